"""What all kinds of sources have in common: ids, states, rows in any order, templates, mixtures, and the registry."""

import json
import multiprocessing
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from sd_mini import images
from sd_mini.config import read
from sd_mini.data import sources
from sd_mini.data.captioned import DataConfig, load
from sd_mini.data.sources import SourceKind, open_source, source_name
from sd_mini.errors import UserError
from tests.data.test_tars import encoded, write_tar

SIDE = 8


def config(source, **fields) -> DataConfig:
    return DataConfig(source=source if isinstance(source, tuple | list) else str(source), resolution=SIDE, **fields)


def opened(source, **fields):
    return open_source(config(source, **fields), "data")


def shades(loaded) -> list[int]:
    return loaded.pictures[:, 0, 0, 0].tolist()


def refused(settings, pattern) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        load(settings)
    assert "\n" not in str(caught.value)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def arrow_rows(count, **columns) -> datasets.Dataset:
    rows = [{"bytes": encoded(i), "path": None} for i in range(count)]
    made = datasets.Dataset.from_dict({"image": rows, "text": [str(i) for i in range(count)], **columns})
    return made.cast_column("image", datasets.Image())


def write_kind(kind: str, folder: Path, count: int = 4):
    """The same `count` rows as a source of each kind => what to give as the source, and the ids that are expected."""
    folder.mkdir(parents=True)
    if kind == "tar":
        members = [one for i in range(count) for one in ((f"{i}.png", encoded(i)), (f"{i}.txt", str(i).encode()))]
        return write_tar(folder / "x.tar", members), [f"x.tar/{i}" for i in range(count)]
    if kind == "parquet":
        for shard in range(2):
            half = range(shard * count // 2, (shard + 1) * count // 2)
            arrow_rows(count).select(half).to_parquet(folder / f"{shard}.parquet")
        return folder, [f"{i // (count // 2)}.parquet/{i % (count // 2)}" for i in range(count)]
    if kind == "saved":
        arrow_rows(count, key=[f"k{i}" for i in range(count)]).save_to_disk(folder)
        return folder, [f"k{i}" for i in range(count)]
    for i in range(count):
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / f"{i}.png").write_bytes(encoded(i))
    ids = [f"deep/{i}.png" for i in range(count)]
    if kind == "csv":
        lines = ["file,text", *(f"./deep/../deep/{i}.png,{i}" for i in range(count))]
        (folder / "rows.csv").write_text("\n".join(lines))
        return folder / "rows.csv", ids
    for i in range(count):
        (folder / "deep" / f"{i}.txt").write_text(str(i))
    return folder, ids


ALL = ["folder", "csv", "tar", "parquet", "saved"]


@pytest.mark.parametrize("kind", ALL)
def test_rows_have_ids_and_are_read_in_any_order(tmp_path, kind):
    source, ids = write_kind(kind, tmp_path / "set", 24)
    table = opened(source)
    order = sorted if kind == "folder" else list  # paths are sorted, other rows are as they lie there
    assert [table.id(i) for i in range(24)] == order(ids)
    numbers = [int(table.text(i, "text")) for i in range(24)]

    def shade(row):
        return int(images.decode(table.picture(row, "image"))[0, 0, 0])

    rows = [*range(23, -1, -1)] * 4
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(shade, rows)) == [numbers[row] for row in rows]
    queue = multiprocessing.get_context("fork").Queue()
    process = multiprocessing.get_context("fork").Process(target=lambda: queue.put([shade(20), shade(3)]))
    process.start()
    assert queue.get(timeout=60) == [numbers[20], numbers[3]]
    process.join()
    part = table.select([5, 2]).select([1])
    assert (part.id(0), part.number(0), part.text(0, "text")) == (table.id(2), 2, str(numbers[2]))
    assert [shade(2)] == [int(images.decode(one)[0, 0, 0]) for one in part.pictures("image")]


