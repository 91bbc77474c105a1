"""The report's part on the text stage: its scores, and its share of the blame."""

import json

import numpy as np
import pytest

from eval.composition import wilson
from eval.text import TextProbe, blame
from sd_mini.data import DataConfig, load
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


def test_the_blame_is_shared_out_whole(report):
    for split in SPLITS:
        exact, ceiling = (report[part][split]["all"]["exact"] for part in ("composition", "ceiling"))
        parts = report["blame"][split]
        assert sum(parts.values()) + exact == pytest.approx(1) and min(parts.values()) >= 0
        assert parts == blame(exact, ceiling, report["text"][split]["binding"])
    assert blame(0.5, 0.9, 0.8) == pytest.approx({"autoencoder": 0.1, "text_encoder": 0.36, "noise_predictor": 0.04})
    assert blame(0.95, 0.9, 0.8) == pytest.approx({"autoencoder": 0.05, "text_encoder": 0, "noise_predictor": 0})
