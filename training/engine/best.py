"""Stop at the best: the weights that scored best are kept, and a training may end when nothing better comes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sd_mini.errors import UserError
from sd_mini.files import atomic_folder, read_json

_WEIGHTS, _FACTS = "weights.safetensors", "best.json"
WORDS = ("lowest", "highest")


def check_wish(wish: str) -> None:
    """Raises UserError for what is not "lowest NAME" or "highest NAME" of a held-out or an evaluator's score."""
    word, _, name = wish.partition(" ")
    if word not in WORDS or not name.startswith(("valid/", "eval/")):
        raise UserError(
            f"train.keep_best {wish!r}: expected lowest or highest and a score, such as 'lowest valid/loss'"
        )


@dataclass(frozen=True)
class Best:
    """The best of all looks so far: its step and score, and how many looks have come after it."""

    step: int
    value: float
    looks_since: int


class BestKeeper:
    """Of a stage in `folder`, by `wish` as `train.keep_best` has it; `best/` holds the weights."""

    def __init__(self, folder: Path, wish: str, patience: int | None):
        word, _, self.name = wish.partition(" ")
        self.wish, self.sign, self.patience, self.folder = wish, (-1 if word == "lowest" else 1), patience, folder

    def best(self) -> Best | None:
        """By the lines of metrics.jsonl, which a resume cuts to what it has done; of equal ones the first."""
        path = self.folder / "metrics.jsonl"
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
        looks = [(line["step"], line[self.name]) for line in lines if self.name in line]
        if not looks:
            return None
        at = max(range(len(looks)), key=lambda i: (self.sign * looks[i][1], -i))
        return Best(*looks[at], looks_since=len(looks) - 1 - at)

    @property
    def is_over(self) -> bool:
        """Whether so many looks have come without a better one."""
        best = self.best()
        return self.patience is not None and best is not None and best.looks_since >= self.patience

    def check(self) -> None:
        """At a resume. Raises UserError where the weights of the best look so far were not kept."""
        best, facts = self.best(), read_json(self.folder / "best" / _FACTS)
        if best is not None and (facts is None or facts["step"] < best.step):
            raise UserError(
                f"train.keep_best {self.wish}: the best look so far is of step {best.step}, whose weights were not "
                "kept; leave it out, or start another --run"
            )

    def look(self, step: int, scores: dict[str, float], objective: nn.Module) -> None:
        """Before the scores of `step` are logged: keep these weights if they are the best. Killed in between, the look
        is made again. Raises UserError where no score goes by that name, and for one that is not finite."""
        if self.name not in scores:
            raise UserError(f"train.keep_best {self.wish}: no such score; there are {', '.join(scores)}")
        value = scores[self.name]
        if not math.isfinite(value):
            raise UserError(f"train.keep_best {self.wish}: is {value} at step {step}, so the best cannot be told")
        best = self.best()
        if best is not None and self.sign * value <= self.sign * best.value:
            return
        with atomic_folder(self.folder / "best") as partial:
            save_file({k: v.contiguous().cpu() for k, v in objective.state_dict().items()}, partial / _WEIGHTS)
            facts = {"step": step, "score": self.name, "value": value}
            (partial / _FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def put(self, objective: nn.Module) -> dict[str, Any]:
        """The best weights into `objective`; what is recorded of them. Raises UserError where they are not there."""
        best, facts = self.best(), read_json(self.folder / "best" / _FACTS)
        if best is None:
            raise UserError(f"train.keep_best {self.wish}: was never measured; set the interval of that score")
        if facts is None or facts["step"] != best.step:
            raise UserError(
                f"{self.folder / 'best'}: the weights of step {best.step} are missing; train from there again"
            )
        with torch.no_grad():
            objective.load_state_dict(load_file(self.folder / "best" / _WEIGHTS))
        return facts
