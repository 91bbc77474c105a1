"""Rows that cannot be used: left out by name up to a share, refused above it."""

import io
import json

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from sd_mini.config import check
from sd_mini.data.captioned import DataConfig, load
from sd_mini.data.parts import load_captioned, load_pictures
from sd_mini.errors import UserError
from tests.support.launching import launch, lines, trace
from training.noise_predictor.config import PredictorConfig

COUNT = 120


@pytest.fixture
def folder(tmp_path):
    """120 pictures, each of its own grey, and their captions; 17.png is no picture, 40.png has no caption."""
    lines = []
    for i in range(COUNT):
        Image.new("RGB", (16, 12), (i, i, i)).save(tmp_path / f"{i:03}.png")
        lines.append({"file_name": f"{i:03}.png", "text": f"grey {i}" if i != 40 else " "})
    (tmp_path / "017.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def config(folder, **fields) -> DataConfig:
    return DataConfig(source=str(folder), resolution=8, **fields)


@pytest.mark.parametrize("is_cached", [False, True])
def test_bad_rows_are_left_out_by_name_and_the_others_keep_their_captions(folder, tmp_path_factory, capsys, is_cached):
    cache = tmp_path_factory.mktemp("cache") if is_cached else None
    for _ in range(2):  # the second time from the cache
        read = load(config(folder, max_bad=0.02), folder=cache)
        assert len(read) == COUNT - 2 and [one.id for one in read.rejected] == ["017.png", "040.png"]
        assert "cannot decode" in read.rejected[0].reason and "is empty" in read.rejected[1].reason
        greys = [int(picture[0, 0, 0]) for picture in read.pictures]
        assert greys == [i for i in range(COUNT) if i not in (17, 40)]
        assert read.captions == [[f"grey {grey}"] for grey in greys]
        remarked = " ".join(capsys.readouterr().err.split())
        assert "data: left out 2 of 120 rows" in remarked and "(row 17, 017.png)" in remarked


def test_pictures_alone_have_one_bad_row_and_share_the_cache(folder, tmp_path_factory, capsys):
    cache = tmp_path_factory.mktemp("cache")
    alone = load(config(folder, max_bad=0.02), pictures_only=True, folder=cache)
    assert [one.id for one in alone.rejected] == ["017.png"] and len(list(cache.iterdir())) == 1
    both = load(config(folder, max_bad=0.02), folder=cache)
    assert len(list(cache.iterdir())) == 1  # what is wrong with captions changes no picture
    assert alone.pictures_fingerprint != both.pictures_fingerprint  # they hold different rows


def test_above_the_allowed_share_the_most_common_reasons_are_named(folder):
    for i in range(8):
        (folder / f"{i:03}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"10 of 120 rows .*max_bad allows 1.00%.*9 x cannot decode .*row 0, 000.png"):
        load(config(folder))
    with pytest.raises(UserError, match=r"row 0 \(000.png\).*and 5 more"):
        load(config(folder, max_bad=0))
    assert len(load(config(folder, max_bad=0.1))) == COUNT - 10


def test_pictures_that_are_too_small_are_enlarged_or_left_out(folder, tmp_path_factory):
    Image.new("RGB", (40, 40), "red").save(folder / "099.png")
    cache = tmp_path_factory.mktemp("cache")
    enlarged = load(DataConfig(source=str(folder), resolution=32, max_bad=1), folder=cache)
    assert len(enlarged) == COUNT - 2
    only = load(DataConfig(source=str(folder), resolution=32, max_bad=1, enlarge=False), folder=cache)
    assert [captions[0] for captions in only.captions] == ["grey 99"]
    reasons = {one.id: one.reason for one in only.rejected}
    assert reasons["000.png"].startswith("it is 16 x 12 px, expected at least 32 px a side")


def test_no_share_allows_a_source_without_a_single_good_row(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="3 of 3 rows"):
        load(config(tmp_path, max_bad=1))


def test_fingerprints_are_the_same_in_memory_and_on_disk(folder, tmp_path_factory):
    options = config(folder, max_bad=0.5)
    on_disk = load(options, folder=tmp_path_factory.mktemp("cache"))
    in_memory = load(options)
    assert on_disk.fingerprint == in_memory.fingerprint
    assert on_disk.pictures_fingerprint == in_memory.pictures_fingerprint
    ids = np.array([5, 0, 5, 99])
    assert np.array_equal(on_disk.pixels(ids), in_memory.pixels(ids))
    assert np.array_equal(np.asarray(on_disk.pictures), in_memory.pictures)


def test_an_edited_picture_is_decoded_again(folder, tmp_path_factory):
    cache, options = tmp_path_factory.mktemp("cache"), config(folder, max_bad=0.5)
    before = load(options, folder=cache)
    Image.new("RGB", (16, 12), (0, 255, 0)).save(folder / "000.png")
    after = load(options, folder=cache)
    assert before.pictures[0][1, 0, 0] == 0 and after.pictures[0][1, 0, 0] == 255


def test_both_parts_of_a_training_are_reported_together(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    train, valid = load_captioned(config(folder, max_bad=0.5), config(folder, max_bad=0.5, count=60), cache)
    assert [(one.part, one.id) for one in [*train.rejected, *valid.rejected]] == [
        ("data", "017.png"),
        ("data", "040.png"),
        ("valid", "017.png"),
        ("valid", "040.png"),
    ]
    with pytest.raises(UserError, match=r"data: 2 of 120 rows.*; valid: 2 of 60 rows"):
        load_captioned(config(folder, max_bad=0), config(folder, max_bad=0, count=60), cache)
    assert len(load_pictures(config(folder), config(folder), cache)[0]) == COUNT - 1  # 0.83 %


def test_a_stage_names_the_rows_it_leaves_out_in_its_folder(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    options = [
        "--data.source",
        str(folder),
        "--valid.source",
        str(folder),
        "--valid.split",
        "train",
        "--valid.count",
        "16",
    ]
    assert launch("autoencoder", run, *options, "--train.steps", "1", "--data.max_bad", "0.02") == 0
    lines = (run / "autoencoder" / "rejected.jsonl").read_text().splitlines()
    (first,) = map(json.loads, lines)
    assert (first["part"], first["source"], first["id"]) == ("data", f"{folder.name}:train", "017.png")
    assert "cannot decode" in first["reason"]


def test_a_mixture_is_drawn_by_weight_and_each_source_is_scored_apart(tmp_path):
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.new("RGB", (32, 32), (colour[0], i, colour[2])).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text(name)
    mixture = json.dumps([{"source": str(tmp_path / "red"), "weight": 3}, {"source": str(tmp_path / "blue")}])
    options = ["--data.source", mixture, "--valid.source", mixture, "--valid.split", "train"]
    options += ["--valid.count", "16", "--data.count", "16", "--train.steps", "4", "--train.batch_size", "8"]
    assert launch("autoencoder", tmp_path / "run", *options, "--train.trace", "true") == 0
    rows = trace(tmp_path / "run" / "autoencoder").values()
    assert [sum(row["id"] < 8 for row in rows), len(rows)] == [24, 32]  # an epoch: 8 x 3 of red, 8 of blue
    scores = [line for line in lines(tmp_path / "run" / "autoencoder") if "valid/psnr" in line][-1]
    apart = [scores[f"valid/{name}:train/psnr"] for name in colours]
    assert scores["valid/psnr"] == pytest.approx(sum(apart) / 2)


@pytest.fixture
def two_columns(tmp_path):
    """Two parquet files whose pictures are in two columns: black in `image`, white in `mask`."""
    for name in "ab":
        rows = {}
        for column, grey in (("image", 0), ("mask", 255)):
            Image.new("L", (8, 8), grey).save(file := io.BytesIO(), "PNG")
            rows[column] = [{"bytes": file.getvalue(), "path": None}] * 3
        made = datasets.Dataset.from_dict({**rows, "text": [f"{name}{i}" for i in range(3)]})
        made.to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def test_another_column_of_one_source_of_a_mixture_is_another_cache(two_columns, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def read(column: str) -> list[int]:
        first = {"source": str(two_columns / "a.parquet"), "image_column": column}
        sources = [first, {"source": str(two_columns / "b.parquet")}]
        config = check(DataConfig, {"source": sources, "resolution": 8}, "test")
        return [int(picture.mean()) for picture in load(config, folder=cache).pictures]

    assert read("image") == [0] * 6 and read("mask") == [255] * 3 + [0] * 3


def test_a_saved_mixture_says_what_was_said(two_columns):
    sources = [{"source": str(two_columns / "a.parquet"), "weight": 2}, {"source": str(two_columns / "b.parquet")}]
    config = check(DataConfig, {"source": sources, "text_column": "mask", "split": "val"}, "test")
    again = check(DataConfig, yaml.safe_load(config.to_yaml()), "saved")
    assert again == config
    assert [one.config(again) for one in again.source] == [one.config(config) for one in config.source]


def test_other_weights_are_another_training(two_columns):
    def identity(weight: float) -> dict[str, str]:
        sources = [
            {"source": str(two_columns / f"{name}.parquet"), "weight": w} for name, w in (("a", weight), ("b", 1))
        ]
        return load(check(DataConfig, {"source": sources, "resolution": 8}, "test")).identity

    assert identity(1)["data"] == identity(3)["data"] and identity(1) == identity(1) != identity(3)


def test_one_alias_that_is_no_list_is_one_bad_row(folder):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        line["aliases"] = ["grey"] if line["file_name"] != "099.png" else "grey"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = load(config(folder, max_bad=0.03, aliases_column="aliases"))
    assert [one.id for one in read.rejected] == ["017.png", "040.png", "099.png"]


def test_caption_weights_beyond_the_encoded_captions_are_refused():
    with pytest.raises(UserError, match="captions beyond captions_per_picture, 2, are not encoded"):
        check(PredictorConfig, {"data": {"caption_weights": [0, 0, 1]}}, "test")
