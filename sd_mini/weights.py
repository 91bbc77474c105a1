"""Weights from folders: every tensor that a network has is found there, or the load is refused by the tensor's name."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sd_mini.errors import UserError

# model.safetensors, model.fp16.safetensors, and of several files model.fp16-00001-of-00002.safetensors, or, as older
# libraries have it, model-00001-of-00002.fp16.safetensors
_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model)(\.(?P<first>\w+))?(-\d{5}-of-\d{5})?(\.(?P<last>\w+))?\.safetensors"
)
_NAMED = 3  # tensors that a message names


def load_complete(
    cls: Any,
    name: str | Path,
    what: str,
    may_lack: Callable[[str], bool] = lambda key: False,
    has_only: bool = False,
    complaint: str = "its weights lack",
    **kwargs: Any,
) -> Any:
    """`cls.from_pretrained(name, **kwargs)`, of diffusers or transformers, from safetensors alone, plain or `variant`.

    Raises ValueError, one line that begins with `what`, for tensors that the files lack, but for those that `may_lack`,
    and with `has_only` for tensors that have no place in `cls`; and whatever the libraries raise for files that cannot
    be read.
    """
    folder = Path(name, kwargs.get("subfolder") or "")
    kwargs.setdefault("variant", variant_of(folder))
    with _quiet():  # the libraries would print a table of what is missing
        loaded, report = cls.from_pretrained(name, use_safetensors=True, output_loading_info=True, **kwargs)
    check_found(what, [key for key in report["missing_keys"] if not may_lack(key)], complaint)
    if has_only and (extra := sorted(report["unexpected_keys"])):
        raise UserError(f"{what}: its weights file holds besides {extra[0]}, for which {cls.__name__} has no place; give its own")
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """In which diffusers and transformers log errors alone."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_found(what: str, missing: Iterable[str], complaint: str = "its weights lack") -> None:
    """Raises ValueError for tensors that a file lacks, the first few named."""
    missing = sorted(missing)
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise UserError(
            f"{what}: {complaint} {', '.join(missing[:_NAMED])}{more}; give the weights of this very network"
        )


def variant_of(folder: str | Path) -> str | None:
    """The variant (such as fp16) that a model's folder holds alone; none where the plain weights are there, or none at
    all, or several variants."""
    matches = [_WEIGHTS.fullmatch(file.name) for file in Path(folder).glob("*.safetensors")]
    variants = {match["first"] or match["last"] for match in matches if match is not None}
    return variants.pop() if len(variants) == 1 else None


def pipeline_variant(folder: str | Path) -> str | None:
    """The variant that a diffusers pipeline's folder needs to be asked for: of a component that has no plain weights."""
    found = {variant_of(part) for part in Path(folder).glob("*/")} - {None}
    return found.pop() if len(found) == 1 else None


def reason(error: Exception) -> str:
    """A library's complaint on one line."""
    return " ".join(str(error).split())[:300]
