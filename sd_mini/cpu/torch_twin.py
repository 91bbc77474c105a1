"""What lies between PRX's matrix products, in torch's operations: see `fused_prx.Between`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sd_mini.cpu.prx import Back, Weights

_EPS = 1e-6  # of every norm of PRX
_aten = torch.ops.aten


class TorchBetween:
    """`turn` (L, 1, d / 2): the rotations as complex numbers; `mask` (n, T) bool: the prompt tokens that are seen."""

    def __init__(self, heads: int, turn: Tensor, mask: Tensor | None):
        self.heads, self.turn, self.mask, self.bias = heads, turn, mask, None
        if mask is not None:
            bias = torch.zeros(len(mask), 1, mask.shape[1] + len(turn))
            bias[..., : mask.shape[1]].masked_fill_(~mask[:, None], -torch.inf)
            self.bias = bias.repeat_interleave(heads, 0)  # (n H, 1, T + L)

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Back]:
        n, width = shift.shape
        normed, mean, spread = torch.native_layer_norm(x, (width,), None, None, _EPS)
        normed, gain = normed.view(n, -1, width), (1 + scale)[:, None]
        y = torch.addcmul(shift[:, None], normed, gain)

        def back(dy: Tensor, dx: Tensor, dshift: Tensor, dscale: Tensor) -> None:
            dy = dy.view(n, -1, width)
            torch.sum(dy, 1, out=dshift), torch.sum(dy * normed, 1, out=dscale)
            given = (dy * gain).view_as(x), x, (width,), mean, spread, None, None, (True, False, False)
            dx += _aten.native_layer_norm_backward(*given)[0]

        return y.view_as(x), back

    def gated(self, x: Tensor, gate: Tensor, made: Tensor) -> tuple[Tensor, Back]:
        n, width = gate.shape
        made = made.view(n, -1, width)
        y = torch.addcmul(x.view(n, -1, width), gate[:, None], made)

        def back(dy: Tensor, dgate: Tensor) -> Tensor:
            dy = dy.view(n, -1, width)
            torch.sum(dy * made, 1, out=dgate)
            return (dy * gate[:, None]).view_as(x)

        return y.view_as(x), back

    def activated(self, inner: Tensor, up: Tensor) -> tuple[Tensor, Back]:
        active, slope = _gelu(inner)

        def back(dy: Tensor) -> tuple[Tensor, Tensor]:
            return (dy * up).mul_(slope()), dy * active

        return active * up, back

    def attended(self, w: Weights, name: str, qkv: Tensor, kv: Tensor) -> tuple[Tensor, Back]:
        heads, turn, length = self.heads, self.turn, len(self.turn)
        width = qkv.shape[1] // 3
        d, n = width // heads, len(qkv) // length
        if self.mask is not None:
            kv = kv.new_zeros(*self.mask.shape, 2 * width).index_put_((self.mask,), kv)
        qkv, kv = qkv.view(n, length, 3, heads, d), kv.view(n, -1, 2, heads, d)
        words = kv.shape[1]
        queries, (keys, values) = qkv.new_empty(n, heads, length, d), qkv.new_empty(2, n, heads, words + length, d)
        names = [f"{name}.norm_{which}.weight" for which in ("q", "k", "added_k")]
        q_back = _normed(w, names[0], qkv[:, :, 0], turn * d**-0.5, queries)  # so that the scores need no scaling
        k_back = _normed(w, names[1], qkv[:, :, 1], turn, keys[:, :, words:])
        text_k_back = _normed(w, names[2], kv[:, :, 0], None, keys[:, :, :words])
        values[:, :, words:].copy_(qkv[:, :, 2].transpose(1, 2))
        values[:, :, :words].copy_(kv[:, :, 1].transpose(1, 2))
        queries, keys, values = queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
        scores = queries @ keys.mT if self.bias is None else torch.baddbmm(self.bias, queries, keys.mT)
        weights = scores.softmax(-1)
        attended = (weights @ values).view(n, heads, length, d).transpose(1, 2).reshape(n * length, width)

        def back(grads: Weights, dy: Tensor) -> tuple[Tensor, Tensor]:
            dattended = dy.view(n, length, heads, d).transpose(1, 2).reshape(-1, length, d)
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
            dkv = dkv.view(-1, 2 * width) if self.mask is None else dkv.view(n, words, -1)[self.mask]
            return dqkv.view(-1, 3 * width), dkv

        return attended, back


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
