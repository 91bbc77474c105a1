"""Any checkpoint as a stage, and an average of any width: what is exported is what was evaluated."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sd_mini import noise_predictor, stages
from sd_mini.cli import commands as cli
from sd_mini.config import command, read
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.launching import MAINS, launch, lines
from training.engine.launch import Launch
from training.storage import checkpoint, export, snapshots

STAGES = ("autoencoder", "text_encoder", "noise_predictor")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("exported")
    options = ["--train.valid_every", "3", "--train.ema_snapshots", "6"]
    assert [launch(stage, run, *options) for stage in STAGES] == [0, 0, 0]
    return run


def launched(stage, run):
    config = read(MAINS[stage].config, run / stage / "config.yaml")
    return Launch(config, run, run / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_the_last_checkpoint_exports_as_the_final_stage(run, tmp_path, stage):
    assert export.export(run / stage, tmp_path / "out") == stages.read_contract(run / stage / "final")["hash"]


@pytest.mark.parametrize("step", [3, 6])
def test_every_checkpoint_loads_into_the_pipeline(run, tmp_path, step):
    """As each was at that step, the noise predictor among stages 1 and 2 it was trained against."""
    export.export(run / "noise_predictor", tmp_path / "out", step)
    made = Pipeline.from_stages(
        *(stages.load_stage(run / stage / "final") for stage in ("text_encoder", "autoencoder")),
        stages.load_stage(tmp_path / "out"),
    )("a small red circle", generator=torch.Generator().manual_seed(0))
    assert made.images[0].size == (32, 32)
    for stage in ("text_encoder", "autoencoder"):
        export.export(run / stage, tmp_path / stage, step)
        assert stages.load_stage(tmp_path / stage, stage).contract["steps"] == step


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("stage", STAGES)
def test_an_exported_checkpoint_scores_as_the_training_logged(run, tmp_path, stage, step):
    export.export(run / stage, tmp_path / "out", step)
    logged = next(line for line in lines(run / stage) if line["step"] == step and "valid/" in "".join(line))
    scores = stages.read_contract(tmp_path / "out")["scores"]
    assert {f"valid/{name}": value for name, value in scores.items()} == {
        k: v for k, v in logged.items() if k != "step"
    }


@pytest.mark.parametrize(("stage", "part"), [("autoencoder", "autoencoder"), ("noise_predictor", "network")])
def test_what_is_exported_is_what_was_evaluated(run, stage, part):
    """The stage's files, read back and scored, have the very scores that the training logged at the end."""
    task = MAINS[stage].make_task(launched(stage, run))
    objective = task.players[stage].objective
    loaded = stages.load_stage(run / stage / "final", stage).parts[stage]
    getattr(objective, part).load_state_dict(loaded.state_dict())
    with torch.no_grad():
        scores = task.validate(objective.eval(), slice(0, task.valid_count))
    logged = [line for line in lines(run / stage) if "valid/" in "".join(line)][-1]
    assert {f"valid/{k}": math.fsum(v.tolist()) / len(v) for k, v in scores.items()} == {
        k: v for k, v in logged.items() if k != "step"
    }


def test_the_raw_weights_are_never_overwritten(run):
    kept = checkpoint.load(run / "noise_predictor" / "checkpoints" / "step-00000006")[0]
    assert kept["model"].keys() >= kept["ema-0.05"].keys() == kept["ema-0.1"].keys()
    names = [name for name in kept["ema-0.1"] if kept["model"][name].ndim == 2]
    assert all(not torch.equal(kept["model"][n], kept["ema-0.1"][n]) for n in names)
    assert all(not torch.equal(kept["ema-0.05"][n], kept["ema-0.1"][n]) for n in names)
    exported = load_file(run / "noise_predictor" / "final" / "noise_predictor" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, kept["ema-0.1"][f"network.{name}"]) for name, value in exported.items())


