"""The command line: sd-mini generate | inspect | export | data. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sd_mini.cli.editing import add_edit_options, edit_inputs
from sd_mini.cli.inspection import inspect
from sd_mini.config import command, read
from sd_mini.errors import UserError
from sd_mini.files import CONTRACT, PIPELINE_MARK, check_writable, read_json, written_to
from sd_mini.openmp import let_threads_sleep
from sd_mini.stages.contract import KINDS, read_contract

if TYPE_CHECKING:
    from PIL import Image

    from sd_mini.pipelines.text_to_image import Pipeline


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ValueErrors, for `config.command`: one line, without the usage in front.

    Abbreviated options are refused: a later option could change what they mean.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows what is expected")


def whole_number(minimum: int) -> Callable[[str], int]:
    """An argparse type: text => a whole number of at least `minimum` and at most 18 digits, which fits any seed."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from {minimum} to 10^18 - 1")
        return int(text)

    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """`sd-mini ...` => exit code: 0, or 2 after one line on stderr that says what to mend."""
    let_threads_sleep()  # nothing has imported torch yet
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    options, rest = _parser().parse_known_args(argv)
    if rest and options.run_command is not _survey:
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; `sd-mini --help` shows what is expected")
    options.rest = rest
    options.run_command(options)


def _parser() -> Parser:
    parser = Parser(prog="sd-mini", description="A latent text-to-image model, trained in three stages.")
    commands = parser.add_subparsers(required=True, metavar="{generate,inspect,export,data}")

    generate = commands.add_parser("generate", help="make pictures of a prompt")
    generate.set_defaults(run_command=_generate)
    generate.add_argument("run", metavar="RUN", type=Path, help="a run folder, or a pipeline folder itself")
    generate.add_argument("prompt", metavar="PROMPT", help="what the picture shows")
    generate.add_argument("--out", type=Path, default=Path("picture.png"), help="picture file (%(default)s)")
    generate.add_argument("--seed", type=whole_number(0), default=0, help="of the first picture's noise (%(default)s)")
    generate.add_argument(
        "--count", type=whole_number(1), default=1, help="pictures, of seeds SEED, SEED + 1, ... as OUT_0, ..."
    )
    generate.add_argument("--steps", type=whole_number(1), help="of the scheduler; the recipe's own if left out")
    generate.add_argument("--guidance", type=float, help="guidance scale, 1 is none; the recipe's own if left out")
    generate.add_argument(
        "--height", type=whole_number(1), help="px; if left out, the picture's of --image, or of the training"
    )
    generate.add_argument("--width", type=whole_number(1), help="px; as --height")
    add_edit_options(generate)
    generate.add_argument(
        "--strict", action="store_true", help="refuse a prompt that is too long, instead of cutting it"
    )
    generate.add_argument(
        "--tile", type=whole_number(1), help="decode in squares of so many latent cells a side: memory by the square"
    )
    generate.add_argument("--negative", metavar="PROMPT", help="what guidance leads away from")
    generate.add_argument("--sampler", help="euler, heun, dpm++, unipc, ddim or ddpm; the recipe's own if left out")
    generate.add_argument("--lora", metavar="FOLDER", type=Path, help="a LoRA of this noise predictor, to be merged")
    generate.add_argument(
        "--autoguidance", action="store_true", help="lead away from the earlier snapshot that was joined as --guide"
    )

    look = commands.add_parser("inspect", help="print what a run holds")
    look.set_defaults(run_command=lambda options: print(*inspect(options.run), sep="\n"))
    look.add_argument("run", metavar="RUN", type=Path, help="a run folder")

    export = commands.add_parser("export", help="join a run's three stages to a pipeline folder")
    export.set_defaults(run_command=_export)
    export.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    export.add_argument("--out", type=Path, help="pipeline folder (RUN/pipeline)")
    export.add_argument(
        "--guide", metavar="FOLDER", type=Path, help="an earlier noise predictor of the run, for autoguidance"
    )

    data = commands.add_parser("data", help="show what a data source holds, before anything is trained on it")
    data.set_defaults(run_command=_survey)
    data.add_argument("source", metavar="SOURCE", help="as data.source; further options are its fields: --text_column")
    data.add_argument("--tokenizer", metavar="NAME", help="an encoder's folder or hub name: lengths and broken words")
    data.add_argument("--sheet", metavar="FILE", type=Path, help="a picture of 40 rows with their captions")
    return parser


