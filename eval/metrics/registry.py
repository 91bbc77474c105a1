"""The metrics of the report. To add one, write a file with a `Metric` and register it in `eval/metrics/all.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_mini.data.captioned import CaptionedPictures, DataConfig

if TYPE_CHECKING:
    from eval.analysis.text import TextProbe
    from eval.features.features import Extractor
    from eval.makers.questions import Question
    from eval.makers.sources import PictureSource
    from eval.metrics.clip_score import Clip
    from eval.metrics.memorisation import Nearest


@dataclass(frozen=True)
class Row:
    """One line of the headline table, which the page and the model card show."""

    name: str
    value: str
    interval: str
    """the 95 % interval, or nothing"""
    n: str


@dataclass(frozen=True)
class Tools:
    """What the metrics need beside the pictures, as far as it is available."""

    networks: list[Extractor]
    """feature networks, each with distances of its own"""
    cache: Path
    """folder for the features of reference pictures"""
    pictures: Path | None = None
    """folder for the data's decoded pictures, which are in memory without it"""
    batch: int = 64
    clip: Clip | None = None
    probe: TextProbe | None = None
    training: CaptionedPictures | None = None
    data: DataConfig = field(default_factory=DataConfig)
    """where the prompts' rows come from: the text stage reads them at a size of its own"""
    blame: bool = True
    """whether each stage's part of every distance is measured"""


@dataclass
class Sample:
    """What one metric is computed from: the pictures of the first split, and what belongs to them.

    `pictures` (N, 3, R, R) uint8; `sets` by name, pictures in which one stage after the other takes part. A metric may
    append to `remarks`, lines that the user reads, add to `blame`, and leave the `nearest` training pictures.
    """

    question: Question
    pictures: np.ndarray
    sets: dict[str, np.ndarray]
    maker: PictureSource | None
    tools: Tools
    remarks: list[str] = field(default_factory=list)
    blame: dict[str, Any] = field(default_factory=dict)
    nearest: Nearest | None = None
    repeated: np.ndarray | None = None
    """pictures of `question.repeated`"""
    _features: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def features(self, extractor: Extractor, name: str) -> np.ndarray:
        """(N, D) of the set of that name, computed once for all metrics."""
        key = (extractor.name, name)
        if key not in self._features:
            self._features[key] = extractor(self.sets[name])
        return self._features[key]

    @property
    def prompts(self) -> list[str]:
        return self.question.splits[0].captions


@dataclass(frozen=True)
class Metric:
    """`name` is its part of report.json, `measure` makes that part (None: left out, and a remark says why), `rows` its
    lines of the headline table, `line` its line on the terminal."""

    name: str
    measure: Callable[[Sample], dict[str, Any] | None]
    rows: Callable[[Mapping[str, Any]], list[Row]]
    line: Callable[[Mapping[str, Any]], list[str]] = lambda part: []


METRICS: dict[str, Metric] = {}
# the parts of report.json that are no metrics
_PARTS = {"composition", "ceiling", "chance", "text", "blame", "sweep", "different_captions"}
_PARTS |= {"remarks", "seconds", "protocol"}


def register(metric: Metric) -> Metric:
    """Raises ValueError for a name that another metric or a part of the report has."""
    if metric.name in METRICS or metric.name in _PARTS:
        raise ValueError(f"metric {metric.name!r} is registered already")
    METRICS[metric.name] = metric
    return metric


def percent_row(name: str, part: Mapping[str, Any], key: str, n: int) -> Row:
    """A row of a share in [0, 1], with the interval that stands beside it as low and high."""
    interval = f"{100 * part['low']:.1f}–{100 * part['high']:.1f}"
    return Row(name, f"{100 * part[key]:.1f} %", interval, str(n))
