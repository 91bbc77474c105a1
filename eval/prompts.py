"""The benchmark's prompts as JSON, for pictures that are made elsewhere.

python -m eval.prompts --level 2 --out prompts.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.makers.questions import shapes_prompts
from sd_mini.cli.arguments import Parser, whole_number
from sd_mini.config import command
from sd_mini.files import written_to
from sd_mini.shapes import LEVELS


def main(argv: Sequence[str] | None = None) -> int:
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m eval.prompts", description="Write the prompts of shapes as JSON.")
    parser.add_argument("--level", type=int, choices=LEVELS, default=1, help="of the world (%(default)s)")
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of the scenes, as --seed of the evaluation (%(default)s)"
    )
    parser.add_argument("--out", required=True, type=Path, help="the JSON file; an older one is replaced")
    options = parser.parse_args(argv)
    text = json.dumps(benchmark(options.level, options.seed), indent=1) + "\n"
    with written_to(options.out):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_name(f"{options.out.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(options.out)
    print(options.out)


def benchmark(level: int, seed: int) -> dict:
    """Each prompt of the three splits with its id, text and scene graph; where its objects are is not part of it."""
    prompts = []
    for split, captions, scenes in shapes_prompts(None, seed, level):
        for i, (caption, scene) in enumerate(zip(captions, scenes, strict=True)):
            graph = {name: value for name, value in scene.to_dict().items() if name not in _DRAWN}
            prompts.append({"id": f"{split}/{i:03d}", "split": split, "text": caption, "graph": graph})
    return {"benchmark": "sd_mini shapes", "level": level, "seed": seed, "prompts": prompts}


_DRAWN = {"level", "layout", "background", "top"}  # how a scene is drawn, which its caption leaves open


if __name__ == "__main__":
    sys.exit(main())
