"""The report's part on the text stage: its scores, and its share of the blame."""

import json

import numpy as np
import pytest
import torch

from eval.analysis.text import TextProbe
from eval.judge.judge import wilson
from sd_mini.data.captioned import CaptionedPictures, DataConfig, load
from sd_mini.stages.contract import load_stage
from sd_mini.text_encoder.adapter import TextStage
from sd_mini.text_encoder.matcher import recalls, text_scores
from tests.support.launching import launch
from tests.support.reporting import PROMPTS_ASKED, SEED, SPLITS


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
        halves = [text_scores(stage, matcher, pictures, [pixels], rows) for rows in (slice(0, 6), slice(6, 13))]
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


def test_what_a_caption_is_taken_for_is_what_recall_counts(tiny_run):
    probe = TextProbe(tiny_run / "text_encoder" / "final")
    data = load(DataConfig(split="test", count=40, seed=1000, resolution=32))
    plain = CaptionedPictures(data.pictures, [[captions[0]] for captions in data.captions], data.name)
    found = probe.taken_for(plain)
    entry = text_scores(probe.stage, probe.matcher, plain, plain.pixel_parts(), slice(0, 40))
    assert (found == np.arange(40)).tolist() == (entry["recall_at_1"] > 0).tolist()


def repeated(count, captions):
    """`count` pictures under so many captions in turn."""
    data = load(DataConfig(split="test", count=count, seed=1000, resolution=32))
    texts = list(dict.fromkeys(several[0] for several in data.captions))[:captions]
    return CaptionedPictures(data.pictures, [[texts[i % len(texts)]] for i in range(count)], data.name)


def test_where_captions_repeat_the_mistaken_rows_are_as_many_different_pictures(tiny_run):
    """The untrained stage takes most of 5 captions for others: their 8 pictures each become 8 different ones."""
    probe, data = TextProbe(tiny_run / "text_encoder" / "final"), repeated(40, 5)
    found, captions = probe.taken_for(data), [several[0] for several in data.captions]
    wrong = [row for row in range(40) if found[row] != row]
    assert wrong
    for caption in set(captions):
        taken = [found[row] for row in wrong if captions[row] == caption]
        assert len(set(taken)) == len(taken), "one picture in several places"
        assert len({captions[number] for number in taken}) <= 1 and caption not in {captions[n] for n in taken}


def test_of_few_captions_only_what_means_something_is_scored(tiny_run):
    probe = TextProbe(tiny_run / "text_encoder" / "final")
    few, many = probe.scores(repeated(40, 5)), probe.scores(repeated(40, 30))
    assert {"binding", "recall_of_captions_at_1"} <= many.keys()
    assert not any(name.startswith(("binding", "recall_of_captions")) for name in few) and "recall_at_1" in few


def test_recall_of_captions_ranks_different_captions():
    """Four pictures, the first three of one caption: the right caption of the last is second of two, not fourth."""
    scores = torch.tensor([[0.9, 0.1]] * 3 + [[0.5, 0.4]])
    found = recalls(scores, ["a", "a", "a", "b"], slice(0, 4))
    assert found["recall_of_captions_at_1"].tolist() == [1, 1, 1, 0]
    assert found["recall_of_captions_at_5"].tolist() == [1, 1, 1, 1]
    several = torch.tensor([[0.5, 0.4]] * 10)
    assert recalls(several, ["a"] * 9 + ["b"], slice(0, 10))["recall_of_captions_at_5"][-1] == 1
