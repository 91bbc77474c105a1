"""PRXTransformer2DModel's forward and backward pass by hand: the same numbers in fewer passes over memory.

Each function returns its output and its backward pass, a function of the output's gradient that returns the gradients
of the inputs and puts those of the weights into the dict `grads`. Shapes: n samples, L picture tokens and T prompt
tokens a sample, R prompt tokens in all without padding, width D. Tokens of all samples are rows of one matrix.
Reference: diffusers/models/transformers/transformer_prx.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor
from torch.nn.functional import silu

from sd_mini.cpu.kernels import Back, Kernels, Weights

_silu_backward = torch.ops.aten.silu_backward


def forward(
    w: Weights,
    config: Mapping[str, Any],
    kernels: Kernels,
    latents: Tensor,
    timesteps: Tensor,
    prompt: Tensor,
    mask: Tensor | None,
    needs_grad: bool = True,
    ends: Tensor | None = None,
    end_blocks: int = 0,
) -> tuple[Tensor, Callable[[Tensor], Weights] | None]:
    """latents (n, C, h, w), timesteps (n,), prompt (n, T, E), mask (n, T) bool => the network's output (n, C, h, w),
    and with `needs_grad` the function from its gradient to those of all weights, to be called once.

    With `ends` (n,) the last `end_blocks` blocks and the final layer read these times instead (Decoupled MeanFlow).
    With bfloat16 kernels the blocks' products of tokens are bfloat16; the residual stream, time embedding, first and
    last layer stay float32.
    """
    if kernels.dtype == torch.bfloat16:
        w = _cast_block_weights(w)
    patch = config["patch_size"]
    x, in_back = _linear(w, "img_in", _patchify(latents, patch))
    # prompt tokens of padding are left out of all products
    text, text_back = _linear(w, "txt_in", prompt.flatten(0, 1) if mask is None else prompt[mask])
    time, time_back = _time_embedding(w, config, timesteps)
    end, end_back = (time, None) if ends is None else _time_embedding(w, config, ends)
    first_at_end = config["depth"] - end_blocks
    block_backs = []
    for number in range(config["depth"]):
        at = time if number < first_at_end else end
        x, block_back = _block(w, f"blocks.{number}", kernels, x, text, at)
        if needs_grad:
            block_backs.append(block_back)
        del block_back  # without gradients its activations are freed here
    out, last_back = _final_layer(w, kernels, x, end)
    output = _unpatchify(out, patch, latents.shape)
    if not needs_grad:
        return output, None

    def back(doutput: Tensor) -> Weights:
        grads: Weights = {}
        dx, dend = last_back(grads, _patchify(doutput, patch))
        dtime = dend if end_back is None else torch.zeros_like(dend)
        dtext = torch.zeros_like(text)
        while block_backs:
            number = len(block_backs) - 1
            dx = block_backs.pop()(grads, dx, dtext, dtime if number < first_at_end else dend)
        time_back(grads, dtime)
        if end_back is not None:
            end_back(of_ends := {}, dend)
            for name, grad in of_ends.items():
                grads[name] += grad
        in_back(grads, dx, to_input=False)
        text_back(grads, dtext, to_input=False)
        return grads

    return output, back


def _cast_block_weights(w: Weights) -> Weights:
    """The matrices that multiply tokens in bfloat16: nearly all of the work. Modulation has one row a sample."""
    names = (name for name, x in w.items() if x.ndim == 2 and name.startswith("blocks.") and ".modulation." not in name)
    return w | {name: w[name].bfloat16() for name in names}


def _patchify(latents: Tensor, p: int) -> Tensor:
    """(n, C, h, w) => (n L, C p p), `img2seq`."""
    n, c, height, width = latents.shape
    patches = latents.reshape(n, c, height // p, p, width // p, p)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, c * p * p)


def _unpatchify(rows: Tensor, p: int, shape: torch.Size) -> Tensor:
    """(n L, C p p) => (n, C, h, w), `seq2img`."""
    n, c, height, width = shape
    return rows.view(n, height // p, width // p, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(shape)


def _linear(w: Weights, name: str, x: Tensor) -> tuple[Tensor, Back]:
    """nn.Linear on (rows, in), in the dtype of its weights."""
    weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    x = x.to(weight.dtype)
    y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())

    def back(grads: Weights, dy: Tensor, to_input: bool = True) -> Tensor | None:
        dy = dy.to(weight.dtype)
        grads[f"{name}.weight"] = (dy.t() @ x).float()
        if bias is not None:
            grads[f"{name}.bias"] = dy.sum(0)
        return dy @ weight if to_input else None

    return y, back


def _time_embedding(w: Weights, config: Mapping[str, Any], timesteps: Tensor) -> tuple[Tensor, Back]:
    """Timesteps (n,) => (n, D), `_compute_timestep_embedding` and the SiLU before every modulation's linear layer."""
    scales = {"scale": config["time_factor"], "max_period": config["time_max_period"]}
    waves = get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=0.0, **scales)
    hidden, in_back = _linear(w, "time_in.in_layer", waves)
    vector, out_back = _linear(w, "time_in.out_layer", silu(hidden))

    def back(grads: Weights, dtime: Tensor) -> None:
        dhidden = out_back(grads, _silu_backward(dtime, vector))
        in_back(grads, _silu_backward(dhidden, hidden), to_input=False)

    return silu(vector), back


