"""PRX written out: the numbers of PRXTransformer2DModel, with their gradient, in few passes over memory.

Each part takes tensors and gives its output and a function `back` from the output's gradient to those of its inputs,
which also puts the weights' gradients into the dict it is given. Rows are picture tokens, samples one after the other.
Names: n samples, L picture and T prompt tokens of each, R of these seen by any (padding is left out), D the width, H
heads of d columns. What lies between the matrix products is either torch's (`fused_torch`) or C (`fused_native`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

Weights = dict[str, Tensor]  # by the names of the stock state dict
Back = Callable[..., tuple[Tensor, ...]]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Plan:
    """What a PRX network's forward pass needs beside its weights."""

    patch: int
    depth: int
    heads: int
    time_factor: float
    max_period: int
    read: int | None = None
    """the block whose output is given beside the velocity"""
    half: bool = False
    """the blocks' products of tokens in bfloat16, summed up in float32, as which all states and updates stay"""


class Between(Protocol):
    """What lies between the matrix products; made for one batch, whose mask and rotations it holds."""

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Back]:
        """A layer norm of (n L, D) without weights of its own, with each sample's `shift` and `scale` (n, D).

        back(dy, dx, dshift, dscale) adds to `dx` and writes the others."""
        ...

    def gated(self, x: Tensor, gate: Tensor, made: Tensor) -> tuple[Tensor, Back]:
        """x (n L, D) + gate (n, D) * made (n L, D). back(dy, dgate) writes `dgate` and gives the gradient of `made`;
        that of x is dy itself."""
        ...

    def activated(self, inner: Tensor, up: Tensor) -> tuple[Tensor, Back]:
        """gelu(inner) * up, (n L, hidden) each. back(dy) gives the gradients of `inner` and `up`."""
        ...

    def attended(self, w: Weights, name: str, qkv: Tensor, kv: Tensor) -> tuple[Tensor, Back]:
        """qkv (n L, 3 D), kv (R, 2 D) => (n L, D): every picture token attends to its prompt and its picture.

        back(grads, dy) gives the gradients of qkv and kv."""
        ...


def forward(
    w: Weights,
    plan: Plan,
    between: Between,
    latents: Tensor,
    timesteps: Tensor,
    prompt: Tensor,
    mask: Tensor | None,
    learns: bool = True,
) -> tuple[tuple[Tensor, ...], Callable[..., Weights] | None]:
    """latents (n, C, h, w), timesteps (n,), prompt (n, T, E), mask (n, T) bool => velocity (n, C, h, w), and with
    `plan.read` what that block gave (n, L, D); their gradients => the weights'.

    Without `learns` there is no way back, and nothing is kept for it.
    """
    w = _halved(w) if plan.half else w
    x, in_back = _linear(w, "img_in", _patches(latents, plan.patch))
    text, text_back = _linear(w, "txt_in", prompt.flatten(0, 1) if mask is None else prompt[mask])
    time, time_back = _time(w, plan, timesteps)
    backs, states = [], []
    for number in range(plan.depth):
        x, back = _block(w, f"blocks.{number}", between, x, text, time)
        if number == plan.read:
            states.append(x.view(len(latents), -1, x.shape[1]))
        if learns:
            backs.append(back)
        del back
    out, last_back = _last(w, between, x, time)
    outputs = _picture(out, plan.patch, latents.shape), *states
    if not learns:
        return outputs, None

    def back(gradient: Tensor, of_states: Tensor | None = None) -> Weights:
        grads: Weights = {}
        dx, dtime = last_back(grads, _patches(gradient, plan.patch))
        dtext = torch.zeros_like(text)
        for number, block in reversed(list(enumerate(backs))):
            if number == plan.read and of_states is not None:
                dx += of_states.reshape(dx.shape)
            dx = block(grads, dx, dtext, dtime)
        time_back(grads, dtime)
        in_back(grads, dx, to_input=False)
        text_back(grads, dtext, to_input=False)
        return grads

    return outputs, back


def _halved(w: Weights) -> Weights:
    """What multiplies tokens within blocks is nearly all of the work; time, first and last layer stay as they are."""
    many = (name for name, x in w.items() if x.ndim == 2 and name.startswith("blocks.") and ".modulation." not in name)
    return w | {name: w[name].bfloat16() for name in many}


