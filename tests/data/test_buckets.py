"""Aspect-ratio buckets, crops and mirror images: against the rules written out, and through the three stages."""

import json
import os
import shutil
import sys
from itertools import pairwise

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageDraw

from eval.__main__ import main as evaluation
from sd_mini import images
from sd_mini.cli.opening import open_pipeline
from sd_mini.config import check
from sd_mini.data import cache
from sd_mini.data.arrays import Buckets, Mirrored
from sd_mini.data.batches import Batch, BucketOrder
from sd_mini.data.buckets import bucket_sizes, nearest_bucket
from sd_mini.data.captioned import CaptionedPictures, DataConfig, ValidConfig, load
from sd_mini.data.near import is_near
from sd_mini.data.parts import load_captioned
from sd_mini.errors import UserError
from sd_mini.memory import let_go_of
from sd_mini.texts import with_sides_swapped
from tests.support.faults import KillAt
from tests.support.launching import assert_equal_runs, launch, launch_apart, lines, trace
from training.engine.augment import AugmentConfig, augment
from training.noise_predictor.data import check_scale

NINE = [(40, 40), (80, 40), (40, 80), (60, 40), (40, 60), (90, 50), (50, 90), (70, 40), (400, 40)]  # width, height


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Smooth noise, a red mark in the upper left corner."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).rectangle((0, 0, width // 4, height // 4), fill="red")
    return image


