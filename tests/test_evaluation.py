"""The evaluators in the loop: the same numbers as offline on the same pictures, and no failure that is not said."""

import io
import json

import numpy as np
import pytest

from eval.__main__ import main as offline
from eval.serve import _parser, serve
from sd_mini.data import DataConfig
from sd_mini.pipeline import Pipeline
from tests.launching import error_line, launch, launch_apart, prepared
from training.evaluation import EvaluateConfig, Evaluator

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
    assert not (run / "noise_predictor" / "final").exists()


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
    failed = answering('input(); print(\'{"error": "NaN it is"}\')', tmp_path)
    with pytest.raises(ValueError, match="evaluate: NaN it is"):
        failed.scores(lambda folder: None)
    ended = answering("input(); exit(3)", tmp_path)
    with pytest.raises(ValueError, match="ended with exit code 3; see above"):
        ended.scores(lambda folder: None)


def test_a_pipeline_that_is_none_is_answered_and_the_next_is_measured(tiny_run, tmp_path):
    options = _parser().parse_args(["--data", "shapes", "--prompts", "3", "--cache", str(tmp_path / "cache")])
    answers = io.StringIO()
    serve(options, io.StringIO(f"{tmp_path}\n{tiny_run / 'pipeline'}\n"), answers)
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert "neither a pipeline folder" in first["error"]
    assert np.isfinite(list(second["scores"].values())).all()
    assert {"exact", "soft", "FD-mini", "FD-mini/kid"} <= set(second["scores"])