def _patches(picture: Tensor, p: int) -> Tensor:
    """(n, C, h, w) => (n L, C p p)."""
    n, c, height, width = picture.shape
    cut = picture.reshape(n, c, height // p, p, width // p, p)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, c * p * p)


def _picture(rows: Tensor, p: int, shape: torch.Size) -> Tensor:
    """(n L, C p p) => (n, C, h, w), what `_patches` undoes."""
    n, c, height, width = shape
    return rows.view(n, height // p, width // p, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(shape)


def _linear(w: Weights, name: str, x: Tensor) -> tuple[Tensor, Back]:
    """A linear layer on (rows, in), in the dtype of its weights."""
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


def _time(w: Weights, plan: Plan, timesteps: Tensor) -> tuple[Tensor, Back]:
    """Timesteps (n,) => (n, D), what every modulation is a linear layer of."""
    waves = get_timestep_embedding(
        timesteps,
        256,
        flip_sin_to_cos=True,
        downscale_freq_shift=0.0,
        scale=plan.time_factor,
        max_period=plan.max_period,
    )
    inner, in_back = _linear(w, "time_in.in_layer", waves)
    vector, out_back = _linear(w, "time_in.out_layer", torch.nn.functional.silu(inner))

    def back(grads: Weights, dtime: Tensor) -> None:
        dinner = out_back(grads, _aten.silu_backward(dtime, vector))
        in_back(grads, _aten.silu_backward(dinner, inner), to_input=False)

    return torch.nn.functional.silu(vector), back


def _block(w: Weights, name: str, between: Between, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Back]:
    """A transformer block: x + gate * attention, then the same with the gated MLP."""
    modulation, modulation_back = _linear(w, f"{name}.modulation.lin", time)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
    y, norm_a = between.modulated(x, shift_a, scale_a)
    attended, attention_back = _attention(w, f"{name}.attention", between, y, text)
    x, add_a = between.gated(x, gate_a, attended)
    y, norm_m = between.modulated(x, shift_m, scale_m)
    made, mlp_back = _mlp(w, name, between, y)
    x, add_m = between.gated(x, gate_m, made)

    def back(grads: Weights, dx: Tensor, dtext: Tensor, dtime: Tensor) -> Tensor:
        dmodulation = torch.empty_like(modulation)
        dshift_a, dscale_a, dgate_a, dshift_m, dscale_m, dgate_m = dmodulation.chunk(6, dim=1)
        norm_m(mlp_back(grads, add_m(dx, dgate_m)), dx, dshift_m, dscale_m)
        norm_a(attention_back(grads, add_a(dx, dgate_a), dtext), dx, dshift_a, dscale_a)
        dtime += modulation_back(grads, dmodulation)
        return dx

    return x, back


def _mlp(w: Weights, name: str, between: Between, x: Tensor) -> tuple[Tensor, Back]:
    """down(gelu(gate x) * up x)."""
    inner, gate_back = _linear(w, f"{name}.gate_proj", x)
    up, up_back = _linear(w, f"{name}.up_proj", x)
    hidden, hidden_back = between.activated(inner, up)
    y, down_back = _linear(w, f"{name}.down_proj", hidden)

    def back(grads: Weights, dy: Tensor) -> Tensor:
        dinner, dup = hidden_back(down_back(grads, dy))
        dx = gate_back(grads, dinner)
        up_back(grads, dup, to_input=False)
        return dx.addmm_(dup, w[f"{name}.up_proj.weight"])

    return y, back


def _attention(w: Weights, name: str, between: Between, x: Tensor, text: Tensor) -> tuple[Tensor, Back]:
    """Picture tokens x (n L, D) attend to prompt tokens (R, D) and to each other."""
    qkv, qkv_back = _linear(w, f"{name}.img_qkv_proj", x)
    kv, kv_back = _linear(w, f"{name}.txt_kv_proj", text)
    attended, attended_back = between.attended(w, name, qkv, kv)
    y, out_back = _linear(w, f"{name}.to_out.0", attended)

    def back(grads: Weights, dy: Tensor, dtext: Tensor) -> Tensor:
        dqkv, dkv = attended_back(grads, out_back(grads, dy))
        dtext += kv_back(grads, dkv)
        return qkv_back(grads, dqkv)

    return y, back


def _last(w: Weights, between: Between, x: Tensor, time: Tensor) -> tuple[Tensor, Back]:
    modulation, modulation_back = _linear(w, "final_layer.adaLN_modulation.1", time)
    y, norm_back = between.modulated(x, *modulation.chunk(2, dim=1))
    out, out_back = _linear(w, "final_layer.linear", y)

    def back(grads: Weights, dout: Tensor) -> tuple[Tensor, Tensor]:
        dx, dmodulation = torch.zeros_like(x), torch.empty_like(modulation)
        norm_back(out_back(grads, dout), dx, *dmodulation.chunk(2, dim=1))
        return dx, modulation_back(grads, dmodulation)

    return out, back
