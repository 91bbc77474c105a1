"""The C kernels between PRX's matrix products: compiled once a machine and head shape, and called with tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_mini.remarks import remark

Weights = dict[str, Tensor]  # by the names of the stock state dict
Back = Callable[..., Any]
SOURCE = Path(__file__).with_suffix(".c")
# sums may be reordered, so that they vectorise; unlike -ffast-math these change no floating point mode of the process
_FLAGS = ["-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math"]
_FLAGS += ["-fno-signed-zeros", "-freciprocal-math"]


def compiler() -> str | None:
    """The path of the C compiler, `cc` or what CC names; None where there is none."""
    return shutil.which(os.environ.get("CC") or "cc")


@lru_cache(maxsize=16)
def compiled(heads: int, head_dim: int, half: bool = False) -> ctypes.CDLL | None:
    """The library for that many heads of so many columns; `half`: around products in bfloat16.

    The first time takes a second or two; the library is kept in `cache_folder()`. None without a C compiler, where it
    fails (with a remark), and for a `head_dim` that 16 does not divide.
    """
    command = compiler()
    if command is None or head_dim % 16:
        return None
    defines = [f"-DH={heads}", f"-DD={head_dim}", *(["-DHALF"] if half else [])]
    try:
        library = _library([command, *defines, *_FLAGS, str(SOURCE)])
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").splitlines()[0]
        remark(f"{command} cannot compile {SOURCE.name} ({reason}); the network runs without it")
        return None
    library.scratch_size.restype = ctypes.c_long
    return library


def cache_folder() -> Path:
    """The user's folder of compiled kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd_mini" / "kernels"