@pytest.mark.parametrize("kind", ALL)
def test_the_state_of_a_source_is_its_content_s(tmp_path, kind):
    """The same after another opening and for the same folder elsewhere; another after a file was written anew."""
    source, _ = write_kind(kind, tmp_path / "set")
    table = opened(source)
    state = table.source_state()
    assert re.fullmatch("[0-9a-f]{64}", state) and opened(source).source_state() == state
    assert table.select(range(4)).source_state() == state != table.select(range(3)).source_state()
    if kind in ("folder", "tar", "csv"):
        (tmp_path / "set").rename(tmp_path / "moved")
        assert opened(tmp_path / "moved" / source.relative_to(tmp_path / "set")).source_state() == state
        (tmp_path / "moved").rename(tmp_path / "set")
    table.check_unchanged()
    files = [path for path in (tmp_path / "set").rglob("*") if path.suffix in (".png", ".tar", ".parquet", ".arrow")]
    os.utime(files[0], ns=(1, 1))
    with pytest.raises(UserError, match=rf"set: 1 of its files changed while they were read \({files[0].name}|deep/"):
        table.check_unchanged()
    assert opened(source).source_state() != state


def test_a_picture_that_vanishes_while_it_is_read_is_named(tmp_path):
    source, _ = write_kind("folder", tmp_path / "set")
    table = opened(source)
    (source / "deep" / "2.png").unlink()
    with pytest.raises(UserError, match=r"1 of its files changed while they were read \(deep/2\.png\)"):
        table.check_unchanged()


def test_ids_of_parquet_are_a_column_s_where_no_two_are_alike(tmp_path):
    for name, values, expected in (
        ("id", [7, 8, 9], ["7", "8", "9"]),
        ("__key__", ["a", "b", "c"], ["a", "b", "c"]),
        ("key", ["a", "b", "a"], ["x.parquet/0", "x.parquet/1", "x.parquet/2"]),
        ("id", [1, None, 2], ["x.parquet/0", "x.parquet/1", "x.parquet/2"]),
        ("id", [0.5, 1.5, 2.5], ["x.parquet/0", "x.parquet/1", "x.parquet/2"]),
    ):
        arrow_rows(3, **{name: values}).to_parquet(tmp_path / "x.parquet")
        table = opened(tmp_path / "x.parquet")
        assert [table.id(i) for i in range(3)] == expected


def test_rows_of_one_id_are_refused(tmp_path):
    """Two spellings of one name, which are one file elsewhere."""
    for name in ("cafe\u0301.png", "caf\u00e9.png"):
        (tmp_path / name).write_bytes(encoded(1))
    refused(config(tmp_path), r"^data.source: .*: 1 ids stand for several rows each \(caf\u00e9\.png\); rename them")


def test_a_loop_of_links_is_one_bad_row_or_left_out(tmp_path, capsys):
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "c.png").write_bytes(encoded(1))
    (tmp_path / "loop").symlink_to(tmp_path)
    refused(config(tmp_path), r"2 of 3 rows .*\(a\.png\): cannot decode .*too many levels of symbolic links")


def test_an_unreadable_folder_is_named(tmp_path):
    locked = tmp_path / "set" / "locked"
    locked.mkdir(parents=True)
    (tmp_path / "set" / "1.png").write_bytes(encoded(1))
    locked.chmod(0)
    user = os.geteuid()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and user == 0 and str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o755)
    os.seteuid(65534 if user == 0 else user)  # root may read everything
    try:
        refused(config(tmp_path / "set"), r"^data.source: .*locked: cannot be read: permission denied")
    finally:
        os.seteuid(user)
        locked.chmod(0o755)