def _block(w: Weights, name: str, kernels: Kernels, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Back]:
    """`PRXBlock`: x + gate * attention(modulated x), then the same with the gated MLP."""
    modulation, modulation_back = _linear(w, f"{name}.modulation.lin", time)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
    y, norm_a_back = kernels.modulate(x, shift_a, scale_a)
    attended, attention_back = _attention(w, f"{name}.attention", kernels, y, text)
    x, add_a_back = kernels.add_gated(x, gate_a, attended)
    y, norm_m_back = kernels.modulate(x, shift_m, scale_m)
    mlp, mlp_back = _mlp(w, name, kernels, y)
    x, add_m_back = kernels.add_gated(x, gate_m, mlp)

    def back(grads: Weights, dx: Tensor, dtext: Tensor, dtime: Tensor) -> Tensor:
        """Updates dx in place (the residual path), adds to dtext and dtime; returns dx."""
        dmodulation = torch.empty_like(modulation)
        dshift_a, dscale_a, dgate_a, dshift_m, dscale_m, dgate_m = dmodulation.chunk(6, dim=1)
        norm_m_back(mlp_back(grads, add_m_back(dx, dgate_m)), dx, dshift_m, dscale_m)
        norm_a_back(attention_back(grads, add_a_back(dx, dgate_a), dtext), dx, dshift_a, dscale_a)
        dtime += modulation_back(grads, dmodulation)
        return dx

    return x, back


def _mlp(w: Weights, name: str, kernels: Kernels, x: Tensor) -> tuple[Tensor, Back]:
    """down_proj(gelu(gate_proj(x)) * up_proj(x))."""
    gate, gate_back = _linear(w, f"{name}.gate_proj", x)
    up, up_back = _linear(w, f"{name}.up_proj", x)
    hidden, hidden_back = kernels.gelu_times(gate, up)
    y, down_back = _linear(w, f"{name}.down_proj", hidden)

    def back(grads: Weights, dy: Tensor) -> Tensor:
        dgate, dup = hidden_back(down_back(grads, dy))
        dx = gate_back(grads, dgate)
        up_back(grads, dup, to_input=False)
        return dx.addmm_(dup, w[f"{name}.up_proj.weight"])

    return y, back


def _attention(w: Weights, name: str, kernels: Kernels, x: Tensor, text: Tensor) -> tuple[Tensor, Back]:
    """`PRXAttnProcessor2_0`: picture tokens x (n L, D) attend to prompt tokens (R, D) and to each other."""
    qkv, qkv_back = _linear(w, f"{name}.img_qkv_proj", x)
    kv, kv_back = _linear(w, f"{name}.txt_kv_proj", text)
    attended, attended_back = kernels.attend(w, name, qkv, kv)
    y, out_back = _linear(w, f"{name}.to_out.0", attended)

    def back(grads: Weights, dy: Tensor, dtext: Tensor) -> Tensor:
        dqkv, dkv = attended_back(grads, out_back(grads, dy))
        dtext += kv_back(grads, dkv)
        return qkv_back(grads, dqkv)

    return y, back


def _final_layer(w: Weights, kernels: Kernels, x: Tensor, time: Tensor) -> tuple[Tensor, Back]:
    """`FinalLayer`: modulated norm, then a linear layer to patches (n L, C p p)."""
    modulation, modulation_back = _linear(w, "final_layer.adaLN_modulation.1", time)
    y, norm_back = kernels.modulate(x, *modulation.chunk(2, dim=1))
    out, out_back = _linear(w, "final_layer.linear", y)

    def back(grads: Weights, dout: Tensor) -> tuple[Tensor, Tensor]:
        dx, dmodulation = torch.zeros_like(x), torch.empty_like(modulation)
        norm_back(out_back(grads, dout), dx, *dmodulation.chunk(2, dim=1))
        return dx, modulation_back(grads, dmodulation)

    return out, back
