"""Words that no training caption holds: what does a text encoder make of them?

python -m eval.analysis.words RUN RUN ... --words kitten=cat serpent=snake --out FOLDER

Each word is asked for as a prompt, and stands for captions that do hold the word behind the `=`. A picture is right if
the training picture nearest to it has that word in one of its captions. The judge knows neither captions nor encoders:
nearness is the mean square difference of pixels at 16 x 16. Every run draws from the same seeds.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.data_options import add_data, asked_data, check_columns, recorded_data
from eval.judge.judge import wilson
from eval.makers.generate import generate
from eval.makers.sources import Ours, Sampling
from eval.metrics.memorisation import nearest, small_pixels
from eval.report.report import drawer_folder
from sd_mini import images
from sd_mini.cli.arguments import Parser, check_target, whole_number
from sd_mini.cli.opening import open_pipeline
from sd_mini.config import command
from sd_mini.data.captioned import CaptionedPictures, load
from sd_mini.errors import UserError
from sd_mini.files import atomic_folder, written_to
from sd_mini.progress import progress

SCORES = "words.json"


def main(argv: Sequence[str] | None = None) -> int:
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    check_target(options.out, SCORES)
    pairs = dict(_pair(text) for text in options.words)
    recorded = recorded_data(drawer_folder(options.runs[0]))
    config = asked_data(options, recorded, "data", "train")
    check_columns(options, config.source)
    runs = [open_pipeline(folder) for folder in options.runs]
    data = load(config.model_copy(update={"resolution": runs[0].config.resolution}))
    classes = {word: _holding(data, known) for word, known in pairs.items()}
    check_words(data, pairs, classes)
    prompts = [word for word in pairs for _ in range(options.seeds)]
    report: dict[str, dict] = {"chance": {word: float(rows.mean()) for word, rows in classes.items()}, "runs": {}}
    rows, known = [], small_pixels(data.pictures)
    for folder, pipeline in zip(options.runs, runs, strict=True):
        maker = Ours(pipeline)
        with progress(total=len(prompts), desc=str(folder)) as bar:
            made = generate(maker, prompts, Sampling(maker.steps, maker.guidance, options.batch), bar)
        right = [
            bool(classes[p][n])
            for p, n in zip(prompts, nearest(small_pixels(made), known).numbers.tolist(), strict=True)
        ]
        report["runs"][str(folder)] = scores(prompts, right)
        rows += [made[i] for i in range(0, len(prompts), options.seeds)]
    for name, found in report["runs"].items():
        print(
            f"{name}: {100 * found['right']:.1f} % [{100 * found['low']:.1f}-{100 * found['high']:.1f}] of {found['n']}"
        )
    print(f"chance: {100 * np.mean(list(report['chance'].values())):.1f} %")
    with written_to(options.out), atomic_folder(options.out, keep=True) as partial:
        (partial / SCORES).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        images.grid(rows, len(pairs), list(pairs) * len(runs), 2).save(partial / "words.png")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m eval.analysis.words", description="Pictures for words that no training caption holds."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="pipeline or run folders, trained alike")
    add_data(parser, "what the first run was trained on", "train")
    parser.add_argument("--words", required=True, nargs="+", help="WORD=KNOWN ...")
    parser.add_argument(
        "--seeds", type=whole_number(1), default=8, help="pictures a word (%(default)s); the grid shows the first"
    )
    parser.add_argument("--batch", type=whole_number(1), default=64, help="pictures made at a time (%(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="folder for words.json and words.png")
    return parser


def _pair(text: str) -> tuple[str, str]:
    word, equals, known = text.partition("=")
    if not (word and equals and known):
        raise UserError(f"--words {text!r}: expected WORD=KNOWN, for example kitten=cat")
    return word, known


def _holding(data: CaptionedPictures, word: str) -> np.ndarray:
    """(N,) bool: which pictures have a caption with that whole word."""
    pattern = re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)
    return np.array([any(pattern.search(caption) for caption in captions) for captions in data.captions])


def check_words(data: CaptionedPictures, pairs: dict[str, str], classes: dict[str, np.ndarray]) -> None:
    """Raises ValueError for a word that training did hold, and for one that stands for nothing it held."""
    for word, known in pairs.items():
        if _holding(data, word).any():
            raise UserError(f"--words {word}={known}: {data.name} holds {word!r} itself; give words that it does not")
        if not classes[word].any():
            raise UserError(f"--words {word}={known}: no caption of {data.name} holds {known!r}; give one that it does")


def scores(prompts: Sequence[str], right: Sequence[bool]) -> dict:
    """Share of all pictures and of each word's, with the 95 % interval of the whole (pictures of a word are alike, so
    it is a little too narrow)."""
    low, high = wilson(sum(right), len(right))
    by_word = {word: float(np.mean([r for p, r in zip(prompts, right, strict=True) if p == word])) for word in prompts}
    return {"right": float(np.mean(right)), "low": low, "high": high, "n": len(right), "words": by_word}


if __name__ == "__main__":
    sys.exit(main())
