"""What lies between PRX's matrix products, in C: see `fused_prx.Between` and `fused_prx.c`.

Compiled for the shape at hand when it is first asked for, which takes a second; without a C compiler there is none.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sd_mini.cpu.prx import Back, Weights

_SOURCE = Path(__file__).with_name("prx.c")
_STACK = 3 * 2**17  # bytes that it may take of a thread's stack, 8 MB on Linux and half of one on a Mac's second thread
# what lets sums be vectorised, and nothing that would change how other code in the process rounds
_FLAGS = ["-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math"]
_FLAGS += ["-fno-signed-zeros", "-freciprocal-math"]


def compiles(head: int) -> bool:
    """Whether there is a C compiler (`cc`, or what CC names), and heads of so many columns are what the code is for."""
    return _compiler() is not None and head % 16 == 0


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC") or "cc")


@lru_cache(maxsize=16)
def library(heads: int, head: int, length: int, words: int, half: bool = False) -> ctypes.CDLL | None:
    """For that many heads of so many columns, picture and prompt tokens; none where it cannot be had. `half`: around
    products in bfloat16.

    It cannot without a C compiler, or with one that fails, which is warned of; for heads whose width 16 does not
    divide, and for more tokens than a head's scratch has room for on a thread's stack.
    """
    if not compiles(head) or _scratch(head, length, words) > _STACK:
        return None
    compiler = _compiler()
    shape = [f"-D{name}={value}" for name, value in zip("HDLT", (heads, head, length, words), strict=True)]
    shape += ["-DHALF"] * half
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "prx.so"
        command = [compiler, *shape, *_FLAGS, str(_SOURCE), "-o", str(target), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            return ctypes.CDLL(str(target))
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").splitlines()[0]
            warnings.warn(f"{compiler} cannot compile {_SOURCE.name} ({said}); torch stands in for it", stacklevel=2)
            return None


def _scratch(head: int, length: int, words: int) -> int:
    """Bytes that `attend_back` takes of the stack: a head's queries, keys, values, their gradients, and scores."""
    queries, keys = length + 15, length + words + 3
    return 4 * (head * (5 * queries + 6 * keys) + keys * queries)


class NativeBetween:
    """`turn` (L, 1, d / 2): the rotations as complex numbers; `mask` (n, T) bool: the prompt tokens that are seen;
    `half`: what the code was compiled for."""

    def __init__(self, code: ctypes.CDLL, half: bool, heads: int, turn: Tensor, mask: Tensor | None):
        self.code, self.heads, self.length = code, heads, len(turn)
        self.dtype = torch.bfloat16 if half else torch.float32
        self.cos, self.sin = (part.reshape(self.length, -1).contiguous() for part in (turn.real, turn.imag))
        self.mask = mask

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Back]:
        n, step = ctypes.c_long(len(shift)), ctypes.c_long(shift.stride(0))
        stats, y = x.new_empty(len(x), 2), torch.empty_like(x, dtype=self.dtype)
        self.code.modulate(n, *_at(x, shift, scale), step, *_at(stats, y))

        def back(dy: Tensor, dx: Tensor, dshift: Tensor, dscale: Tensor) -> None:
            own = dy.to(self.dtype)
            self.code.modulate_back(n, *_at(x, stats, scale), step, *_at(own, dx, dshift, dscale))

        return y, back

    def gated(self, x: Tensor, gate: Tensor, made: Tensor) -> tuple[Tensor, Back]:
        n, step = ctypes.c_long(len(gate)), ctypes.c_long(gate.stride(0))
        y = torch.empty_like(x)
        self.code.gated(n, *_at(x, gate), step, *_at(made, y))

        def back(dy: Tensor, dgate: Tensor) -> Tensor:
            dmade = torch.empty_like(made)
            self.code.gated_back(n, *_at(dy, gate), step, *_at(made, dmade, dgate))
            return dmade

        return y, back

    def activated(self, inner: Tensor, up: Tensor) -> tuple[Tensor, Back]:
        count, y = ctypes.c_long(inner.numel()), torch.empty_like(inner)
        self.code.activate(count, *_at(inner, up, y))

        def back(dy: Tensor) -> tuple[Tensor, Tensor]:
            dinner, dup = torch.empty_like(inner), torch.empty_like(up)
            self.code.activate_back(count, *_at(inner, up, dy, dinner, dup))
            return dinner, dup

        return y, back

    def attended(self, w: Weights, name: str, qkv: Tensor, kv: Tensor) -> tuple[Tensor, Back]:
        n, width = len(qkv) // self.length, qkv.shape[1] // 3
        words, first = self._words(n, len(kv))
        norms = [f"{name}.norm_{which}.weight" for which in ("q", "k", "added_k")]
        weights = torch.stack([w[norm] for norm in norms])
        given = ctypes.c_long(n), *_at(qkv, kv, weights, self.cos, self.sin, first)
        keys, queries = -(-(words + self.length) // 4) * 4, -(-self.length // 16) * 16  # as they are padded there
        probs, y = weights.new_empty(n, self.heads, keys, queries), qkv.new_empty(len(qkv), width)
        self.code.attend(*given, *_at(probs, y))

        def back(grads: Weights, dy: Tensor) -> tuple[Tensor, Tensor]:
            dqkv, dkv, dweights = torch.empty_like(qkv), torch.empty_like(kv), torch.empty_like(weights)
            self.code.attend_back(*given, *_at(probs, dy, dqkv, dkv, dweights))
            grads.update(zip(norms, dweights, strict=True))
            return dqkv, dkv

        back.kept = qkv, kv, weights, first, self  # `given` holds no more than where they are
        return y, back

    def _words(self, n: int, rows: int) -> tuple[int, Tensor]:
        """How many prompt tokens a sample has at most, and (n + 1,) int64: the row of `kv` where each one's begin."""
        if self.mask is None:
            return rows // n, torch.arange(n + 1) * (rows // n)
        return self.mask.shape[1], torch.nn.functional.pad(self.mask.sum(1).cumsum(0), (1, 0))


def _at(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Where each tensor begins, its last axis contiguous; nowhere for none."""
    return [ctypes.c_void_p(x.data_ptr() if x is not None else None) for x in tensors]
