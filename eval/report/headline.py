"""The few rows of a report that everything else explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Row:
    name: str
    value: str
    interval: str
    n: str


def headline(report: Mapping[str, Any]) -> list[Row]:
    """report.json => its main measures, each with its 95 % interval, where it has one, and n."""
    rows = []
    for split, scores in report.get("composition", {}).items():
        rows.append(_share(f"exact, {split}", scores["all"], "exact", scores["all"]["n"]))
    for name, found in report["distances"].items():
        rows += _distances(name, found)
    if "clip" in report:
        rows += _clip(report["clip"])
    if "reconstruction" in report:
        found = report["reconstruction"]
        ends = f"{found['psnr_low']:.2f}–{found['psnr_high']:.2f}"
        rows.append(Row("reconstruction, PSNR", f"{found['psnr']:.2f} dB PSNR", ends, str(found["n"])))
    if "memorisation" in report:
        # by the network's features: pictures that are a little blurred always pass the comparison by pixels
        network = next(name for name in report["memorisation"] if name not in ("training", "n_training", "pixels"))
        found = report["memorisation"][network]
        name = f"closer to training pictures than {found['expected']:.0%} of held-out ones, by {network}"
        rows.append(_share(name, found, "copied", found["n"]))
    few = report.get("different_captions")
    return rows if few is None else [replace(row, n=f"{row.n} ({few} different captions)") for row in rows]


def _share(name: str, found: Mapping[str, Any], key: str, n: int) -> Row:
    ends = f"{100 * found['low']:.1f}–{100 * found['high']:.1f}"
    return Row(name, f"{100 * found[key]:.1f} %", ends, str(n))


def _distances(name: str, found: Mapping[str, Any]) -> list[Row]:
    n = f"{found['n']} : {found['n_reference']}"
    ends = f"{found['low']:.4g}–{found['high']:.4g}" if "low" in found else ""
    rows = [Row(name, f"{found['fd']:.4g}", ends, n)]
    if "fd_infinity" in found:
        has_ends = "fd_infinity_low" in found
        ends = f"{found['fd_infinity_low']:.4g}–{found['fd_infinity_high']:.4g}" if has_ends else ""
        rows.append(Row(f"{name} of infinitely many", f"{found['fd_infinity']:.4g}", ends, n))
    kid = "KID" if name == "FID" else f"KID by {name.removeprefix('FD-')}"
    rows.append(Row(f"{kid} (unbiased)", f"{found['kid']:.4g}", f"{found['kid_low']:.4g}–{found['kid_high']:.4g}", n))
    by = "" if name == "FID" else f" by {name.removeprefix('FD-')}"
    for key in ("precision", "recall", "density", "coverage") if "precision" in found else ():
        ends = f"{found[key + '_low']:.3f}–{found[key + '_high']:.3f}"
        rows.append(Row(f"{key}{by}", f"{found[key]:.3f}", ends, n))
    return rows


def _clip(found: Mapping[str, Any]) -> list[Row]:
    label = "; the model that conditioned the pictures" if found["conditioned"] else ""
    names = {"cosine": "cosine", "x100": "100 max(cos, 0)", "hessel": "2.5 max(cos, 0)"}
    rows = []
    for key, what in names.items():
        one = found[key]
        ends = f"{one['low']:.4g}–{one['high']:.4g}"
        rows.append(Row(f"CLIP score, {what}{label}", f"{one['mean']:.4g}", ends, str(found["n"])))
    one = found["r_precision"]
    rows.append(_share(f"CLIP R-precision of {one['candidates']}", one, "mean", found["n"]))
    n = f"{found['n']} : {found['n_reference']}"
    return [*rows, Row("CMMD, 1000 MMD², biased", f"{found['cmmd']:.4g}", "", n)]
