"""What the page's fields hold <=> the settings of pictures."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sd_mini import images
from sd_mini.config import check
from sd_mini.errors import UserError
from sd_mini.png import Settings
from sd_mini.texts import check_text

if TYPE_CHECKING:
    from PIL import Image

Values = Mapping[str, Any]  # of the page's fields, by name

MAX_PICTURES = 64  # a press
MAX_SIDE = 2048  # px: what a shared page should not be made to draw
MAX_STEPS = 1000
LAST_SEED = 2**53 - 1  # the largest whole number of a browser
_WHOLE = {"seed": (0, LAST_SEED), "count": (1, MAX_PICTURES), "steps": (1, MAX_STEPS)}
_WHOLE |= {"width": (1, MAX_SIDE), "height": (1, MAX_SIDE)}
_RANGE = re.compile(r"\s*(\d{1,15})\s*(?:-|to)\s*(\d{1,15})\s*")


def settings_of(values: Values) -> Settings:
    """The fields => the settings of the first picture. Raises UserError that names the field."""
    whole = {name: whole_number(values[name], name, *ends) for name, ends in _WHOLE.items()}
    prompt, negative = values["prompt"] or "", values["negative"] or ""
    check_text(prompt, "prompt")
    has_image = (values["editor"] or {}).get("background") is not None
    fields = {
        "prompt": prompt,
        "negative_prompt": negative if negative.strip() else None,
        "seed": whole["seed"],
        "num_inference_steps": whole["steps"],
        "guidance_scale": number(values["guidance"], "guidance"),
        "guidance_interval": (number(values["low"], "interval"), number(values["high"], "interval")),
        "sampler": values["sampler"] or None,
        "width": whole["width"],
        "height": whole["height"],
        "strength": number(values["strength"], "strength") if has_image else None,
    }
    return check(Settings, fields, source="settings")


def fields_of(settings: Settings) -> dict[str, Any]:
    """Settings, as of a picture => what the fields are set to; a field whose setting is None is left out."""
    low, high = settings.guidance_interval or (None, None)
    fields = {
        "seed": settings.seed,
        "steps": settings.num_inference_steps,
        "guidance": settings.guidance_scale,
        "low": low,
        "high": high,
        "sampler": settings.sampler,
        "width": settings.width,
        "height": settings.height,
        "strength": settings.strength,
    }
    texts = {"prompt": settings.prompt, "negative": settings.negative_prompt or ""}
    return texts | {name: value for name, value in fields.items() if value is not None}


def sources_of(values: Values) -> tuple[Image.Image | None, Image.Image | None]:
    """The fields => the picture to start from, RGB, and its mask, L and white where it is repainted; none without.

    The mask is a file, or what was painted over the picture. Raises UserError for a mask without a picture.
    """
    editor = values["editor"] or {}
    background, mask_file = editor.get("background"), values["mask"]
    painted = _painted(editor.get("layers") or [])
    if background is None:
        if painted is not None or mask_file is not None:
            raise UserError("mask: there is no picture to repaint; give one to start from, or remove the mask")
        return None, None
    image = images.decode_image(background)[0]
    if mask_file is not None:
        return image, images.decode_image(mask_file, background=(0, 0, 0))[0]  # what is transparent is kept
    return image, painted


def _painted(layers: list[Image.Image]) -> Image.Image | None:
    """Layers of strokes => white wherever anything was painted; none where nothing was."""
    from PIL import ImageChops

    mask: Image.Image | None = None
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").point(lambda value: 255 if value else 0)
        mask = alpha if mask is None else ImageChops.lighter(mask, alpha)
    return mask if mask is not None and mask.getbbox() else None


def numbers_of(text: str, name: str) -> list[float]:
    """ "1, 2.5, 4" => the numbers; "0 - 15" or "0 to 15" => the whole numbers of a range. Raises UserError."""
    if match := _RANGE.fullmatch(text):
        first, last = int(match[1]), int(match[2])
        if not 0 <= last - first < MAX_PICTURES:
            raise UserError(f"{name}: {first} to {last}; expected at most {MAX_PICTURES} numbers, the lower first")
        return list(map(float, range(first, last + 1)))
    parts = [part for part in re.split(r"[,;\s]+", text[:10_000]) if part]
    if not parts:
        raise UserError(f"{name}: is empty; expected numbers, such as 1, 2, 4")
    return [number(part, name) for part in parts]


def whole_number(value: Any, name: str, low: int, high: int) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or value != int(value):
        raise UserError(f"{name}: got {value!r:.40}, expected a whole number from {low} to {high}")
    return int(value)


def number(value: Any, name: str) -> float:
    try:
        parsed = float(value)
    except (TypeError, ValueError):
        parsed = math.nan
    if not math.isfinite(parsed):
        raise UserError(f"{name}: got {value!r:.40}, expected a number")
    return parsed


@contextmanager
def messages() -> Generator[None]:
    """In which a UserError becomes the page's message, one line, its text shown as text."""
    import gradio

    try:
        yield
    except UserError as error:
        line = html.escape(" ".join(str(error).split()))
        raise gradio.Error(line, title="Please check", print_exception=False) from None
