"""sd_mini.data on tiny real sources of every kind, and what it says of broken ones."""

import json
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from sd_mini import images, memory, shapes
from sd_mini.data import parts as data_parts
from sd_mini.data.captioned import CaptionedPictures, DataConfig, load, unique_captions
from sd_mini.data.hub import READERS
from sd_mini.data.parts import load_captioned, load_pictures
from sd_mini.errors import UserError
from sd_mini.memory import available

SIDE = 8
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7)]
TEXTS = ["red", "green", "blue", "dark"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def picture(i: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), COLOURS[i])


def table(tmp_path, texts=TEXTS, **columns) -> datasets.Dataset:
    """Rows of encoded pictures with captions and any further columns."""
    rows = []
    for i, _ in enumerate(texts):
        path = tmp_path / f"source_{i}.png"
        picture(i).save(path)
        rows.append({"bytes": path.read_bytes(), "path": None})
    made = datasets.Dataset.from_dict({"image": rows, "text": list(texts), **columns})
    return made.cast_column("image", datasets.Image())


def config(source, **fields) -> DataConfig:
    return DataConfig(source=str(source), resolution=SIDE, **fields)


def folder_of_pictures(folder, lines):
    folder.mkdir(parents=True)
    for i in range(len(COLOURS)):
        picture(i).save(folder / f"{i}.png")
    if lines is not None:
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def assert_is_the_four(loaded: CaptionedPictures, texts=TEXTS) -> None:
    assert len(loaded) == len(texts) and loaded.pictures.dtype == np.uint8
    assert loaded.captions == [[text] for text in texts]
    expected = np.array(COLOURS[: len(texts)], dtype=np.uint8)[:, :, None, None]
    assert (loaded.pictures == np.broadcast_to(expected, (len(texts), 3, SIDE, SIDE))).all()
    assert loaded.scenes is None


def refused(settings: DataConfig, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        load(settings)
    assert "\n" not in str(caught.value) and "\\n" not in str(caught.value)


def test_shapes_are_the_world_s_own_scenes():
    loaded = load(DataConfig(count=5, resolution=32, seed=3, split="heldout_pairs"))
    scenes = shapes.sample_scenes(5, "heldout_pairs", 3)
    assert loaded.scenes == scenes and loaded.name == "shapes:heldout_pairs"
    assert (loaded.pictures == shapes.draw_batch(scenes, 32)).all()
    assert loaded.captions == [shapes.captions(scene) for scene in scenes]


def test_level_2_has_a_cache_and_a_name_of_its_own(tmp_path):
    config = DataConfig(count=5, resolution=32, level=2)
    loaded, kept = load(config), load(config, folder=tmp_path)
    assert loaded.scenes == shapes.sample_scenes(5, level=2) and loaded.name == "shapes, level 2:train"
    assert (
        loaded.fingerprint == kept.fingerprint != load(DataConfig(count=5, resolution=32), folder=tmp_path).fingerprint
    )


def test_another_name_of_a_split_is_the_same_scenes():
    loaded = load(DataConfig(count=3, resolution=32, split="eval"))
    assert loaded.name == "shapes:test" and loaded.scenes == shapes.sample_scenes(3, "test", 0)


def test_pixels_are_rows_in_the_range_of_the_network():
    loaded = load(DataConfig(count=6, resolution=32))
    for ids in ([4, 1], np.array([4, 1]), torch.tensor([4, 1])):
        pixels = loaded.pixels(ids)
        assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, 32, 32)
        assert (images.to_uint8(pixels).numpy() == loaded.pictures[[4, 1]]).all()


def test_a_parquet_file_is_train_and_its_own_name(tmp_path):
    table(tmp_path).to_parquet(tmp_path / "some.parquet")
    assert_is_the_four(load(config(tmp_path / "some.parquet")))
    loaded = load(config(tmp_path / "some.parquet", split="some"))
    assert_is_the_four(loaded)
    assert loaded.name == "some.parquet"
    refused(config(tmp_path / "some.parquet", split="test"), "no split 'test'; it has train, some$")


