"""Loss curves of the stages, from their metrics.jsonl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_mini.stages.contract import KINDS

if TYPE_CHECKING:
    import pandas

    from sd_mini.app.runs import Run

HELD_OUT = "valid/"  # before the name of a measure on rows that are not trained on
_NO_MEASURE = ("step", "seconds")


def measures(run: Run) -> list[str]:
    """Names of what the stages have recorded, the loss first; a held-out measure goes with its like."""
    names = dict.fromkeys(["loss"])
    for kind in KINDS:
        for record in run.metrics(kind):
            names |= dict.fromkeys(name.removeprefix(HELD_OUT) for name in record if name not in _NO_MEASURE)
    return list(names)


def table(records: list[dict[str, Any]], measure: str) -> pandas.DataFrame:
    """Records of a stage => rows of step, value and measure, of `measure` in training and on held-out rows."""
    import pandas

    rows = [
        {"step": record["step"], "value": float(record[name]), "measure": label}
        for name, label in ((measure, "training"), (HELD_OUT + measure, "held out"))
        for record in records
        if isinstance(record.get(name), int | float)
    ]
    return pandas.DataFrame(rows, columns=["step", "value", "measure"])