def open_pipeline(folder: Path) -> Pipeline:
    """A pipeline folder, or a run folder => the Pipeline, on the GPU where there is one.

    A run's `pipeline/` is taken if it is there, else its three exported stages are joined.

    Raises ValueError, one line: no such folder, neither of the two, a stage not trained yet, or damaged files.
    """
    saved = next((f for f in (folder, folder / "pipeline") if (f / PIPELINE_MARK).is_file()), None)
    if saved is None:
        _check_run(folder)
    elif saved != folder:
        _check_current(folder, saved)
    import torch

    from sd_mini.pipelines.text_to_image import Pipeline
    from sd_mini.weights import reason

    _hide_loading_bars()
    try:
        pipeline = Pipeline.from_run(folder) if saved is None else Pipeline.from_pretrained(saved)
    except UserError:
        raise
    except Exception as error:  # of damaged files the libraries raise whatever their parsers do
        what = saved or folder
        raise UserError(f"{what}: cannot be loaded: {reason(error)}; join it again: sd-mini export RUN") from error
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def _check_current(run: Path, saved: Path) -> None:
    """Raises ValueError if a stage of the run was trained anew after its pipeline was joined."""
    joined = (read_json(saved / PIPELINE_MARK) or {}).get("stages", {})
    for kind in KINDS:
        final = run / kind / "final"
        if (final / CONTRACT).is_file() and read_contract(final, kind)["hash"] != joined.get(kind):
            raise UserError(
                f"{saved}: was joined from another {kind} than {final}; join it again: sd-mini export {run}"
            )


def _check_run(folder: Path) -> None:
    """Raises ValueError unless `folder` is a run with all three stages exported."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected a run folder, or a pipeline folder ({PIPELINE_MARK} in it)"
        )
    if not any((folder / kind).is_dir() for kind in KINDS):
        raise UserError(
            f"{folder}: neither a pipeline folder (no {PIPELINE_MARK}) nor a run folder (no {', '.join(KINDS)}); "
            "give one of these"
        )
    for kind in KINDS:
        read_contract(folder / kind / "final", kind)


def _hide_loading_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()


def check_target(folder: Path, mark: str) -> Path:
    """The `--out` folder, checked before anything is computed.

    What we wrote into a folder that stands there is replaced, so it has to be empty or to hold `mark`, the file by
    which ours are known; a user's other files stay (`files.atomic_folder`).

    Raises ValueError for a file in its place or above it, for a folder of anything else, and where nothing can be
    written.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--out {folder}: {nearest} is a file, expected a folder; give another name")
    if nearest == folder and any(folder.iterdir()) and not (folder / mark).is_file():
        raise UserError(f"--out {folder}: holds other files (no {mark}) and would be replaced; give a new folder")
    check_writable(folder)
    return folder


def _generate(options: argparse.Namespace) -> None:
    picture_format = _check_picture_file(options.out)
    targets = [options.out]
    if options.count > 1:
        targets = [options.out.with_stem(f"{options.out.stem}_{i}") for i in range(options.count)]
    edit = edit_inputs(options)
    pipeline = open_pipeline(options.run)
    if options.tile is not None:
        pipeline.enable_vae_tiling(options.tile)
    if options.sampler is not None:
        pipeline.use_sampler(options.sampler)
    if options.lora is not None:
        pipeline.load_lora(options.lora)
    if edit:
        from sd_mini import ImageToImagePipeline, InpaintingPipeline

        sibling = InpaintingPipeline if "mask_image" in edit else ImageToImagePipeline
        pipeline = sibling.from_pipe(pipeline)
    import torch

    for seed, target in enumerate(targets, options.seed):
        # one at a time: in a batch the last bits, and so a pixel's rounding, would depend on the neighbours
        made = pipeline(
            options.prompt,
            negative_prompt=options.negative,
            height=options.height,
            width=options.width,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            autoguidance=options.autoguidance,
            strict=options.strict,
            generator=torch.Generator().manual_seed(seed),
            **edit,
        )
        _save(made.images[0], target, picture_format)
        print(target)


def _check_picture_file(path: Path) -> str:
    """A file to be written => Pillow's format for its ending. Raises ValueError if no picture can be put there."""
    from PIL import Image

    if not path.parent.is_dir():
        raise UserError(f"--out {path}: no folder {path.parent}; make it, or give another")
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder, expected a picture file such as {path / 'picture.png'}")
    picture_format = Image.registered_extensions().get(path.suffix.lower(), "none")
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), picture_format)
    except (KeyError, OSError, ValueError):  # no such format; one that Pillow only reads; one without colours
        raise UserError(f"--out {path}: Pillow writes no {path.suffix or 'file without an ending'}; use .png") from None
    check_writable(path)
    return picture_format


def _save(picture: Image.Image, path: Path, picture_format: str) -> None:
    """Write beside `path`, then rename: whoever looks finds a whole picture or none."""
    partial = path.with_name(f".{path.name}.partial")
    with written_to(path):
        try:
            picture.save(partial, picture_format)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _export(options: argparse.Namespace) -> None:
    _check_run(options.run)
    out = check_target(options.out or options.run / "pipeline", PIPELINE_MARK)
    from sd_mini.pipelines.text_to_image import Pipeline

    _hide_loading_bars()
    Pipeline.from_run(options.run, guide=options.guide).save(out)
    print(out)


def _survey(options: argparse.Namespace) -> None:
    if options.source == "shapes":
        raise UserError("shapes: is drawn, not read; give a file, a folder or a hub name")
    if options.sheet is not None:
        _check_picture_file(options.sheet)
    from sd_mini.data.captioned import DataConfig
    from sd_mini.data.preflight import survey

    config = read(DataConfig, None, ["--source", options.source, *options.rest])
    print(*survey(config, options.tokenizer, options.sheet), sep="\n")
