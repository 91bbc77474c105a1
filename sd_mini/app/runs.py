"""What a run folder offers the page: its pipeline, checkpoints, loss curves, report and card, read when asked for."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from sd_mini.errors import UserError
from sd_mini.files import CONTRACT, MANIFEST, PIPELINE_MARK, combined_hash, read_json
from sd_mini.stages.contract import FAMILIES, KINDS, STAGES, TUNED, check_files, drawer_of, kind_of, lineage
from sd_mini.texts import read_text

if TYPE_CHECKING:
    from sd_mini.pipelines.text_to_image import Pipeline

CHECKPOINTS = ("checkpoints", "snapshots")  # folders of a stage that hold averages of its weights, by step
_STEP = re.compile(r"step-(\d{8})")
_AVERAGE = re.compile(r"ema-([0-9.]+)\.safetensors")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)


@dataclass(frozen=True)
class StageState:
    """How far a stage of a run is: "trained", "in training" or "not trained yet", and the last step that it logged."""

    kind: str
    state: str
    step: int | None


class Run:
    """A run folder, or a pipeline folder itself, which may still be written while the page is open.

    Raises UserError for a folder that is neither.
    """

    def __init__(self, folder: Path, open_pipeline: Callable[[Path], Pipeline]):
        self.folder = folder
        self._open, self._lock = open_pipeline, Lock()
        self._pipeline: Pipeline | None = None
        self._opened_from: list[int] = []
        is_pipeline, parent = (folder / PIPELINE_MARK).is_file(), folder.resolve().parent
        self.root = parent if is_pipeline and _is_run(parent) else folder  # where the stages, logs and report are
        self.name = self.root.resolve().name
        if not is_pipeline and not _is_run(folder):
            what = "neither a run folder nor a pipeline folder" if folder.is_dir() else "no such folder"
            raise UserError(
                f"{folder}: {what}; expected a run folder ({', '.join(KINDS)} in it), or a pipeline folder "
                f"({PIPELINE_MARK} in it)"
            )

    def pipeline(self) -> Pipeline:
        """The run's pipeline, loaded once and again after it was exported anew.

        Raises UserError, one line, that names the stage which is missing, or what is damaged.
        """
        with self._lock:
            versions = self._versions()
            if self._pipeline is None or versions != self._opened_from:
                self._pipeline, self._opened_from = None, versions  # its memory is free while the next one loads
                self._pipeline = self._open(self.folder)
                self._pipeline.set_progress_bar_config(disable=True)
            return self._pipeline

    def _versions(self) -> list[int]:
        """When the files were written by which a pipeline and its stages are known."""
        finals = [self.folder / stage / "final" / CONTRACT for stage in STAGES]
        marks = [self.folder / PIPELINE_MARK, self.folder / "pipeline" / PIPELINE_MARK, *finals]
        return [mark.stat().st_mtime_ns if mark.is_file() else 0 for mark in marks]

    @property
    def predictor(self) -> str:
        """The stage that draws the pipeline's latents: stage 3, one tuned from it, or another generator."""
        saved = next((f for f in (self.folder, self.folder / "pipeline") if (f / PIPELINE_MARK).is_file()), None)
        index = read_json(saved / PIPELINE_MARK) if saved is not None else None
        digest = drawer_of((index or {}).get("stages", {}))
        return (lineage(self.root, digest) or ["noise_predictor"])[-1]

    def checkpoints(self) -> dict[int, Path]:
        """Folders with averages of the noise predictor's weights, by step."""
        folders = {}
        for where in CHECKPOINTS:
            for folder in (self.root / self.predictor / where).glob("step-*"):
                if (match := _STEP.fullmatch(folder.name)) and any(folder.glob("ema-*.safetensors")):
                    folders[int(match[1])] = folder
        return dict(sorted(folders.items()))

    def at_checkpoint(self, step: int) -> Pipeline:
        """The run's pipeline with the noise predictor as it was at `step`: the tracked average next to the final one's.

        Raises UserError for a step without one, and for damaged files or those of another network.
        """
        folder = self.checkpoints().get(step)
        if folder is None:
            raise UserError(f"{self.root}: no checkpoint of step {step} any more; choose another")
        from safetensors.torch import load_file

        from sd_mini.pipelines.text_to_image import Pipeline

        pipeline = self.pipeline()
        manifest = read_json(folder / MANIFEST) or {}
        contract = read_json(self.root / self.predictor / "final" / CONTRACT) or {}
        name = _nearest_average(folder, float(contract.get("ema_width") or 0.1))
        files = {name: manifest.get("files", {}).get(name, "")}
        check_files(folder, files, "choose another checkpoint")
        part = "noise_predictor" if pipeline.latent_generator is None else "latent_generator"
        network = copy.deepcopy(getattr(pipeline, part))
        parameters = dict(network.named_parameters())
        for key, tensor in load_file(folder / name).items():
            if key not in parameters or parameters[key].shape != tensor.shape:
                raise UserError(
                    f"{folder / name}: {key} has no place in the run's {part.replace('_', ' ')}; train it as a whole"
                )
            parameters[key].data.copy_(tensor)
        stages = {**pipeline.config.stages, kind_of(self.predictor): combined_hash(files)}
        return Pipeline.from_pipe(pipeline, **{part: network}, stages=stages)

    def stages(self) -> list[StageState]:
        states = []
        for kind in (*KINDS, *(stage for stage in (*TUNED, *FAMILIES) if (self.root / stage).is_dir())):
            records = self.metrics(kind)
            is_trained = (self.root / kind / "final" / CONTRACT).is_file()
            state = "trained" if is_trained else "in training" if records else "not trained yet"
            states.append(StageState(kind, state, records[-1]["step"] if records else None))
        return states

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """The records of a stage's metrics.jsonl. A last line that is still being written is left out."""
        path = self.root / kind / "metrics.jsonl"
        records = []
        for line in read_text(path).split("\n")[:-1] if path.is_file() else []:
            record = _record(line)
            if record is not None:
                records.append(record)
        return records

    def report(self) -> str | None:
        """The HTML of the report; none where the run has not been evaluated."""
        path = self.root / "report" / "report.html"
        return read_text(path) if path.is_file() else None

    def scores(self) -> dict[str, Any] | None:
        """The fields of report.json."""
        return read_json(self.root / "report" / "report.json")

    def card(self) -> str | None:
        """The model card as Markdown, without the fields for a hub in front of it."""
        saved = self.folder if (self.folder / PIPELINE_MARK).is_file() else self.folder / "pipeline"
        path = saved / "README.md"
        return _FRONT_MATTER.sub("", read_text(path)) if path.is_file() else None


def open_runs(folders: Sequence[Path], open_pipeline: Callable[[Path], Pipeline]) -> dict[str, Run]:
    """Run folders by the names under which the page shows them, each once: the folder's own, or its path where two have
    the same."""
    runs = [Run(folder, open_pipeline) for folder in dict.fromkeys(map(Path, folders))]
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else str(run.folder): run for run in runs}


def _is_run(folder: Path) -> bool:
    return any((folder / kind).is_dir() for kind in KINDS)


def _nearest_average(folder: Path, width: float) -> str:
    """The file of the tracked average whose relative width is nearest to `width`."""
    widths = {path.name: float(match[1]) for path in folder.iterdir() if (match := _AVERAGE.fullmatch(path.name))}
    return min(widths, key=lambda name: abs(widths[name] - width))


def _record(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl => its numbers by name; none for a line that is no record of a step."""
    try:
        fields = json.loads(line)
    except ValueError:  # of a training that was killed within a line: the next one begins a new line
        return None
    return fields if isinstance(fields, dict) and isinstance(fields.get("step"), int) else None
