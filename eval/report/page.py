"""report.json and pictures => report.html: one file that needs no network and no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from eval.judge.judge import CATEGORIES
from eval.report import figures
from eval.report.gallery import Gallery
from eval.report.headline import headline
from sd_mini import images

_TEMPLATE = "report.html.j2"


def render(report: Mapping[str, Any], galleries: Sequence[Gallery], curves: Mapping[str, Any]) -> str:
    """report.json's content, the pictures to show and the stages' training curves => the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        headline=headline(report),
        remarks=report["remarks"],
        blame=_blame(report),
        splits=_splits(report),
        sweep={**report["sweep"], "svg": figures.sweep(report["sweep"])} if "sweep" in report else None,
        diversity=report.get("diversity"),
        by_caption=report.get("by_caption", {}),
        text=report.get("text"),
        galleries=galleries,
        curves=figures.curves(curves) if curves else "",
        seconds=report["seconds"],
        protocol=report["protocol"],
        png=_png,
    )


def _blame(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A waterfall for every split and measure."""
    found = []
    for split, measures in report.get("blame", {}).items():
        for measure, entry in measures.items():
            is_share = measure == "not exact"
            unit, factor = (f"{measure}, %", 100.0) if is_share else (measure, 1.0)
            svg = figures.waterfall(entry["shares"], entry.get("shuffled"), unit, factor, f"{split} {measure}")
            found.append({"split": split, "measure": measure, "svg": svg})
    return found


def _splits(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By split, the categories it has, with what was made, the ceiling and chance side by side."""
    found = {}
    for split, scores in report.get("composition", {}).items():
        ceiling, chance = report.get("ceiling", {}).get(split), report["chance"][split]
        rows = [
            {
                "category": category,
                "score": scores[category],
                "ceiling": ceiling[category] if ceiling is not None else None,
                "chance": chance[category],
            }
            for category in CATEGORIES
            if category in scores
        ]
        svg = figures.bars(scores, ceiling, chance, split)
        found[split] = {"rows": rows, "has_ceiling": ceiling is not None, "svg": svg}
    return found


def _png(picture: np.ndarray) -> str:
    """(3, H, W) uint8 => an encoded PNG in base64."""
    encoded = io.BytesIO()
    images.to_pil(picture[None])[0].save(encoded, "PNG")
    return base64.b64encode(encoded.getvalue()).decode("ascii")
