"""PRXTransformer2DModel by C kernels, its batch in parts, one a core: the stock network's numbers up to rounding."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from diffusers.models import PRXTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_prx as stock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd_mini.cpu import prx
from sd_mini.cpu.kernels import SOURCE, Kernels, compiled, compiler
from sd_mini.cpu.threads import cores, in_threads

_MIN_SAMPLES = 8  # a thread: with fewer, Python's overhead is larger than the gain of a second core
_MAX_TOKENS = 192  # of picture and prompt: beyond, diffusers' attention is faster and keeps no attention weights
_Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # latents, timestep, prompt, mask, end
_STOCK_MODULES = {
    PRXTransformer2DModel, stock.PRXBlock, stock.PRXAttention, stock.PRXEmbedND, stock.MLPEmbedder, stock.Modulation,
    stock.FinalLayer, RMSNorm, nn.LayerNorm, nn.Linear, nn.SiLU, nn.GELU, nn.Dropout, nn.ModuleList, nn.Sequential,
}  # fmt: skip


def accelerate(network: nn.Module) -> str | None:
    """Let C kernels compute the network's passes, in place; weights, config and saved files stay the stock ones.

    Returns None, or, where nothing could be changed, the reason in words. Compiles the kernels on the first call for a
    head shape (seconds). Each later call of the network that the kernels do not cover runs as diffusers wrote it: on
    another device or in another dtype, with a part replaced, hooked or compiled, with gradient checkpointing, or where
    gradients of the inputs are asked for.
    """
    reason = _obstacle(network)
    if reason is None and "forward" not in vars(network):
        # a partial, as a function bound to an instance of another class cannot be pickled
        network.forward = partial(_forward, cast(PRXTransformer2DModel, network))
    return reason


def flow_map(
    network: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    prompt: Tensor,
    mask: Tensor | None,
    end: Tensor,
    end_blocks: int,
) -> Tensor | None:
    """The accelerated network's output where its last `end_blocks` blocks and final layer read the times `end` (B,)
    instead of `timestep` (B,); None where the kernels do not cover this call."""
    if "forward" not in vars(network) or torch.compiler.is_compiling() or end.shape != timestep.shape:
        return None
    accelerated = cast(PRXTransformer2DModel, network)
    library = _library(accelerated, latents, timestep, prompt, mask)
    if library is None:
        return None
    return _run(accelerated, library, latents, timestep, prompt, mask, end, end_blocks)


def stock_copy(network: ModelMixin) -> ModelMixin:
    """A copy of the network as diffusers itself would load it: the same weights and config, not accelerated."""
    plain = type(network)(**{name: value for name, value in network.config.items() if not name.startswith("_")})
    plain.load_state_dict(network.state_dict())
    return plain.to(network.device)


def _obstacle(network: nn.Module) -> str | None:
    if type(network) is not PRXTransformer2DModel:
        return f"there are CPU kernels for PRXTransformer2DModel alone, and this is {type(network).__name__}"
    config: Any = network.config
    head_dim = config.hidden_size // config.num_heads
    if head_dim % 16:
        return f"its attention heads are {head_dim} wide; the CPU kernels expect a multiple of 16"
    if config.get("bottleneck_size") is not None or config.get("resolution_embeds"):
        return "the CPU kernels do not cover bottleneck_size and resolution_embeds"
    if network.device.type != "cpu" or network.dtype != torch.float32:
        return f"it is on {network.device} in {network.dtype}; the kernels are for float32 on a CPU"
    if not SOURCE.is_file():
        return "this copy of sd_mini has no C source of the kernels; install the package"
    if compiler() is None:
        return "there is no C compiler; install one (apt-get install gcc), or name it in the environment variable CC"
    if compiled(config.num_heads, head_dim) is None:
        return "the C compiler failed"
    return None


def _forward(
    network: PRXTransformer2DModel,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> tuple[Tensor, ...] | Transformer2DModelOutput:
    """PRXTransformer2DModel.forward, by the kernels where they cover this call."""
    inputs = hidden_states, timestep, encoder_hidden_states, attention_mask
    library = None if torch.compiler.is_compiling() else _library(network, *inputs)
    if library is None:
        return type(network).forward(network, *inputs, attention_kwargs, return_dict)
    output = _run(network, library, *inputs)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _library(
    network: PRXTransformer2DModel, latents: Tensor, timestep: Tensor, prompt: Tensor, mask: Tensor | None
) -> ctypes.CDLL | None:
    """The kernels for this call; None where network or inputs are not what they cover."""
    config: Any = network.config
    is_cast = torch.is_autocast_enabled("cpu")
    tokens = math.prod(latents.shape[-2:]) // config.patch_size**2 + prompt.shape[1]
    is_covered = (
        all(x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad for x in (latents, prompt))
        and timestep.ndim == 1
        and len(timestep) == len(latents) == len(prompt)
        and tokens <= _MAX_TOKENS
        and (not is_cast or torch.get_autocast_dtype("cpu") == torch.bfloat16)
        and _is_unchanged(network)
    )
    return compiled(config.num_heads, config.hidden_size // config.num_heads, is_cast) if is_covered else None


def _is_unchanged(network: PRXTransformer2DModel) -> bool:
    """Whether the network still consists of stock modules and float32 weights on the CPU, and nothing else runs in its
    passes: hooks (of a reader of hidden states, of Accelerate, of FSDP), compiled blocks, checkpointing, adapters."""
    return (
        not network.gradient_checkpointing
        and all(_is_stock(module, module is network) for module in network.modules())
        and all(type(p) in (nn.Parameter, Tensor) for p in network.parameters())
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in network.parameters())
    )


def _is_stock(module: nn.Module, is_root: bool) -> bool:
    if type(module) is stock.PRXAttention and type(module.processor) is not stock.PRXAttnProcessor2_0:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    is_replaced = "forward" in vars(module) and not is_root  # as by Accelerate's hooks
    return type(module) in _STOCK_MODULES and not (hooks or is_replaced or module._compiled_call_impl)


def _run(
    network: PRXTransformer2DModel,
    library: ctypes.CDLL,
    latents: Tensor,
    timestep: Tensor,
    prompt: Tensor,
    mask: Tensor | None,
    end: Tensor | None = None,
    end_blocks: int = 0,
) -> Tensor:
    config: Any = network.config
    half, needs_grad = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
    ids = stock.get_image_ids(1, *latents.shape[-2:], config.patch_size, latents.device)
    # the first column of each 2 x 2 rotation is (cos, sin), the same for every sample: (L, head_dim / 2) complex
    rotation = torch.view_as_complex(network.pe_embedder(ids)[0, 0, ..., 0].contiguous())

    def run_part(
        w: prx.Weights, latents: Tensor, timestep: Tensor, prompt: Tensor, mask: Tensor | None, end: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], prx.Weights] | None]:
        kernels = Kernels(library, half, config.num_heads, rotation, mask)
        return prx.forward(w, config, kernels, latents, timestep, prompt, mask, needs_grad, end, end_blocks)

    inputs = latents, timestep, prompt, None if mask is None else mask.bool(), end
    names, weights = zip(*network.named_parameters(), strict=True)
    with torch.autocast("cpu", enabled=False):
        if needs_grad:
            output = _Fused.apply(run_part, names, inputs, *weights)
        else:
            output = torch.cat([part for part, _ in _run_parts(run_part, names, inputs, weights)])
    return output.bfloat16() if half else output


class _Fused(torch.autograd.Function):
    """The whole network as one node of autograd, whose differentiable inputs are the weights."""

    @staticmethod
    def forward(ctx: Any, run_part: Callable, names: tuple[str, ...], inputs: _Inputs, *weights: Tensor) -> Tensor:
        outputs, backs = zip(*_run_parts(run_part, names, inputs, weights), strict=True)
        ctx.names, ctx.backs, ctx.sizes = names, backs, [len(part) for part in outputs]
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        backs, ctx.backs = ctx.backs, None
        if backs is None:
            raise RuntimeError("accelerated PRX: a second backward pass through one forward pass is not supported")
        parts = zip(backs, gradient.split(ctx.sizes), strict=True)
        grads = in_threads([partial(back, part) for back, part in parts])
        total, *others = ([by_name[name] for name in ctx.names] for by_name in grads)

        def add(start: int) -> None:
            for other in others:
                torch._foreach_add_(total[start :: len(grads)], other[start :: len(grads)])

        # the sum over parts, each thread for every len(grads)-th weight
        in_threads([partial(add, start) for start in range(len(grads))])
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *(g if want else None for g, want in zip(total, wanted, strict=True))


def _run_parts(
    run_part: Callable, names: Sequence[str], inputs: _Inputs, weights: Sequence[Tensor]
) -> list[tuple[Tensor, Callable]]:
    """The forward pass, with the batch in as many parts as there are cores: outputs and backward functions."""
    w = dict(zip(names, (p.detach().contiguous() for p in weights), strict=True))
    count = cores() if len(inputs[0]) >= _MIN_SAMPLES * cores() else 1
    pieces = [[None] * count if x is None else x.contiguous().tensor_split(count) for x in inputs]
    return in_threads([partial(run_part, w, *part) for part in zip(*pieces, strict=True)])
