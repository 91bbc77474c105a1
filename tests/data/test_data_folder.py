"""Folders of pictures: which rows they have, in which order, and what is said of the rest."""

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd_mini import images
from sd_mini.data.captioned import DataConfig, load
from sd_mini.data.folder import list_files
from sd_mini.errors import UserError

SIDE = 8


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), (shade, shade, shade)).save(path)


def metadata(folder, rows, name="metadata.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(source, **fields) -> DataConfig:
    return DataConfig(source=str(source), resolution=SIDE, **fields)


def shades(loaded) -> list[int]:
    return loaded.pictures[:, 0, 0, 0].tolist()


def refused(settings, *parts, **how) -> str:
    with pytest.raises(UserError) as caught:
        load(settings, **how)
    said = str(caught.value)
    assert "\n" not in said
    assert all(part in said for part in parts), said
    return said


def test_the_name_of_a_file_makes_no_split(tmp_path):
    names = ["a.png", "b.png", "photo of a train.png", "test.png", "train.png", "valid_1.png"]
    for shade, name in enumerate(names):
        picture(tmp_path / name, shade)
    assert shades(load(config(tmp_path))) == list(range(6))
    metadata(tmp_path, [{"file_name": name, "text": f"number {i}"} for i, name in enumerate(names)])
    loaded = load(config(tmp_path))
    assert loaded.captions == [[f"number {i}"] for i in range(6)]


def test_folders_with_the_name_of_a_split_are_the_splits(tmp_path, capsys):
    for shade, name in enumerate(("train/a.png", "train/deep/b.png", "val/c.png", "Test/d.png", "e.png")):
        picture(tmp_path / name, shade)
    assert shades(load(config(tmp_path))) == [0, 1]
    assert "left out 1 file (outside Test, train, val: 1 .png)" in capsys.readouterr().err
    for name in ("val", "valid", "validation"):
        assert shades(load(config(tmp_path, split=name))) == [2]
    assert shades(load(config(tmp_path, split="test"))) == [3]
    shutil.rmtree(tmp_path / "val")
    refused(config(tmp_path, split="valid"), "valid.split: ", "has no split 'valid'; it has Test, train", part="valid")


def test_a_class_that_is_called_train_is_not_taken_for_the_split(tmp_path):
    for name in ("train", "bus", "car"):
        picture(tmp_path / name / "1.png")
    refused(config(tmp_path), "train/ may be a split or a class", "bus, car", "rename it")
    (tmp_path / "train").rename(tmp_path / "trains")
    assert len(load(config(tmp_path))) == 3


def test_classes_are_read_without_captions_and_by_name_where_asked(tmp_path):
    for shade, name in enumerate(("cat/1.png", "dog/1.png", "dog/2.png")):
        picture(tmp_path / name, shade)
    assert load(config(tmp_path)).captions == [[], [], []]
    assert load(config(tmp_path, text_column="label")).captions == [["cat"], ["dog"], ["dog"]]


def test_the_metadata_s_field_makes_splits(tmp_path):
    rows = []
    for shade, split in enumerate(("train", "test", "train")):
        picture(tmp_path / f"{shade}.png", shade)
        rows.append({"file_name": f"{shade}.png", "text": "a", "split": split})
    metadata(tmp_path, rows)
    assert shades(load(config(tmp_path))) == [0, 2] and shades(load(config(tmp_path, split="test"))) == [1]


@pytest.mark.parametrize("kind", ["avif", "webp", "bmp", "tiff", "jp2", "ppm", "tga", "qoi"])
def test_every_suffix_that_pillow_reads_is_a_picture(tmp_path, kind):
    picture(tmp_path / "a.png", 10)
    picture(tmp_path / f"b.{kind.upper()}", 10)
    assert len(load(config(tmp_path))) == 2
    (tmp_path / "a.png").unlink()
    assert len(load(config(tmp_path))) == 1


def test_formats_without_pixels_are_no_pictures():
    suffixes = images.picture_suffixes()
    assert {".png", ".jpg", ".avif", ".gif"} <= suffixes and not {".h5", ".mpg", ".pdf", ".grib"} & suffixes


def test_what_is_left_out_is_counted_by_kind(tmp_path, capsys):
    for name in ("a.png", "b.png", "c.PNG", "d.jpg"):
        picture(tmp_path / name)
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "features.h5").write_bytes(b"hello")
    load(config(tmp_path, count=1))
    assert "left out 2 files (no pictures: 1 .h5, 1 .md)" in capsys.readouterr().err
    metadata(tmp_path, [{"file_name": "a.png", "text": "a"}])
    assert load(config(tmp_path)).captions == [["a"]]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "left out 5 files (no pictures: 1 .h5, 1 .md; not in the metadata: 1 .PNG, 1 .jpg, 1 .png)" in said


