"""Options of `python -m eval`: what has no use for what is measured is refused by name, and the rest is recorded."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from eval import options
from eval.__main__ import main
from eval.makers.sources import Sampling, open_source
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.sampling.loop import Guidance

SHORT = ["--data", "shapes", "--prompts", "2", "--steps", "1", "--sweep"]


@pytest.fixture
def lying(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    return folder


@pytest.mark.parametrize(
    "given",
    [
        ["--prompts", "2"],
        ["--steps", "3"],
        ["--guidance", "2"],
        ["--rescale", "0"],
        ["--interval", "0", "1"],
        ["--sampler", "euler"],
        ["--autoguidance"],
        ["--resolution", "32"],
        ["--batch", "64"],
        ["--sweep", "1", "2"],
        ["--sweep"],
        ["--sweep_prompts", "4"],
    ],
)
def test_nothing_is_asked_of_how_pictures_were_made_that_are_there(lying, tmp_path, capsys, given):
    assert main([str(lying), "--data", "shapes", "--out", str(tmp_path / "report"), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {given[0]}: ") and error.count("\n") == 1 and "made already" in error


def maker(*takes):
    return SimpleNamespace(takes=frozenset(takes), guidance=Guidance(1.0), steps=5)


def parsed(*given):
    return options.parser().parse_args(["folder", "--data", "shapes", "--out", "report", *given])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--guidance", "2"], "--guidance: folder is a pipeline that takes no guidance_scale"),
        (["--rescale", "0.5"], "--rescale: folder is a pipeline that takes no guidance_rescale"),
        (["--interval", "0", "0.5"], "--interval: folder is a pipeline that takes no guidance_interval"),
        (["--sampler", "heun"], "--sampler: folder is a pipeline that takes no sampler"),
        (["--autoguidance"], "--autoguidance: folder is a pipeline that takes no autoguidance"),
        (["--sweep", "1", "2"], "--sweep: folder is a pipeline that takes no guidance_scale"),
    ],
)
def test_what_a_pipeline_does_not_take_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        options.check_source(parsed(*given), maker())
    taken = ("guidance_scale", "guidance_rescale", "guidance_interval", "sampler", "autoguidance")
    options.check_source(parsed(*given), maker(*taken))


def test_what_is_left_out_is_the_pipeline_s_own():
    own = maker("guidance_scale")
    own.guidance = Guidance(2.0, 0.7, 0.1, 0.9)
    assert options.sampling(parsed(), own).guidance == own.guidance
    found = options.sampling(parsed("--rescale", "0", "--interval", "0", "0.5", "--steps", "3", "--autoguidance"), own)
    assert found.guidance == Guidance(2.0, 0.0, 0.0, 0.5) and found.steps == 3 and found.autoguidance


def test_a_sweep_that_is_none_is_refused():
    own = maker("guidance_scale")
    with pytest.raises(ValueError, match="--sweep 3: is the scale that all pictures are made with"):
        options.check_source(parsed("--sweep", "3", "3", "--guidance", "3"), own)
    options.check_source(parsed("--sweep", "3", "--guidance", "2"), own)
    with pytest.raises(ValueError, match="--sweep_prompts 9: there is no sweep"):
        options.swept_scales(parsed("--sweep", "--sweep_prompts", "9"), own, True)
    with pytest.raises(ValueError, match="--sweep_prompts 9: there is no sweep"):
        options.swept_scales(parsed("--sweep_prompts", "9"), maker(), True)
    with pytest.raises(ValueError, match="nothing says how well pictures fit"):
        options.swept_scales(parsed("--sweep", "2"), own, False)
    assert options.swept_scales(parsed(), own, True) == options.SCALES
    assert options.swept_scales(parsed(), maker(), True) == ()


def test_data_have_the_options_of_their_kind():
    options.check_data(parsed("--seed", "3"))
    with pytest.raises(ValueError, match="--split test: shapes is measured on all its splits"):
        options.check_data(parsed("--split", "test"))
    other = options.parser().parse_args(["folder", "--data", "a.parquet", "--out", "report", "--seed", "0"])
    with pytest.raises(ValueError, match=r"--seed 0: draws the scenes of shapes, a\.parquet has none"):
        options.check_data(other)


def measured(pipeline, out, *given):
    assert main([str(pipeline), "--out", str(out), *SHORT, *given]) == 0
    return json.loads((out / "report.json").read_text())["protocol"]


def test_another_sampler_is_recorded_and_one_that_does_not_fit_is_refused(tiny_run, tmp_path, capsys):
    pipeline = shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    usual, heun = (measured(pipeline, tmp_path / str(i), *given) for i, given in enumerate(([], ["--sampler", "heun"])))
    assert "sampler" not in usual and usual["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert heun["sampler"] == "heun" and heun["scheduler"] == "FlowMatchHeunDiscreteScheduler"
    assert usual["pipeline_hash"] != heun["pipeline_hash"]
    capsys.readouterr()
    for given, says in (
        (["--sampler", "ddim"], "--sampler: sampler ddim: follows a discrete schedule"),
        (["--sampler", "eular"], "--sampler: sampler 'eular': expected one of"),
        (["--autoguidance"], "--autoguidance: this pipeline has no guide; join one"),
    ):
        assert main([str(pipeline), "--out", str(tmp_path / "none"), *SHORT, *given]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {says}") and error.count("\n") == 1


def test_pictures_led_away_from_a_snapshot_are_measured(tiny_run, tmp_path):
    joined = Pipeline.from_pretrained(tiny_run / "pipeline")
    joined.register_modules(guide=copy.deepcopy(joined.noise_predictor))
    joined.save(tmp_path / "pipeline")
    found = measured(tmp_path / "pipeline", tmp_path / "report", "--autoguidance", "--guidance", "2")
    assert found["autoguidance"] is True
    source = open_source(tmp_path / "pipeline", None, "cpu")
    led = source.make(["a red circle"], [0], Sampling(2, Guidance(3.0), 1, autoguidance=True))
    alone = source.make(["a red circle"], [0], Sampling(2, Guidance(1.0), 1))
    assert np.abs(led.astype(int) - alone).max() <= 1  # a guide that says the same leads nowhere
