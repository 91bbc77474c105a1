"""`sd-mini generate`: pictures of a prompt, from noise or from a picture, or once more with a picture's settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_mini import __version__
from sd_mini.cli.arguments import check_picture_file, fraction, whole_number
from sd_mini.cli.opening import open_pipeline
from sd_mini.errors import UserError
from sd_mini.remarks import remark

if TYPE_CHECKING:
    from PIL import Image

    from sd_mini.pipelines.text_to_image import Pipeline
    from sd_mini.png import Settings

OWN = "(default: the recipe's own, as `sd-mini inspect RUN` shows)"


def add_command(commands: Any) -> None:
    parser = commands.add_parser("generate", help="make pictures of a prompt")
    parser.set_defaults(run_command=run)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, or a pipeline folder itself")
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="what the picture shows; may be left out with --like"
    )
    parser.add_argument("--out", type=Path, default=Path("picture.png"), help="picture file (default: %(default)s)")
    parser.add_argument(
        "--like",
        metavar="PNG",
        type=Path,
        help="take the settings in this picture; options change some (default: none)",
    )
    parser.add_argument("--seed", type=whole_number(0), help="of the first picture's noise (default: 0)")
    parser.add_argument(
        "--count",
        type=whole_number(1),
        default=1,
        help="number of pictures, of seeds SEED, SEED + 1, ... as OUT_0, ... (default: %(default)s)",
    )
    parser.add_argument("--steps", dest="num_inference_steps", type=whole_number(1), help=f"of the sampler {OWN}")
    parser.add_argument("--guidance", dest="guidance_scale", type=float, help=f"scale, 1 is no guidance {OWN}")
    parser.add_argument(
        "--interval",
        dest="guidance_interval",
        metavar=("LOW", "HIGH"),
        nargs=2,
        type=fraction,
        help=f"noise levels, 0 to 1 (the noise), between which steps are guided {OWN}",
    )
    parser.add_argument(
        "--rescale",
        dest="guidance_rescale",
        type=fraction,
        help="how far the spread of a guided prediction is brought back, 0 to 1 (default: 0)",
    )
    parser.add_argument(
        "--negative", dest="negative_prompt", metavar="PROMPT", help="what guidance leads away from (default: nothing)"
    )
    parser.add_argument("--sampler", help=f"euler, heun, dpm++, unipc, ddim or ddpm {OWN}")
    size = "px (default: the size of --image, or of the training)"
    parser.add_argument("--height", type=whole_number(1), help=size)
    parser.add_argument("--width", type=whole_number(1), help=size)
    parser.add_argument("--image", metavar="FILE", type=Path, help="start from this picture (default: from noise)")
    parser.add_argument(
        "--mask", metavar="FILE", type=Path, help="of its size: white is repainted, black is kept (default: all white)"
    )
    parser.add_argument(
        "--strength",
        type=fraction,
        help="how much of the picture may change, 0 to 1 (default: 0.8; with --mask 1)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse a prompt that is too long (default: it is cut, with a warning)"
    )
    parser.add_argument(
        "--tile",
        type=whole_number(1),
        help="decode in squares of so many latent cells a side: memory by the square (default: the whole picture)",
    )
    parser.add_argument(
        "--lora", metavar="FOLDER", type=Path, help="a LoRA of this noise predictor, to be merged (default: none)"
    )
    parser.add_argument(
        "--autoguidance",
        action="store_const",
        const=True,
        help="lead away from the earlier snapshot that was joined as --guide (default: from the null prompt)",
    )


def run(options: argparse.Namespace) -> None:
    picture_format = check_picture_file(options.out)
    settings = settings_of(options)
    targets = [options.out]
    if options.count > 1:
        targets = [options.out.with_stem(f"{options.out.stem}_{i}") for i in range(options.count)]
    if settings.seed + options.count > LAST_SEED:
        raise UserError(f"--seed {settings.seed}, --count {options.count}: expected seeds below {LAST_SEED}")
    image, mask = _sources(options, settings)
    pipeline = open_pipeline(options.run)
    if options.lora is not None:
        pipeline.load_lora(options.lora)
    # of `--like` its name alone is known
    settings = settings.model_copy(update={"lora": None if options.lora is None else options.lora.resolve().name[:200]})
    if options.like is not None:
        _compare(options.like, settings, pipeline, image, mask)
    from sd_mini import png
    from sd_mini.pipelines.generation import generate

    if picture_format != "PNG":
        remark(f"{options.out}: settings are kept in PNG files alone")
    for seed, target in enumerate(targets, settings.seed):
        one = settings.model_copy(update={"seed": seed})
        picture, made_with = generate(pipeline, one, image, mask, options.strict)
        if picture_format == "PNG":
            png.save(picture, target, made_with)
        else:
            png.replace(picture, target, picture_format)
        print(target)


def settings_of(options: argparse.Namespace) -> Settings:
    """The options, and for those left out the settings in `--like`. Raises UserError for neither prompt nor picture."""
    from sd_mini import png
    from sd_mini.config import check
    from sd_mini.texts import check_text

    taken = {name for name in png.Settings.model_fields if name not in _NO_OPTIONS}
    given = {name: getattr(options, name, None) for name in taken}
    given = {name: value for name, value in given.items() if value is not None}
    if options.like is None and options.prompt is None:
        raise UserError("PROMPT: missing; give it, or a picture with one by --like PNG; see `sd-mini generate --help`")
    if options.prompt is not None:
        check_text(options.prompt, "prompt 0")
    like = {} if options.like is None else png.read(options.like).model_dump()
    return check(png.Settings, like | given, source="command line")


LAST_SEED = 2**63
_NO_OPTIONS = ("image", "mask_image", "lora", "stages", "version")  # hashes and names, whose options are files


def _sources(options: argparse.Namespace, settings: Settings) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture to start from and its mask, decoded. Raises UserError for a mask or a strength without a picture."""
    for what, file, mark in (("picture", options.image, settings.image), ("mask", options.mask, settings.mask_image)):
        if file is None and mark is not None:
            option = "--image" if what == "picture" else "--mask"
            raise UserError(
                f"--like {options.like}: was made from a {what}, which it does not hold; give it by {option}"
            )
    if options.image is None:
        for name in ("mask", "strength"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name}: goes with a picture to start from; give it by --image FILE")
        return None, None
    from sd_mini.images import decode_image

    image = decode_image(options.image)[0]
    if options.mask is None:
        return image, None
    return image, decode_image(options.mask, background=(0, 0, 0))[0]  # what is transparent is kept


def _compare(like: Path, settings: Settings, pipeline: Pipeline, image: Any, mask: Any) -> None:
    """A remark for all that will make the picture another one than `like` in spite of equal settings."""
    from sd_mini.pipelines.generation import fingerprint

    if settings.version != __version__:
        remark(
            f"--like {like}: was made by sd_mini {settings.version}, this is {__version__}; the picture may be another"
        )
    here = dict(pipeline.config.stages)
    for kind in sorted(set(here) | set(settings.stages)):
        if here.get(kind) != settings.stages.get(kind):
            before, now = (stages.get(kind, "none")[:12] for stages in (settings.stages, here))
            remark(f"--like {like}: was made by the {kind} {before}, here is {now}; the picture will be another")
    for option, source, mark in (("--image", image, settings.image), ("--mask", mask, settings.mask_image)):
        if mark is not None and fingerprint(source) != mark:
            remark(f"{option}: holds other pixels than the one that {like} was made from; the picture will be another")
