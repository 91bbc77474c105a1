"""The few rows of a report that everything else explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from eval.metrics.all import METRICS
from eval.metrics.registry import Row, percent_row


def headline(report: Mapping[str, Any]) -> list[Row]:
    """report.json => its main measures, each with its 95 % interval, where it has one, and n."""
    rows = [
        percent_row(f"exact, {split}", scores["all"], "exact", scores["all"]["n"])
        for split, scores in report.get("composition", {}).items()
    ]
    rows += [row for name, metric in METRICS.items() if name in report for row in metric.rows(report[name])]
    few = report.get("different_captions")
    return rows if few is None else [replace(row, n=f"{row.n} ({few} different captions)") for row in rows]
