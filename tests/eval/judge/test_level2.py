"""The judge of level 2, against clean, degraded, independently rendered, changed and broken pictures."""

from collections import Counter

import numpy as np
import pytest

from eval.judge.judge import CATEGORIES, judge, read_picture, summarise
from sd_mini.shapes import COLOURS, SPLITS, draw, draw_batch, sample_scenes
from sd_mini.shapes.level2.graph import Background, Group, Scene
from tests.support.independent_renderer_level2 import render
from tests.support.judging import changes_caught, degrade, exact_share

N = 240
# what a change must show in, beside the category of the scene's kind; an exchange of shapes is seen as one of colours,
# and one of counts in the kind's category alone
EXPECTED_CATEGORY = {
    "colour": "colour", "size": "size", "pattern": "pattern", "shape": "shape", "place": "place",
    "relation": "relation", "count": "number", "colour swap": "colour", "size swap": "size",
    "pattern swap": "pattern",
}  # fmt: skip


@pytest.fixture(scope="module")
def scenes():
    return [scene for split in SPLITS for scene in sample_scenes(N // len(SPLITS), split, seed=21, level=2)]


@pytest.fixture(scope="module")
def pictures(scenes):
    return draw_batch(scenes)


def test_clean_drawings_are_exact(pictures, scenes):
    assert exact_share(pictures, scenes) >= 0.99


def test_blur_and_noise_are_seen_through(pictures, scenes):
    assert exact_share(degrade(pictures, 0.6, 6), scenes) >= 0.97


def test_the_independent_renderer_is_read(scenes):
    some = [scene for scene in scenes if scene.background.kind != "noisy"][::3]
    assert exact_share([render(scene) for scene in some], some) >= 0.98


@pytest.mark.parametrize("resolution", [48, 128])
def test_other_resolutions_are_read(scenes, resolution):
    some = scenes[::5]
    assert exact_share(draw_batch(some, resolution), some) >= 0.97


def test_one_change_flips_the_verdict_in_its_category(scenes):
    def categories(scene, name):
        expected = {scene.kind, "all", EXPECTED_CATEGORY.get(name, scene.kind)}
        if scene.kind != "one_object" and name != "relation":
            expected.add("binding")
        is_apart = "swap" not in name and scene.kind != "groups"
        return expected, {"place", "relation", "number"} - expected if is_apart else set()

    flipped, right = changes_caught(scenes, categories)
    assert flipped >= 0.99 and right >= 0.98


def test_what_is_read_does_not_depend_on_what_is_asked(pictures, scenes):
    """The reader takes a picture and a level; two scenes are judged by the same objects."""
    first, second = scenes[0], scenes[1]
    before = read_picture(pictures[0], 2)
    judge(pictures[0], second)
    assert read_picture(pictures[0], 2) == before
    assert judge(pictures[0], first).exact and not judge(pictures[0], second).exact


@pytest.mark.parametrize("kind", ["plain", "gradient", "noisy"])
def test_backgrounds_do_not_matter(kind):
    group = Group("bar", "yellow", "medium", "dotted", place="centre")
    for i, tone in enumerate(("white", "grey", "blue", "green", "rose", "cream")):
        background = Background(kind, tone, "grey" if kind == "gradient" else tone, 0.7 * i, i)
        scene = Scene("one_object", (group,), (), ((0.5, 0.5, 0.135),), background)
        assert judge(draw(scene), scene).exact


def test_overlapping_objects_are_both_read():
    overlapping = [s for s in sample_scenes(400, "test", seed=5, level=2, kinds=["two_objects"]) if s.top is not None]
    assert len(overlapping) > 60
    assert exact_share(draw_batch(overlapping), overlapping) >= 0.97


@pytest.mark.parametrize("missing", ["left", "right", "top", "bottom"])
def test_half_drawn_objects_fail(scenes, missing):
    wrongly = []
    for scene in [scene for scene in scenes if scene.kind == "one_object" and scene.background.kind == "plain"]:
        picture, empty = draw(scene), draw_batch([Scene("groups", (), (), (), scene.background)])[0]
        x, y = (round(centre * 64) for centre in scene.layout[0][:2])
        half = {
            "left": np.s_[:, :, :x], "right": np.s_[:, :, x:], "top": np.s_[:, :y], "bottom": np.s_[:, y:],
        }[missing]  # fmt: skip
        picture[half] = empty[half]
        wrongly.append(judge(picture, scene).exact)
    assert len(wrongly) > 10 and not any(wrongly)


@pytest.mark.parametrize("rgb", [COLOURS["red"], COLOURS["yellow"], (125, 25, 150), (130, 130, 130)])
def test_an_extra_object_of_any_colour_fails(rgb):
    groups = (Group("circle", "red", "medium", "striped"), Group("square", "blue"))
    scene = Scene("two_objects", groups, ("left of",), ((0.3, 0.6, 0.135), (0.7, 0.6, 0.135)))
    picture = draw(scene)
    assert judge(picture, scene).exact
    rows, columns = np.mgrid[:64, :64] + 0.5
    disc = np.hypot(columns - 32, rows - 12) < 6
    picture[:, disc] = np.array(rgb, dtype=np.uint8)[:, None]
    verdict = judge(picture, scene)
    assert not verdict.exact and not verdict.categories["number"].exact and verdict.categories["relation"].exact


def test_blank_and_noise_pictures_score_nothing(scenes):
    rng = np.random.default_rng(0)
    broken = [np.full((3, 64, 64), level, dtype=np.uint8) for level in (0, 128, 245, 255)]
    broken += [np.broadcast_to(np.array(rgb, dtype=np.uint8)[:, None, None], (3, 64, 64)) for rgb in COLOURS.values()]
    broken += [rng.integers(0, 256, (3, 64, 64)).astype(np.uint8) for _ in range(3)]
    broken += [np.clip(rng.normal(200, spread, (3, 64, 64)), 0, 255).astype(np.uint8) for spread in (10, 30, 60)]
    for picture in broken:
        for scene in scenes[::40]:
            verdict = judge(picture, scene)
            assert not verdict.exact and verdict.soft == 0


def test_categories_of_a_chain_are_counted_by_their_facts():
    groups = (Group("circle", "red"), Group("square", "blue"), Group("cross", "green"))
    layout = ((0.2, 0.25, 0.135), (0.65, 0.25, 0.135), (0.65, 0.7, 0.135))
    scene = Scene("chain", groups, ("left of", "above"), layout)
    turned = Scene("chain", groups, ("left of", "below"), ((0.2, 0.7, 0.135), (0.65, 0.7, 0.135), (0.65, 0.25, 0.135)))
    verdict = judge(draw(turned), scene)
    wrong = {category for category, value in verdict.categories.items() if not value.exact}
    assert wrong == {"all", "chain", "relation"}
    assert verdict.categories["relation"].soft == 0.5
    assert verdict.soft == pytest.approx(14 / 15)  # number, four attributes of each, two relations


def test_every_category_is_summarised(pictures, scenes):
    summary = summarise(judge(picture, scene) for picture, scene in zip(pictures[::4], scenes[::4], strict=True))
    assert list(summary) == [category for category in CATEGORIES if category != "count"]
    assert Counter(len(row) for row in summary.values()) == {6: len(summary)}


@pytest.mark.filterwarnings("error")
def test_an_object_between_others_that_cannot_be_seen_alone_is_read_without_a_warning():
    """Thin stripes of two colours side by side: every pixel of the one is next to one of the other."""
    picture = np.full((3, 64, 64), 245, dtype=np.uint8)
    for i, column in enumerate(range(20, 44, 3)):
        picture[:, 20:44, column : column + 3] = np.array(COLOURS["red" if i % 2 else "blue"])[:, None, None]
    read = read_picture(picture, 2)
    assert all(np.isfinite([one.x, one.y]).all() for one in read)
