"""Faster equals of stock networks: the same weights, the same numbers up to rounding, fewer passes over memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin, PRXTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_prx as prx
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd_mini.cpu import prx as written
from sd_mini.cpu.native import NativeBetween, library
from sd_mini.cpu.threads import cores, shared
from sd_mini.cpu.torch_twin import TorchBetween

_ROWS = 8  # samples a thread takes at least: with fewer, Python is slower than the cores
_STOCK = {
    PRXTransformer2DModel, prx.PRXBlock, prx.PRXAttention, prx.PRXEmbedND, prx.MLPEmbedder, prx.Modulation,
    prx.FinalLayer, RMSNorm, nn.LayerNorm, nn.Linear, nn.SiLU, nn.GELU, nn.Dropout, nn.ModuleList, nn.Sequential,
}  # fmt: skip


def speed_up(network: ModelMixin) -> ModelMixin:
    """Replace what has a faster equal. The weights and the saved config stay the stock ones. A compiled network is left
    alone."""
    if isinstance(network, PRXTransformer2DModel) and "forward" not in vars(network):
        for block in network.blocks:
            block.attention.processor = FusedPRXAttention()
        # a partial, as a bound function that is no method of its class cannot be pickled
        network.forward, network.read = partial(_forward, network), None
    return network


@contextmanager
def states_of(network: ModelMixin, layer: nn.Module) -> Iterator[list[Tensor]]:
    """Within, the list takes what `layer` of the network gives each time that the network is called."""
    found: list[Tensor] = []
    blocks = list(network.blocks) if isinstance(network, PRXTransformer2DModel) and "forward" in vars(network) else []
    if layer in blocks:
        network.read = blocks.index(layer), found  # which keeps it written out, as a hook would not
        try:
            yield found
        finally:
            network.read = None
        return
    with _kept(layer, found):
        yield found


@contextmanager
def _kept(layer: nn.Module, found: list[Tensor]) -> Iterator[None]:
    def keep(module: nn.Module, given: Any, made: Any) -> None:
        found.append(made[0] if isinstance(made, tuple) else made)

    handle = layer.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def stock(network: ModelMixin) -> ModelMixin:
    """A copy with the same weights and config in which nothing is replaced: what diffusers itself would have loaded."""
    made = type(network)(**{name: value for name, value in network.config.items() if not name.startswith("_")})
    made.load_state_dict(network.state_dict())
    return made.to(network.device)


def _forward(
    network: PRXTransformer2DModel,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> tuple[Tensor, ...] | Transformer2DModelOutput:
    """PRXTransformer2DModel.forward, written out where network and inputs are what that was written for: float32 on a
    CPU, or that under autocast to bfloat16; no part replaced, hooked or compiled."""
    given = hidden_states, timestep, encoder_hidden_states, attention_mask
    if torch.compiler.is_compiling() or not _fits(network, given):
        reading = nullcontext() if network.read is None else _kept(network.blocks[network.read[0]], network.read[1])
        with reading:
            return type(network).forward(network, *given, attention_kwargs, return_dict)
    output, *states = _run(network, *given)
    if states:
        network.read[1].extend(states)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _fits(network: PRXTransformer2DModel, given: Iterable[Tensor | None]) -> bool:
    latents, timestep, prompt, _ = given
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad for x in (latents, prompt))
    samples = timestep.ndim == 1 and len(timestep) == len(latents) == len(prompt)
    return plain and samples and is_written(network) and (not _is_cast() or _has_half(network, latents, prompt))


def _is_cast() -> bool:
    return torch.is_autocast_enabled("cpu")


def _has_half(network: PRXTransformer2DModel, latents: Tensor, prompt: Tensor) -> bool:
    """Whether what is cast can be written out: to bfloat16, by the code in C alone."""
    return torch.get_autocast_dtype("cpu") == torch.bfloat16 and _code(network, latents, prompt) is not None


def _code(network: PRXTransformer2DModel, latents: Tensor, prompt: Tensor) -> ctypes.CDLL | None:
    config = network.config
    length = math.prod(latents.shape[-2:]) // config.patch_size**2
    return library(config.num_heads, config.hidden_size // config.num_heads, length, prompt.shape[1], _is_cast())


def is_written(network: nn.Module) -> bool:
    """Whether the network runs written out, with its batch shared out over the cores, as long as its inputs allow."""
    return (
        isinstance(network, PRXTransformer2DModel)
        and "forward" in vars(network)
        and not network.gradient_checkpointing
        and network.resolution_embedder is None
        and all(_is_stock(module, module is network) for module in network.modules())
        and all(type(p) in (nn.Parameter, Tensor) for p in network.parameters())
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in network.parameters())
    )


def _is_stock(module: nn.Module, is_root: bool) -> bool:
    changed = not is_root and "forward" in vars(module)  # as Accelerate's hooks replace it
    changed = (
        changed
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._compiled_call_impl
    )
    if type(module) is prx.PRXAttention and type(module.processor) is not FusedPRXAttention:
        return False
    return type(module) in _STOCK and not changed


def _run(
    network: PRXTransformer2DModel, latents: Tensor, t: Tensor, prompt: Tensor, mask: Tensor | None
) -> tuple[Tensor, ...]:
    """The velocity, and the states that are read, where some are."""
    config, read, half = network.config, None if network.read is None else network.read[0], _is_cast()
    own = config.patch_size, config.depth, config.num_heads, config.time_factor, config.time_max_period
    plan = written.Plan(*own, read, half)
    height, width = latents.shape[-2:]
    ids = prx.get_image_ids(1, height, width, config.patch_size, latents.device)
    # the first column of each 2 x 2 rotation is (cos, sin), the same for every sample: (L, 1, d / 2) complex
    turn = torch.view_as_complex(network.pe_embedder(ids)[0, 0, ..., 0].contiguous())[:, None]
    code = _code(network, latents, prompt)
    kind = TorchBetween if code is None else partial(NativeBetween, code, half)
    given = latents, t, prompt, None if mask is None else mask.bool()
    learns = torch.is_grad_enabled()
    call = partial(_part, plan, partial(kind, config.num_heads, turn), learns)
    names, weights = zip(*network.named_parameters(), strict=True)
    with torch.autocast("cpu", enabled=False):
        if learns:
            output, *states = _Written.apply(call, names, given, *weights)
        else:
            output, *states = _joined([outputs for outputs, _ in _parts(call, names, given, weights)])
    return output.bfloat16() if half else output, *states


def _joined(parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))


def _part(
    plan: written.Plan,
    between: Callable[[Tensor | None], written.Between],
    learns: bool,
    w: written.Weights,
    latents: Tensor,
    t: Tensor,
    prompt: Tensor,
    mask: Tensor | None,
) -> tuple[tuple[Tensor, ...], Callable[..., written.Weights] | None]:
    return written.forward(w, plan, between(mask), latents, t, prompt, mask, learns)


class _Written(torch.autograd.Function):
    """The written network as one step of autograd, whose inputs are the weights."""

    @staticmethod
    def forward(
        ctx: Any, call: Callable, names: tuple[str, ...], given: tuple[Tensor | None, ...], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, backs = zip(*_parts(call, names, given, weights), strict=True)
        ctx.names, ctx.backs, ctx.sizes = names, backs, [len(part[0]) for part in outputs]
        return _joined(outputs)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        backs, ctx.backs = ctx.backs, None
        if backs is None:
            raise RuntimeError("the written PRX keeps nothing for a second backward pass through the same forward")
        parts = zip(*(gradient.split(ctx.sizes) for gradient in gradients), strict=True)
        grads = shared([partial(back, *part) for back, part in zip(backs, parts, strict=True)])
        total, *others = ([of[name] for name in ctx.names] for of in grads)

        def add(start: int) -> None:
            for more in others:
                torch._foreach_add_(total[start :: len(grads)], more[start :: len(grads)])

        shared([partial(add, start) for start in range(len(grads))])
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *(g if want else None for g, want in zip(total, wanted, strict=True))


def _parts(
    call: Callable, names: Sequence[str], given: tuple[Tensor | None, ...], weights: Sequence[Tensor]
) -> list[tuple[tuple[Tensor, ...], Callable]]:
    """The forward pass in as many parts of the batch as there are threads to share it: their outputs, and ways back."""
    w = dict(zip(names, (p.detach().contiguous() for p in weights), strict=True))
    threads, n = cores(), len(given[0])
    count = threads if n >= _ROWS * threads else 1
    cut = [[None] * count if x is None else x.contiguous().tensor_split(count) for x in given]
    return shared([partial(call, w, *part) for part in zip(*cut, strict=True)])


class FusedPRXAttention:
    """PRX's attention with the same numbers in fewer passes over memory: rotation as one product, of complex numbers
    on a CPU.

    On two CPU cores a training step of the shapes recipe takes 0.34 s with it and 0.46 s with the stock processor.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor:
        """Picture tokens (B, L, D) attend to prompt tokens (B, T, D), where the mask allows, and to each other."""
        b, length, _ = hidden_states.shape
        heads, dim = attn.heads, attn.head_dim
        q, k, v = attn.img_qkv_proj(hidden_states).view(b, length, 3, heads, dim).permute(2, 0, 3, 1, 4)
        text_k, text_v = attn.txt_kv_proj(encoder_hidden_states).view(b, -1, 2, heads, dim).permute(2, 0, 3, 1, 4)
        # the first column of each 2 x 2 rotation is (cos, sin), the same for every sample: (1, 1, L, dim / 2, 2)
        turn = image_rotary_emb[:1, ..., 0].contiguous()
        q, k = (_rotate(norm(x), turn) for x, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        mask = None
        if attention_mask is not None:
            mask = torch.cat([attention_mask.bool(), attention_mask.new_ones(b, length, dtype=torch.bool)], dim=1)
            mask = mask[:, None, None, :]
        keys, values = torch.cat([attn.norm_added_k(text_k), k], dim=2), torch.cat([text_v, v], dim=2)
        attended = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return attn.to_out[0](attended.transpose(1, 2).reshape(b, length, heads * dim))


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Pairs of the last axis of x (B, H, L, D) turned by `turn`, (cos, sin) of (1, 1, L, D / 2): rotary embedding, Su
    et al. 2021. As complex numbers where that is one pass; a compiler makes one pass of real ones alone."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    return turned.flatten(-2).type_as(x)
