"""The evaluators in the loop: the same numbers as offline on the same pictures, and no failure that is not said."""

import io
import json
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.__main__ import main as offline
from eval.serve import _parser, _question, serve
from sd_mini.data.captioned import DataConfig
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.launching import error_line, launch, launch_apart, prepared
from training.engine.evaluation import EvaluateConfig, Evaluator

PROMPTS = 9


def measured(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if any(name.startswith("eval/") for name in line)}


def test_in_the_loop_is_offline(smoke_run, tmp_path):
    """Every number that training logs of its last step is the report's of the pipeline it exports."""
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    options = ["--evaluate.every", "4", "--evaluate.prompts", str(PROMPTS), "--evaluate.batch", "4"]
    assert launch("noise_predictor", run, *options, "--log_with", "none") == 0
    found = measured(run / "noise_predictor")
    assert sorted(found) == [4, 6]  # every four steps, and at the end
    Pipeline.from_run(run).save(run / "pipeline")
    arguments = [
        str(run / "pipeline"),
        "--data",
        "shapes",
        "--out",
        str(run / "report"),
        "--sweep",
        "--training",
        "none",
    ]
    assert offline([*arguments, "--prompts", str(PROMPTS), "--batch", "4"]) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    last, distance = found[6], report["distances"]["FD-mini"]
    assert last["eval/FD-mini"] == distance["fd"]
    for kind in ("kid", "precision", "recall", "density", "coverage"):
        assert last[f"eval/FD-mini/{kind}"] == distance[kind]
    assert last["eval/exact"] == report["composition"]["test"]["all"]["exact"]
    assert last["eval/soft"] == report["composition"]["test"]["all"]["soft"]
    assert found[4]["eval/FD-mini"] != last["eval/FD-mini"]
    assert len(list((run / "cache" / "features").iterdir())) == 1  # the reference was looked at once for all three


@pytest.mark.slow
def test_an_evaluation_that_fails_stops_the_training(smoke_run, tmp_path):
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    codes, said = launch_apart(
        "noise_predictor", run, "--evaluate.every", "3", "--evaluate.features", "[inception=nowhere.pth]"
    )
    assert codes == [2]
    assert "evaluate: inception weights nowhere.pth: no such file" in error_line(said)
    assert not (run / "noise_predictor").exists()  # not even begun


@pytest.mark.slow
def test_what_was_lost_by_a_kill_is_measured_when_it_goes_on(smoke_run, tmp_path):
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    options = ["--evaluate.every", "6", "--evaluate.prompts", "4", "--log_with", "none"]
    assert launch("noise_predictor", run, *options) == 0
    folder = run / "noise_predictor"
    first = measured(folder)[6]
    kept = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "eval/" not in line]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    (folder / "final" / "stage.json").unlink()
    assert launch("noise_predictor", run, *options) == 0
    assert measured(folder)[6] == first


def answering(code, folder):
    """An evaluator whose process is `code` instead."""
    evaluator = Evaluator(EvaluateConfig(), DataConfig(source="shapes"), folder)
    evaluator.command[1:] = ["-c", code]
    return evaluator


def test_what_cannot_be_measured_and_a_process_that_ended_are_said(tmp_path):
    failed = answering('print("{}", flush=True); input(); print(\'{"error": "NaN it is"}\')', tmp_path)
    with pytest.raises(ValueError, match="evaluate: NaN it is"):
        failed.scores(lambda folder: None)
    ended = answering("print('{}', flush=True); input(); exit(3)", tmp_path)
    with pytest.raises(ValueError, match="ended with exit code 3; see above"):
        ended.scores(lambda folder: None)


def served(folder, folders, data, *options):
    options = _parser().parse_args(["--data", json.dumps(data), "--cache", str(folder / "cache"), *options])
    answers = io.StringIO()
    serve(options, io.StringIO(folders), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


@pytest.fixture
def columns(tmp_path, monkeypatch):
    """test.parquet whose columns have names of their own: the data that training would read as `valid`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = {"seen": [png(i) for i in range(6)], "said": [f"grey {i}" for i in range(6)]}
    pq.write_table(pa.table(made), tmp_path / "test.parquet")
    return {"source": str(tmp_path / "test.parquet"), "split": "test", "resolution": 32, "image_column": "seen",
            "text_column": "said"}  # fmt: skip


def png(shade):
    encoded = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, shade, shade)).save(encoded, "PNG")
    return encoded.getvalue()


def test_the_data_are_read_by_their_whole_config(columns):
    options = _parser().parse_args(["--data", "{}", "--cache", "none", "--prompts", "2"])
    question = _question(options, DataConfig(**columns, count=5))
    # of five rows one of the first two and one of the other three; the rest is the reference
    assert question.splits[0].captions == ["grey 0", "grey 3"] and question.reference[:, 0, 0, 0].tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("changes", "config", "says"),
    [
        ({}, {"prompts": 7}, "--prompts 7: .* has 6 in split test; ask for fewer"),
        ({"count": 3}, {"prompts": 4}, "--prompts 4: .* has 3 in split test"),
        ({"text_column": "said"}, {"features": ("inceptoin",)}, "features 'inceptoin': expected mini"),
        ({"image_column": "picture"}, {}, "data.image_column: no column 'picture'"),
    ],
)
def test_what_cannot_be_measured_with_is_said_at_once(columns, tmp_path, changes, config, says):
    data = DataConfig(**{**columns, **changes})
    given = Evaluator(EvaluateConfig(**{"prompts": 2, **config}), data, tmp_path / "cache").command[3:]
    answers = io.StringIO()
    serve(_parser().parse_args(given), io.StringIO(), answers)
    (answer,) = map(json.loads, answers.getvalue().splitlines())
    assert re.search(says, answer["error"]) and "\n" not in answer["error"]


def test_it_is_said_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="evaluate: features 'inceptoin': expected mini") as refused:
        Evaluator(EvaluateConfig(every=100, features=("inceptoin",)), DataConfig(), tmp_path / "cache")
    assert "\n" not in str(refused.value)


def test_a_pipeline_of_another_size_than_the_data_is_answered(tiny_run, tmp_path):
    _, answer = served(tmp_path, f"{tiny_run / 'pipeline'}\n", {"resolution": 64}, "--prompts", "3")
    assert "makes 32 px, --data has 64" in answer["error"]
    (answer,) = served(tmp_path, "", {"resolutoin": 64})
    assert "--data: " in answer["error"] and "resolutoin" in answer["error"]


def test_a_pipeline_that_is_none_is_answered_and_the_next_is_measured(tiny_run, tmp_path):
    folders = f"{tmp_path}\n{tiny_run / 'pipeline'}\n"
    ready, first, second = served(tmp_path, folders, {"resolution": 32}, "--prompts", "3")
    assert ready == {"ready": True} and "neither a pipeline folder" in first["error"]
    assert np.isfinite(list(second["scores"].values())).all()
    assert {"exact", "soft", "FD-mini", "FD-mini/kid"} <= set(second["scores"])
