"""What a picture was made with, in its PNG file: written and read here alone.

Two text chunks (iTXt, UTF-8) before the pixels: `sd_mini`, the settings as JSON, from which the same picture can be
made again (a list of them in a grid of pictures); and `parameters`, the same in the form that Automatic1111's web UI
writes and galleries show. Reading one decodes no pixels and executes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from sd_mini import __version__
from sd_mini.config import Config, complaint
from sd_mini.errors import UserError
from sd_mini.files import atomic_file, written_to

if TYPE_CHECKING:
    from PIL import Image

SETTINGS, PARAMETERS = "sd_mini", "parameters"  # keys of the text chunks
MAX_PROMPT = 100_000  # characters; a tokenizer keeps a few hundred of them
_MAX_AREA = 2**26  # px
_MAX_CHUNK = 2**20  # characters of the settings as JSON


_Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
_Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{0,64}$")]


class Settings(Config):
    """What one picture is made with. None stands for the pipeline's own value, until the picture is made.

    Raises UserError through `config.check` for values of the wrong kind; what fits the pipeline is its call's to check.
    """

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    """what the picture shows"""
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    """what guidance leads away from; null: the trained condition of no prompt"""
    seed: int = Field(0, ge=0, lt=2**63)
    """of the noise"""
    num_inference_steps: int | None = Field(None, ge=1, le=10_000)
    """of the sampler"""
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    """1: no guidance"""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """how far the spread of a guided prediction is brought back, 0 to 1"""
    guidance_interval: tuple[float, float] | None = None
    """noise levels, 0 to 1, between which steps are guided"""
    sampler: str | None = Field(None, max_length=100)
    """euler, heun, dpm++, unipc, ddim or ddpm"""
    height: int | None = Field(None, ge=1, le=65_536)
    """px"""
    width: int | None = Field(None, ge=1, le=65_536)
    """px"""
    autoguidance: bool = False
    """guidance leads away from the pipeline's guide"""
    tile: int | None = Field(None, ge=1, le=65_536)
    """latent cells a side of the squares that are decoded one at a time"""
    strength: float | None = Field(None, ge=0, le=1)
    """with a picture to start from: how much of it may change"""
    image: str | None = Field(None, max_length=64)
    """SHA-256 of the pixels of the picture to start from"""
    mask_image: str | None = Field(None, max_length=64)
    """SHA-256 of the pixels of its mask"""
    lora: str | None = Field(None, max_length=200)
    """name of the LoRA that is merged into the noise predictor"""
    stages: dict[_Name, _Hash] = Field({}, max_length=16)
    """hashes of the stages that made it, by kind"""
    version: str = Field(__version__, max_length=100)
    """of sd_mini"""


_GRIDS = TypeAdapter(Annotated[list[Settings], Field(min_length=1, max_length=1000)])


def attach(picture: Image.Image, *settings: Settings) -> Image.Image:
    """The picture itself, which knows from now on what it, or each picture of its grid, was made with."""
    texts = [one.model_dump_json() for one in settings]
    picture.info[SETTINGS] = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    picture.info[PARAMETERS] = "\n\n".join(map(as_parameters, settings))
    return picture


def save(picture: Image.Image, target: str | Path | BinaryIO, *settings: Settings) -> None:
    """Write a PNG with `settings` in it, or with those attached to the picture: a file, whole or not at all, or into a
    stream. Raises UserError."""
    from PIL.PngImagePlugin import PngInfo

    if settings:
        attach(picture, *settings)
    chunks = PngInfo()
    for name in (SETTINGS, PARAMETERS):
        if name in picture.info:
            chunks.add_itxt(name, picture.info[name])
    if isinstance(target, str | Path):
        replace(picture, Path(target), "PNG", pnginfo=chunks)
    else:
        picture.save(target, "PNG", pnginfo=chunks)


def replace(picture: Image.Image, path: Path, picture_format: str, **options: object) -> None:
    """Write beside `path`, then rename: whoever opens it finds a whole picture or none. Raises UserError."""
    with written_to(path), atomic_file(path) as partial:
        picture.save(partial, picture_format, **options)


def read(path: str | Path) -> Settings:
    """The settings in a PNG of one picture that `save` wrote. Raises UserError: no such file, no PNG, none in it, those
    of several pictures, or forged ones."""
    found = read_all(path)
    if len(found) != 1:
        raise UserError(f"{path}: is a grid of {len(found)} pictures; give one of a single picture")
    return found[0]


def read_all(path: str | Path) -> list[Settings]:
    """As `read`, of each picture in a grid, in order."""
    text = _chunk(Path(path))
    try:
        found = _GRIDS.validate_json(text) if text.startswith("[") else [Settings.model_validate_json(text)]
    except ValidationError as error:
        raise UserError(f"{path}: its settings cannot be used: {complaint(Settings, error)}") from None
    for one in found:
        if one.image is None and (one.strength is not None or one.mask_image is not None):
            raise UserError(
                f"{path}: its settings cannot be used: a strength or a mask without a picture to start from"
            )
        if (one.height or 1) * (one.width or 1) > _MAX_AREA:
            raise UserError(
                f"{path}: its settings cannot be used: {one.width} x {one.height} px are more than a picture"
            )
    return found


def _chunk(path: Path) -> str:
    """The JSON in a PNG file, of bounded length, read from the chunks before its pixels."""
    from PIL import Image

    if not path.is_file():
        raise UserError(f"{path}: no such file; give a PNG that sd-mini made")
    try:
        # the pixels stay undecoded, and Pillow bounds what a text chunk may unpack to (1 MiB each, 64 MiB in all)
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(SETTINGS)
    except Exception as error:  # on damaged bytes Pillow raises anything, from SyntaxError to struct.error
        raise UserError(f"{path}: cannot be read as a PNG ({error}); give one that sd-mini made") from error
    if not isinstance(text, str):
        raise UserError(f"{path}: holds no settings of sd_mini's; an editor or a web site may have removed them")
    if len(text) > _MAX_CHUNK:
        raise UserError(f"{path}: its settings have {len(text):,} characters; expected at most {_MAX_CHUNK:,}")
    return text


def described(settings: Settings) -> dict[str, Any]:
    """For a person to read: name => value, without what is None, the stages by the first digits of their hashes."""
    values = settings.model_dump(exclude_none=True)
    stages = values.pop("stages")
    return values | {f"stage {kind}": digest[:12] for kind, digest in stages.items()}


def as_parameters(settings: Settings) -> str:
    """The settings in Automatic1111's form: the prompt, the negative prompt, a line of `name: value`."""
    values = {
        "Steps": settings.num_inference_steps,
        "Sampler": settings.sampler,
        "CFG scale": settings.guidance_scale,
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}" if settings.width else None,
        "Model hash": (settings.stages.get("noise_predictor") or settings.stages.get("generator", ""))[:10] or None,
        "Denoising strength": settings.strength,
        "Version": f"sd_mini {settings.version}",
    }
    lines = [settings.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in values.items() if value is not None))
    return "\n".join(lines)
