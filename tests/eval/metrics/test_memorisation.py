"""Copies of training pictures: pictures that were trained on are not held out, and a report holds finite numbers."""

import numpy as np
import pytest
from scipy.stats import norm

from eval.features.features import open_features
from eval.makers.questions import PromptSet, Question
from eval.measure import Tools, measure
from eval.metrics.memorisation import QUANTILE, Nearest, audit, nearest, small_pixels
from eval.report.report import check_finite, write
from sd_mini import shapes
from sd_mini.data.captioned import CaptionedPictures


@pytest.fixture(scope="module")
def drawn():
    return shapes.draw_batch(shapes.sample_scenes(160, "test", seed=1), 32)


def measured(made, held_out, training, tmp_path):
    question = Question([PromptSet("test", [f"prompt {i}" for i in range(len(made))])], held_out, True, "some", "0")
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


def test_copies_are_found_and_held_out_pictures_are_not():
    drawn = shapes.draw_batch(shapes.sample_scenes(1200, "test", seed=1), 32)
    training, held_out, new = small_pixels(drawn[:800]), small_pixels(drawn[800:1000]), drawn[1000:]
    noise = np.random.default_rng(0).integers(-3, 4, drawn[:60].shape)
    copies = np.clip(drawn[100:160].astype(int) + noise, 0, 255).astype(np.uint8)
    held = nearest(held_out, training)
    fair = audit(nearest(small_pixels(new), training), held)
    assert fair["low"] <= fair["expected"] <= fair["high"] and fair["median_ratio"] == pytest.approx(1, abs=0.15)
    found = nearest(small_pixels(np.concatenate([new[:40], copies])), training)
    assert found.numbers[40:].tolist() == list(range(100, 160))
    assert audit(found, held)["copied"] >= 0.6


def test_the_interval_of_what_is_copied_knows_that_the_held_out_pictures_are_a_sample():
    """Distances of known distributions: how often the interval holds the true share, of few held-out pictures."""
    draw, numbers = np.random.default_rng(0), np.zeros(500, dtype=int)
    limit = norm.ppf(QUANTILE)
    for closer, held_out in ((0, 200), (1, 200), (0, 1000)):
        true, held = norm.cdf(limit + closer), 0
        for _ in range(200):
            made, other = draw.normal(10 - closer, 1, 500), draw.normal(10, 1, held_out)
            found = audit(Nearest(made, numbers), Nearest(other, numbers))
            held += found["low"] <= true <= found["high"]
        assert held / 200 >= 0.9  # Wilson's alone: 0.67, 0.53, 0.90
    nothing = audit(Nearest(np.full(500, 20.0), numbers), Nearest(draw.normal(10, 1, 200), numbers))
    assert nothing["low"] == 0 < nothing["high"] and nothing["n_held_out"] == 200
    assert "median_ratio" not in audit(Nearest(np.ones(9), numbers[:9]), Nearest(np.zeros(30), numbers[:30]))


def test_the_nearest_picture_by_brute_force():
    draw = np.random.default_rng(0)
    made, pictures = (draw.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8) for n in (5, 9))

    def small(picture):
        return picture.reshape(3, 16, 2, 16, 2).mean((2, 4))

    distances = np.array([[np.sqrt(((small(a) - small(b)) ** 2).mean()) for b in pictures] for a in made])
    found = nearest(small_pixels(made), small_pixels(pictures))
    assert found.numbers.tolist() == distances.argmin(1).tolist()
    np.testing.assert_allclose(found.distances, distances.min(1), rtol=1e-5)
