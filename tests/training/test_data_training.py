"""What the stages say of their data before they train, and in which words."""

import re

import pytest
from PIL import Image

from eval.metrics.distances import _few
from sd_mini.config import read
from tests.support.launching import SMOKE
from training.autoencoder import task as autoencoder
from training.autoencoder.task import AutoencoderConfig, AutoencoderTask
from training.engine import reference
from training.noise_predictor import task as noise_predictor
from training.text_encoder import config as text_config


@pytest.fixture
def folder(tmp_path):
    """Pictures of two splits, of which one has an empty caption beside it."""
    for split, count in (("train", 4), ("test", 2)):
        (tmp_path / split).mkdir()
        for i in range(count):
            Image.new("RGB", (40, 40), (60 * i, 10 * count, 0)).save(tmp_path / split / f"{i}.png")
    return tmp_path


def task(folder, *more):
    given = [word for part in ("data", "valid") for word in (f"--{part}.source", str(folder))]
    config = read(AutoencoderConfig, SMOKE / "autoencoder_dc.yaml", [*given, *more])
    counts = {
        "data": config.data.model_copy(update={"count": 4}),
        "valid": config.valid.model_copy(update={"count": 2}),
    }
    return AutoencoderTask(config.model_copy(update=counts))


def test_the_first_stage_says_that_the_later_ones_will_lack_captions(folder, capsys):
    assert task(folder).count == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "captions" in line]
    assert line.startswith("note: data: ") and "this stage needs none" in line


def test_a_stage_without_captions_looks_at_none(folder, capsys):
    (folder / "train" / "0.txt").write_text(" ")
    (folder / "test" / "0.txt").write_text("a red one")
    assert task(folder, "--data.aliases_column", "none there").valid_count == 2
    assert "captions" not in capsys.readouterr().err


def test_latents_of_few_cells_are_remarked_with_what_to_change(folder, capsys):
    size = ["--data.resolution", "32", "--valid.resolution", "32"]
    made = task(folder, *size, "--model.patch_size", "4").latent_shape
    said = [line for line in capsys.readouterr().err.splitlines() if "latents are" in line]
    assert made[1:] == (4, 4) and len(said) == 1
    assert "4 x 4 cells, each of 8 px" in said[0] and "model.patch_size than 4, or a larger resolution" in said[0]
    assert task(folder, *size, "--model.patch_size", "1").latent_shape[1:] == (16, 16)
    assert "latents are" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "config", [AutoencoderConfig, text_config.TextConfig, noise_predictor.PredictorConfig], ids=lambda one: one.__name__
)
def test_help_says_null_for_what_is_typed_as_null(config):
    fields = reference.help_text(config, "stage").partition("\n\n")[2]
    assert not re.findall(r"\bnone[:;]|\bnone means", fields)
    assert "null" in fields and autoencoder.main.stage == "autoencoder"


def test_a_bias_that_exceeds_its_distance_is_no_part_of_it():
    assert "about 0.0292 of 0.0372 is bias" in _few("FD-mini", 64, 64, 0.0372, 0.0292)
    said = _few("FD-mini", 64, 64, 0.0292, 0.0372)
    assert (
        " of 0.0292" not in said
        and "0.0292, is no larger than the bias that is expected by their number, 0.0372" in said
    )