def test_a_folder_of_parquet_files_has_their_splits(tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    table(tmp_path).select([0, 1]).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    table(tmp_path).select([2, 3]).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    table(tmp_path).select([0]).to_parquet(folder / "data" / "held_out.parquet")
    assert_is_the_four(load(config(folder)))
    assert_is_the_four(load(config(folder, split="held_out")), ["red"])
    refused(config(folder, split="validation"), "no split 'validation'; it has held_out, train$")


def test_a_folder_of_pictures_with_metadata(tmp_path):
    lines = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(TEXTS)]
    folder = folder_of_pictures(tmp_path / "set", lines)
    assert_is_the_four(load(config(folder)))
    refused(config(folder, split="test"), "no split 'test'; it has train$")


def test_a_folder_of_pictures_without_captions_is_pictures_alone(tmp_path):
    loaded = load(config(folder_of_pictures(tmp_path / "set", None)))
    assert len(loaded) == 4 and loaded.captions == [[], [], [], []]
    assert unique_captions(loaded.captions) == []
    refused(config(tmp_path / "set", aliases_column="more"), "got 'more' without a text column")


def test_metadata_that_names_no_file_or_no_caption_is_refused(tmp_path):
    lines = [{"file_name": "0.png", "text": "red"}, {"file_name": "lost.png", "text": "lost"}]
    refused(config(folder_of_pictures(tmp_path / "a", lines)), r"row 1 of .*lost\.png: no such file")
    lines = [{"file_name": "0.png", "text": "red"}, {"file_name": "1.png", "text": None}]
    refused(
        config(folder_of_pictures(tmp_path / "b", lines)), r"row 1 of .*a caption is a NoneType \(None\); expected text"
    )


def test_saved_data_sets(tmp_path):
    table(tmp_path).save_to_disk(tmp_path / "one")
    assert_is_the_four(load(config(tmp_path / "one")))
    refused(config(tmp_path / "one", split="test"), "no split 'test'; it has train$")
    both = datasets.DatasetDict(train=table(tmp_path), test=table(tmp_path).select([0, 1]))
    both.save_to_disk(tmp_path / "both")
    assert_is_the_four(load(config(tmp_path / "both")))
    assert_is_the_four(load(config(tmp_path / "both", split="test")), TEXTS[:2])


def test_every_way_of_naming_the_same_rows_has_the_same_fingerprint(tmp_path):
    table(tmp_path).to_parquet(tmp_path / "a.parquet")
    table(tmp_path).save_to_disk(tmp_path / "b")
    lines = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(TEXTS)]
    folder_of_pictures(tmp_path / "c", lines)
    prints = {load(config(tmp_path / name)).fingerprint for name in ("a.parquet", "b", "c")}
    assert len(prints) == 1 and re.fullmatch("[0-9a-f]{64}", prints.pop())