def test_a_width_that_was_not_tracked_is_exported_from_snapshots(run, tmp_path):
    """By the command, and by a training that asks for it from the start."""
    argv = [str(run / "noise_predictor"), "--out", str(tmp_path / "out"), "--ema_width", "0.07"]
    assert command(export.main, argv) == 0
    weights = load_file(tmp_path / "out" / "noise_predictor" / "diffusion_pytorch_model.safetensors")
    expected = snapshots.at_width(run / "noise_predictor", 6, 0.07)
    assert all(torch.equal(value, expected[f"network.{name}"]) for name, value in weights.items())
    for stage in ("autoencoder", "text_encoder"):
        shutil.copytree(run / stage, tmp_path / "asked" / stage)
    options = ["--train.ema_width", "0.07", "--train.valid_every", "3", "--train.ema_snapshots", "6"]
    assert launch("noise_predictor", tmp_path / "asked", *options) == 0
    contracts = [
        stages.read_contract(path) for path in (tmp_path / "asked" / "noise_predictor" / "final", tmp_path / "out")
    ]
    assert contracts[0]["hash"] == contracts[1]["hash"] and contracts[0]["ema_width"] == 0.07
    assert contracts[0]["scores"] == contracts[1]["scores"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--step", "9"], "step-00000009: expected a whole checkpoint, but no such folder"),
        (["--ema_width", "0.5"], "ema_width 0.5: expected above 0 and at most 0.28"),
        (["--step", "9", "--ema_width", "0.07"], "no such folder"),
    ],
)
def test_what_is_not_there_is_one_line(run, tmp_path, capsys, more, says):
    assert command(export.main, [str(run / "noise_predictor"), "--out", str(tmp_path / "out"), *more]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and says in error[0]
    assert not (tmp_path / "out").exists()


def test_out_is_never_something_else(run, tmp_path, capsys):
    """A run's or a stage's folder, or a person's: refused before anything is read, and untouched."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"")
    for out in (run, run / "noise_predictor", tmp_path / "mine"):
        before = sorted(out.rglob("*"))
        assert command(export.main, [str(run / "noise_predictor"), "--out", str(out)]) == 2
        assert "holds something else than an exported stage" in capsys.readouterr().err
        assert sorted(out.rglob("*")) == before
    for _ in range(2):  # an exported stage may be written anew
        assert command(export.main, [str(run / "noise_predictor"), "--out", str(tmp_path / "out")]) == 0


def test_a_damaged_snapshot_is_left_out_and_named(run, tmp_path, capsys):
    copy = shutil.copytree(run / "noise_predictor", tmp_path / "noise_predictor")
    whole = snapshots.at_width(copy, 6, 0.07)
    (copy / "snapshots" / "step-00000002" / "ema-0.1.safetensors").write_bytes(b"rotten")
    without = snapshots.at_width(copy, 6, 0.07)
    assert "step-00000002: ema-0.1.safetensors is damaged" in capsys.readouterr().err
    changed = sum(not torch.equal(without[name], value) for name, value in whole.items())
    assert changed and all(torch.allclose(without[name], value, atol=0.02) for name, value in whole.items())


def test_a_stage_without_averages_has_none_to_choose(run, tmp_path, capsys):
    assert command(export.main, [str(run / "text_encoder"), "--out", str(tmp_path / "o"), "--ema_width", "0.1"]) == 2
    assert "was trained without averages" in capsys.readouterr().err


def test_held_out_loss_is_the_same_whenever_it_is_asked(run):
    """Fixed noise and timesteps: in one call or in parts, before or after other draws, the same number a sample."""
    task = MAINS["noise_predictor"].make_task(launched("noise_predictor", run))
    objective = task.players["noise_predictor"].objective.eval()
    with torch.no_grad():
        whole = task.validate(objective, slice(0, 16))
        torch.manual_seed(99)
        parts = [task.validate(objective, rows) for rows in (slice(0, 7), slice(7, 16))]
    levels = [f"loss_t{(level + 0.5) / 10:.2f}" for level in range(10)]
    assert list(whole) == ["loss", *levels]
    for name, values in whole.items():
        np.testing.assert_allclose(np.concatenate([part[name] for part in parts]), values, rtol=1e-5)
    np.testing.assert_allclose(whole["loss"], np.mean([whole[name] for name in levels], axis=0), rtol=1e-6)


def test_an_earlier_snapshot_guides(run, tmp_path):
    """Of a step whose checkpoint has gone; guidance by it leads away from what it makes of the same prompt."""
    kept = run / "noise_predictor" / "checkpoints" / "step-00000003"
    shutil.move(kept, tmp_path / "kept")
    try:
        export.export(run / "noise_predictor", tmp_path / "early", 3)
    finally:
        shutil.move(tmp_path / "kept", kept)
    early = stages.load_stage(tmp_path / "early", "noise_predictor")
    averages = checkpoint.load(kept)[0]["ema-0.1"]
    for name, tensor in early.parts["noise_predictor"].state_dict().items():
        torch.testing.assert_close(tensor, averages[f"network.{name}"], rtol=0, atol=1e-6)
    assert (
        command(cli._main, ["export", str(run), "--guide", str(tmp_path / "early"), "--out", str(tmp_path / "p")]) == 0
    )
    joined = Pipeline.from_pretrained(tmp_path / "p")
    for one in (joined.noise_predictor, joined.guide):  # a network of six updates hardly says anything yet
        with torch.random.fork_rng():
            torch.manual_seed(3 + (one is joined.guide))
            for parameter in one.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    sampling = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"}
    noise = torch.randn(1, *joined.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    made = joined("a red circle", latents=noise, autoguidance=True, **sampling).images
    tokens, mask = joined.encode_prompt("a red circle")
    # one Euler step from t 1 to 0: x - (bad + 3 (good - bad)), each with the prompt
    with torch.no_grad():
        good, bad = (
            noise_predictor.predict(one, noise, torch.tensor([1000.0]), tokens, mask)
            for one in (joined.noise_predictor, joined.guide)
        )
    torch.testing.assert_close(made, noise - (bad + 3 * (good - bad)), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not from a negative prompt"):
        joined("a red circle", autoguidance=True, negative_prompt="a blue one")
    with pytest.raises(ValueError, match="autoguidance: this pipeline has no guide; join one"):
        Pipeline.from_run(run)("a red circle", autoguidance=True)


def test_a_snapshot_exports_what_was_frozen_as_it_was_trained(tmp_path, monkeypatch):
    """Places, null word and word vectors are drawn once: another draw before them changes nothing that is exported."""
    run, stage, step = tmp_path / "run", "text_encoder", 2
    assert launch(stage, run, "--train.ema_width", "0.05", "--train.ema_snapshots", "6") == 0
    folder = run / stage
    averaged = checkpoint.load(snapshots.of_step(folder, step))[0]["ema-0.05"]
    trained = checkpoint.load(checkpoint.find(folder, stage))[0]["model"]
    assert not checkpoint.named(folder, step).is_dir() and {"adapter.places", "adapter.null_word"} <= trained.keys()
    seed = torch.manual_seed

    def seed_and_draw(number):
        generator = seed(number)
        torch.randn(3)
        return generator

    monkeypatch.setattr(torch, "manual_seed", seed_and_draw)
    export.export(folder, tmp_path / "out", step)
    parts = stages.load_stage(tmp_path / "out", stage).parts
    exported = {f"adapter.{name}": value for name, value in parts["text_adapter"].state_dict().items()}
    exported |= {f"encoders.0.{name}": value for name, value in parts["text_encoder"].state_dict().items()}
    measured_on_export = {"adapter.token_mean", "adapter.token_std", "adapter.pooled_rms"}
    for name in exported.keys() - measured_on_export:
        assert torch.equal(exported[name], averaged.get(name, trained[name])), name
