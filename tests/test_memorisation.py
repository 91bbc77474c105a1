"""Copies of training pictures: pictures that were trained on are not held out, and a report holds finite numbers."""

import numpy as np
import pytest

from eval.asked import Asked, Question
from eval.features import open_features
from eval.measure import Tools, measure
from eval.memorisation import audit, nearest, small_pixels
from eval.report import check_finite, write
from sd_mini import shapes
from sd_mini.data import CaptionedPictures


@pytest.fixture(scope="module")
def drawn():
    return shapes.draw_batch(shapes.sample_scenes(160, "test", seed=1), 32)


def measured(made, held_out, training, tmp_path):
    question = Question([Asked("test", [f"prompt {i}" for i in range(len(made))])], held_out, True, "some", "0")
    known = CaptionedPictures(training, [["a caption"]] * len(training), "trained")
    tools = Tools([open_features("mini")], tmp_path / "cache", training=known)
    return measure(question, {"test": made}, None, tools)


def test_a_reference_that_was_trained_on_says_nothing_of_copies(drawn, tmp_path):
    found = measured(drawn[:20], drawn[20:100], drawn[20:100], tmp_path)
    assert "memorisation" not in found.scores
    assert any("80 of 80 reference pictures are training pictures; left out" in remark for remark in found.remarks)
    check_finite(found.scores)


def test_training_pictures_among_the_reference_are_left_out(drawn, tmp_path):
    found = measured(drawn[:20], drawn[20:80], drawn[60:160], tmp_path)
    assert any("20 of 60 reference pictures are training pictures; only the others" in said for said in found.remarks)
    made, others = (nearest(small_pixels(part), small_pixels(drawn[60:160])) for part in (drawn[:20], drawn[20:60]))
    assert found.scores["memorisation"]["pixels"] == audit(made, others)
    assert found.scores["memorisation"]["mini"]["n_held_out"] == 40


def test_a_report_with_nan_is_not_written(tmp_path):
    for value in (float("nan"), float("inf"), np.float64("-inf")):
        with pytest.raises(ValueError, match=r"report\.json, distances, FID, points, 1, kid: is -?(nan|inf), expected"):
            write(tmp_path / "out", {"distances": {"FID": {"points": [{"kid": 1.0}, {"kid": value}]}}}, [], {})
    assert not list(tmp_path.iterdir())
