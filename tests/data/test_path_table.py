"""Tables of picture paths, and of URLs that img2dataset has downloaded."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sd_mini.data.captioned import DataConfig, load
from sd_mini.data.sources import open_source
from sd_mini.errors import UserError
from tests.data.test_tars import encoded, shades, write_tar

SIDE = 8


def config(source, **fields) -> DataConfig:
    return DataConfig(source=str(source), resolution=SIDE, **fields)


def refused(settings, *parts) -> None:
    with pytest.raises(UserError) as caught:
        load(settings)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


def write_table(path, rows, bom=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(bom)
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def pictures(folder, count=3):
    (folder / "pictures").mkdir(parents=True)
    for i in range(count):
        (folder / "pictures" / f"{i}.png").write_bytes(encoded(i))
    return folder


@pytest.mark.parametrize("form", ["csv", "tsv"])
@pytest.mark.parametrize("column", ["image", "path", "file"])
@pytest.mark.parametrize("absolute", [False, True])
def test_paths_are_relative_to_the_table_and_their_column_is_found(tmp_path, monkeypatch, form, column, absolute):
    folder = pictures(tmp_path / "set")
    start = f"{folder}/" if absolute else ""
    rows = [{"n": i, column: f"{start}pictures/{i}.png", "text": f'a "{i}",\nin two lines'} for i in (2, 0, 1)]
    path = write_table(folder / f"rows.{form}", rows, bom="\ufeff")
    monkeypatch.chdir(tmp_path)
    for source in (path, f"set/rows.{form}"):
        loaded, table = load(config(source)), open_source(config(source), "data")
        assert shades(loaded) == [2, 0, 1]
        assert loaded.captions == [[f'a "{i}",\nin two lines'] for i in (2, 0, 1)]
        assert [table.id(i) for i in range(3)] == ["pictures/2.png", "pictures/0.png", "pictures/1.png"]
        assert loaded.name == f"rows:{'train'}"


def test_of_two_columns_of_paths_one_must_be_named(tmp_path):
    pictures(tmp_path)
    rows = [{"photo": "pictures/0.png", "mask": "pictures/1.png", "text": "a"}]
    path = write_table(tmp_path / "rows.csv", rows)
    refused(config(path), "data.image_column: no column 'image' in", "photo, mask, text", "photo, mask hold them all")
    assert shades(load(config(path, image_column="mask"))) == [1]
    path = write_table(tmp_path / "rows.csv", [{"name": "first", "text": "a"}])
    refused(config(path), "data.image_column", "expected one of name, text to hold paths", "none of them does")


def test_captions_of_other_columns_are_named(tmp_path):
    pictures(tmp_path)
    rows = [{"path": "pictures/0.png", "caption": "one", "other": "uno"}]
    path = write_table(tmp_path / "rows.csv", rows)
    refused(config(path), "data.text_column: no column 'text'; there are image, caption, other")
    assert load(config(path, text_column="caption")).captions == [["one"]]


def test_a_column_of_splits_is_heeded(tmp_path):
    pictures(tmp_path)
    rows = [{"path": f"pictures/{i}.png", "text": str(i), "split": "val" if i == 1 else "train"} for i in range(3)]
    path = write_table(tmp_path / "rows.csv", rows)
    assert shades(load(config(path))) == [0, 2] and shades(load(config(path, split="valid"))) == [1]
    refused(config(path, split="test"), "data.split", "no split 'test'; it has train, val")


def test_bad_rows_of_a_table_are_named_together(tmp_path):
    pictures(tmp_path)
    names = ["pictures/0.png", "pictures/lost.png", "", "pictures/0.png", "./pictures/0.png", "pictures/1.png"]
    path = write_table(tmp_path / "rows.csv", [{"image": name, "text": "a"} for name in names])
    refused(
        config(path),
        "4 of 6 rows", "(pictures/lost.png): cannot decode", "no such file", "line 4 has no path of a picture",
        "(pictures/0.png): is listed twice, in line 2 and in line 5", "put its captions into one row",
    )  # fmt: skip
    (tmp_path / "rows.csv").write_text("image,text\n")
    refused(config(path), "has no rows in split 'train'")
    (tmp_path / "rows.csv").write_text("")
    refused(config(path), "has no rows in split 'train'")


# what img2dataset writes: a table of each shard, and its pictures in a folder or in a tar

URLS = [f"https://example.org/{i}.jpg?size=1" for i in range(4)]


def downloads(folder, form):
    for shard, numbers in enumerate(((0, 1), (2,))):
        keys = [f"{shard:05}{i:04}" for i in numbers]
        status = ["failed_to_download" if i == 1 else "success" for i in numbers]
        columns = {"url": [URLS[i] for i in numbers], "key": keys, "status": status, "caption": ["x"] * len(numbers)}
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / f"{shard:05}.parquet")
        members = [(f"{key}.jpg", encoded(10 * i, "JPEG")) for key, i in zip(keys, numbers, strict=True) if i != 1]
        if form == "tar":
            write_tar(folder / f"{shard:05}.tar", members)
        else:
            (folder / f"{shard:05}").mkdir()
            for name, content in members:
                (folder / f"{shard:05}" / name).write_bytes(content)


@pytest.mark.parametrize("form", ["tar", "files"])
@pytest.mark.parametrize("place", ["pictures", "."])
def test_urls_that_img2dataset_has_downloaded_are_read(tmp_path, form, place):
    path = write_table(tmp_path / "urls.csv", [{"url": URLS[i], "text": f"number {i}"} for i in (2, 0)])
    downloads(tmp_path / place, form)
    loaded, table = load(config(path)), open_source(config(path), "data")
    assert shades(loaded) == [20, 0] and loaded.captions == [["number 2"], ["number 0"]]
    shard = "{:05}.tar" if form == "tar" else "{:05}"
    start = "" if place == "." else "pictures/"
    assert [table.id(i) for i in range(2)] == [
        f"{start}{shard.format(1)}/000010002",
        f"{start}{shard.format(0)}/000000000",
    ]
    table.check_unchanged()


def test_urls_that_were_not_downloaded_are_named(tmp_path):
    path = write_table(tmp_path / "urls.tsv", [{"url": url, "text": "a"} for url in URLS])
    refused(
        config(path), "column 'url' holds URLs", "download them first",
        "img2dataset --url_list urls.tsv --input_format tsv --url_col url --output_folder pictures",
    )  # fmt: skip
    downloads(tmp_path / "pictures", "tar")
    refused(
        config(path), "2 of 4 rows", f"{URLS[1]} was not downloaded: failed_to_download",
        f"{URLS[3]} is not among what img2dataset was given",
    )  # fmt: skip
