"""The report's part on the text stage: its scores, and its share of the blame."""

import json

import numpy as np
import pytest

from eval.composition import wilson
from eval.text import TextProbe
from sd_mini.data import CaptionedPictures, DataConfig, load
from sd_mini.retrieval import text_scores
from sd_mini.stages import load_stage
from sd_mini.text_encoder import TextStage
from tests.launching import launch
from tests.reporting import PROMPTS_ASKED, SEED, SPLITS


@pytest.fixture(scope="module")
def report(shapes_report):
    return json.loads((shapes_report / "report.json").read_text())


def test_the_text_stage_is_scored_on_the_scenes_that_are_asked_for(report, tiny_run):
    """The same numbers from the stage folder, its rows scored in two halves."""
    parts = load_stage(tiny_run / "text_encoder" / "final").parts
    stage, matcher = TextStage.from_parts(parts), parts["matcher"]
    assert tuple(report["text"]) == SPLITS
    for split, entry in report["text"].items():
        pictures = load(DataConfig(split=split, count=PROMPTS_ASKED, seed=1000 + SEED, resolution=32))
        pixels = pictures.pixels(range(PROMPTS_ASKED))
        halves = [text_scores(stage, matcher, pictures, pixels, rows) for rows in (slice(0, 6), slice(6, 13))]
        for name in ("recall_at_1", "recall_at_5", "recall_at_10", "binding", "binding_projection"):
            assert entry[name] == pytest.approx(np.concatenate([half[name] for half in halves]).mean(), abs=1e-6)
        assert (entry["binding_low"], entry["binding_high"]) == wilson(round(13 * entry["binding"]), 13)
        assert entry["n"] == PROMPTS_ASKED


def test_a_matcher_of_features_reports_what_was_measured_in_training(tmp_path):
    """The features of other pictures are not at hand, so nothing is measured anew."""
    for name, count in (("train", 64), ("valid", 16)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).normal(size=(count, 12)).astype(np.float32))
    assert launch("text_encoder", tmp_path / "run", "--tower.features", str(tmp_path), "--train.steps", "3") == 0
    folder = tmp_path / "run" / "text_encoder" / "final"
    probe, recorded = TextProbe(folder), json.loads((folder / "stage.json").read_text())["scores"]
    assert not probe.sees_pixels and probe.recorded("other:test") is None
    entry = probe.recorded("shapes:test")
    assert entry["n"] == 16 and all(entry[name] == pytest.approx(value) for name, value in recorded.items())
    assert entry["binding_low"] < recorded["binding"] + 1e-9 < entry["binding_high"] + 2e-9


def test_doubtful_captions_are_the_misses_and_as_many_hits(tiny_run):
    """Of the untrained stage about all; the share of what it tells is what the report calls binding."""
    probe = TextProbe(tiny_run / "text_encoder" / "final")
    data = load(DataConfig(split="test", count=40, seed=1000, resolution=32))
    misses = round(40 * (1 - probe.scores(data)["binding"]))
    assert misses > 0 and probe.doubtful(data).sum() == min(2 * misses, 40)


def test_what_is_retrieved_for_a_caption_is_what_recall_counts(tiny_run):
    probe = TextProbe(tiny_run / "text_encoder" / "final")
    data = load(DataConfig(split="test", count=40, seed=1000, resolution=32))
    plain = CaptionedPictures(data.pictures, [[captions[0]] for captions in data.captions], data.name)
    found = probe.retrieved(plain)
    entry = text_scores(probe.stage, probe.matcher, plain, plain.pixels(range(40)), slice(0, 40))
    assert (found == np.arange(40)).tolist() == (entry["recall_at_1"] > 0).tolist()