def test_the_fingerprint_changes_with_one_pixel_caption_place_or_size():
    loaded = load(DataConfig(count=4, resolution=32))
    one_pixel = loaded.pictures.copy()
    one_pixel[2, 1, 5, 6] ^= 1
    other_caption = [*loaded.captions[:3], [*loaded.captions[3][:-1], "another"]]
    variants = [
        loaded,
        CaptionedPictures(one_pixel, loaded.captions, "x"),
        CaptionedPictures(loaded.pictures, other_caption, "x"),
        CaptionedPictures(loaded.pictures[::-1], loaded.captions, "x"),
        CaptionedPictures(loaded.pictures, loaded.captions[::-1], "x"),
        CaptionedPictures(loaded.pictures.reshape(16, 3, 16, 16), loaded.captions, "x"),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    same = CaptionedPictures(loaded.pictures.copy(), loaded.captions, "another name")
    assert same.fingerprint == loaded.fingerprint


def test_aliases_follow_the_main_caption(tmp_path):
    more = [["crimson", "red"], [], None, ["dim", "dim"]]
    table(tmp_path, aliases=more).to_parquet(tmp_path / "a.parquet")
    loaded = load(config(tmp_path / "a.parquet", aliases_column="aliases"))
    assert loaded.captions == [["red", "crimson"], ["green"], ["blue"], ["dark", "dim"]]
    assert unique_captions(loaded.captions) == ["red", "crimson", "green", "blue", "dark", "dim"]
    table(tmp_path, aliases=[["a"], ["b"], ["c", " "], ["d"]]).to_parquet(tmp_path / "b.parquet")
    refused(config(tmp_path / "b.parquet", aliases_column="aliases"), "row 2 of .*a caption is empty; expected text")
    refused(
        config(tmp_path / "b.parquet", aliases_column="text"),
        "row 0: column 'text' of aliases holds 'red'; expected a list",
    )


@pytest.mark.parametrize("bad", [None, "", " \t"])
def test_a_caption_without_text_is_refused_with_its_row(tmp_path, bad):
    table(tmp_path, ["red", "green", bad]).to_parquet(tmp_path / "a.parquet")
    refused(config(tmp_path / "a.parquet"), "row 2 of .*a caption is (empty|a NoneType)")


def test_captions_that_are_numbers_are_refused(tmp_path):
    table(tmp_path, [1, 2]).to_parquet(tmp_path / "a.parquet")
    refused(
        config(tmp_path / "a.parquet"),
        r"2 of 2 rows of .*: row 0: a caption is a int \(1\); expected text; row 1: a caption is a int \(2\)",
    )


def test_half_a_surrogate_pair_is_refused_with_its_row(tmp_path):
    """JSON can hold one, and no tokenizer can read it."""
    lines = [{"file_name": "0.png", "text": "red"}, {"file_name": "1.png", "text": "red \ud83d"}]
    refused(
        config(folder_of_pictures(tmp_path / "a", lines)),
        r"row 1 of .*a caption has a lone surrogate, U\+D83D, at character 4",
    )


def test_missing_columns_are_refused_and_those_there_named(tmp_path):
    table(tmp_path, aliases=[["a"]] * 4).to_parquet(tmp_path / "a.parquet")
    for field in ("image_column", "text_column", "aliases_column"):
        wrong = config(tmp_path / "a.parquet", **{field: "typo"})
        refused(wrong, f"data.{field}: no column 'typo'; there are image, text, aliases$")
    assert load(config(tmp_path / "a.parquet", text_column=None)).captions == [[]] * 4


def test_pictures_that_cannot_be_read_are_refused_with_their_row(tmp_path):
    rows = [{"bytes": (b"hello" if i == 1 else None), "path": str(tmp_path / "p.png")} for i in range(2)]
    picture(0).save(tmp_path / "p.png")
    broken = datasets.Dataset.from_dict({"image": rows, "text": ["a", "b"]}).cast_column("image", datasets.Image())
    broken.save_to_disk(tmp_path / "broken")
    refused(
        config(tmp_path / "broken"), r"row 1 of .*broken': cannot decode a picture of 5 bytes: not a picture format"
    )
    absent = datasets.Dataset.from_dict({"image": [rows[0], None], "text": ["a", "b"]})
    absent.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "absent")
    refused(config(tmp_path / "absent"), "row 1 of .*no picture in column 'image'")
    datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"]}).save_to_disk(tmp_path / "numbers")
    refused(config(tmp_path / "numbers"), r"column 'image' of .*numbers' as pictures \(it holds Value\('int64'\)\)")


