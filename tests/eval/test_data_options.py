"""Which data the evaluations read: those of the command line, or else the run's own."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from eval.__main__ import main
from eval.analysis import words
from eval.analysis.text import TextProbe
from eval.data_options import asked_data, recorded_data
from eval.makers.questions import captions_question, folder_question, shapes_question
from eval.measure import Tools, _text_scores
from eval.metrics import reconstruction
from eval.options import parser
from sd_mini.data.captioned import DataConfig

COLUMNS = {"image_column": "seen", "text_column": "said", "aliases_column": "also"}


def encoded(shade):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (shade, 40, 90)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def data(tmp_path):
    """A folder of train.parquet and val.parquet, whose columns have names of their own."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for split, shades in (("train", range(0, 240, 40)), ("val", range(10, 240, 30))):
        rows = {"seen": [encoded(shade) for shade in shades], "said": [f"shade {shade}" for shade in shades]}
        pq.write_table(pa.table({**rows, "also": [["a tint"] for _ in shades]}), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def run(tiny_run, tmp_path, data):
    """A run that says of its first and its third stage which data they were trained on."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    valid = {"source": str(data), "split": "val", "resolution": 32, **COLUMNS}
    for stage in ("autoencoder", "noise_predictor"):
        parts = {"data": {**valid, "split": "train"}, "valid": valid}
        (run / stage / "config.yaml").write_text(yaml.safe_dump(parts))
    return run


def parsed(*given):
    return parser().parse_args(["run", "--out", "report", *given])


def test_what_is_left_out_is_the_run_s_own(run, data, tmp_path, monkeypatch):
    recorded = recorded_data(run / "noise_predictor")
    own = recorded["valid"]
    assert asked_data(parsed(), recorded, "valid", "test") == own and own.text_column == "said"
    monkeypatch.chdir(tmp_path)
    assert asked_data(parsed("--data", "pictures/"), recorded, "valid", "test").split == "val"  # by another path
    found = asked_data(parsed("--split", "train", "--text_column", "also"), recorded, "valid", "test")
    assert (found.split, found.text_column, found.image_column) == ("train", "also", "seen")
    other = asked_data(parsed("--data", "elsewhere", "--image_column", "jpg"), recorded, "valid", "test")
    assert other == DataConfig(source="elsewhere", split="test", image_column="jpg")
    assert asked_data(parsed("--data", "shapes"), recorded, "valid", "test") == DataConfig(split="test")


def test_a_run_is_measured_on_its_own_held_out_part(run, tmp_path):
    out = tmp_path / "report"
    assert main([str(run), "--out", str(out), "--training", "none", "--prompts", "3", "--reference", "4"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["protocol"]["columns"] == {**COLUMNS, "template": None} and report["protocol"]["prompts"] == {
        "val": 3
    }
    assert report["protocol"]["reference_count"] == report["distances"]["FD-mini"]["n_reference"] == 4
    assert "FD-mini" in report["blame"]["val"]
    asked = ["--data", str(run.parent / "pictures" / "val.parquet"), "--split", "val", "--blame", "none"]
    columns = [word for name, column in COLUMNS.items() for word in (f"--{name}", column)]
    assert main([str(run), "--out", str(out), "--training", "none", "--prompts", "3", *asked, *columns]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["distances"]["FD-mini"]["n_reference"] == 5 and "blame" not in report


def test_without_a_run_s_data_they_are_asked_for(tiny_run, tmp_path, capsys):
    for program, given in (
        (main, [str(tiny_run)]),
        (reconstruction.main, [str(tiny_run / "autoencoder" / "final")]),
        (words.main, [str(tiny_run), "--words", "a=b"]),
    ):
        assert program([*given, "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.startswith("error: --data: expected it, as no config of a run says")


def test_shapes_have_no_columns(tiny_run, tmp_path, capsys):
    asked = ["--data", "shapes", "--out", str(tmp_path / "out"), "--image_column", "a"]
    for program, given in ((main, tiny_run), (reconstruction.main, tiny_run / "autoencoder" / "final")):
        assert program([str(given), *asked]) == 2
        assert "error: --image_column a: shapes has no columns; leave it out" in capsys.readouterr().err


def test_the_reference_has_at_most_so_many_pictures(data):
    config = DataConfig(source=str(data), split="val", resolution=32, **COLUMNS)
    assert len(captions_question(config, 2).reference) == 6 and len(captions_question(config, 2, 3).reference) == 3
    whole, part = shapes_question(2, 0, 32), shapes_question(2, 0, 32, 5)
    assert len(whole.reference) == 1000 and (part.reference == whole.reference[:5]).all()


@pytest.mark.parametrize("kinds", ["class by class", "in turn"])
@pytest.mark.parametrize("prompts", [None, 10])
def test_prompts_and_the_reference_come_from_all_of_the_data(tmp_path, kinds, prompts):
    """However the rows are sorted: as folders of classes, or a cat and a dog in turn."""
    for i in range(40):
        is_dog = i >= 20 if kinds == "class by class" else i % 2 == 1
        Image.new("RGB", (8, 8), (i, 200 if is_dog else 0, 0)).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text("dog" if is_dog else "cat")
    config = DataConfig(source=str(tmp_path), resolution=8)
    question = captions_question(config, prompts)
    (asked,) = question.splits
    assert len(asked.captions) == (20 if prompts is None else prompts)
    assert 0.3 < asked.captions.count("dog") / len(asked.captions) < 0.7
    assert [caption == "dog" for caption in asked.captions] == (asked.pictures[:, 1, 0, 0] > 0).tolist()
    rows, others = asked.pictures[:, 0, 0, 0].tolist(), question.reference[:, 0, 0, 0].tolist()
    assert sorted(rows + others) == list(range(40)) and question.is_apart
    for capped in (captions_question(config, prompts, 10), folder_question(config, ["cat"], 0, 10)):
        dogs = (capped.reference[:, 1, 0, 0] > 0).sum()
        assert len(capped.reference) == 10 and 3 <= dogs <= 7
    assert set(captions_question(config, prompts, 10).reference[:, 0, 0, 0].tolist()) <= set(others)


def test_an_autoencoder_is_measured_on_its_run_s_held_out_part(run, tmp_path):
    """Whose captions are nobody's concern."""
    path = tmp_path / "pictures" / "val.parquet"
    table = pq.read_table(path)
    said = pa.array(["", *table["said"].to_pylist()[1:]])
    pq.write_table(table.set_column(1, "said", said), path)
    assert reconstruction.main([str(run / "autoencoder" / "final"), "--out", str(tmp_path / "out")]) == 0
    scores = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert scores["n"] == 8 and scores["protocol"]["data"] == "pictures:val"


def test_words_are_looked_for_in_what_the_run_was_trained_on(run, tmp_path):
    assert words.main([str(run), "--words", "hue=tint", "--seeds", "1", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "words.json").read_text())["chance"] == {"hue": 1.0}


def test_the_text_stage_is_asked_about_the_rows_that_pictures_are_made_of(tiny_run, tmp_path):
    """Row for row, however they are spread: its share of the blame compares them one by one."""
    for i in range(24):
        Image.new("RGB", (32, 32), (10 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(f"picture {i}")
    config = DataConfig(source=str(tmp_path), resolution=32)
    question = captions_question(config, 6)
    tools = Tools([], tmp_path / "cache", probe=TextProbe(tiny_run / "text_encoder" / "final"), data=config)
    (asked,) = question.splits
    found = _text_scores({}, asked, question, tools)
    assert [several[0] for several in found.captions] == asked.captions
    assert np.array_equal(found.pictures, asked.pictures)
    # the first few are of the whole, as a sweep and a gallery show them
    assert max(asked.rows[:3]) >= 12 > min(asked.rows[:3])
