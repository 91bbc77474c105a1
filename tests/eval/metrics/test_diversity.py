"""Diversity within a prompt: closed forms, real drawings against drawings, and pictures that are all alike."""

import math
from itertools import product

import numpy as np
import pytest

from eval.features.features import open_features
from eval.judge.judge import read_picture
from eval.makers.repeated import EACH, PROMPTS, of_captions, repeated_captions, repeated_shapes, several_of_each
from eval.metrics.diversity import LAYOUTS, layouts, share, vendi_score, within_prompts
from sd_mini import shapes


@pytest.fixture(scope="module")
def repeated():
    return repeated_shapes(3, 64)


@pytest.fixture(scope="module")
def measured(repeated):
    """Features of the real pictures, and what is found in each."""
    return open_features("mini")(repeated.real), list(map(read_picture, repeated.real))


def test_the_vendi_score_is_its_closed_form():
    assert vendi_score(np.ones((5, 5))) == pytest.approx(1)
    assert vendi_score(np.eye(5)) == pytest.approx(5)
    # two kinds, three and one: the exponential of the entropy of (3/4, 1/4)
    blocks = np.kron(np.eye(2), np.ones((3, 3)))[:4, :4]
    assert vendi_score(blocks) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    # of a pair alike by r the eigenvalues are (1 + r) / 2 and (1 - r) / 2
    pair = np.array([[1, 0.4], [0.4, 1]])
    assert vendi_score(pair) == pytest.approx(math.exp(-0.7 * math.log(0.7) - 0.3 * math.log(0.3)))


def test_other_drawings_have_all_of_the_diversity_and_one_picture_none(repeated, measured):
    features, _ = measured
    again = shapes.draw_batch(shapes.redrawn(repeated.scenes, 99), 64)
    found = within_prompts(open_features("mini")(again), features, repeated.captions)
    for score in found.values():
        assert score["low"] <= 1 <= score["high"] and 0.85 < score["share"] < 1.15
    first = features.reshape(PROMPTS, EACH, -1)[:, :1].repeat(EACH, 1).reshape(features.shape)
    alike = within_prompts(first, features, repeated.captions)
    assert alike["vendi"]["share"] == pytest.approx(0, abs=1e-9) and alike["distance"]["share"] < 1e-5


def test_the_order_of_a_prompt_s_pictures_and_of_prompts_does_not_matter(repeated, measured):
    features, rng = measured[0], np.random.default_rng(0)
    made = features + rng.normal(size=features.shape).astype(np.float32) * 0.01
    shuffled = np.concatenate([made[i : i + EACH][rng.permutation(EACH)] for i in range(0, len(made), EACH)])
    scores = [within_prompts(one, features, repeated.captions)["vendi"]["share"] for one in (made, shuffled)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


def test_distance_is_the_mean_over_pairs():
    made, real = np.array([[0.0], [1], [3], [0], [2]]), np.array([[0.0], [2], [4], [0], [1]])
    found = within_prompts(made, real, ["a", "a", "a", "b", "b"])["distance"]
    assert found["share"] == pytest.approx((2 + 2) / (8 / 3 + 1)) and found["n_prompts"] == 2


def test_vendi_within_prompts_by_hand():
    """Pairs that lie 1 apart, and of one prompt 2: alike by exp(-1 / 2) and exp(-4 / 2), as s^2 is 1."""

    def less_one(similarity):
        shares = np.array([(1 + similarity) / 2, (1 - similarity) / 2])
        return math.exp(-(shares * np.log(shares)).sum()) - 1

    made, real = np.array([[0.0], [1], [0], [2]]), np.array([[0.0], [1], [3], [4]])
    found = within_prompts(made, real, ["a", "a", "b", "b"])["vendi"]
    near, far = less_one(math.exp(-0.5)), less_one(math.exp(-2))
    assert found["share"] == pytest.approx((near + far) / (2 * near))


def test_real_pictures_that_are_all_the_same_give_no_share():
    assert within_prompts(np.eye(4), np.ones((4, 2)), ["a", "a", "b", "b"]) == {"vendi": None, "distance": None}


def test_layouts_of_drawings_are_the_data_s_and_of_one_layout_none(repeated, measured):
    found = measured[1]
    score = layouts(found, repeated.scenes, repeated.captions)
    assert score["low"] <= 1 <= score["high"] and score["n"] > 0.95 * EACH * PROMPTS / 2
    alike = [found[i // EACH * EACH] for i in range(len(found))]
    scenes = [repeated.scenes[i // EACH * EACH] for i in range(len(found))]
    assert layouts(alike, scenes, repeated.captions)["share"] == 0
    wrong = list(map(read_picture, np.full((len(found), 3, 64, 64), 245, np.uint8)))
    assert layouts(wrong, repeated.scenes, repeated.captions) is None


@pytest.mark.parametrize(("count", "ways"), LAYOUTS.items())
def test_the_entropy_that_is_expected_of_few_drawings(count, ways):
    """By counting every outcome of four draws; and the ways are those in which `count` quarters are filled."""
    from eval.metrics.diversity import _entropy, _expected_entropy

    assert math.comb(4, count) == ways
    outcomes = [np.unique(draw, return_counts=True)[1] / 4 for draw in product(range(ways), repeat=4)]
    assert _expected_entropy(4, ways) == pytest.approx(np.mean([_entropy(shares) for shares in outcomes]))


def test_the_interval_is_over_prompts():
    made, real = np.arange(40) % 2 * 2.0, np.ones(40)
    found = share(made, real)
    assert found["share"] == 1 and found["low"] == pytest.approx(1 - 2 / math.sqrt(40), abs=0.1)
    assert share(real, real) == {"share": 1.0, "low": 1.0, "high": 1.0, "n_prompts": 40}


def test_which_shapes_prompts_are_asked(repeated):
    assert len(repeated.captions) == PROMPTS * EACH == len(repeated.real) and len(set(repeated.captions)) == PROMPTS
    kinds = [scene.kind for scene in repeated.scenes[::EACH]]
    assert [kinds.count(kind) for kind in shapes.KINDS] == [8, 8, 16]
    few = repeated_shapes(3, 64, prompts=2)
    assert few.captions == repeated.captions[: 2 * EACH] and (few.real == repeated.real[: 2 * EACH]).all()
    # the pictures are of the same graphs, in other layouts
    for scene, other in zip(repeated.scenes, shapes.redrawn(repeated.scenes, 1), strict=True):
        shapes.check_scene(other)
        assert other.canonical() == scene.canonical() and other.layout != scene.layout


def test_other_data_are_compared_with_the_same_captions_or_the_nearest():
    pictures = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(3, 1)
    captions = ["a red cat", "a dog", "a dog", "a red cat here", "a blue bird", "a dog"]
    same = of_captions(["a dog"] * 3, captions, pictures)
    assert same.real[:, 0, 0, 0].tolist() == [1, 2, 5] and same.source == "pictures of the same captions"
    near = of_captions(["a red cat"] * 2, captions, pictures)
    assert near.real[:, 0, 0, 0].tolist() == [0, 3] and "nearest" in near.source
    assert repeated_captions(range(6), captions, pictures) is None  # fewer than are compared
    assert of_captions(["a dog"] * 7, captions, pictures) is None


def test_a_folder_s_pictures_of_one_prompt_are_brought_together():
    assert several_of_each(["a", "b", "a", "a", "a", "b", "b"] + ["d"] * 10) == [0, 2, 3, 4, *range(7, 15)]
    assert several_of_each(["a", "a", "a"]) == []  # by chance