def test_a_parquet_file_that_is_cut_short_is_named(tmp_path):
    arrow_rows(20).to_parquet(tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    for size in (4, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.parquet").write_bytes(whole[:size])
        refused(config(tmp_path / "x.parquet"), r"^data.source: cannot read .*x\.parquet': Parquet")


# class folders, and columns of classes


def test_class_folders_become_captions_by_a_template(tmp_path):
    for shade, name in enumerate(("apple_pie/1.png", "dog/1.png", "Umbrella/1.png")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encoded(shade))
    loaded = load(config(tmp_path, template="a photo of {article} {label}"))
    captions = dict(zip(shades(loaded), loaded.captions, strict=True))
    assert captions == {0: ["a photo of an apple pie"], 1: ["a photo of a dog"], 2: ["a photo of an Umbrella"]}
    assert load(config(tmp_path, text_column="label", template="{label}")).captions[1:] == [["apple pie"], ["dog"]]


def test_a_column_of_classes_becomes_captions_by_a_template(tmp_path):
    """The layout of the hub's cifar10: columns `img` and `label`."""
    rows = arrow_rows(4, label=[0, 1, -1, 0]).rename_column("image", "img").remove_columns("text")
    rows = rows.cast_column("label", datasets.ClassLabel(names=["airplane", "sea_lion"]))
    rows.select([0, 1, 3]).to_parquet(tmp_path / "train.parquet")
    asked = {"image_column": "img", "text_column": "label", "template": "a photo of {article} {label}"}
    plane, lion = ["a photo of an airplane"], ["a photo of a sea lion"]
    assert load(config(tmp_path, **asked)).captions == [plane, lion, plane]
    rows.save_to_disk(tmp_path / "saved")
    refused(config(tmp_path / "saved", **asked), "row 2 of .*a caption is a NoneType")
    refused(
        config(tmp_path, **asked | {"text_column": "name"}), "^data.template: .* no column 'name' of labels; .* img, l"
    )


def test_labels_that_are_no_texts_are_not_made_captions(tmp_path):
    arrow_rows(2, label=[3, 4]).remove_columns("text").to_parquet(tmp_path / "x.parquet")
    refused(config(tmp_path / "x.parquet", text_column="label", template="{label}"), r"a caption is a int \(3\)")
    refused(config(tmp_path / "x.parquet", template="{label}", image_column="image"), r"a caption is a int \(3\)")
    arrow_rows(2, kinds=[["cup b", "ox"], ["c"]]).to_parquet(tmp_path / "y.parquet")
    loaded = load(config(tmp_path / "y.parquet", text_column="kinds", template="{article} {label}"))
    assert loaded.captions == [["a cup b", "an ox"], ["a c"]]
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "1.png").write_bytes(encoded(1))
    refused(config(tmp_path / "z", template="{label}"), "^data.template: .* has no column 'text' of labels; there are")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("a photo of {colour} {label}", r"unknown placeholder \{colour\}; expected \{label\}"),
        ("a photo of {} {label}", r"unknown placeholder \{\}"),
        ("a photo of {label!r}", "unknown placeholder"),
        ("a photo of {label:>9}", "unknown placeholder"),
        ("a photo of {label.__class__}", "unknown placeholder"),
        ("a photo", r"has no \{label\}"),
        ("a photo of {label", "its braces do not match"),
    ],
)
def test_a_template_with_other_placeholders_is_refused(template, says):
    with pytest.raises(UserError, match=says) as caught:
        read(DataConfig, None, ["--template", json.dumps(template)])
    assert "\n" not in str(caught.value)


# several sources as one


@pytest.fixture
def pair(tmp_path):
    """Two sources under other names of columns."""
    write_kind("tar", tmp_path / "a", 3)
    rows = arrow_rows(2, label=[1, 0]).rename_column("image", "img").remove_columns("text")
    rows = rows.cast_column("label", datasets.ClassLabel(names=["cat", "owl"]))
    rows.to_parquet(tmp_path / "b.parquet")
    first = {"source": str(tmp_path / "a" / "x.tar"), "weight": 2}
    second = {"source": str(tmp_path / "b.parquet"), "image_column": "img", "text_column": "label"}
    return [first, second | {"template": "{article} {label}"}]


def test_several_sources_are_one_with_weights(pair):
    table, loaded = opened(pair), load(config(pair))
    assert shades(loaded) == [0, 1, 2, 0, 1]
    assert loaded.captions == [["0"], ["1"], ["2"], ["an owl"], ["a cat"]]
    assert table.weights is not None and table.weights.dtype == np.float64
    assert table.weights.tolist() == [2, 2, 2, 1, 1]
    assert table.select([4, 0]).weights.tolist() == [1, 2]
    assert [table.id(i) for i in (0, 4)] == ["x.tar:train/x.tar/0", "b.parquet:train/b.parquet/1"]
    assert source_name(config(pair)) == loaded.name == "x:train + b:train"
    assert opened(pair[0]["source"]).weights is None
    table.check_unchanged()
    os.utime(pair[1]["source"], ns=(1, 1))
    with pytest.raises(UserError, match=r"files changed while they were read \(b\.parquet\)"):
        table.check_unchanged()
    assert opened(pair).source_state() != table.source_state()


