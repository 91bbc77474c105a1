"""The steps that ask a model: CLIP's score, a classifier of one's own, and NudeNet where it is there."""

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sd_mini.config import command
from tests.text_encoder.test_open_clip import save_model
from training.benchmarks.planted import draw
from training.data.prepare.__main__ import main
from training.data.prepare.harmful import load_classifier


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(10):
        draw(np.random.default_rng(i)).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(f"picture number {i} of a small set")
    return source


def rejected(folder, out, *words):
    assert command(main, ["--data", str(folder), "--out", str(out), "--workers", "1", *words]) == 0
    return {row["id"]: row for row in pq.read_table(out / "rejected.parquet").to_pylist()}


def test_clip_scores_are_open_clip_s(folder, tmp_path):
    name = save_model(tmp_path / "clip")
    model, _, transform = open_clip.create_model_and_transforms(name)
    pictures = [transform(Image.open(folder / f"{i}.png").convert("RGB")) for i in range(10)]
    words = open_clip.get_tokenizer(name)([f"picture number {i} of a small set" for i in range(10)])
    with torch.no_grad():
        cosines = torch.cosine_similarity(model.eval().encode_image(torch.stack(pictures)), model.encode_text(words))
    limit = float(cosines.median()) + 1e-4
    found = rejected(folder, tmp_path / "out", "--quality.clip", name, "--quality.min_clip_score", str(limit))
    assert {row["reason"] for row in found.values()} == {"clip_score"}
    far = np.flatnonzero(np.abs(cosines - limit) > 0.02)  # a model's picture is scaled twice, to 320 px and to its own
    assert len(far) >= 3 and all((f"{i}.png" in found) == bool(cosines[i] < limit) for i in far)


def dark(pictures, captions):
    assert pictures.dtype == np.uint8 and pictures.shape[1:] == (3, 64, 64) and len(captions) == len(pictures)
    return 1 - pictures.mean((1, 2, 3)) / 255


def test_a_classifier_of_one_s_own(folder, tmp_path):
    means = [np.asarray(Image.open(folder / f"{i}.png").convert("RGB")).mean() for i in range(10)]
    limit = 1 - np.median(means) / 255
    options = ["--harmful.classifier", f"module:{__name__}:dark", "--harmful.resolution", "64"]
    found = rejected(folder, tmp_path / "out", *options, "--harmful.threshold", f"{limit:.4f}")
    assert {(row["step"], row["reason"]) for row in found.values()} == {("harmful", "picture")} and len(found) >= 3


def test_nudenet_finds_nothing_in_shapes():
    pytest.importorskip("nudenet")
    pictures = np.zeros((2, 3, 320, 320), np.uint8)
    assert np.asarray(load_classifier("nudenet")(pictures, ["", ""])).max() < 0.5
