"""A whole cleaning: what it finds of planted faults, what it writes, what it refuses."""

import json
import os
from collections import Counter

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd_mini.config import command
from sd_mini.data.captioned import DataConfig, load
from training.benchmarks.planted import KINDS, PERIOD, draw, kind_of, number_of, planted_row, score, write_planted
from training.data.prepare.__main__ import help_text, main

ROWS = 3 * PERIOD
TEST_ROWS = 10


def prepare(*words):
    return command(main, [str(word) for word in words])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    source = tmp_path_factory.mktemp("planted") / "source"
    write_planted(source, ROWS, TEST_ROWS)
    return source


def options(planted):
    limits = ["--quality.max_repeats", 2, "--shard_rows", 150, "--workers", 1]
    return ["--data", planted, "--test", planted, *limits]


@pytest.fixture(scope="module")
def cleaned(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("cleaned") / "out"
    assert prepare(*options(planted), "--out", out) == 0
    return out


def test_every_planted_fault_is_found_and_no_clean_row_is_refused(cleaned):
    result = score(cleaned, ROWS)
    assert result.by_kind == {name: (total, total) for name, (_, total) in result.by_kind.items()}
    assert result.by_kind.keys() == {kind.name for kind in KINDS}
    assert result.clean > 400 and result.clean_refused == 0


def test_the_counts_add_up(cleaned):
    report = json.loads((cleaned / "report.json").read_text())
    rejected = pq.read_table(cleaned / "rejected.parquet").to_pylist()
    counted = Counter((row["step"], row["reason"]) for row in rejected)
    told = {(s, r): n for s, reasons in report["rejected"].items() for r, n in reasons.items()}
    assert told == dict(counted)
    shards = sorted(cleaned.glob("train-*.parquet"))
    kept = [pq.read_metadata(shard).num_rows for shard in shards]
    assert report["rows"] == ROWS == report["kept"] + len(rejected)
    assert sum(kept) == report["kept"] and kept[:-1] == [150] * (len(kept) - 1) and report["test"] == TEST_ROWS
    assert shards[0].name == f"train-00000-of-{len(shards):05d}.parquet"
    for bins in report["histograms"].values():
        assert sum(bins["kept"]) == report["kept"]
    assert report["changed_captions"] == 2 * 3 and report["kept_for_another_caption"] >= 1


def test_kept_rows_are_the_source_s_bytes_with_cleaned_captions(cleaned):
    rows = [row for shard in sorted(cleaned.glob("train-*")) for row in pq.read_table(shard).to_pylist()]
    assert [number_of(row["id"]) for row in rows] == sorted(number_of(row["id"]) for row in rows)
    for row in rows:
        picture, caption = planted_row(number_of(row["id"]), TEST_ROWS)
        assert row["image"]["bytes"] == picture
        kind = kind_of(number_of(row["id"]))
        if kind is None:
            assert row["text"] == caption
        elif kind.name == "tags":
            words = caption.removeprefix("<p>").split(" <b>")[0]
            assert row["text"] == f"{words} 5 < 6\n& more"
        elif kind.name == "mojibake":
            assert row["text"].endswith("café “here”")


def test_datasets_and_our_own_sources_read_what_is_written(cleaned, tmp_path):
    report = json.loads((cleaned / "report.json").read_text())
    rows = datasets.load_dataset(str(cleaned), cache_dir=str(tmp_path))
    assert list(rows) == ["train"] and len(rows["train"]) == report["kept"]
    first = rows["train"][0]
    assert (first["image"].width, first["image"].height) == (first["width"], first["height"])
    ours = load(DataConfig(source=str(cleaned), resolution=16, count=20))
    assert ours.captions[0] == [first["text"]] and len(ours) == 20


def test_the_page_needs_no_network_and_escapes_captions(cleaned):
    page = (cleaned / "report.html").read_text()
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert "duplicates: near" in page and "data:image/png;base64," in page and "<svg" in page


def test_the_same_command_again_does_nothing_and_another_config_is_refused(planted, cleaned, capsys):
    before = contents(cleaned)
    (cleaned / ".work").mkdir()  # as a kill just before the end leaves it
    assert prepare(*options(planted), "--out", cleaned) == 0
    assert "already cleaned" in capsys.readouterr().out
    assert prepare(*options(planted), "--out", cleaned, "--duplicates.bits", 4) == 2
    assert "duplicates.bits was 10, now 4" in capsys.readouterr().err
    assert contents(cleaned) == before


def test_a_folder_of_anything_else_is_refused(planted, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert prepare(*options(planted), "--out", tmp_path) == 2
    assert "notes.txt" in capsys.readouterr().err and contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "shapes", "--out", "o"], "nothing to clean"),
        (["--data", "SOURCE"], "expected --out FOLDER"),
        (
            ["--data", "SOURCE", "--out", "o", "--data.text_column", "caption"],
            "no column 'caption'; it has image, text",
        ),
        (["--data", "SOURCE", "--out", "o", "--quality.min_sied", "3"], "did you mean 'min_side'"),
        (["--data", "SOURCE", "--out", "o", "--quality.languages", "[latn]"], "latin"),
        (["--data", "SOURCE", "--out", "o", "--data.count", "100000"], "ask for fewer"),
        (["--data", "SOURCE", "--test", "nowhere/at/all", "--out", "o"], "test.source"),
        (["--data", "SOURCE", "--out", "o", "--harmful.words", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(planted, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert prepare(*[planted if word == "SOURCE" else word for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_anything_is_written(planted, tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert prepare("--data", planted, "--out", tmp_path / "out") == 2
    assert "more are needed" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def classes(tmp_path):
    """24 pictures of two classes, of which the last is a smaller copy of the first, and a grey one; the caption is in
    NAME.txt."""
    folder = tmp_path / "classes"
    folder.mkdir()
    for i in range(24):
        picture = draw(np.random.default_rng(i), (80, 120))
        if i == 23:
            picture = draw(np.random.default_rng(0), (80, 120)).resize((60, 60))
        picture.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a photo of a {('cat', 'dog')[i % 2 if i != 23 else 0]}")
    return folder


def test_class_like_captions_may_repeat(classes, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("--data", classes, "--out", out, "--quality.max_repeats", 3, "--workers", 1) == 0
    report = json.loads((out / "report.json").read_text())
    assert any(line.startswith("class-like") for line in report["remarks"])
    (row,) = pq.read_table(out / "rejected.parquet").to_pylist()
    assert row == {"id": "23.png", "step": "duplicates", "reason": "near", "detail": "row 00.png"}


def test_captions_of_a_class_like_test_source_may_be_trained_on(classes, tmp_path):
    tests, out = tmp_path / "tests", tmp_path / "out"
    tests.mkdir()
    for i in range(6):
        draw(np.random.default_rng(100 + i), (80, 120)).save(tests / f"{i}.png")
        (tests / f"{i}.txt").write_text("a photo of a cat")
    options = ["--test", tests, "--test.split", "train", "--out", out, "--workers", 1]
    assert prepare("--data", classes, *options) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["test"] == 6 and not report["rejected"]["decontamination"]
    assert any("class-like test captions" in line for line in report["remarks"])


def test_a_file_whose_name_is_no_utf8_is_named(classes, tmp_path):
    bad = os.fsencode(classes) + b"/\xff.png"
    with open(bad, "wb") as file:
        file.write(b"no picture")
    assert prepare("--data", classes, "--out", tmp_path / "out", "--workers", 1) == 0
    rows = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert {(row["id"], row["step"]) for row in rows} >= {("\\udcff.png", "read")}


def test_steps_can_be_turned_off(classes, tmp_path):
    out = tmp_path / "out"
    (classes / "05.txt").write_text("<b>porn</b> IMG")
    Image.new("RGB", (20, 20)).save(classes / "06.png")
    off = [f"--{step}.enabled=false" for step in ("harmful", "markup", "quality", "duplicates")]
    assert prepare("--data", classes, "--out", out, *off, "--workers", 1) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["kept"] == report["rows"] == 24 and report["changed_captions"] == 0


def test_pictures_without_captions(classes, tmp_path):
    for path in classes.glob("*.txt"):
        path.unlink()
    out = tmp_path / "out"
    assert prepare("--data", classes, "--data.text_column", "null", "--out", out, "--workers", 1) == 0
    assert json.loads((out / "report.json").read_text())["rejected"]["duplicates"] == {"near": 1}
    assert "text" not in pq.read_schema(next(out.glob("train-*"))).names


def test_several_captions_a_picture(classes, tmp_path):
    (classes / "03.txt").write_text("a dog\n<i>a brown dog</i>\n")
    out = tmp_path / "out"
    assert prepare("--data", classes, "--out", out, "--workers", 1) == 0
    rows = pq.read_table(next(out.glob("train-*"))).to_pylist()
    assert [(row["text"], row["aliases"]) for row in rows[2:4]] == [
        ("a photo of a cat", []),
        ("a dog", ["a brown dog"]),
    ]


def test_nothing_kept_is_an_error_with_a_report(classes, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("--data", classes, "--out", out, "--quality.min_side", 5000, "--workers", 1) == 2
    assert "no row was kept" in capsys.readouterr().err and (out / "report.html").is_file()


def test_a_source_that_changes_between_the_passes_is_named(classes, tmp_path, monkeypatch, capsys):
    out, before = tmp_path / "out", __import__("training.data.prepare.run", fromlist=["run"])
    write = before.write_rejected
    decide = before._verdicts

    def changed(work, find_pairs):
        draw(np.random.default_rng(99)).save(classes / "04.png")
        return decide(work, find_pairs)

    monkeypatch.setattr(before, "_verdicts", changed)
    assert prepare("--data", classes, "--out", out, "--workers", 1) == 2
    assert "has changed since it was read (row 04.png)" in capsys.readouterr().err
    assert write is before.write_rejected and not list(out.glob("train-*"))


def test_help_names_every_field():
    assert "--duplicates.bits (int; 10)" in help_text() and "--test SOURCE" in help_text()
