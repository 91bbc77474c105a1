"""report.json and report.html: how many rows each rule refused, examples of each, and histograms before and after."""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq

from sd_mini import images
from sd_mini.errors import UserError
from training.data.prepare.config import PrepareConfig
from training.data.prepare.facts import Facts
from training.data.prepare.shard import STEPS
from training.data.prepare.source import Source, open_rows
from training.data.prepare.verdicts import REASONS, Verdicts

EXAMPLES = 6  # of each reason: the first in order
PAIRS = 24  # near-duplicates that are shown
THUMBNAIL_SIDE = 96  # px
_EDGES = {  # of the histograms' bins
    "short side, px": [0, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 20001],
    "long side / short side": [1, 1.05, 1.2, 1.35, 1.5, 1.8, 2, 2.5, 3, 4, 6, 10, 20001],
    "characters of the caption": [0, 1, 5, 10, 20, 30, 50, 75, 100, 150, 200, 400, 1000, 2**31],
    "sharpness": [0, 3, 6, 12, 25, 50, 100, 200, 400, 800, 1600, 3200, 2**31],
}


def summary(config: PrepareConfig, facts: Facts, test_rows: int, verdicts: Verdicts) -> dict[str, Any]:
    """report.json's content; `rows` is `kept` and all of `rejected` together."""
    counts = Counter(REASONS[code] for code in verdicts.code[verdicts.code > 0].tolist())
    for table in facts.shards(["step", "reason"]):
        steps, reasons = (table[name].drop_null().to_pylist() for name in ("step", "reason"))
        counts.update(zip(steps, reasons, strict=True))
    by_step: dict[str, dict[str, int]] = {step: {} for step in STEPS}
    for (step, reason), number in sorted(counts.items()):
        by_step[step][reason] = number
    kept_pairs = _kept_pairs(verdicts)
    return {
        "rows": len(verdicts.alive),
        "kept": int(verdicts.alive.sum()),
        "test": test_rows,
        "rejected": by_step,
        "changed_captions": int(np.sum(facts.column("changed") & verdicts.alive)),
        "kept_for_another_caption": len(np.unique(kept_pairs[:, 1])),
        "remarks": verdicts.remarks,
        "histograms": _histograms(facts, verdicts.alive),
        "config": config.content(),
    }


def _kept_pairs(verdicts: Verdicts) -> np.ndarray:
    """Near-duplicates of which both are kept in the end."""
    return verdicts.kept_pairs[verdicts.alive[verdicts.kept_pairs].all(1)]


def _histograms(facts: Facts, alive: np.ndarray) -> dict[str, dict[str, Any]]:
    """Of the rows that were read, and of those that are kept."""
    width, height = (facts.column(name).astype(np.float64) for name in ("width", "height"))
    short, long = np.minimum(width, height), np.maximum(width, height)
    is_read = short > 0
    values = {
        "short side, px": short,
        "long side / short side": long / np.maximum(short, 1),
        "characters of the caption": facts.column("length"),
        "sharpness": facts.column("sharpness"),
    }
    return {
        name: {
            "edges": _EDGES[name],
            "read": np.histogram(value[is_read], _EDGES[name])[0].tolist(),
            "kept": np.histogram(value[alive], _EDGES[name])[0].tolist(),
        }
        for name, value in values.items()
    }


def page(config: PrepareConfig, facts: Facts, verdicts: Verdicts, rejected: Path, report: Mapping[str, Any]) -> str:
    """report.html: one file that needs no network and no script. `rejected` is rejected.parquet."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    examples = _first_of_each_reason(verdicts, rejected)
    near = [
        ("One of each was kept", _refused_pairs(verdicts)[:PAIRS]),
        ("Both were kept, for their captions", _kept_pairs(verdicts)[:PAIRS]),
    ]
    rows = {row for members in examples.values() for row, _ in members}
    rows |= {int(row) for _, pairs in near for row in pairs.ravel()}
    tiles = _tiles(open_rows(config, "data"), facts, sorted(rows))
    return environment.get_template("report.html.j2").render(
        report=report,
        source=config.data.source,
        examples={key: [(tiles[row], detail) for row, detail in members] for key, members in examples.items()},
        near=[(title, [(tiles[a], tiles[b]) for a, b in pairs.tolist()]) for title, pairs in near if len(pairs)],
        bars=[_bars(name, **bins) for name, bins in report["histograms"].items()],
    )


def _refused_pairs(verdicts: Verdicts) -> np.ndarray:
    """Near-duplicates (K, 2): what was kept, and what was refused for it."""
    (rows,) = np.nonzero(verdicts.code == REASONS.index(("duplicates", "near")))
    return np.stack([verdicts.other[rows], rows], 1)


def _first_of_each_reason(verdicts: Verdicts, rejected: Path) -> dict[tuple[str, str], list[tuple[int, str]]]:
    """(step, reason) => row numbers and details."""
    first: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    rows = iter(np.flatnonzero(~verdicts.alive).tolist())  # the file has the rows in order
    for batch in pq.ParquetFile(rejected).iter_batches(columns=["step", "reason", "detail"]):
        for fields, row in zip(batch.to_pylist(), rows, strict=False):
            members = first[fields["step"], fields["reason"]]
            if len(members) < EXAMPLES:
                members.append((row, fields["detail"]))
    return dict(sorted(first.items(), key=lambda item: (STEPS.index(item[0][0]), item[0][1])))


def _tiles(source: Source, facts: Facts, rows: Sequence[int]) -> dict[int, dict[str, str]]:
    """Row => its id, its caption and a small PNG in base64, "" where the picture cannot be read."""
    known = facts.take(rows, ["id", "captions"])
    tiles = {}
    for row, read in zip(rows, source.read(rows), strict=True):
        caption = (known[row]["captions"] or [""])[0]
        tiles[row] = {"id": read.id, "caption": caption[:300], "png": _thumbnail(read.picture)}
    return tiles


def _thumbnail(encoded: bytes | None) -> str:
    if encoded is None:
        return ""
    try:
        rgb, _ = images.decode_image(encoded, least_side=THUMBNAIL_SIDE)
    except UserError:
        return ""
    rgb.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    written = io.BytesIO()
    rgb.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode("ascii")


def _bars(name: str, edges: Sequence[float], read: Sequence[int], kept: Sequence[int]) -> dict[str, Any]:
    """A histogram's bars for the page, heights as shares of the highest."""
    highest = max(*read, 1)
    bars = [
        {"label": f"{edge:g}", "read": a / highest, "kept": b / highest, "counts": (a, b)}
        for edge, a, b in zip(edges[:-1], read, kept, strict=True)
    ]
    filled = [i for i, count in enumerate(read) if count]
    return {"name": name, "bars": bars[filled[0] : filled[-1] + 1] if filled else []}