def _library(command: list[str]) -> ctypes.CDLL:
    """What `command` compiles, from the cache if this compiler made it of this source for this kind of processor."""
    # the macros that -march=native defines name the processor's features, and those of the compiler its version
    describe = [command[0], *_FLAGS, "-dM", "-E", "-x", "c", "-"]
    macros = subprocess.run(describe, input=b"", check=True, capture_output=True, timeout=60).stdout
    key = hashlib.sha256(b"\0".join([macros, SOURCE.read_bytes(), *map(str.encode, command[:-1])])).hexdigest()
    target = cache_folder() / f"{key[:24]}.so"
    if target.exists():
        return ctypes.CDLL(str(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        where = target.parent if os.access(target.parent, os.W_OK) else None
    except OSError:  # a home that cannot be written: compiled for this process alone
        where = None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        fresh = Path(folder) / "kernels.so"
        subprocess.run([*command, "-o", str(fresh), "-lm"], check=True, capture_output=True, timeout=60)
        if where is None:
            return ctypes.CDLL(str(fresh))
        os.replace(fresh, target)  # whole, or not there
    return ctypes.CDLL(str(target))


class Kernels:
    """The kernels for one part of a batch, in its caller's thread.

    n samples of L picture tokens and T prompt tokens each, R prompt tokens in all without padding, width D = heads *
    head_dim. `rotation` (L, head_dim / 2) complex: rotary embedding; `mask` (n, T) bool: True where a prompt token is
    none of padding. Each method returns its output and its backward pass.
    """

    def __init__(self, library: ctypes.CDLL, half: bool, heads: int, rotation: Tensor, mask: Tensor | None):
        self.compiled, self.heads, self.tokens, self.mask = library, heads, len(rotation), mask
        self.dtype = torch.bfloat16 if half else torch.float32
        self.cos, self.sin = rotation.real.contiguous(), rotation.imag.contiguous()

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Back]:
        """(1 + scale) * layer_norm(x) + shift: x (n L, D), shift and scale (n, D).

        backward(dy, dx, dshift, dscale) adds to dx and writes the two others."""
        sizes, step = (_long(len(shift)), _long(self.tokens)), _long(shift.stride(0))
        stats, y = x.new_empty(len(x), 2), torch.empty_like(x, dtype=self.dtype)
        self.compiled.modulate(*sizes, *_pointers(x, shift, scale), step, *_pointers(stats, y))

        def backward(dy: Tensor, dx: Tensor, dshift: Tensor, dscale: Tensor) -> None:
            dy = dy.to(self.dtype)
            outputs = _pointers(dy, dx, dshift, dscale)
            self.compiled.modulate_backward(*sizes, *_pointers(x, stats, scale), step, *outputs)

        return y, backward

    def add_gated(self, x: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Back]:
        """x + gate * branch: x and branch (n L, D), gate (n, D).

        backward(dy, dgate) writes dgate and returns dbranch; dx is dy itself."""
        sizes, step = (_long(len(gate)), _long(self.tokens)), _long(gate.stride(0))
        y = torch.empty_like(x)
        self.compiled.add_gated(*sizes, *_pointers(x, gate), step, *_pointers(branch, y))

        def backward(dy: Tensor, dgate: Tensor) -> Tensor:
            dbranch = torch.empty_like(branch)
            self.compiled.add_gated_backward(*sizes, *_pointers(dy, gate), step, *_pointers(branch, dbranch, dgate))
            return dbranch

        return y, backward

    def gelu_times(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Back]:
        """gelu(gate) * up, (n L, hidden) each. backward(dy) returns dgate and dup."""
        count, y = _long(gate.numel()), torch.empty_like(gate)
        self.compiled.gelu_times(count, *_pointers(gate, up, y))

        def backward(dy: Tensor) -> tuple[Tensor, Tensor]:
            dgate, dup = torch.empty_like(gate), torch.empty_like(up)
            self.compiled.gelu_times_backward(count, *_pointers(gate, up, dy, dgate, dup))
            return dgate, dup

        return y, backward

    def attend(self, w: Weights, name: str, qkv: Tensor, kv: Tensor) -> tuple[Tensor, Back]:
        """Attention of picture tokens to prompt and picture: qkv (n L, 3 D), kv (R, 2 D) => (n L, D).

        `name`: of the attention module, whose norms' weights are read. backward(grads, dy) returns dqkv and dkv."""
        n = len(qkv) // self.tokens
        words, first = self._prompt_rows(n, len(kv))
        norms = [f"{name}.norm_{which}.weight" for which in ("q", "k", "added_k")]
        weights = torch.stack([w[norm] for norm in norms])
        scratch = weights.new_empty(self.compiled.scratch_size(_long(self.tokens), _long(words)))
        sizes = _long(n), _long(self.tokens), _long(words)
        inputs = (qkv, kv, weights, self.cos, self.sin, first, scratch)
        # padded as in the C code
        keys, queries = -(-(words + self.tokens) // 4) * 4, -(-self.tokens // 16) * 16
        probs, y = weights.new_empty(n, self.heads, keys, queries), qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        self.compiled.attend(*sizes, *_pointers(*inputs, probs, y))

        def backward(grads: Weights, dy: Tensor) -> tuple[Tensor, Tensor]:
            dqkv, dkv, dweights = torch.empty_like(qkv), torch.empty_like(kv), torch.empty_like(weights)
            self.compiled.attend_backward(*sizes, *_pointers(*inputs, probs, dy, dqkv, dkv, dweights))
            grads.update(zip(norms, dweights, strict=True))
            return dqkv, dkv

        return y, backward

    def _prompt_rows(self, n: int, rows: int) -> tuple[int, Tensor]:
        """The most prompt tokens a sample can have, and (n + 1,) int64: the row of `kv` where each sample's begin."""
        if self.mask is None:
            return rows // n, torch.arange(n + 1) * (rows // n)
        return self.mask.shape[1], torch.nn.functional.pad(self.mask.sum(1).cumsum(0), (1, 0))


def _long(number: int) -> ctypes.c_long:
    return ctypes.c_long(number)


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    """The address of each tensor's first element. The caller keeps the tensors alive; their last axis is contiguous."""
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]
