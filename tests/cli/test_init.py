"""sd-mini init: a recipe that the launchers take, equal to the measured one where data and machine are its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sd_mini.cli import commands as cli
from sd_mini.cli.recipe import STAGES, Machine, Recipe
from sd_mini.config import read
from sd_mini.data.buckets import bucket_sizes
from sd_mini.data.captioned import DataConfig
from tests.cli.test_cli import assert_refused
from training.autoencoder.task import AutoencoderConfig
from training.noise_predictor.config import PredictorConfig
from training.text_encoder.config import TextConfig

CONFIGS = dict(zip(STAGES, (AutoencoderConfig, TextConfig, PredictorConfig), strict=True))
MEASURED = {"cpu": "pictures", "cuda": "emoji_gpu"}
ROOT = Path(__file__).parents[2]


def folder_of(place, count, size, name="die Bilder"):
    folder = place / name
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)  # none is like another
        Image.fromarray(pixels).resize(size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def test_the_files_are_read_by_the_launchers(tmp_path, monkeypatch, capsys):
    source = folder_of(tmp_path, 30, (80, 70))
    monkeypatch.chdir(tmp_path)
    argv = ["init", "mine", "--data", source.name, "--max_aspect", "2"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "30 pictures of about 70 px" in out and " of disk" in out and ("minutes" in out or "hours" in out)
    for stage, config in CONFIGS.items():
        read_back = read(config, tmp_path / "mine" / f"{stage}.yaml")
        assert read_back.data.source == str(source) and read_back.data.max_aspect == 2
        assert len(bucket_sizes(read_back.data)) > 1
        assert read_back.train.batch_size <= 29
    readme = (tmp_path / "mine" / "README.md").read_text()
    own = tmp_path / "mine"  # the commands are given in the checkout
    assert all(f"training.{stage} --config {own}/{stage}.yaml --run runs/mine" in readme for stage in STAGES)
    assert f"sd-mini data '{source}' --max_aspect 2.0 --sheet sheet.png" in readme
    assert_refused(argv, capsys, "mine", "there already")


@pytest.mark.parametrize(("device", "side"), [("cpu", 64), ("cuda", 128)])
@pytest.mark.parametrize("stage", STAGES)
def test_it_is_the_measured_recipe(device, side, stage, tmp_path):
    """Of 3,243 pictures like the emoji: the fields of the files in training/configs, but for where the data is."""
    recipe = Recipe(tmp_path, DataConfig(source="pictures"), 3243, side, Machine(device, 1e12, 140))
    ours = yaml.safe_load(getattr(recipe, stage)())
    measured = ROOT / "training" / "configs" / MEASURED[device] / f"{stage}.yaml"
    if not measured.is_file():  # the GPU's recipe takes the text encoder of the CPU's
        measured = ROOT / "training" / "configs" / "pictures" / f"{stage}.yaml"
    theirs = yaml.safe_load(measured.read_text())
    for fields in (ours, theirs):
        for name in ("data", "valid", "resident"):
            fields.pop(name, None)
        for name in ("preview_every", "checkpoint_every", "valid_every", "log_every"):
            fields["train"].pop(name, None)
        fields.get("sampling", {}).pop("interval", None)
        if device == "cuda" and stage != "noise_predictor":  # which the recipe for one large GPU leaves out
            for name in ("mixed_precision", "compile"):
                fields["train"].pop(name, None)
        fields["train"].pop("ema_every", None)
    assert ours == theirs


@pytest.mark.parametrize(("side", "resolution"), [(20, 32), (50, 64), (40, 32), (500, 64)])
def test_small_pictures_are_not_blown_up(side, resolution, tmp_path):
    recipe = Recipe(tmp_path, DataConfig(source="pictures"), 10, side, Machine("cpu", 1e11))
    assert recipe.resolution == resolution and recipe.batch(64) == 8


def test_every_field_that_was_given_is_kept(tmp_path):
    source = folder_of(tmp_path, 20, (40, 40))
    given = ["--resolution", "32", "--max_bad", "0.5", "--crop", "top", "--mirror", "true", "--background", "[0, 0, 0]"]
    assert cli.main(["init", str(tmp_path / "mine"), "--data", str(source), *given, "--max_aspect", "2"]) == 0
    for stage, config in CONFIGS.items():
        data = read(config, tmp_path / "mine" / f"{stage}.yaml").data
        assert (data.resolution, data.max_bad, data.crop, data.mirror, data.background) == (
            32,
            0.5,
            "top",
            True,
            (0, 0, 0),
        )
        assert len(bucket_sizes(data)) > 1


def test_a_small_gpu_gets_small_batches(tmp_path):
    recipes = [
        Recipe(tmp_path, DataConfig(source="a"), 9999, 128, Machine("cuda", 1e13, gb, gb > 20)) for gb in (140, 16)
    ]
    large, small = (yaml.safe_load(recipe.noise_predictor())["train"] for recipe in recipes)
    assert (large["batch_size"], small["batch_size"]) == (512, 32)
    assert large["mixed_precision"] == "bf16" and "mixed_precision" not in small


def test_sources_of_which_no_stage_could_be_trained(tmp_path, capsys):
    plain, alike, few, gaps = (
        folder_of(tmp_path, n, (40, 40), name) for n, name in ((20, "a"), (20, "b"), (3, "c"), (20, "d"))
    )
    for text in plain.glob("*.txt"):
        text.unlink()
    for text in alike.glob("*.txt"):
        text.write_text("a picture")
    for number in range(10):
        (gaps / f"{number}.txt").write_text(" ")
    for source, parts in ((plain, ("no captions",)), (alike, ("every caption is 'a picture'",)), (few, ("has 3 rows",)),
                          (gaps, ("10 of 20 rows cannot be used", "max_bad"))):  # fmt: skip
        assert_refused(["init", tmp_path / "new", "--data", source], capsys, *parts)
    assert not (tmp_path / "new").exists()


def test_what_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    new = tmp_path / "new"
    assert_refused(["init", new, "--data", "shapes"], capsys, "has its recipe already")
    assert_refused(["init", new, "--data", tmp_path / "empty"], capsys, str(tmp_path / "empty"))
    assert_refused(["init", new], capsys, "--data")
    assert_refused(["init", new, "--data", folder_of(tmp_path, 2, (9, 9)), "--text_colum", "a"], capsys, "text_column")
    assert not new.exists()


@pytest.mark.slow
def test_a_recipe_trains(tmp_path):
    """20 pictures in 9 shapes, from `init` to the first updates of each stage."""
    folder = folder_of(tmp_path, 20, (80, 80), "pictures")
    for i in range(20):
        with Image.open(folder / f"{i}.png") as picture:
            picture.resize((60 + 10 * (i % 3), 60 + 10 * (i // 3 % 3))).save(folder / f"{i}.png")
    assert cli.main(["init", str(tmp_path / "mine"), "--data", str(folder), "--max_aspect", "2"]) == 0
    for stage in STAGES:
        config = tmp_path / "mine" / f"{stage}.yaml"
        argv = [
            "-m",
            f"training.{stage}",
            "--config",
            str(config),
            "--run",
            str(tmp_path / "run"),
            "--train.steps",
            "2",
        ]
        subprocess.run([sys.executable, *argv], check=True, cwd=ROOT)
