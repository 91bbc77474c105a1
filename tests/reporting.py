"""One report on the tiny run's shapes, made once for all tests that read it."""

from pathlib import Path

from eval.__main__ import main

PROMPTS_ASKED, STEPS, SEED = 13, 2, 7
SPLITS = ("test", "heldout_pairs", "heldout_relations")


def run(pipeline: Path, out: Path, *options: str) -> int:
    return main([str(pipeline), "--out", str(out), *options])


def make(pipeline: Path, out: Path) -> None:
    options = ["--data", "shapes", "--prompts", str(PROMPTS_ASKED), "--seed", str(SEED), "--batch", "8"]
    assert run(pipeline, out, *options, "--steps", str(STEPS), "--guidance", "1.5", "--sweep", "1", "4") == 0
