"""What a pipeline may be asked for: one line for whoever asks for something else, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sd_mini.errors import UserError
from sd_mini.texts import check_text

Generators = torch.Generator | list[torch.Generator] | None


def draw_noise(batch: int, shape: tuple[int, ...], generator: Generators) -> Tensor:
    """Pure noise (batch, *shape) on the CPU, each picture's from its own generator, or in order from the one that all
    share. Raises ValueError for another number of generators."""
    if isinstance(generator, list) and len(generator) != batch:
        raise UserError(f"{len(generator)} generators for {batch} pictures; give one, or one each")
    generators = generator if isinstance(generator, list) else [generator] * batch
    drawn = [torch.randn(shape, generator=g, device=g.device if g else "cpu").cpu() for g in generators]
    return torch.stack(drawn)


def listed(prompt: str | Sequence[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def check_texts(prompt: Any, negative_prompt: Any, prompt_embeds: Tensor | None) -> None:
    """Raises ValueError for anything but texts, and for a prompt beside its own embeddings, or neither."""
    if (prompt is None) == (prompt_embeds is None):
        raise UserError("expected either prompt or prompt_embeds, got " + ("neither" if prompt is None else "both"))
    for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if texts is not None and not isinstance(texts, str | list | tuple):
            raise UserError(f"{name} is a {type(texts).__name__}; expected text or a list of texts")
        if texts is not None and len(texts := listed(texts)) == 0:
            raise UserError(f"{name} is an empty list; give at least one text")
        for number, text in enumerate(texts or []):
            check_text(text, f"{name} {number}")


def check_embeds(prompt_embeds: Tensor | None, prompt_mask: Tensor | None, length: int, dim: int) -> None:
    """Raises ValueError for one without the other, and for another shape than (B, length, dim) and (B, length)."""
    if (prompt_embeds is None) != (prompt_mask is None):
        raise UserError("prompt_embeds and prompt_mask: expected both, as encode_prompt gives them, or neither")
    if prompt_embeds is None or prompt_mask is None:
        return
    for name, value in (("prompt_embeds", prompt_embeds), ("prompt_mask", prompt_mask)):
        if not isinstance(value, Tensor):
            raise UserError(f"{name} is a {type(value).__name__}; expected a tensor, as encode_prompt gives it")
    if tuple(prompt_embeds.shape[1:]) != (length, dim):
        raise UserError(f"prompt_embeds are {tuple(prompt_embeds.shape)}; expected (B, {length}, {dim})")
    if prompt_mask.shape != prompt_embeds.shape[:2]:
        raise UserError(f"prompt_mask is {tuple(prompt_mask.shape)}; expected {tuple(prompt_embeds.shape[:2])}")


def check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name} {value!r}: expected a whole number of at least 1")