def test_transparency_is_put_on_the_background(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGBA", (30, 20), (1, 2, 3, 0)).save(folder / "0.png")
    loaded = load(config(folder, background=(10, 20, 30)))
    assert loaded.pictures.shape == (1, 3, SIDE, SIDE)
    assert (loaded.pictures == np.array([10, 20, 30])[:, None, None]).all()


def test_count_takes_the_first_rows_and_no_more_than_there_are(tmp_path):
    table(tmp_path).to_parquet(tmp_path / "a.parquet")
    assert_is_the_four(load(config(tmp_path / "a.parquet", count=2)), TEXTS[:2])
    refused(config(tmp_path / "a.parquet", count=5), "got 5, but .* has 4 rows")


def test_empty_missing_and_broken_sources_are_refused(tmp_path):
    table(tmp_path).select([]).to_parquet(tmp_path / "empty.parquet")
    refused(config(tmp_path / "empty.parquet"), r"empty\.parquet' has no rows in split 'train'")
    table(tmp_path).select([]).save_to_disk(tmp_path / "empty")
    refused(config(tmp_path / "empty"), "has no rows")
    (tmp_path / "nothing").mkdir()
    refused(config(tmp_path / "nothing"), "cannot read .*nothing")
    refused(config(tmp_path / "lost.parquet"), r"lost\.parquet': no such file or folder")
    refused(config("lost.parquet"), "no such file or folder")
    refused(config(tmp_path / "lost"), "no such file or folder")
    (tmp_path / "broken.parquet").write_bytes(b"hello")
    refused(config(tmp_path / "broken.parquet"), r"cannot read .*broken\.parquet': Parquet")
    (tmp_path / "notes.txt").write_text("hello")
    refused(config(tmp_path / "notes.txt"), "neither a folder nor a .parquet, .csv, .tsv or .tar file")


def test_a_hub_name_that_cannot_be_reached_is_refused():
    refused(
        config("nobody/nothing-here"), "cannot read 'nobody/nothing-here', which is no file or folder here, from the"
    )


def test_wrong_settings_are_refused():
    refused(DataConfig(split="valid"), "no split 'valid'; it has train, test, heldout_pairs, heldout_relations$")
    for wrong in ({"resolution": 0}, {"count": 0}, {"background": (0, 0, 256)}, {"sorce": "shapes"}):
        with pytest.raises(ValidationError):
            DataConfig(**wrong)


def parquet(folder, *names):
    """Files of a row each, in this order: red, green, ..."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table(folder.parent).select([i]).to_parquet(folder / name)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("00000.parquet", "00001.parquet", "00002.parquet", "00003.parquet"),
        ("train/0000.parquet", "train/0001.parquet", "train/0002.parquet", "train/0003.parquet"),
        ("faces_1.parquet", "faces_2.parquet", "faces_3.parquet", "faces_4.parquet"),
        ("train-0.parquet", "train-1.parquet", "train-2.parquet", "train-5.parquet"),
        tuple(f"part-0000{i}-1b2c3d4e-aaaa-bbbb-cccc-0123456789ab-c000.snappy.parquet" for i in range(4)),
        tuple(f"data/train-0000{i}-of-00004-0123456789abcdef.parquet" for i in range(4)),
        tuple(f"part.{i}.parquet" for i in range(4)),
    ],
)
def test_the_parts_of_a_parquet_set_are_one_split(tmp_path, names):
    folder = parquet(tmp_path / "set", *names)
    (folder / "._SUCCESS.parquet").write_bytes(b"")
    assert_is_the_four(load(config(folder)))


def test_parquet_files_that_are_no_parts_are_splits(tmp_path):
    folder = parquet(tmp_path / "set", "faces_2020.parquet", "faces_2021.parquet", "valid/0.parquet")
    assert_is_the_four(load(config(folder, split="faces_2020")), ["red"])
    refused(config(folder), "no split 'train'; it has faces_2020, faces_2021$")
    folder = parquet(tmp_path / "other", "train-00000-of-00001.parquet", "val.parquet")
    assert len(load(config(folder, split="validation"))) == 1


def test_class_labels_that_are_read_as_captions_are_their_names(tmp_path):
    kinds = datasets.List(datasets.ClassLabel(names=["a", "b"]))
    rows = table(tmp_path, kinds=[[0], [1, 0], [0], [1]]).cast_column("kinds", kinds)
    rows = rows.add_column("label", [1, 0, 1, 1]).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    rows.to_parquet(tmp_path / "a.parquet")
    assert load(config(tmp_path / "a.parquet", text_column="label")).captions == [["dog"], ["cat"], ["dog"], ["dog"]]
    assert load(config(tmp_path / "a.parquet", text_column="kinds")).captions == [["a"], ["b", "a"], ["a"], ["b"]]
    unknown = table(tmp_path, label=[0, -1, 1, 0]).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    unknown.save_to_disk(tmp_path / "unknown")
    refused(config(tmp_path / "unknown", text_column="label"), "row 1 of .*a caption is a NoneType")


def test_captions_as_lists_in_a_column_are_read(tmp_path):
    table(tmp_path, captions=[["a", "b"], ["c"], ["d", "d"], ["e"]]).to_parquet(tmp_path / "a.parquet")
    loaded = load(config(tmp_path / "a.parquet", text_column="captions"))
    assert loaded.captions == [["a", "b"], ["c"], ["d"], ["e"]]


def test_bad_pictures_and_bad_captions_of_both_parts_are_named_together(tmp_path):
    rows = table(tmp_path, ["red", "", "blue", "dark"])
    rows = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[3]["image"] = {"bytes": b"no picture", "path": None}
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    made.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError) as caught:
        load_captioned(config(tmp_path / "train.parquet"), config(tmp_path / "train.parquet", count=2))
    said = str(caught.value)
    for part in ("data: 2 of 4 rows of", "row 1: a caption is empty", "row 3: cannot decode a picture of 10 bytes",
                 "valid: row 1 of"):  # fmt: skip
        assert part in said


def test_a_training_on_pictures_reads_no_captions(tmp_path):
    table(tmp_path, ["red", "", None, "dark"], aliases=["no", "list", "at", "all"]).to_parquet(tmp_path / "a.parquet")
    asked = config(tmp_path / "a.parquet", aliases_column="aliases")
    loaded = load(asked, pictures_only=True)
    assert len(loaded) == 4 and loaded.captions == [[], [], [], []]
    table(tmp_path).to_parquet(tmp_path / "b.parquet")
    captioned = load(config(tmp_path / "b.parquet"))
    assert captioned.pictures_fingerprint == loaded.fingerprint != captioned.fingerprint


def test_a_training_on_pictures_says_what_later_stages_will_lack(tmp_path, capsys):
    folder_of_pictures(tmp_path / "bare" / "train", None)
    picture(1).save(tmp_path / "bare" / "train" / "4.png")
    picture(2).resize((9, 9)).save(tmp_path / "other.png")
    (tmp_path / "bare" / "test").mkdir()
    (tmp_path / "other.png").rename(tmp_path / "bare" / "test" / "0.png")
    parts = config(tmp_path / "bare"), config(tmp_path / "bare", split="test")
    load_pictures(*parts)
    said = capsys.readouterr().err.splitlines()
    assert "bare' has no captions; valid: " in said[0] and "the text encoder and the noise predictor will" in said[0]
    table(tmp_path).rename_column("text", "caption").to_parquet(tmp_path / "a.parquet")
    load_pictures(config(tmp_path / "a.parquet"), config(tmp_path / "a.parquet", count=1))
    assert "data.text_column: " in (said := capsys.readouterr().err) and "there are image, caption" in said
    load_pictures(*(part.model_copy(update={"text_column": None}) for part in parts))
    assert "captions" not in capsys.readouterr().err


def test_validating_on_training_pictures_is_remarked(tmp_path, capsys):
    table(tmp_path).to_parquet(tmp_path / "train.parquet")
    table(tmp_path).select([1, 3]).to_parquet(tmp_path / "test.parquet")
    load_captioned(config(tmp_path, split="train"), config(tmp_path, split="test"))
    assert "note: valid: 2 of 2 pictures of" in capsys.readouterr().err
    world = DataConfig(count=30, resolution=32)
    load_captioned(world, world.model_copy(update={"split": "test"}))
    assert capsys.readouterr().err == ""
    load_pictures(world, world.model_copy(update={"count": 10}))
    assert "valid: 10 of 10 pictures of shapes:train are training pictures" in capsys.readouterr().err


def test_messages_name_the_field_of_the_part_that_is_meant(tmp_path):
    table(tmp_path).to_parquet(tmp_path / "train.parquet")
    train = config(tmp_path / "train.parquet")
    for changes, says in (
        ({"split": "valid"}, "^valid.split: .* no split 'valid'"),
        ({"count": 9}, "^valid.count: got 9"),
        ({"image_column": "typo"}, "^valid.image_column: no column"),
        ({"text_column": "typo"}, "^valid.text_column: no column"),
        ({"source": "lost.parquet"}, "^valid.source: 'lost.parquet': no such file"),
    ):
        with pytest.raises(UserError, match=says):
            load_captioned(train, train.model_copy(update=changes))


def test_more_pictures_than_memory_holds_are_refused_before_any_is_read(tmp_path):
    table(tmp_path).to_parquet(tmp_path / "a.parquet")
    side = int((available() / 6) ** 0.5)  # so that two fill it, and four take twice as much
    with pytest.raises(UserError, match=r"data: 4 pictures of \d+ px take [\d,.]+ GiB of memory, and [\d,.]+ GiB"):
        load(DataConfig(source=str(tmp_path / "a.parquet"), resolution=side))
    with pytest.raises(UserError, match=r"valid: 1,000,000,000 pictures of 64 px take 11,444.1 GiB of memory"):
        load(DataConfig(count=10**9), "valid")


@pytest.mark.parametrize("name", ["webdataset", "imagefolder", "csv", "json", "WebDataset"])
def test_a_reader_of_files_is_no_data_set(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    refused(config(name), f"^data.source: {name!r} is a reader of files in `datasets`, not a data set; give the folder")


def test_every_reader_of_datasets_is_known():
    assert set(datasets.packaged_modules._PACKAGED_DATASETS_MODULES) <= READERS


def test_a_set_is_called_by_its_own_name(tmp_path, monkeypatch):
    folder = parquet(tmp_path / "faces.v2", "train.parquet", "test.parquet")
    assert load(config(folder, split="test")).name == "faces.v2:test"
    assert load(config(folder / "train.parquet")).name == "train.parquet"
    assert load(config(folder / "train.parquet", split="train")).name == "train.parquet"
    folder_of_pictures(tmp_path / "train", None)
    assert load(config(tmp_path / "train")).name == "train"
    monkeypatch.chdir(folder)
    assert load(config(".")).name == "faces.v2:train"


def test_nothing_is_said_to_be_downloaded_that_lies_here(tmp_path, capfd):
    table(tmp_path).to_parquet(tmp_path / "a.parquet")
    capfd.readouterr()
    assert not datasets.are_progress_bars_disabled()
    load(config(tmp_path / "a.parquet"))
    assert capfd.readouterr().err == "" and not datasets.are_progress_bars_disabled()


def test_a_container_s_limit_counts_as_the_machine_s_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    whole = available()
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert available() == 650_000 and memory.total() == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available() == pytest.approx(whole, rel=0.5)


def test_a_large_held_out_part_is_scored_in_an_even_sample(tmp_path, monkeypatch, capsys):
    """A cap of 10 of 25 rows, said, unless a count is given; `load` itself, as evaluations use it, reads all."""
    monkeypatch.setattr(data_parts, "HELD_OUT_MOST", 10)
    for part, count in (("train", 4), ("test", 25)):
        (tmp_path / part).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 7, 200)).save(tmp_path / part / f"{number:02}.png")
    train, valid = (DataConfig(source=str(tmp_path), split=part, resolution=8) for part in ("train", "test"))
    _, held_out = load_pictures(train, valid)
    assert held_out.pictures[:, 0, 0, 0].tolist() == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
    assert "valid: 10 of the 25 rows" in capsys.readouterr().err
    _, first = load_pictures(train, valid.model_copy(update={"count": 12}))
    assert len(first) == 12 and "evenly" not in capsys.readouterr().err
    assert len(load(valid)) == 25


def test_rows_of_a_sample_keep_their_numbers_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(data_parts, "HELD_OUT_MOST", 2)
    table(tmp_path, ["red", "green", "", "dark"]).to_parquet(tmp_path / "a.parquet")
    folder_of_pictures(tmp_path / "b", [{"file_name": f"{i}.png", "text": text} for i, text in enumerate("ab d")])
    for name in ("a.parquet", "b"):
        with pytest.raises(UserError, match="valid: row 2 of"):  # the second of rows 0 and 2
            load_captioned(config(tmp_path / name, count=1), config(tmp_path / name))


def test_memory_that_other_processes_hold_is_not_counted_twice(monkeypatch):
    """The last of four processes, a GiB each: 3 of 5 GiB are taken."""
    gib = 2**30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(memory, "available", lambda: 2 * gib)
    monkeypatch.setattr(memory, "total", lambda: 5 * gib)
    side = 2**14
    memory.check_room("data", 1, side)  # 0.75 GiB
    with pytest.raises(UserError, match=r"in each of 4 processes take 6\.0 GiB of memory, and there are 5\.0 GiB in"):
        memory.check_room("data", 2, side)
    with pytest.raises(UserError, match=r"take 2\.2 GiB of memory, and 2\.0 GiB are available"):
        memory.check_room("data", 3, side)
