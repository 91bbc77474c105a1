"""A folder that a command was given => its Pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sd_mini.errors import UserError
from sd_mini.files import CONTRACT, PIPELINE_MARK, read_json
from sd_mini.progress import is_seen
from sd_mini.stages.contract import GENERATOR, KINDS, exported_drawers, kind_of, lineage, read_contract

if TYPE_CHECKING:
    from sd_mini.pipelines.text_to_image import Pipeline


def open_pipeline(folder: Path) -> Pipeline:
    """A pipeline folder, or a run folder => the Pipeline, on the GPU where there is one.

    A run's `pipeline/` is taken if it is there, else its three exported stages are joined.

    Raises ValueError, one line: no such folder, neither of the two, a stage not trained yet, or damaged files.
    """
    saved = next((f for f in (folder, folder / "pipeline") if (f / PIPELINE_MARK).is_file()), None)
    if saved is None:
        check_run(folder)
    elif saved != folder:
        _check_current(folder, saved)
    import torch

    from sd_mini.pipelines.text_to_image import Pipeline
    from sd_mini.weights import reason

    hide_loading_bars()
    try:
        pipeline = Pipeline.from_run(folder) if saved is None else Pipeline.from_pretrained(saved)
    except UserError:
        raise
    except Exception as error:  # of damaged files the libraries raise whatever their parsers do
        what = saved or folder
        raise UserError(f"{what}: cannot be loaded: {reason(error)}; join it again: sd-mini export RUN") from error
    pipeline.set_progress_bar_config(disable=not is_seen())
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def _check_current(run: Path, saved: Path) -> None:
    """Raises ValueError if a stage of the run was trained anew after its pipeline was joined."""
    joined = (read_json(saved / PIPELINE_MARK) or {}).get("stages", {})
    for kind in KINDS:
        final, digest = run / kind / "final", joined.get(kind)
        if kind == KINDS[2] and digest is None and GENERATOR in joined:  # its latents are drawn by another family
            exported = [stage for stage in exported_drawers(run) if kind_of(stage) == GENERATOR]
            if exported and not lineage(run, joined[GENERATOR]):
                raise UserError(
                    f"{saved}: was joined from another generator than lies in {run}; join it again: sd-mini export "
                    f"{run}"
                )
            continue
        is_tuned = kind == "noise_predictor" and bool(lineage(run, digest))
        if (final / CONTRACT).is_file() and read_contract(final, kind)["hash"] != digest and not is_tuned:
            raise UserError(
                f"{saved}: was joined from another {kind} than {final}; join it again: sd-mini export {run}"
            )


def check_run(folder: Path, predictor: str = "noise_predictor") -> None:
    """Raises ValueError unless `folder` is a run with the first two stages and `predictor` exported."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected a run folder, or a pipeline folder ({PIPELINE_MARK} in it)"
        )
    if not any((folder / kind).is_dir() for kind in KINDS):
        raise UserError(
            f"{folder}: neither a pipeline folder (no {PIPELINE_MARK}) nor a run folder (no {', '.join(KINDS)}); "
            "give one of these"
        )
    for stage in (*KINDS[:2], predictor):
        read_contract(folder / stage / "final", kind_of(stage))


def hide_loading_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