@pytest.fixture
def twenty(tmp_path):
    """20 pictures in 9 shapes, one of which has a single picture, each with a caption that names a side."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i in range(20):
        picture(*NINE[i if i < 9 else i % 8], i).save(folder / f"{i:02}.png")
        rows.append({"file_name": f"{i:02}.png", "text": f"picture {i}, its mark on the left"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize(("resolution", "step", "aspect"), [(64, 8, 2.0), (256, 32, 3.0), (32, 16, 4.0), (64, 32, 9.0)])
def test_buckets_are_the_sides_of_at_most_the_squares_area(resolution, step, aspect):
    found = bucket_sizes(DataConfig(source="pictures", resolution=resolution, bucket_step=step, max_aspect=aspect))
    multiples = range(step, resolution**2 // step + 1, step)
    expected = {(resolution, resolution)}
    for long in (side for side in multiples if side > resolution):
        short = max((side for side in multiples if side * long <= resolution**2), default=None)
        if short is not None and long / short <= aspect:
            expected |= {(long, short), (short, long)}
    assert {tuple(size) for size in found} == expected and len(found) == len(expected)
    ratios = [width / height for height, width in found]
    assert ratios == sorted(ratios)


def test_a_picture_takes_the_nearest_ratio():
    buckets = bucket_sizes(DataConfig(source="pictures", resolution=64, bucket_step=8, max_aspect=2))
    own = np.array([(w, h) for w in range(10, 90, 7) for h in range(10, 90, 9)])
    found = nearest_bucket(own, buckets)
    for (width, height), number in zip(own, found, strict=True):
        factors = [max(width / height * b.height / b.width, height / width * b.width / b.height) for b in buckets]
        assert factors[number] == pytest.approx(min(factors))


@pytest.mark.parametrize("counts", [[13, 1, 6], [100, 3, 40, 1, 1], [2, 2]])
def test_each_sample_is_drawn_as_often_as_any_other_and_a_batch_is_of_one_bucket(counts):
    order, steps = BucketOrder(7, counts, 8), 4_000
    edges = np.cumsum([0, *counts])
    drawn, buckets = [], []
    for step in range(steps):
        ids = order.ids(step)
        bucket = np.searchsorted(edges, ids, side="right") - 1
        assert ids.shape == (8,) and len(set(bucket)) == 1
        drawn.append(ids)
        buckets.append(bucket[0])
    # all of a bucket before any of it again, and each bucket's share of the steps within a batch or two a bucket
    often = np.bincount(np.concatenate(drawn), minlength=sum(counts))
    for number, (first, last) in enumerate(pairwise(edges)):
        assert np.ptp(often[first:last]) <= 1
        share = steps * counts[number] / sum(counts)
        assert abs(buckets.count(number) - share) <= 0.02 * share + 4
    # a pure function of seed and step, asked in any order
    again = BucketOrder(7, counts, 8)
    for step in (3999, 17, 2500, 0, 3999):
        assert (again.ids(step) == drawn[step]).all()
    assert any((BucketOrder(8, counts, 8).ids(step) != drawn[step]).any() for step in range(20))


def test_weights_count_in_every_bucket():
    weights = np.array([1.0, 3.0, 2.0, 2.0, 0.5, 1.5])
    order = BucketOrder(0, [2, 3, 1], 4, weights)
    often = np.bincount(np.concatenate([order.ids(step) for step in range(4_000)]), minlength=6)
    assert often / often.sum() == pytest.approx(weights / weights.sum(), rel=0.08)


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 32)])
def test_crops(size):
    """The kept part is the largest of that ratio, at the place that the crop names."""
    high, (height, width) = picture(40, 100, 0), size
    kept = 40 * height / width
    for crop, place, top in (("center", 0.5, (100 - kept) / 2), ("top", 0.5, 0), ("random", 0.25, 0.25 * (100 - kept))):
        found = images.fit(high, size, crop, place)
        expected = high.resize((width, height), Image.Resampling.LANCZOS, box=(0, top, 40, top + kept))
        assert (found == np.asarray(expected).transpose(2, 0, 1)).all()
    whole = high.resize((width, height), Image.Resampling.LANCZOS)
    assert (images.fit(high, size, "none") == np.asarray(whole).transpose(2, 0, 1)).all()


def test_a_random_crop_depends_on_the_row_alone(twenty, tmp_path):
    options = DataConfig(source=str(twenty), resolution=32, crop="random")
    every = load(options)
    assert (load(options, folder=tmp_path / "cache").pictures[:] == every.pictures).all()
    assert not (load(options.model_copy(update={"crop": "center"})).pictures == every.pictures).all()
    (twenty / "metadata.jsonl").write_text("\n".join((twenty / "metadata.jsonl").read_text().splitlines()[1:]))
    assert (load(options).pictures == every.pictures[1:]).all()  # whatever rows are beside it


def test_no_bucket_loses_its_pictures_and_captions_stay_with_them(twenty, tmp_path):
    options = DataConfig(source=str(twenty), resolution=32, bucket_step=16, max_aspect=4)
    for folder in (None, tmp_path / "cache"):
        read = load(options, folder=folder)
        assert len(read) == 20 and sum(read.bucket_counts) == 20
        buckets = bucket_sizes(options)
        for span, size in zip(read.spans, read.sizes, strict=True):
            for row in span:
                number = int(read.captions[row][0].split()[1].strip(","))
                own = Image.open(twenty / f"{number:02}.png")
                assert buckets[nearest_bucket(np.array([own.size]), buckets)[0]] == size
                assert (read.pictures[row] == images.fit(own, size)).all()
        assert (read.pixels(read.spans[-1]).shape[2:]) == tuple(read.sizes[-1])
    with pytest.raises(IndexError, match="shapes"):
        read.pixels([0, 19])
    # pictures that are moved, or whose file says that they are turned, are in the bucket of what is seen
    picture(80, 40, 1).save(twenty / "00.png", exif=_turned())
    again = load(options)
    row = next(row for row, own in enumerate(again.captions) if own[0].startswith("picture 0,"))
    height, width = again.pictures[row].shape[1:]
    assert height > width


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_whole_pictures_are_scaled_and_longer_ones_are_named(twenty):
    options = DataConfig(source=str(twenty), resolution=32, bucket_step=16, max_aspect=4, crop="none", max_bad=0.1)
    read = load(options)
    assert [one.id for one in read.rejected] == ["08.png"] and "10:1" in read.rejected[0].reason
    row = next(i for i, own in enumerate(read.captions) if own[0].startswith("picture 1,"))
    whole = Image.open(twenty / "01.png").resize((48, 16), Image.Resampling.LANCZOS)
    assert (read.pictures[row] == np.asarray(whole).transpose(2, 0, 1)).all()
    with pytest.raises(UserError, match="crop none"):
        check(DataConfig, {"crop": "none"}, "data")
    with pytest.raises(UserError, match=r"valid\.crop none"):
        load_captioned(DataConfig(source=str(twenty)), ValidConfig(source=str(twenty), crop="none"))
    with pytest.raises(UserError, match="no bucket but the square"):
        bucket_sizes(DataConfig(source="pictures", resolution=64, max_aspect=1.5))
    with pytest.raises(UserError, match="bucket_step 24 does not divide"):
        bucket_sizes(DataConfig(source="pictures", resolution=32, bucket_step=24, max_aspect=2))


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("a cat to the left of a dog", "a cat to the right of a dog"),
        ("LEFT and Right, the rightmost; left-hand side", "RIGHT and Left, the leftmost; right-hand side"),
        ("an upright bright copyright, leftovers", "an upright bright copyright, leftovers"),
        ("leftwards, right.", "rightwards, left."),
        ("looking_left, right_hand, lefthand side", "looking_right, left_hand, righthand side"),
    ],
)
def test_left_and_right_are_exchanged(text, mirrored):
    assert with_sides_swapped(text) == mirrored and with_sides_swapped(mirrored) == text


@pytest.mark.parametrize("aspect", [1, 4])
def test_mirror_images_have_captions_of_their_own(twenty, aspect):
    options = DataConfig(source=str(twenty), resolution=32, max_aspect=aspect)
    plain, both = load(options), load(options.model_copy(update={"mirror": True}))
    assert len(both) == 40 and both.bucket_counts == [2 * count for count in plain.bucket_counts]
    assert both.fingerprint != plain.fingerprint
    known = {own[0]: plain.pictures[row] for row, own in enumerate(plain.captions)}
    for row, (caption,) in enumerate(both.captions):
        if caption.endswith("left"):
            assert (both.pictures[row] == known[caption]).all()
        else:
            assert (both.pictures[row] == known[caption.replace("right", "left")][..., ::-1]).all()
    # held-out pictures are not mirrored, whichever way they are held out
    train, valid = load_captioned(options.model_copy(update={"mirror": True, "share": 0.3}), ValidConfig(share=0.3))
    assert all(own[0].endswith("left") for own in valid.captions)
    assert sum(own[0].endswith("right") for own in train.captions) * 2 == len(train)
    for name, value in (("mirror", True), ("max_aspect", 2)):
        with pytest.raises(UserError, match=f"{name} is for pictures that are read"):
            check(DataConfig, {name: value}, "data")


def test_arrays_of_several_shapes_and_of_mirror_images_are_read_alike():
    first, second = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2), np.arange(3 * 3 * 2 * 4).reshape(3, 3, 2, 4)
    both = Buckets([first, Mirrored(second)])
    assert len(both) == 8 and len(list(both)) == 8
    assert (both[5] == second[0, ..., ::-1]).all() and (both[2:5] == second).all()
    chosen = both.select(np.array([1, 3, 6]))
    assert (chosen[0] == first[1]).all() and (chosen[np.array([1, 2])] == [second[1], second[1, ..., ::-1]]).all()
    assert sum(len(piece) for piece in chosen.pieces()) == 3
    with pytest.raises(IndexError, match="stay together"):
        both.select(np.array([3, 0]))


def test_runs_and_the_rows_that_are_shown():
    pictures = Buckets([np.zeros((n, 3, 4, w), np.uint8) for n, w in ((5, 4), (1, 8), (3, 2))])
    data = CaptionedPictures(pictures, [[str(i)] for i in range(9)], "nine")
    assert [(run.start, run.stop) for run in data.runs(slice(1, 8), 2)] == [(1, 3), (3, 5), (5, 6), (6, 8)]
    assert data.spread(4) == [0, 1, 5, 6] and data.spread(20) == list(range(9))
    assert CaptionedPictures(pictures.parts[0], [[]] * 5, "one size").spread(3) == [0, 1, 2]


@pytest.mark.parametrize("size", [(20, 12), (12, 20)])
def test_pictures_of_any_shape_are_shifted(size):
    pixels = torch.arange(4 * 3 * size[0] * size[1]).reshape(4, 3, *size).float()
    shifted = augment(pixels, Batch(0, 0, np.arange(4), slice(0, 4)), AugmentConfig(shift=2))
    padded = torch.nn.functional.pad(pixels, [2] * 4, mode="replicate")
    for one, whole in zip(shifted, padded, strict=True):
        places = [whole[:, a : a + size[0], b : b + size[1]] for a in range(5) for b in range(5)]
        assert any(torch.equal(one, place) for place in places)


def test_a_large_set_with_a_tiny_bucket_has_its_scale_checked():
    """The rows that are looked at may hold none of a bucket."""
    draw = np.random.default_rng(0)
    latents = Buckets([draw.normal(size=(n, 2, 2, w)).astype(np.float32) for n, w in ((5000, 2), (1, 3), (5000, 1))])
    data = CaptionedPictures(np.zeros((1, 3, 4, 4), np.uint8), [["a"]], "many")
    check_scale(latents, data, {})


def test_a_stream_is_not_read_bucket_by_bucket(twenty, tmp_path):
    rows = [{"image": {"bytes": (twenty / f"{i:02}.png").read_bytes(), "path": None}, "text": "a"} for i in range(20)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    options = DataConfig(source=str(tmp_path / "rows.parquet"), resolution=32, max_aspect=4)
    assert len(load(options)) == 20
    with pytest.raises(UserError, match="stream"):
        load(options.model_copy(update={"streaming": True}))


def test_a_cache_that_is_cut_short_while_it_is_open_is_named(tmp_path):
    stored = cache.encode(tmp_path, {}, 10, lambda rows: {"x": np.arange(rows.start, rows.stop)[:, None]}, "x")["x"]
    (file,) = tmp_path.rglob("x.npy")
    assert (stored[[9, 2, 3]] == [[9], [2], [3]]).all()
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(OSError, match="cut short"):
        stored[[9]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are let go by Linux's madvise")
def test_pages_of_a_file_behind_a_link_are_let_go(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "zeros").write_bytes(bytes(2**26))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    mapped = np.memmap(tmp_path / "link" / "zeros", mode="r")
    before = psutil.Process().memory_info().rss
    assert not mapped[::4096].any() and psutil.Process().memory_info().rss > before + 2**25
    let_go_of({str(tmp_path / "link" / "zeros")})
    assert psutil.Process().memory_info().rss < before + 2**24 and not mapped[-1]


def test_all_buckets_have_to_fit_before_the_first_is_decoded(twenty, tmp_path, monkeypatch):
    options = DataConfig(source=str(twenty), resolution=32, max_aspect=4)
    needed = sum(3 * size.height * size.width * count for size, count in _counted(load(options)))
    largest = max(3 * size.height * size.width * count for size, count in _counted(load(options)))
    usage = shutil.disk_usage(tmp_path)
    assert largest + 1000 < needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(UserError, match="make room"):
        load(options, folder=tmp_path / "cache")
    assert not list(tmp_path.rglob("pictures.npy"))


def _counted(data):
    return list(zip(data.sizes, data.bucket_counts, strict=True))


def test_one_picture_in_two_shapes_is_near():
    wide = picture(80, 40, 3)
    one, other = images.fit(wide, (16, 48), "none"), images.fit(wide, (32, 32), "none")
    assert is_near(one, other, is_mirrored=False) and is_near(one, other[..., ::-1].copy(), is_mirrored=True)
    assert not is_near(one, images.fit(picture(80, 40, 4), (32, 32), "none"), is_mirrored=False)


def options_of(folder, *more: str) -> list[str]:
    data = ["source", str(folder), "split", "train", "count", "null", "resolution", "32", "max_aspect", "4"]
    data += ["bucket_step", "8"]
    pairs = [word for name, value in zip(data[::2], data[1::2], strict=True) for word in (f"--data.{name}", value)]
    valid = ["--valid.source", "null", "--valid.split", "null", "--valid.count", "9", "--valid.share", "0.3"]
    return [*pairs, *valid, "--valid.resolution", "32", *more]


def test_the_three_stages_train_on_twenty_pictures_in_nine_shapes(twenty, tmp_path):
    """Batches of several shapes; killed, or on two ranks, stage 3 is as it is straight through; the pipeline draws."""
    runs = [tmp_path / name for name in ("straight", "killed", "parallel")]
    for stage in ("autoencoder", "text_encoder"):
        assert launch(stage, runs[0], *options_of(twenty, "--data.mirror", "true")) == 0
        for other in runs[1:]:
            shutil.copytree(runs[0] / stage, other / stage)
    more = ("--data.mirror", "true", "--train.steps", "7", "--train.checkpoint_every", "2", "--train.trace", "true")
    stage_3 = options_of(twenty, *more)
    assert launch_apart("noise_predictor", runs[0], *stage_3)[0] == [0]
    assert launch_apart("noise_predictor", runs[1], *stage_3, fault=KillAt(5))[0] == [-9]
    assert launch_apart("noise_predictor", runs[1], *stage_3)[0] == [0]
    assert launch_apart("noise_predictor", runs[2], *stage_3, ranks=2)[0] == [0, 0]
    straight, killed, parallel = (run / "noise_predictor" for run in runs)
    assert_equal_runs(straight, killed)
    one, two = trace(straight), trace(parallel)
    assert one.keys() == two.keys()
    assert all(one[key]["id"] == two[key]["id"] for key in one)
    for left, right in zip(lines(straight), lines(parallel), strict=True):
        assert all(right[name] == pytest.approx(left[name], rel=1e-4) for name in left if "loss" in name)
    # an evaluation draws and compares squares, and finds what was trained on
    assert evaluation([str(runs[0]), "--out", str(tmp_path / "report"), "--prompts", "2", "--sweep"]) == 0
    assert (tmp_path / "report" / "report.json").is_file()
    pipeline = open_pipeline(runs[0])
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(["a mark"], num_inference_steps=2, height=16, width=48).images[0].size == (48, 16)
