"""The judge, against clean, degraded, independently rendered, changed and broken pictures."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from eval.judge.judge import CategoryVerdict, Verdict, judge, relations_of, summarise, wilson
from eval.judge.objects import FoundObject
from sd_mini.shapes import BACKGROUND, COLOURS, SPLITS, Group, Scene, draw, draw_batch, sample_scenes
from tests.support.independent_renderer import render
from tests.support.judging import changes_caught, degrade, exact_share

N = 1000
# what a change must show in, beside the category of the scene's kind
EXPECTED_CATEGORY = {
    "colour": "colour", "size": "size", "place": "place", "relation": "relation", "count": "count",
    "colour swap": "colour", "size swap": "size",
}  # fmt: skip


@pytest.fixture(scope="module")
def scenes():
    quarter = N // len(SPLITS)
    return [scene for split in SPLITS for scene in sample_scenes(quarter, split, seed=21)]


def two_objects():
    groups = (Group("circle", "red", "small"), Group("square", "blue", "large"))
    return Scene("two_objects", groups, "left of", ((0.2, 0.5, 0.1), (0.7, 0.5, 0.18)))


def paint_disc(picture, x, y, radius, rgb):
    rows, columns = np.mgrid[: picture.shape[1], : picture.shape[2]] + 0.5
    inside = np.hypot(columns - x * picture.shape[2], rows - y * picture.shape[1]) < radius * picture.shape[1]
    return np.where(inside, np.array(rgb, dtype=np.uint8)[:, None, None], picture)


def test_clean_drawings_are_exact(scenes):
    assert exact_share(draw_batch(scenes), scenes) >= 0.995


def test_blur_and_noise_are_seen_through(scenes):
    assert exact_share(degrade(draw_batch(scenes), 0.6, 6), scenes) >= 0.98


def test_the_independent_renderer_is_read(scenes):
    assert exact_share([render(scene) for scene in scenes], scenes) >= 0.995


@pytest.mark.parametrize("resolution", [32, 48, 128, 256])
def test_other_resolutions_are_read(scenes, resolution):
    some = scenes[::5]
    assert exact_share(draw_batch(some, resolution), some) >= 0.98


def test_one_changed_attribute_flips_the_verdict_in_its_category(scenes):
    def categories(scene, name):
        # an exchange of shapes is seen as one of colours, a lone shape in the kind's category alone
        expected = {scene.kind, "all", EXPECTED_CATEGORY.get(name, scene.kind)}
        if scene.kind == "two_objects" and name != "relation":
            expected.add("binding")
        return expected, {"place", "relation"} - {name} if "swap" not in name else set()

    flipped, right = changes_caught(scenes, categories)
    assert flipped >= 0.99 and right >= 0.99


def test_a_single_change_leaves_other_facts_standing():
    scene = two_objects()
    recoloured = replace(scene, groups=(replace(scene.groups[0], colour="green"), scene.groups[1]))
    verdict = judge(draw(recoloured), scene)
    wrong = {category for category, value in verdict.categories.items() if not value.exact}
    assert wrong == {"all", "two_objects", "colour", "binding"}
    assert verdict.soft == pytest.approx(7 / 8)  # number, three attributes of each, relation
    assert verdict.categories["colour"] == CategoryVerdict(False, 0.5)


def test_exchanged_colours_fail_in_colour_and_binding():
    scene = two_objects()
    a, b = scene.groups
    exchanged = replace(scene, groups=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
    verdict = judge(draw(exchanged), scene)
    assert not verdict.categories["colour"].exact and not verdict.categories["binding"].exact
    assert verdict.categories["relation"].exact and verdict.categories["size"].exact


def blank_and_noise_pictures():
    rng = np.random.default_rng(0)
    levels = [np.full((3, 64, 64), level, dtype=np.uint8) for level in (0, 128, 245, 255)]
    palette = [paint_disc(levels[0], 0.5, 0.5, 1, rgb) for rgb in COLOURS.values()]
    uniform = [rng.integers(0, 256, (3, 64, 64)).astype(np.uint8) for _ in range(4)]
    gaussian = [
        np.clip(rng.normal(mean, spread, (3, 64, 64)), 0, 255).astype(np.uint8)
        for mean in (128, 245) for spread in (10, 30, 60, 100)
    ]  # fmt: skip
    smooth = [s * ndimage.gaussian_filter(rng.normal(size=(3, 64, 64)), (0, s, s)) for s in (1, 2, 4)]
    clouds = [np.clip(128 + 200 * cloud, 0, 255).astype(np.uint8) for cloud in smooth]
    return levels + palette + uniform + gaussian + clouds


def test_blank_and_noise_pictures_score_nothing(scenes):
    for picture in blank_and_noise_pictures():
        for scene in scenes[::40]:
            verdict = judge(picture, scene)
            assert not verdict.exact and verdict.soft == 0
            assert all(not value.exact and value.soft == 0 for value in verdict.categories.values())


def test_noise_is_an_abstention_and_an_empty_picture_is_not():
    noise = np.random.default_rng(1).integers(0, 256, (3, 64, 64)).astype(np.uint8)
    empty = np.ones((3, 64, 64), dtype=np.uint8) * np.array(BACKGROUND, dtype=np.uint8)[:, None, None]
    assert judge(noise, two_objects()).abstain and not judge(empty, two_objects()).abstain


@pytest.mark.parametrize("rgb", [COLOURS["red"], COLOURS["yellow"], (125, 25, 150), (130, 130, 130)])
@pytest.mark.parametrize("radius", [0.04, 0.1])
def test_an_extra_object_of_any_colour_fails(rgb, radius):
    scene = two_objects()
    verdict = judge(paint_disc(draw(scene), 0.3, 0.2, radius, rgb), scene)
    assert not verdict.exact and not verdict.categories["binding"].exact
    assert 0.7 < verdict.soft < 1  # where the extra one equals an asked one, it may be taken for it


def test_specks_and_thin_lines_are_extra():
    scene = two_objects()
    for mark in (np.s_[:, 4:7, 4:7], np.s_[:, 2:4, :], np.s_[:, :, 61:62]):
        picture = draw(scene)
        picture[mark] = np.array(COLOURS["red"], dtype=np.uint8)[:, None, None]
        assert not judge(picture, scene).exact


@pytest.mark.parametrize("missing", ["left", "right", "top", "bottom"])
def test_half_drawn_objects_fail(scenes, missing):
    for scene in [scene for scene in scenes if scene.kind == "one_object"][:100]:
        picture = draw(scene)
        x, y = (round(centre * 64) for centre in scene.layout[0][:2])
        half = {
            "left": np.s_[:, :, :x], "right": np.s_[:, :, x:], "top": np.s_[:, :y], "bottom": np.s_[:, y:],
        }[missing]  # fmt: skip
        picture[half] = np.array(BACKGROUND, dtype=np.uint8)[:, None, None]
        assert not judge(picture, scene).exact


def test_merged_objects_do_not_count_as_two():
    layout = ((0.25, 0.25, 0.11), (0.75, 0.25, 0.11))
    scene = Scene("count", (Group("circle", "red", "small", 2),), None, layout)
    picture = draw(scene)
    assert judge(picture, scene).exact
    picture[:, 14:18, 16:48] = np.array(COLOURS["red"], dtype=np.uint8)[:, None, None]
    verdict = judge(picture, scene)
    assert not verdict.exact and verdict.soft < 0.5


@pytest.mark.parametrize(
    ("centre", "expected"),
    [
        ((0.2, 0.5), {"left of"}),
        ((0.8, 0.5), {"right of"}),
        ((0.5, 0.2), {"above"}),
        ((0.5, 0.8), {"below"}),
        ((0.2, 0.2), {"left of", "above"}),
        ((0.5, 0.5), set()),
        ((0.47, 0.52), set()),
    ],
)
def test_relations_follow_geneval(centre, expected):
    a = FoundObject("circle", "red", "small", *centre, 0.2, 0.2, True)
    b = FoundObject("square", "blue", "small", 0.5, 0.5, 0.2, 0.2, True)
    assert relations_of(a, b) == expected


def test_wilson_matches_published_values():
    # Newcombe 1998, table I
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="wilson: got 3 of 2"):
        wilson(3, 2)


def test_summary_counts_abstentions_as_wrong():
    good, bad = CategoryVerdict(True, 1.0), CategoryVerdict(False, 0.0)
    verdicts = [
        Verdict(True, 1.0, False, {"all": good, "count": good}),
        Verdict(False, 0.0, True, {"all": bad, "one_object": bad}),
    ]
    summary = summarise(iter(verdicts))
    low, high = wilson(1, 2)
    assert summary["all"] == {"exact": 0.5, "soft": 0.5, "abstain": 0.5, "n": 2, "low": low, "high": high}
    assert list(summary) == ["one_object", "count", "all"] and summary["one_object"]["abstain"] == 1.0
    assert summarise([]) == {}


def test_every_category_is_summarised(scenes):
    summary = summarise(judge(draw(scene), scene) for scene in scenes[::4])
    facts = ["colour", "size", "place", "relation"]
    assert list(summary) == ["one_object", "two_objects", "count", *facts, "binding", "all"]
    assert all(row["low"] <= row["exact"] <= row["high"] for row in summary.values())


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((64, 64, 3), dtype=np.uint8), r"got \(64, 64, 3\) uint8"),
        (np.zeros((3, 64, 64), dtype=np.float32), "float32, expected"),
        (np.zeros((3, 64, 32), dtype=np.uint8), r"got \(3, 64, 32\)"),
        (np.zeros((3, 16, 16), dtype=np.uint8), "got 16 px"),
        (None, "picture: got None NoneType"),
    ],
)
def test_other_pictures_are_refused(picture, message):
    with pytest.raises(ValueError, match=message) as error:
        judge(picture, two_objects())
    assert "\n" not in str(error.value)
