"""What a pipeline may be asked for: one line for whoever asks for something else, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sd_mini.errors import UserError
from sd_mini.texts import check_text

Generators = torch.Generator | list[torch.Generator] | None


def number(value: Any) -> Any:
    """A number of numpy's as Python's own, and anything else as it is."""
    is_numpy = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if is_numpy else value


def tensor(value: Any) -> Any:
    """A numpy array as a tensor, and anything else as it is."""
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def as_generators(given: Any) -> Generators:
    """One generator, or a list of them (any sequence), or none. Raises ValueError for anything else."""
    if given is None or isinstance(given, torch.Generator):
        return given
    if not isinstance(given, Sequence) or not all(isinstance(one, torch.Generator) for one in given):
        raise UserError(
            f"generator is {given!r:.80}; expected a torch.Generator, or a list of them, one a picture: "
            "torch.Generator().manual_seed(0)"
        )
    return list(given)


def draw_noise(batch: int, shape: tuple[int, ...], generator: Generators) -> Tensor:
    """Pure noise (batch, *shape) on the CPU, each picture's from its own generator, or in order from the one that all
    share. Raises ValueError for another number of generators."""
    if isinstance(generator, list) and len(generator) != batch:
        raise UserError(f"{len(generator)} generators for {batch} pictures; give one, or one each")
    return draws((batch, *shape), generator if isinstance(generator, list) else [generator] * batch)


def draws(shape: tuple[int, ...], generator: Generators | list[None], dtype: torch.dtype | None = None) -> Tensor:
    """N(0, I) on the CPU from one generator, or with a list row i from the i-th; each draws on its own device."""
    if not isinstance(generator, list):
        device = "cpu" if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).cpu()
    return torch.stack([draws(shape[1:], one, dtype) for one in generator])


def listed(prompt: str | Sequence[Any]) -> list[Any]:
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
        for row, text in enumerate(texts or []):
            if name == "prompt" or not is_blank(text):
                check_text(text, f"{name} {row}")


def is_blank(negative_prompt: Any) -> bool:
    """Whether there is nothing in a negative prompt: the empty box of a page is none at all."""
    return negative_prompt is None or (isinstance(negative_prompt, str) and not negative_prompt.strip())


def given_negative(negative_prompt: Any) -> Any:
    """A negative prompt, or a list of them; none where all are blank."""
    if isinstance(negative_prompt, list | tuple) and len(negative_prompt):
        return None if all(map(is_blank, negative_prompt)) else negative_prompt
    return None if is_blank(negative_prompt) else negative_prompt


def check_embeds(prompt_embeds: Tensor | None, prompt_mask: Tensor | None, length: int | None, dim: int | None) -> None:
    """Raises ValueError for one without the other, and for another shape than (B, length, dim) and (B, length); with
    None any length and width."""
    if (prompt_embeds is None) != (prompt_mask is None):
        raise UserError("prompt_embeds and prompt_mask: expected both, as encode_prompt gives them, or neither")
    if prompt_embeds is None or prompt_mask is None:
        return
    for name, value in (("prompt_embeds", prompt_embeds), ("prompt_mask", prompt_mask)):
        if not isinstance(value, Tensor):
            raise UserError(f"{name} is a {type(value).__name__}; expected a tensor, as encode_prompt gives it")
    shape = tuple(prompt_embeds.shape[1:])
    if len(shape) != 2 or (length is not None and shape != (length, dim)):
        raise UserError(f"prompt_embeds are {tuple(prompt_embeds.shape)}; expected (B, {length or 'L'}, {dim or 'D'})")
    if prompt_mask.shape != prompt_embeds.shape[:2]:
        raise UserError(f"prompt_mask is {tuple(prompt_mask.shape)}; expected {tuple(prompt_embeds.shape[:2])}")


def check_latents(latents: Any, shape: tuple[int, int, int]) -> None:
    """Raises ValueError for anything but numbers (B, C, h, w) for a picture's (C, h, w)."""
    expected = f"expected (B, {str(shape)[1:]}"
    if not isinstance(latents, Tensor):
        raise UserError(f"latents is a {type(latents).__name__}; {expected}, a tensor")
    if tuple(latents.shape[1:]) != shape:
        raise UserError(f"latents are {tuple(latents.shape)}; {expected}")
    if not latents.is_floating_point():
        raise UserError(f"latents are {latents.dtype}; {expected} floats")


def check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} {value!r}: expected a whole number of at least 1")
