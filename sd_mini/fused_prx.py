"""PRX written out: the numbers of PRXTransformer2DModel, with their gradient, in few passes over memory.

Each part takes tensors and gives its output and a function `back` from the output's gradient to those of its inputs,
which also puts the weights' gradients into the dict it is given. Rows are picture tokens, samples one after the other.
Names: n samples, L picture and T prompt tokens of each, D the width, H heads of d columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

Weights = dict[str, Tensor]  # by the names of the stock state dict
Back = Callable[..., tuple[Tensor, ...]]

_EPS = 1e-6  # of every norm of PRX
_aten = torch.ops.aten


@dataclass(frozen=True)
class Plan:
    """What a PRX network's forward pass needs beside its weights."""

    patch: int
    depth: int
    heads: int
    time_factor: float
    max_period: int


def forward(
    w: Weights, plan: Plan, latents: Tensor, timesteps: Tensor, prompt: Tensor, bias: Tensor | None, turn: Tensor
) -> tuple[Tensor, Callable[[Tensor], Weights]]:
    """latents (n, C, h, w), timesteps (n,), prompt (n, T, E) => velocity (n, C, h, w); its gradient => the weights'.

    `bias` (n, 1, 1, T + L) is added to the scores, `turn` (L, 1, d / 2) are the rotations as complex numbers.
    """
    n = len(latents)
    x, in_back = _linear(w, "img_in", _patches(latents, plan.patch))
    text, text_back = _linear(w, "txt_in", prompt.flatten(0, 1))
    time, time_back = _time(w, plan, timesteps)
    if bias is not None:
        bias = bias.expand(-1, plan.heads, -1, -1).reshape(n * plan.heads, 1, -1)
    backs = []
    for number in range(plan.depth):
        x, back = _block(w, f"blocks.{number}", x, text, time, plan.heads, bias, turn)
        backs.append(back)
    out, last_back = _last(w, x, time)

    def back(gradient: Tensor) -> Weights:
        grads: Weights = {}
        dx, dtime = last_back(grads, _patches(gradient, plan.patch))
        dtext = torch.zeros_like(text)
        for block in reversed(backs):
            dx = block(grads, dx, dtext, dtime)
        time_back(grads, dtime)
        in_back(grads, dx, to_input=False)
        text_back(grads, dtext, to_input=False)
        return grads

    return _picture(out, plan.patch, latents.shape), back


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
    """A linear layer on (rows, in)."""
    weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())

    def back(grads: Weights, dy: Tensor, to_input: bool = True) -> Tensor | None:
        grads[f"{name}.weight"] = dy.t() @ x
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


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Back]:
    """A layer norm of (n L, D) without weights of its own, with each sample's `shift` and `scale` (n, D)."""
    n, width = shift.shape
    normed, mean, spread = torch.native_layer_norm(x, (width,), None, None, _EPS)
    normed, gain = normed.view(n, -1, width), (1 + scale)[:, None]
    y = torch.addcmul(shift[:, None], normed, gain)

    def back(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dy = dy.view(n, -1, width)
        dshift, dscale = dy.sum(1), (dy * normed).sum(1)
        given = (dy * gain).view_as(x), x, (width,), mean, spread, None, None, (True, False, False)
        return _aten.native_layer_norm_backward(*given)[0], dshift, dscale

    return y.view_as(x), back


def _block(
    w: Weights, name: str, x: Tensor, text: Tensor, time: Tensor, heads: int, bias: Tensor | None, turn: Tensor
) -> tuple[Tensor, Back]:
    """A transformer block: x + gate * attention, then the same with the gated MLP."""
    n = len(time)
    modulation, modulation_back = _linear(w, f"{name}.modulation.lin", time)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
    y, norm_a = _modulated(x, shift_a, scale_a)
    attended, attention_back = _attention(w, f"{name}.attention", y, text, n, heads, bias, turn)
    x, add_a = _gated(x, gate_a, attended)
    y, norm_m = _modulated(x, shift_m, scale_m)
    made, mlp_back = _mlp(w, name, y)
    x, add_m = _gated(x, gate_m, made)

    def back(grads: Weights, dx: Tensor, dtext: Tensor, dtime: Tensor) -> Tensor:
        dmodulation = torch.empty_like(modulation)
        parts = dmodulation.chunk(6, dim=1)
        dmade, dgate = add_m(dx)
        parts[5].copy_(dgate)
        for part, norm, inner, add in ((3, norm_m, mlp_back, add_a), (0, norm_a, attention_back, None)):
            dy, dshift, dscale = norm(inner(grads, dmade, dtext))
            parts[part].copy_(dshift)
            parts[part + 1].copy_(dscale)
            dx = dy.add_(dx)
            if add is not None:
                dmade, dgate = add(dx)
                parts[2].copy_(dgate)
        dtime += modulation_back(grads, dmodulation)
        return dx

    return x, back


def _gated(x: Tensor, gate: Tensor, made: Tensor) -> tuple[Tensor, Back]:
    """x (n L, D) + gate (n, D) * made (n L, D)."""
    n, width = gate.shape
    gate, made = gate[:, None], made.view(n, -1, width)
    y = torch.addcmul(x.view(n, -1, width), gate, made)

    def back(dy: Tensor) -> tuple[Tensor, Tensor]:
        """=> the gradients of `made` and `gate`; that of x is dy itself."""
        dy = dy.view(n, -1, width)
        return (dy * gate).view_as(x), (dy * made).sum(1)

    return y.view_as(x), back


def _mlp(w: Weights, name: str, x: Tensor) -> tuple[Tensor, Back]:
    """down(gelu(gate x) * up x)."""
    inner, gate_back = _linear(w, f"{name}.gate_proj", x)
    up, up_back = _linear(w, f"{name}.up_proj", x)
    active, slope = _gelu(inner)
    y, down_back = _linear(w, f"{name}.down_proj", active * up)

    def back(grads: Weights, dy: Tensor, dtext: Tensor) -> Tensor:
        dhidden = down_back(grads, dy)
        dup = dhidden * active
        dx = gate_back(grads, dhidden.mul_(up).mul_(slope()))
        up_back(grads, dup, to_input=False)
        return dx.addmm_(dup, w[f"{name}.up_proj.weight"])

    return y, back


# GELU(x) = x / 2 (1 + tanh(c (x + 0.044715 x^3))), c = sqrt(2 / pi), and (1 + tanh(z)) / 2 = sigmoid(2 z), which takes
# torch a fifth of the time of tanh on a CPU
_LINEAR, _CUBIC = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715


def _gelu(x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """GELU by its tanh formula, and its derivative."""
    share = (x * x).mul_(_CUBIC).add_(_LINEAR).mul_(x).sigmoid_()
    y = x * share

    def slope() -> Tensor:
        steepness = (x * x).mul_(3 * _CUBIC).add_(_LINEAR)
        return torch.addcmul(share, _aten.sigmoid_backward(x, share), steepness)

    return y, slope


def _attention(
    w: Weights, name: str, x: Tensor, text: Tensor, n: int, heads: int, bias: Tensor | None, turn: Tensor
) -> tuple[Tensor, Back]:
    """Picture tokens x (n L, D) attend to prompt tokens (n T, D) and to each other."""
    width = x.shape[1]
    d = width // heads
    qkv, qkv_back = _linear(w, f"{name}.img_qkv_proj", x)
    kv, kv_back = _linear(w, f"{name}.txt_kv_proj", text)
    qkv, kv = qkv.view(n, -1, 3, heads, d), kv.view(n, -1, 2, heads, d)
    length, words = qkv.shape[1], kv.shape[1]
    queries, (keys, values) = x.new_empty(n, heads, length, d), x.new_empty(2, n, heads, words + length, d)
    names = [f"{name}.norm_{which}.weight" for which in ("q", "k", "added_k")]
    turn_q = turn * d**-0.5  # so that the scores need no scaling
    q_back = _normed(w, names[0], qkv[:, :, 0], turn_q, queries)
    k_back = _normed(w, names[1], qkv[:, :, 1], turn, keys[:, :, words:])
    text_k_back = _normed(w, names[2], kv[:, :, 0], None, keys[:, :, :words])
    values[:, :, words:].copy_(qkv[:, :, 2].transpose(1, 2))
    values[:, :, :words].copy_(kv[:, :, 1].transpose(1, 2))
    queries, keys, values = queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
    scores = queries @ keys.mT if bias is None else torch.baddbmm(bias, queries, keys.mT)
    weights = scores.softmax(-1)
    attended = (weights @ values).view(n, heads, length, d).transpose(1, 2).reshape(n * length, width)
    y, out_back = _linear(w, f"{name}.to_out.0", attended)

    def back(grads: Weights, dy: Tensor, dtext: Tensor) -> Tensor:
        dattended = out_back(grads, dy).view(n, length, heads, d).transpose(1, 2).reshape(-1, length, d)
        dvalues = (weights.mT @ dattended).view(n, heads, -1, d)
        dscores = _aten._softmax_backward_data(dattended @ values.mT, weights, -1, weights.dtype)
        dqueries = (dscores @ keys).view(n, heads, -1, d)
        dkeys = (dscores.mT @ queries).view(n, heads, -1, d)
        dqkv, dkv = torch.empty_like(qkv), torch.empty_like(kv)
        q_back(grads, dqueries, dqkv[:, :, 0])
        k_back(grads, dkeys[:, :, words:], dqkv[:, :, 1])
        text_k_back(grads, dkeys[:, :, :words], dkv[:, :, 0])
        dqkv[:, :, 2].copy_(dvalues[:, :, words:].transpose(1, 2))
        dkv[:, :, 1].copy_(dvalues[:, :, :words].transpose(1, 2))
        dkv = dkv.view(-1, 2 * width)
        kv_back(grads, dkv, to_input=False)
        dtext.addmm_(dkv, w[f"{name}.txt_kv_proj.weight"])
        return qkv_back(grads, dqkv.view(-1, 3 * width))

    return y, back


def _normed(w: Weights, name: str, x: Tensor, turn: Tensor | None, out: Tensor) -> Back:
    """x (n, length, H, d) to root mean square 1, times its weight (d,), rotated => `out` (n, H, length, d)."""
    weight, d = w[name], x.shape[-1]
    factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(d).add_(_EPS).rsqrt_()
    unit = x * factor
    if turn is None:
        torch.mul(unit, weight, out=out.transpose(1, 2))
    else:
        torch.mul(_complex(unit * weight), turn, out=_complex(out.transpose(1, 2)))

    def back(grads: Weights, dout: Tensor, dx: Tensor) -> None:
        """`dx` takes the gradient of x."""
        dout = dout.transpose(1, 2)
        if turn is not None:
            dout = torch.view_as_real(_complex(dout) * turn.conj()).flatten(-2)
        product = dout * unit
        grads[name] = product.sum((0, 1, 2))
        along = (product @ weight).div_(-d)[..., None]
        torch.mul((dout * weight).addcmul_(unit, along), factor, out=dx)

    return back


def _complex(x: Tensor) -> Tensor:
    """(..., d) => (..., d / 2), neighbours as one complex number."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _last(w: Weights, x: Tensor, time: Tensor) -> tuple[Tensor, Back]:
    modulation, modulation_back = _linear(w, "final_layer.adaLN_modulation.1", time)
    y, norm_back = _modulated(x, *modulation.chunk(2, dim=1))
    out, out_back = _linear(w, "final_layer.linear", y)

    def back(grads: Weights, dout: Tensor) -> tuple[Tensor, Tensor]:
        dx, *parts = norm_back(out_back(grads, dout))
        return dx, modulation_back(grads, torch.cat(parts, 1))

    return out, back
