"""Folders written before the modules were moved into packages: a run of the smoke recipes."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd_mini import Pipeline, load_stage
from tests.support.launching import SMOKE, launch, lines

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"


@pytest.fixture(scope="module")
def flat_run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("flat") / "run"
    with tarfile.open(HERE / "fixtures" / "flat_layout_run.tar.gz") as archive:
        archive.extractall(run, filter="data")
    return run


def golden(stage: str) -> list[float]:
    """The losses of 20 updates of the smoke recipe."""
    return json.loads((GOLDEN / f"{stage}.json").read_text())


def test_an_old_pipeline_makes_the_picture_that_it_made(flat_run):
    pipeline = Pipeline.from_pretrained(flat_run / "pipeline")
    index = json.loads((flat_run / "pipeline" / "model_index.json").read_text())
    assert index["autoencoder"] == ["sd_mini.autoencoder", "Autoencoder"]
    assert index["text_adapter"] == ["sd_mini.text_encoder", "TextAdapter"]
    picture = pipeline("a small red circle", generator=torch.Generator().manual_seed(3)).images[0]
    with Image.open(flat_run / "picture.png") as before:
        difference = np.asarray(picture, dtype=int) - np.asarray(before, dtype=int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("stage", ["autoencoder", "text_encoder", "noise_predictor"])
def test_an_old_stage_loads(flat_run, stage):
    loaded = load_stage(flat_run / stage / "final", stage)
    assert loaded.contract["files"]


def test_an_old_checkpoint_goes_on_to_the_same_losses(flat_run):
    """Its latents and embeddings are encoded again, as caches were not kept."""
    folder = flat_run / "noise_predictor"
    shutil.rmtree(folder / "final")  # as if stopped after the checkpoint
    (folder / "metrics.jsonl").unlink()
    assert launch("noise_predictor", flat_run, "--steps", "20", "--train.log_every", "1", "--log_with", "none") == 0
    losses = {line["step"]: line["loss"] for line in lines(folder) if "loss" in line}
    assert list(losses) == [19, 20]
    assert list(losses.values()) == pytest.approx(golden("noise_predictor")[18:], rel=1e-3)


@pytest.mark.parametrize("stage", ["autoencoder", "text_encoder", "noise_predictor", "few_steps"])
def test_losses_are_the_golden_ones(stage, flat_run, tmp_path):
    recipe = "autoencoder_kl" if stage == "autoencoder" else stage
    stands_on = {"noise_predictor": ("autoencoder", "text_encoder")}
    stands_on["few_steps"] = (*stands_on["noise_predictor"], "noise_predictor")
    stages = [f"--{name}={flat_run / name / 'final'}" for name in stands_on.get(stage, ())]
    options = ["--config", str(SMOKE / f"{recipe}.yaml"), "--steps", "20", "--train.log_every", "1"]
    assert launch(stage, tmp_path, *options, "--log_with", "none", *stages) == 0
    losses = [line["loss"] for line in lines(tmp_path / stage) if "loss" in line]
    assert losses == pytest.approx(golden(stage), rel=1e-3)