def test_hidden_files_are_no_pictures(tmp_path, capsys):
    picture(tmp_path / "1.png")
    for name in (".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/1.png", ".hidden.png"):
        picture(tmp_path / name)
    for name in ("._1.png", "Thumbs.db", ".DS_Store"):
        (tmp_path / name).write_bytes(b"no picture")
    assert len(load(config(tmp_path))) == 1
    assert capsys.readouterr().err == ""


def test_metadata_in_every_folder_is_read_in_the_order_of_paths(tmp_path):
    """However the disk lists them: here in both orders of making."""
    prints = set()
    for name, order in (("a", [0, 1, 2, 3, 4]), ("b", [3, 1, 4, 0, 2])):
        for i in order:
            folder = tmp_path / name / f"part{i}"
            metadata(folder, [{"file_name": f"{k}.png", "text": f"{i} {k}"} for k in (1, 0)])
            for k in (i % 2, 1 - i % 2):
                picture(folder / f"{k}.png", 10 * i + k)
        loaded = load(config(tmp_path / name))
        assert loaded.captions == [[f"{i} {k}"] for i in range(5) for k in range(2)]
        prints.add(loaded.fingerprint)
    assert len(prints) == 1


def test_names_that_differ_by_how_an_accent_is_written_are_the_same(tmp_path):
    picture(tmp_path / "cafe\u0301.png", 3)  # as macOS writes it
    metadata(tmp_path, [{"file_name": "caf\u00e9.png", "text": "a cup"}])
    assert shades(load(config(tmp_path))) == [3]


def test_a_link_back_up_has_an_end_and_other_links_are_followed(tmp_path):
    picture(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "set")
    assert [path.name for path in list_files(tmp_path / "set")] == ["1.png"]
    assert len(load(config(tmp_path / "set"))) == 1


CAPTION = "a \u201cred\u201d one\u2028of two\u0085lines"


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "txt"])
def test_captions_of_every_kind_of_file_are_read(tmp_path, kind, end, bom):
    """With a byte-order mark and Windows' ends of lines too; what Unicode calls a line's end stays in the caption."""
    captions = [CAPTION, 'a "green", blue one']
    for i in range(2):
        picture(tmp_path / f"{i}.png", i)
    rows = [{"file_name": f"{i}.png", "text": text, "width": 8} for i, text in enumerate(captions)]
    if kind == "txt":
        for i, text in enumerate(captions):
            (tmp_path / f"{i}.txt").write_bytes(f"{bom}{text}{end}".encode())
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    elif kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) + end for row in rows]
        (tmp_path / "metadata.jsonl").write_bytes((bom + "".join(lines)).encode())
    else:
        with (tmp_path / f"metadata.{kind}").open("w", encoding="utf-8", newline="") as file:
            file.write(bom)
            delimiter = "," if kind == "csv" else "\t"
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end)
            writer.writeheader()
            writer.writerows(rows)
    assert load(config(tmp_path)).captions == [[text] for text in captions]


def test_lists_of_captions_are_read_from_columns_and_from_files_of_lines(tmp_path):
    picture(tmp_path / "a" / "1.png")
    metadata(tmp_path / "a", [{"file_name": "1.png", "texts": ["red", "crimson", "red"]}])
    assert load(config(tmp_path / "a", text_column="texts")).captions == [["red", "crimson"]]
    metadata(tmp_path / "a", [{"file_name": "1.png", "texts": []}])
    refused(config(tmp_path / "a", text_column="texts"), "row 0", "(1.png)", "list of captions is empty")
    picture(tmp_path / "b" / "1.png")
    (tmp_path / "b" / "1.txt").write_text("red\n\n  crimson \n")
    assert load(config(tmp_path / "b")).captions == [["red", "crimson"]]


