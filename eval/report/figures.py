"""The report's figures as SVG that stands inside a page: no script, no address, text as text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from eval.judge.judge import CATEGORIES

_INK, _PALE, _MARK, _THIRD = "#1f5f8b", "#a9c5d8", "#c0392b", "#7a7a7a"
_PART_COLOURS = {
    "floor": "#bdbdbd",
    "autoencoder": "#e0a030",
    "text_encoder": "#3a8a5a",
    "noise_predictor": _INK,
    "rest": _INK,
}


def bars(scores: Mapping[str, Any], ceiling: Mapping[str, Any] | None, chance: Mapping[str, Any], label: str) -> str:
    """One split's categories: exact with its interval, a line at the ceiling, one at chance."""
    names = [category for category in CATEGORIES if category in scores]
    figure, axes = _figure(0.34 * len(names) + 0.9)
    for place, name in enumerate(names):
        score = scores[name]
        axes.barh(place, 100 * score["exact"], color=_PALE, height=0.62)
        axes.plot([100 * score["low"], 100 * score["high"]], [place, place], color=_INK, lw=1.6)
        if ceiling is not None:
            axes.plot([100 * ceiling[name]["exact"]] * 2, [place - 0.4, place + 0.4], color="black", lw=1.6)
        axes.plot([100 * chance[name]["exact"]] * 2, [place - 0.4, place + 0.4], color=_MARK, lw=1.6, ls=":")
    axes.set(
        yticks=range(len(names)), yticklabels=[n.replace("_", " ") for n in names], xlim=(0, 101), xlabel="exact, %"
    )
    axes.invert_yaxis()
    return _svg(figure, f"exact by category, {label}")


def waterfall(
    shares: Mapping[str, Mapping[str, float]], shuffled: float | None, unit: str, factor: float, label: str
) -> str:
    """Errors that grow from stage to stage; `factor` turns a share into `unit`."""
    figure, axes = _figure(0.42 * (len(shares) + 1 + (shuffled is not None)) + 0.8)
    start, names = 0.0, []
    for place, (part, entry) in enumerate(shares.items()):
        value = factor * entry["share"]
        axes.barh(place, value, left=start, color=_PART_COLOURS[part], height=0.62)
        if "low" in entry:
            ends = [start + factor * entry["low"], start + factor * entry["high"]]
            axes.plot(ends, [place, place], color="black", lw=1)
        start += value
        names.append(f"{part_name(part)} {value:+.3g}")
    axes.barh(len(names), start, color="#444444", height=0.62)
    names.append(f"in all {start:.3g}")
    if shuffled is not None:
        axes.barh(len(names), factor * shuffled, color="white", edgecolor=_THIRD, hatch="//", height=0.62)
        names.append(f"shuffled prompts {factor * shuffled:.3g}")
    axes.axvline(0, color="black", lw=0.6)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel=unit)
    axes.invert_yaxis()
    return _svg(figure, f"{label} by stage")


def part_name(part: str) -> str:
    return {"floor": "real pictures", "rest": "text and noise"}.get(part, part.replace("_", " "))


def sweep(found: Mapping[str, Any]) -> str:
    """Fit against distance, up and left is better, and against diversity, up and right is: a point a guidance scale.
    The chosen one is marked."""
    from matplotlib.figure import Figure  # a second

    points, is_exact = found["points"], found["fit"] == "exact"
    factor, unit = (100, "exact, %") if is_exact else (1, "CLIP score, x100")
    panels = {f"{found['distance']}, lower is nearer to real pictures": [p["fd"] for p in points]}
    if all("diversity" in p for p in points):
        shares = [100 * p["diversity"]["share"] for p in points]
        panels["diversity within a prompt (Vendi), % of the data's"] = shares
    figure = Figure(figsize=(4.3, 3.0 * len(panels)), layout="constrained")
    fit = [factor * p["fit"] for p in points]
    ends = [[f - factor * p["low"], factor * p["high"] - f] for f, p in zip(fit, points, strict=True)]
    for row, (label, values) in enumerate(panels.items()):
        axes = figure.add_subplot(len(panels), 1, row + 1)
        bars = list(zip(*ends, strict=True))
        axes.errorbar(values, fit, yerr=bars, color=_INK, marker="o", ms=4, lw=1, elinewidth=0.6)
        for x, y, point in zip(values, fit, points, strict=True):
            axes.annotate(f"{point['guidance']:g}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
            if point["guidance"] == found["chosen"]:
                axes.plot(x, y, marker="o", ms=11, mfc="none", mec=_MARK, mew=1.6)
        axes.set(xlabel=label, ylabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure, f"{found['fit']} against {found['distance']} by guidance scale")


def curves(stages: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> str:
    """Each stage's loss and held-out score by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3, 1.7 * len(stages)), layout="constrained")
    for row, (stage, series) in enumerate(stages.items()):
        axes = figure.add_subplot(len(stages), 1, row + 1)
        for number, (name, points) in enumerate(series.items()):
            at = axes if number == 0 else axes.twinx()
            colour = (_INK, _MARK)[number]
            at.plot(*zip(*points, strict=True), color=colour, lw=1.2, marker="." if len(points) < 20 else None)
            at.set_ylabel(name, color=colour, fontsize=8)
            at.tick_params(labelsize=8)
        axes.set_title(stage.replace("_", " "), fontsize=9, loc="left")
    return _svg(figure, "training curves")


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # a second

    figure = Figure(figsize=(4.3, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(labelsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Any, label: str) -> str:
    import matplotlib

    written = io.StringIO()
    # text stays text; the salt keeps two figures' names apart on one page, and the same figure the same bytes
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    body = written.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", body, count=3)  # HTML knows what an svg is
    body = body.replace("xlink:href=", "href=")
    return body.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
