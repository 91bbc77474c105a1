"""A model card, as diffusers and the hub expect it: README.md in the pipeline's folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from eval.makers.sources import CARD, Ours, PictureSource
from eval.report.headline import headline
from sd_mini.files import GENERATED, atomic_text, written_to


def write(maker: PictureSource, report: Mapping[str, Any], out: Path) -> Path | None:
    """README.md beside the weights of a saved pipeline of ours. A card that someone else wrote is left alone, and so is
    another's pipeline, and one that cannot be written to: the report's folder has it then. None where that holds
    someone's own, too."""
    own = [maker.folder] if isinstance(maker, Ours) and maker.folder is not None else []
    for folder in (*own, out):
        target = folder / CARD
        if target.is_file() and GENERATED not in target.read_text(encoding="utf-8", errors="replace"):
            continue
        with written_to(target) if folder == out else suppress(OSError):
            atomic_text(target, text(report))
            return target
    return None


def text(report: Mapping[str, Any]) -> str:
    """report.json => the card: front matter, how to use it, what was measured and how."""
    protocol, rows = report["protocol"], headline(report)
    is_ours = "pipeline" not in protocol  # its class, of another's
    library, name = ("sd_mini", "Pipeline") if is_ours else ("diffusers", "DiffusionPipeline")
    guidance = f", guidance {protocol['guidance']:g}" if "guidance" in protocol else ""
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags: [text-to-image, sd_mini]" if is_ours else "tags: [text-to-image]",
        "---",
        GENERATED,
        "",
        f"# Text to image, measured on {protocol['data']}",
        "",
        f"{protocol['resolution']} x {protocol['resolution']} px, {protocol['scheduler']}, {protocol['steps']} steps"
        f"{guidance}.",
        "",
        "```python",
        f"from {library} import {name}",
        "",
        f'picture = {name}.from_pretrained("FOLDER")("a prompt").images[0]',
        "```",
        "",
        "| measure | value | 95 % | n |",
        "|---|---|---|---|",
        *(f"| {row.name} | {row.value} | {row.interval} | {row.n} |" for row in rows),
        "",
        *_training(report),
        "## Protocol",
        "",
        *(f"- {name.replace('_', ' ')}: {_plain(value)}" for name, value in protocol.items()),
        "",
    ]
    return "\n".join(lines)


def _training(report: Mapping[str, Any]) -> list[str]:
    stages = {k: v for k, v in report["seconds"].items() if k not in ("evaluation", "total")}
    if not stages:
        return []
    spent = ", ".join(f"{name.replace('_', ' ')} {value:.0f} s" for name, value in stages.items())
    return ["## Training", "", f"Stages trained apart: {spent}.", ""]


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