def test_each_source_of_several_has_its_own_count_and_the_whole_another(pair):
    pair[0]["count"] = 1
    assert shades(load(config(pair))) == [0, 0, 1]
    assert shades(load(config(pair, count=2))) == [0, 0]
    pair[0]["count"] = 4
    refused(config(pair), "^data.count: got 4, but .*x.tar' split 'train' has 3 rows")


def test_mistakes_in_a_list_of_sources_are_named(pair, tmp_path):
    del pair[1]["text_column"], pair[1]["template"]
    refused(config(pair), r"2 of 5 rows of \({source: .*b.parquet:train has no column 'text'; there are img, label")
    del pair[1]["image_column"]
    refused(config(pair), "^data.image_column: no column 'image' in .*b.parquet'; there are img, label")
    refused(config([pair[0], pair[0]]), r"ids stand for several rows each \(.*x.tar:train\)")
    refused(config([pair[0], {"source": "shapes"}]), "'shapes' is drawn and not read, and cannot be mixed")
    refused(config([pair[0], {"source": "lost.tar"}]), "^data.source: 'lost.tar': no such file")
    refused(config([]), "^data.source: got an empty list")
    for wrong in ({"weight": 0}, {"weight": -1}, {"weight": float("nan")}, {"resolution": 64}, {"sorce": "a"}):
        with pytest.raises(ValidationError):
            config([pair[0] | wrong])


def test_a_list_of_sources_is_given_on_the_command_line(pair):
    assert read(DataConfig, None, ["--source", json.dumps(pair)]) == DataConfig(source=pair)
    assert DataConfig.model_validate(json.loads(DataConfig(source=pair).model_dump_json())) == DataConfig(source=pair)


# the registry


def test_the_example_of_contributing_is_a_source(tmp_path, monkeypatch):
    """The very code of CONTRIBUTING.md, at most 30 lines, and its line in the table."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## Add a data source") :]
    code = re.findall(r"```python\n(.*?)```", section, re.S)[0]
    assert len(code.splitlines()) <= 30
    names: dict = {}
    exec(code, names)
    kind = SourceKind(lambda source, config: source.endswith(".zip"), names["ZipRows"])
    monkeypatch.setattr(sources, "KINDS", (kind, *sources.KINDS))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in (1, 0):
            archive.writestr(f"{i}.png", encoded(i))
            archive.writestr(f"{i}.txt", str(i))
    loaded, table = load(config(tmp_path / "x.zip")), opened(tmp_path / "x.zip")
    assert shades(loaded) == [0, 1] and loaded.captions == [["0"], ["1"]]
    assert [table.id(i) for i in range(2)] == ["0.png", "1.png"] and len(table.source_state()) == 64
    refused(config(tmp_path / "x.zip", split="test"), "^data.split: .* no split 'test'; it has train")


def test_what_is_of_no_kind_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    refused(config(tmp_path / "notes.md"), "is neither a folder nor a .parquet, .csv, .tsv or .tar file")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "notes.md").write_text("hello")
    refused(config(tmp_path / "set"), "cannot read .*set': it holds no pictures, parquet files or tars")
    write_kind("folder", tmp_path / "pictures")
    refused(config(tmp_path / "pictures", streaming=True), "^data.streaming: .* only parquet files and sets of the hub")


@pytest.mark.parametrize("source", ["x" * 300, "a/" * 3000, "a\0b", "", "~/pictures", "C:\\pictures", "a b", "-"])
def test_a_source_that_is_nowhere_is_refused_in_one_line(source, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(config(source), "^data.source: ")


def test_a_tar_beside_pictures_is_left_out_and_counted(tmp_path, capsys):
    write_kind("folder", tmp_path / "set")
    write_tar(tmp_path / "set" / "backup.tar", [("a.png", encoded(9))])
    assert len(load(config(tmp_path / "set"))) == 4
    assert "left out 1 file (no pictures: 1 .tar)" in capsys.readouterr().err


def test_missing_columns_name_those_there(tmp_path):
    table = pa.table({"image": [encoded(0)], "legend": ["a"]})
    pq.write_table(table, tmp_path / "x.parquet")
    refused(config(tmp_path / "x.parquet"), "^data.text_column: no column 'text'; there are image, legend$")
