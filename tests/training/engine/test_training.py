"""Each stage's own launch, in process on the smoke recipes: what it writes, that it goes on where it stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image

from sd_mini import png, stages
from sd_mini.config import command, read_yaml
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.launching import MAINS, ROOT, arguments, launch, lines
from training.storage import checkpoint


@pytest.mark.parametrize("stage", MAINS)
def test_what_a_stage_writes(smoke_run, stage):
    folder = smoke_run / stage
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 6
    assert [line["step"] for line in lines(folder)] == [4, 6, 6]
    assert [p.name for p in sorted((folder / "samples").iterdir())] == ["step-00000003.png", "step-00000006.png"]
    assert Image.open(folder / "samples" / "step-00000006.png").width > 64
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    if stage == "noise_predictor":  # a preview holds what each of its pictures was made with
        settings = png.read_all(folder / "samples" / "step-00000006.png")
        assert [one.seed for one in settings] == list(range(len(settings))) and settings[0].sampler == "euler"
    contract = stages.read_contract(folder / "final", stage)
    assert contract["steps"] == 6 and contract["data"]["count"] == 64 and contract["seconds"] > 0


def test_the_three_join_into_a_pipeline(smoke_run):
    pipeline = Pipeline.from_run(smoke_run)
    made = pipeline("a small red circle at the top left", generator=torch.Generator().manual_seed(0))
    assert made.images[0].size == (32, 32)


def test_latents_are_standardised(smoke_run):
    from sd_mini.data.captioned import DataConfig, load

    vae = stages.load_stage(smoke_run / "autoencoder" / "final").parts["autoencoder"]
    with torch.no_grad():
        latents = vae.encode(load(DataConfig(count=64, resolution=32)).pixels(range(64)))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(4), rtol=0, atol=1e-4)


def test_accumulation_changes_nothing_but_rounding(smoke_run, tmp_path):
    for name in ("text_encoder", "autoencoder"):
        shutil.copytree(smoke_run / name, tmp_path / name)
    assert launch("noise_predictor", tmp_path, "--train.accumulation", "3") == 0
    whole, parts = lines(smoke_run / "noise_predictor"), lines(tmp_path / "noise_predictor")
    for a, b in zip(whole, parts, strict=True):
        assert a.keys() == b.keys()
        assert all(b[k] == pytest.approx(a[k], rel=1e-4) for k in a)


def test_sigterm_to_accelerate_launch_reaches_the_training(tmp_path):
    """The launcher dies of it without passing it on; the training saves all the same, and does not live on."""
    options = ["--steps", "100000", "--train.checkpoint_every", "100000", "--train.preview_every", "100000"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command_line = [*launcher, "-m", "training.autoencoder", *arguments("autoencoder", tmp_path, *options)]
    process = subprocess.Popen(command_line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "autoencoder"
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "rerun the command to resume" in process.communicate(timeout=60)[1]  # which waits for the training
    saved = checkpoint.newest(folder / "checkpoints")[0]
    assert saved is not None and lines(folder)[-1]["step"] <= int(saved.name[-8:])


def test_a_finished_stage_is_left_as_it_is(smoke_run, capsys):
    before = stages.read_contract(smoke_run / "autoencoder" / "final")
    assert launch("autoencoder", smoke_run) == 0
    assert "already trained" in capsys.readouterr().out
    assert stages.read_contract(smoke_run / "autoencoder" / "final") == before


def test_a_damaged_checkpoint_is_skipped(smoke_run, tmp_path, capsys):
    folder = shutil.copytree(smoke_run / "autoencoder", tmp_path / "autoencoder")
    shutil.rmtree(folder / "final")
    (folder / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"")
    assert launch("autoencoder", tmp_path) == 0
    assert "step-00000006: model.safetensors is damaged" in capsys.readouterr().err
    assert lines(folder) == lines(smoke_run / "autoencoder")


def test_a_checkpoint_of_other_inputs_is_refused(smoke_run, tmp_path, capsys):
    """Another autoencoder under the same path, halfway: going on would export weights under a false contract."""
    for name in ("text_encoder", "noise_predictor"):
        shutil.copytree(smoke_run / name, tmp_path / name)
    shutil.rmtree(tmp_path / "noise_predictor" / "final")
    assert launch("autoencoder", tmp_path, "--train.seed", "1") == 0
    assert launch("noise_predictor", tmp_path) == 2
    assert "was trained on autoencoder" in capsys.readouterr().err


def test_other_data_is_another_cache(smoke_run, tmp_path):
    for name in ("text_encoder", "autoencoder"):
        shutil.copytree(smoke_run / name, tmp_path / name)
    before = set(os.listdir(smoke_run / "cache" / "latents"))
    shutil.copytree(smoke_run / "cache", tmp_path / "cache")
    assert launch("noise_predictor", tmp_path, "--data.seed", "5") == 0
    assert before < set(os.listdir(tmp_path / "cache" / "latents"))


@pytest.mark.parametrize(
    ("stage", "more", "says"),
    [
        ("autoencoder", ["--train.stepz", "3"], "did you mean 'steps'"),
        ("autoencoder", ["--train.lr", "fast"], "train.lr: got 'fast'"),
        ("autoencoder", ["--steps", "-4"], "train.steps: got -4"),
        ("autoencoder", ["--data.source", "nowhere.parquet"], "nowhere.parquet"),
        ("autoencoder", ["--data.split", "dev"], "'dev'"),
        (
            "autoencoder",
            ["--data.resolution", "30", "--valid.resolution", "30"],
            "expected a multiple of 4; the nearest are 28 or 32",
        ),
        ("autoencoder", ["--model.network.latent_chanels", "4"], "'latent_chanels' is unknown"),
        ("autoencoder", ["--train.ema_width", "0.9"], "train.ema_width: got 0.9"),
        ("autoencoder", ["--train.ema_width", "0.07"], "ema_width 0.07 is made of snapshots; expected ema_snapshots"),
        ("text_encoder", ["--encoder.name", "no/such-model"], "text encoder 'no/such-model'"),
        ("text_encoder", ["--adapter.heads", "5"], "dim 32 is not a multiple of heads 5"),
        ("text_encoder", ["--encoder.max_length", "8", "--strict", "true"], "more than 8 tokens"),
        ("text_encoder", ["--tower.patch", "5"], "tower.patch 5 does not divide"),
        ("text_encoder", ["--data.text_column", "null", "--data.source", "x"], "give both, from the same data"),
        ("autoencoder", ["--data.resolution", "64"], "valid.resolution 32; give both the same"),
        ("autoencoder", ["--train.accumulation", "9"], "at least one for each of 9 passes"),
        ("autoencoder", ["--model.network.latent_channels", "-4"], "cannot be built"),
        ("noise_predictor", [], "no text_encoder stage here"),
    ],
)
def test_a_users_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, monkeypatch, stage, more, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = tmp_path / "run"
    assert launch(stage, run, *more) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and says in error[0]
    # pictures may be decoded already: what the mended launch will read
    assert {str(path.relative_to(run)) for path in run.glob("*/*")} <= {"cache/pictures"}


def test_another_config_is_refused_with_its_fields(smoke_run, capsys):
    assert launch("autoencoder", smoke_run, "--train.lr", "0.5") == 2
    assert "train.lr was 0.002, now 0.5" in capsys.readouterr().err


def test_a_stage_of_another_run_is_refused(smoke_run, tmp_path):
    assert launch("autoencoder", tmp_path, "--train.seed", "1") == 0
    for name in ("text_encoder", "noise_predictor"):
        shutil.copytree(smoke_run / name, tmp_path / name)
    with pytest.raises(ValueError, match="was trained against autoencoder"):
        Pipeline.from_run(tmp_path)


def test_help_lists_every_field(capsys):
    assert command(MAINS["noise_predictor"], ["--help"]) == 0
    out = capsys.readouterr().out
    assert "--train.batch_size" in out and "--objective.caption_dropout" in out and "accelerate launch" in out


def test_a_run_remembers_its_data(tmp_path, capsys):
    """What the first stage's launch says of the data holds for the others, field by field, but for other sources."""
    run = tmp_path / "run"
    data = ["--data.count", "40", "--data.seed=3", "--valid.count", "12"]
    assert launch("autoencoder", run, *data) == 0
    assert launch("text_encoder", run) == 0
    assert "--data.count=40 --data.seed=3 --valid.count=12, from the run's first stage" in capsys.readouterr().err
    recorded = read_yaml(run / "text_encoder" / "config.yaml")
    assert (recorded["data"]["count"], recorded["data"]["seed"], recorded["valid"]["count"]) == (40, 3, 12)
    assert launch("noise_predictor", run, "--data.count", "48") == 0
    recorded = read_yaml(run / "noise_predictor" / "config.yaml")
    assert (recorded["data"]["count"], recorded["data"]["seed"], recorded["valid"]["count"]) == (48, 3, 12)
    # what a stage was started with is not changed by what another was told: it is done, and not refused
    assert launch("autoencoder", run, *data) == 0
    assert "already trained" in capsys.readouterr().out
    other = ["--data.source", "shapes", "--valid.source", "shapes"]
    assert launch("autoencoder", tmp_path / "other", *other, "--data.seed", "5", "--steps", "1") == 0
    shutil.copy(run / "data.yaml", tmp_path / "other" / "data.yaml")
    assert launch("text_encoder", tmp_path / "other", *other, "--steps", "1") == 0
    assert read_yaml(tmp_path / "other" / "text_encoder" / "config.yaml")["data"]["seed"] == 0
