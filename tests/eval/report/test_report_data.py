"""`python -m eval` on other data, on a run's own training pictures, and on what it refuses."""

import io
import json
import shutil

import datasets
import pytest
from PIL import Image

from eval.__main__ import main
from tests.support.reporting import Page, run

CAPTIONS = ["a <b>red</b> one", "a green one", "a blue & grey one", "a dark one"]


@pytest.fixture
def captioned(tmp_path, monkeypatch):
    """A folder with test.parquet: four captioned pictures of 40 px."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()  # so that stderr holds the error alone
    rows = []
    for shade in range(len(CAPTIONS)):
        encoded = io.BytesIO()
        Image.new("RGB", (40, 40), (60 * shade, 40, 90)).save(encoded, "PNG")
        rows.append({"bytes": encoded.getvalue(), "path": None})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"image": rows, "text": CAPTIONS}).to_parquet(tmp_path / "data" / "test.parquet")
    yield tmp_path / "data"
    datasets.enable_progress_bars()


def test_other_data_has_a_grid_and_reconstruction_but_no_judge(captioned, tiny_run, tmp_path, capsys):
    out = tmp_path / "report"
    assert run(tiny_run / "pipeline", out, "--data", str(captioned), "--prompts", "3") == 0
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {"text", "distances", "reconstruction", "remarks", "seconds", "protocol"}
    assert report["text"]["test"]["n"] == 4 and report["reconstruction"]["n"] == 3
    assert report["distances"]["FD-mini"]["n_reference"] == 4  # nothing is left that was not asked for
    assert report["protocol"]["prompts"] == {"test": 3} and "scene_seed" not in report["protocol"]
    page = Page(out / "report.html")
    assert page.alternatives == [CAPTIONS[row] for row in (0, 2, 1)]  # in the order in which the rows are spread
    assert "b" not in page.tags  # a caption's markup is text
    assert "no composition scores" in page.text
    assert (out / "grid.png").is_file()
    assert len(capsys.readouterr().out.splitlines()) == 5  # text, distance, PSNR, seconds, the page's path


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--data", "shapes", "--prompts", "0"], ["--prompts", "'0'"]),
        (["--data", "shapes", "--split", "train"], ["--split train", "all its splits"]),
        (["--data", "shapes", "--guidance", "-1"], ["guidance", "-1"]),
        (["--data", "data", "--prompts", "2", "--sweep", "1", "3"], ["--sweep", "--clip"]),
        (["--data", "shapes", "--prompts", "1"], ["--prompts", "'1'", "from 2"]),
        (["--data", "shapes", "--features", "mini", "mini"], ["--features mini mini", "give each once"]),
        (["--data", "shapes", "--features", "vgg"], ["features 'vgg'", "mini"]),
        (["--data", "shapes", "--clip", "local-dir:nowhere"], ["open_clip", "nowhere"]),
        (["--data", "shapes", "--resolution", "64"], ["--resolution 64", "32 px"]),
        (["--data", "shapes", "--batch", "none"], ["--batch", "'none'"]),
        (["--data", "missing.parquet"], ["missing.parquet", "no such file"]),
        (["--data", "data", "--split", "valid"], ["'valid'", "test"]),
        (["--data", "data", "--prompts", "5"], ["--prompts 5", "4"]),
        ([], ["--data"]),
    ],
)
def test_what_cannot_be_measured_is_refused(options, parts, captioned, tiny_run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert_refused(capfd, parts, tiny_run / "pipeline", tmp_path / "report", *options)


def assert_refused(capfd, parts, pipeline, out, *options):
    """Exit code 2, one line of an error, the last on stderr, that has all `parts` in it, and no report."""
    assert run(pipeline, out, *options) == 2
    shown = capfd.readouterr()
    error = shown.err.splitlines()[-1]
    assert shown.out == "" and error.startswith("error: ") and shown.err.count("error: ") == 1
    assert all(part in error for part in parts)
    assert not (out / "report.json").exists() and not out.with_name(f".{out.name}.partial").exists()


def test_folders_that_are_not_what_they_should_be_are_refused(tiny_run, tmp_path, capfd):
    shapes_data = ["--data", "shapes", "--prompts", "2"]
    assert_refused(capfd, ["neither a pipeline"], tmp_path, tmp_path / "report", *shapes_data)
    assert_refused(capfd, ["no such folder"], tmp_path / "none", tmp_path / "report", *shapes_data)
    (tmp_path / "report").write_text("a file")
    assert_refused(capfd, ["report is a file"], tiny_run / "pipeline", tmp_path / "report", *shapes_data)
    assert_refused(capfd, ["other files"], tiny_run / "pipeline", tmp_path, *shapes_data)
    assert (tmp_path / "report").read_text() == "a file"


def test_pictures_too_small_to_be_judged_are_refused(tiny_run, tmp_path, capfd):
    small = shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    index = json.loads((small / "model_index.json").read_text())
    (small / "model_index.json").write_text(json.dumps({**index, "resolution": 16}))
    assert_refused(capfd, ["16 px", "32 px"], small, tmp_path / "report", "--data", "shapes")


def test_copies_of_training_pictures_are_looked_for(smoke_run, tmp_path):
    """In what the run's own config says it was trained on; if that is no longer what it was, it is said."""
    run = shutil.copytree(smoke_run, tmp_path / "run")
    asked = ["--data", "shapes", "--prompts", "6", "--sweep"]
    assert main([str(run), "--out", str(run / "report"), *asked]) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    found = report["memorisation"]
    assert found["training"] == "shapes:train" and found["n_training"] == 64
    assert found["pixels"]["n"] == found["mini"]["n"] == 6 and found["pixels"]["low"] <= found["pixels"]["copied"]
    page = Page(run / "report" / "report.html")
    assert "Closest to the training pictures" in page.text and page.text.count("training picture ") >= 6
    assert "noise predictor" in page.text and "valid/loss" in page.text  # the curves of all three stages
    config = run / "noise_predictor" / "config.yaml"
    config.write_text(config.read_text().replace("count: 64", "count: 63", 1))
    assert main([str(run), "--out", str(run / "report"), *asked]) == 2