def test_a_table_that_a_spreadsheet_numbered_is_read(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text(',file_name,text\n0,1.png,"red,\nand blue"\n')
    assert load(config(tmp_path)).captions == [["red,\nand blue"]]


def test_numbers_in_a_table_are_no_captions(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,width,split\n1.png,640,train\n")
    assert load(config(tmp_path)).captions == [[]]


def test_everything_that_is_wrong_with_a_folder_is_said_at_once(tmp_path):
    for i in range(8):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "2.png").write_bytes(b"no picture")
    rows = [{"file_name": f"{i}.png", "text": f"number {i}"} for i in range(8)]
    rows[3]["text"] = None
    rows[5]["text"] = " "
    rows += [{"file_name": "6.png", "text": "again"}, {"file_name": "lost.png", "text": "lost"}]
    metadata(tmp_path, rows)
    said = refused(config(tmp_path), "data: 5 of 10 rows of", "cannot be used", "is listed twice, in line 7 of")
    for name, reason in (("2.png", "not a picture"), ("3.png", "NoneType"), ("5.png", "is empty"),
                         ("6.png", "and in line 9"), ("lost.png", "no such file")):  # fmt: skip
        assert f"({name}): " in said and reason in said
    rows += [{"file_name": f"lost{i}.png", "text": "lost"} for i in range(3)]
    metadata(tmp_path, rows)
    assert "8 of 13 rows" in refused(config(tmp_path, max_bad=0), "(lost.png)", "and 3 more")
    by_reason = refused(config(tmp_path), "8 of 13 rows", "data.max_bad allows 1.00%", "4 x cannot decode")
    assert "no such file" in by_reason and "(row 9, lost.png)" in by_reason


def test_a_picture_without_a_text_file_among_others_is_named(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("red")
    (tmp_path / "2.txt").write_bytes(b"caf\xe9")
    refused(config(tmp_path), "2 of 3 rows", "(1.png): there is no 1.txt beside it", "2.txt: is not UTF-8 (byte 0xe9")
    assert len(load(config(tmp_path), pictures_only=True)) == 3
    assert len(load(config(tmp_path, text_column=None))) == 3


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("metadata.jsonl", '{"file_name": "1.png"\n[1]\n', ["line 1 (", "line 2 ('[1]')", "no JSON object"]),
        ("metadata.jsonl", '{"name": "1.png"}\n{"file_name": 3}\n', ["line 1 has name", "line 2 has 3 there"]),
        ("metadata.csv", "file,text\n1.png,red\n", ["expected a column 'file_name'", "line 2 has file, text"]),
        ("metadata.csv", "file_name,text\n1.png,red, blue\n", ["line 2 has another number of fields", "quotes"]),
        ("metadata.csv", "file_name,text\n1.png\n", ["line 2 has another number of fields"]),
        ("metadata.csv", 'file_name,text\n1.png,"red\n', ["is not readable as CSV"]),
        ("metadata.parquet", "hello", ["cannot be read as parquet"]),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "a", "split": null}\n', ["(1.png)", "'split' is None"]),
    ],
)
def test_metadata_that_cannot_be_read_is_refused_in_one_line(tmp_path, name, text, says):
    picture(tmp_path / "1.png")
    (tmp_path / name).write_text(text)
    refused(config(tmp_path), *says)


def test_lines_that_cannot_be_read_are_rows_that_cannot_be_used(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"{i}"}) for i in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*rows[:2], '{"file_name": ', '{"text": "none"}', *rows[2:]]))
    refused(config(tmp_path), "2 of 6 rows", "no JSON object", "line 4 has text")
    read = load(config(tmp_path, max_bad=0.4))
    assert read.captions == [["0"], ["1"], ["2"], ["3"]]
    assert [one.id for one in read.rejected] == ["metadata.jsonl: line 3", "metadata.jsonl: line 4"]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b,c\n2.png,d\n")
    read = load(config(tmp_path, max_bad=0.4))
    assert read.captions == [["a"], ["d"]] and [one.id for one in read.rejected] == ["metadata.csv: line 3"]
    (tmp_path / "rows.csv").write_text("image,text\n0.png,a\n1.png,b,c\n2.png,d\n")
    read = load(config(tmp_path / "rows.csv", max_bad=0.4))
    assert read.captions == [["a"], ["d"]] and [one.id for one in read.rejected] == ["rows.csv: line 3"]
    # of splits, a line that cannot be read counts with the one before it
    (tmp_path / "rows.csv").write_text("image,text,split\n0.png,a,train\n1.png,b,c,train\n2.png,d,test\n3.png,e,test\n")
    assert load(config(tmp_path / "rows.csv", split="test", max_bad=0)).captions == [["d"], ["e"]]
    assert len(load(config(tmp_path / "rows.csv", max_bad=0.5)).rejected) == 1
    (tmp_path / "metadata.csv").write_text("file_name,text,split\n0.png,a,test\n1.png,b,c,d\n2.png,d,valid\n")
    refused(config(tmp_path, split="train"), "train", "test, valid")
    refused(config(tmp_path, split="test", max_bad=0), "metadata.csv: line 3")
    assert load(config(tmp_path, split="valid", max_bad=0)).captions == [["d"]]


