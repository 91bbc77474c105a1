"""The evaluators in the loop: the same numbers as offline on the same pictures, and no failure that is not said."""

import io
import json
import random

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from eval.__main__ import main as offline
from sd_mini.data.captioned import DataConfig
from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.launching import error_line, launch, launch_apart, lines, prepared
from training.engine.evaluation import EvaluateConfig, Evaluator, open_prompts, untouched_training

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


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, {"prompts": 7}, "--prompts 7: .* has 6 in split test; ask for fewer"),
        ({"count": 3}, {"prompts": 4}, "--prompts 4: .* has 3 in split test"),
        ({"text_column": "said"}, {"features": ("inceptoin",)}, "features 'inceptoin': expected mini"),
        ({"image_column": "picture"}, {}, "data.image_column: no column 'picture'"),
    ],
)
def test_a_mistake_is_one_line_before_the_training(columns, tmp_path, changes, config, message):
    data = DataConfig(**{**columns, **changes})
    with pytest.raises(UserError, match=f"evaluate: .*{message}") as refused:
        Evaluator(EvaluateConfig(**{"every": 100, "prompts": 2, **config}), data, tmp_path / "cache")
    assert "\n" not in str(refused.value)


def test_the_data_are_read_by_their_whole_config(columns):
    question = open_prompts(2, DataConfig(**columns, count=5))
    # of five rows one of the first two and one of the other three; the rest is the reference
    assert question.splits[0].captions == ["grey 0", "grey 3"] and question.reference[:, 0, 0, 0].tolist() == [1, 2, 4]


def test_a_pipeline_that_cannot_be_scored_is_one_line(tiny_run, tmp_path):
    evaluator = Evaluator(EvaluateConfig(every=1, prompts=3), DataConfig(resolution=32), tmp_path / "cache")
    pipeline = Pipeline.from_pretrained(tiny_run / "pipeline")
    with torch.no_grad():
        next(pipeline.noise_predictor.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"evaluate: .*leave evaluate\.every out") as refused:
        evaluator.scores(pipeline)
    assert "\n" not in str(refused.value)


def test_losses_do_not_depend_on_evaluation(smoke_run, tmp_path):
    records = []
    for name, options in (("without", []), ("with", ["--evaluate.every", "2", "--evaluate.prompts", "4"])):
        run = prepared("noise_predictor", smoke_run, tmp_path / name)
        assert launch("noise_predictor", run, "--train.log_every", "1", "--log_with", "none", *options) == 0
        records.append([line for line in lines(run / "noise_predictor") if "loss" in line])
    assert len(records[0]) == 6 and records[0] == records[1]


def test_random_states_threads_and_grad_mode_are_left_alone():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before, threads = states(), torch.get_num_threads()
    with untouched_training():
        assert not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(1)
        torch.set_num_threads(threads + 1)
    assert states() == before and torch.get_num_threads() == threads and torch.is_grad_enabled()
