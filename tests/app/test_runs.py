"""What a run folder offers the page, while it is trained and after."""

import json
import shutil

import pytest
import torch

from sd_mini.app import curves
from sd_mini.app.runs import open_runs
from sd_mini.cli.opening import open_pipeline
from sd_mini.errors import UserError
from tests.app.support import add_checkpoints, unfinished


@pytest.fixture
def run_folder(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def open_run(folder):
    (run,) = open_runs([folder], open_pipeline).values()
    return run


def test_names_are_told_apart(tiny_run, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(tiny_run, tmp_path / place / "run")
    runs = open_runs([tmp_path / "a" / "run", tmp_path / "b" / "run", tiny_run / "pipeline"], open_pipeline)
    assert list(runs) == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), str(tiny_run / "pipeline")]
    assert list(open_runs([tiny_run, tiny_run], open_pipeline)) == ["run"]
    (pipeline,) = open_runs([tiny_run / "pipeline"], open_pipeline).values()
    assert (pipeline.name, pipeline.root) == ("run", tiny_run)  # whose curves and report are shown with it


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run folder nor a pipeline folder"):
        open_run(tmp_path)


def test_a_pipeline_is_loaded_once_and_again_after_an_export(run_folder):
    run = open_run(run_folder)
    first = run.pipeline()
    assert run.pipeline() is first
    first.save(run_folder / "pipeline")
    assert run.pipeline() is not first


def test_an_unfinished_run(run_folder):
    run = open_run(unfinished(run_folder))
    with pytest.raises(UserError, match="noise_predictor"):
        run.pipeline()
    states = [(one.kind, one.state, one.step) for one in run.stages()]
    assert states == [
        ("text_encoder", "trained", None),
        ("autoencoder", "trained", None),
        ("noise_predictor", "in training", 20),
    ]
    assert run.report() is None and run.scores() is None and run.card() is None
    assert curves.measures(run) == ["loss", "error"]
    table = curves.table(run.metrics("noise_predictor"), "loss")
    assert table.values.tolist() == [[10, 0.5, "training"], [20, 0.25, "training"], [20, 0.3, "held out"]]
    # the rest of a line that was being written appears at the next look
    with (run_folder / "noise_predictor" / "metrics.jsonl").open("a") as file:
        file.write('30, "loss": 0.125}\n')
    assert run.metrics("noise_predictor")[-1] == {"step": 30, "loss": 0.125}


def test_checkpoints_are_other_noise_predictors(run_folder):
    pipeline = open_pipeline(run_folder)
    add_checkpoints(run_folder, pipeline, {1: 0.5, 2: 1.0})
    run = open_run(run_folder)
    assert list(run.checkpoints()) == [1, 2]
    before = {name: value.clone() for name, value in run.pipeline().noise_predictor.named_parameters()}
    early = run.at_checkpoint(1)
    for name, value in early.noise_predictor.named_parameters():
        assert torch.equal(value, 0.5 * before[name])
    assert early.config.stages["noise_predictor"] != run.pipeline().config.stages["noise_predictor"]
    assert early.config.stages["autoencoder"] == run.pipeline().config.stages["autoencoder"]
    for name, value in run.pipeline().noise_predictor.named_parameters():
        assert torch.equal(value, before[name])
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        run.at_checkpoint(3)


def test_a_damaged_checkpoint_is_refused(run_folder):
    add_checkpoints(run_folder, open_pipeline(run_folder), {1: 0.5})
    file = run_folder / "noise_predictor" / "snapshots" / "step-00000001" / "ema-0.1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"ema-0\.1\.safetensors.*SHA-256"):
        open_run(run_folder).at_checkpoint(1)


def test_the_average_next_to_the_final_one_s(run_folder):
    add_checkpoints(run_folder, open_pipeline(run_folder), {1: 0.5}, widths={0.05: 2.0, 0.1: 1.0})
    contract = run_folder / "noise_predictor" / "final" / "stage.json"
    contract.write_text(json.dumps({**json.loads(contract.read_text()), "ema_width": 0.06}))
    run = open_run(run_folder)
    (name, value), *_ = run.pipeline().noise_predictor.named_parameters()
    assert torch.equal(dict(run.at_checkpoint(1).noise_predictor.named_parameters())[name], 0.5 * 2.0 * value)