def test_two_files_of_metadata_are_refused(tmp_path):
    picture(tmp_path / "1.png")
    metadata(tmp_path, [{"file_name": "1.png", "text": "a"}])
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,b\n")
    refused(config(tmp_path), "holds metadata.csv and metadata.jsonl; keep one of them")


def test_what_img2dataset_writes_as_files_is_read_as_pictures(tmp_path):
    """Pictures and texts in numbered folders, and beside each a table that only describes them."""
    for shard in range(2):
        for i in range(2):
            path = tmp_path / f"0000{shard}" / f"{shard}{i}.jpg"
            picture(path, 100 * shard)
            path.with_suffix(".txt").write_text(f"number {shard}{i}")
            path.with_suffix(".json").write_text("{}")
        described = pa.table({"url": ["a", "b"], "caption": ["c", "d"]})
        pq.write_table(described, tmp_path / f"0000{shard}.parquet")
    loaded = load(config(tmp_path))
    assert loaded.captions == [[f"number {i:02}"] for i in (0, 1, 10, 11)]
    assert np.ptp(loaded.pictures[2:]) == 0


@pytest.mark.parametrize("absolute", [False, True])
def test_absolute_paths_in_metadata_are_the_same_pictures(tmp_path, monkeypatch, capsys, absolute):
    """Whether the source is given relative or absolute."""
    for i in range(3):
        picture(tmp_path / "set" / f"{i}.png", i)
    rows = [{"file_name": str(tmp_path / "set" / f"{i}.png"), "text": f"number {i}"} for i in range(3)]
    metadata(tmp_path / "set", rows)
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "set" if absolute else "set"
    assert load(config(source)).captions == [[f"number {i}"] for i in range(3)]
    assert "left out" not in capsys.readouterr().err
    metadata(tmp_path / "set", [*rows, {"file_name": "1.png", "text": "again"}])
    refused(config(source), "(1.png): is listed twice, in line 2 of", "and in line 4 of")


def test_a_row_of_metadata_without_a_text_is_said_to_lack_it(tmp_path):
    rows = [{"file_name": f"{i}.png", "text": "a"} for i in range(3)]
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    del rows[2]["text"]
    metadata(tmp_path, rows)
    said = refused(config(tmp_path), "(2.png): the metadata gives it no 'text'")
    assert "beside others" not in said


def test_a_caption_file_s_accents_may_be_written_otherwise(tmp_path):
    picture(tmp_path / "cafe\u0301.png")
    (tmp_path / "caf\u00e9.txt").write_text("a cup")
    assert load(config(tmp_path)).captions == [["a cup"]]


def test_suffixes_may_be_upper_case(tmp_path):
    picture(tmp_path / "a" / "0.PNG")
    (tmp_path / "a" / "0.TXT").write_text("red")
    assert load(config(tmp_path / "a")).captions == [["red"]]
    picture(tmp_path / "b" / "0.PNG")
    metadata(tmp_path / "b", [{"file_name": "0.PNG", "text": "blue"}], "METADATA.JSONL")
    assert load(config(tmp_path / "b")).captions == [["blue"]]


def test_metadata_without_texts_leaves_them_to_the_caption_files(tmp_path, capsys):
    for i, text in enumerate(("red", "green", "blue")):
        picture(tmp_path / f"{i}.png", i)
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "metadata.csv").write_text("file_name,split\n0.png,train\n1.png,test\n2.png,train\n")
    assert load(config(tmp_path)).captions == [["red"], ["blue"]]
    assert load(config(tmp_path, split="test")).captions == [["green"]]
    assert capsys.readouterr().err == ""


def test_two_columns_of_one_name_are_refused(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,text\n1.png,red,blue\n")
    refused(config(tmp_path), "metadata.csv: the first line has 'text' more than once")
    (tmp_path / "metadata.csv").write_text("file_name,text,,\n1.png,red,,\n")
    assert load(config(tmp_path)).captions == [["red"]]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "red", "text": "blue"}\n')
    refused(config(tmp_path), "metadata.jsonl: line 1 has 'text' more than once")
    (tmp_path / "metadata.jsonl").unlink()
    table = pa.table([["1.png"], ["red"], ["blue"]], names=["file_name", "text", "text"])
    pq.write_table(table, tmp_path / "metadata.parquet")
    refused(config(tmp_path), "metadata.parquet: the table has 'text' more than once")


def test_a_long_cell_of_a_table_is_read(tmp_path):
    picture(tmp_path / "1.png")
    text, usual = "red " * 50_000, csv.field_size_limit()
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n1.png,{text}\n")
    assert load(config(tmp_path)).captions == [[text]] and csv.field_size_limit() == usual
