"""One report on the tiny run's shapes, made once for all tests that read it; and its page, read."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from eval.__main__ import main

PROMPTS_ASKED, STEPS, SEED = 13, 2, 7
SPLITS = ("test", "heldout_pairs", "heldout_relations")


def run(pipeline: Path, out: Path, *options: str) -> int:
    return main([str(pipeline), "--out", str(out), *options])


def make(pipeline: Path, out: Path) -> None:
    options = ["--data", "shapes", "--prompts", str(PROMPTS_ASKED), "--seed", str(SEED), "--batch", "8"]
    assert run(pipeline, out, *options, "--steps", str(STEPS), "--guidance", "1.5", "--sweep", "1", "4") == 0


class Page(HTMLParser):
    """Collects what a page would fetch or run, its embedded pictures and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.alternatives, self.text = set(), [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        self.alternatives += [value for name, value in attributes if name == "alt"]

    def handle_data(self, data):
        self.text += data

    def pictures(self):
        start = "data:image/png;base64,"
        encoded = [address.removeprefix(start) for address in self.addresses if address.startswith(start)]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(part, validate=True)))) for part in encoded]
