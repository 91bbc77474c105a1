"""`sd-mini export --to`: the folder as someone has it who has diffusers and no sd_mini."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.repocard import RepoCard
from PIL import Image

from eval.makers.sources import Ours, open_source
from sd_mini import Pipeline
from sd_mini.cli import commands as cli
from sd_mini.files import MANIFEST, file_hash
from sd_mini.pipelines import standalone
from tests.cli.test_cli import PROMPT, assert_refused

SCRIPT = f"""
import importlib.util, sys
assert importlib.util.find_spec("sd_mini") is None
import torch
from diffusers import DiffusionPipeline
folder = sys.argv[1]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline({PROMPT!r}, num_inference_steps=3, generator=torch.Generator().manual_seed(1)).images[0].save("a.png")
again = type(pipeline).from_pretrained(folder, dtype=torch.bfloat16)
assert again.text_adapter.dtype == torch.bfloat16
pipeline.save_pretrained("again")
"""


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    place = tmp_path_factory.mktemp("standalone")
    folder, run = place / "folder", shutil.copytree(tiny_run, place / "run")
    for stage in ("autoencoder", "text_encoder", "noise_predictor"):  # as a training leaves them
        config = {"data": {"source": str(place / "pictures")}, "train": {"steps": 3}}
        (run / stage / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["export", str(run), "--to", str(folder), "--license", "cc-by-4.0"]) == 0
    return folder


def without_sd_mini(place):
    """A folder of this environment's packages but sd_mini, for PYTHONPATH."""
    place.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "sd_mini" not in path.name and path.suffix != ".pth":
            (place / path.name).symlink_to(path)
    return place


def test_stock_diffusers_makes_the_same_picture(folder, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    environment |= {"PYTHONPATH": str(without_sd_mini(tmp_path / "packages")), "HF_HOME": str(tmp_path / "hf")}
    (tmp_path / "a.py").write_text(SCRIPT)
    # -S: no .pth file of this environment, which could name the checkout
    command = [sys.executable, "-S", "a.py", str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "packages that were not found" not in done.stderr
    ours = Pipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    expected = ours(PROMPT, num_inference_steps=3, generator=generator).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(expected))


def test_ours_loads_it_without_running_its_code(folder, tiny_run, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for code in copy.rglob("*.py"):
        code.write_text("raise SystemExit('was run')\n")
    (copy / MANIFEST).unlink()  # which would name the change
    ours, theirs = Pipeline.from_pretrained(copy), Pipeline.from_run(tiny_run)
    for name in ("text_adapter", "autoencoder", "noise_predictor"):
        assert type(getattr(ours, name)) is type(getattr(theirs, name))
        for a, b in zip(getattr(ours, name).parameters(), getattr(theirs, name).parameters(), strict=True):
            assert torch.equal(a, b)
    ours.save(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "model_index.json").read_text())["_class_name"] == "Pipeline"
    assert type(open_source(folder, None, "cpu")) is Ours  # as `python -m eval` opens it
    with pytest.raises(ValueError, match=standalone.CODE):
        (folder / standalone.CODE).rename(tmp_path / "aside")
        try:
            Pipeline.from_pretrained(folder)
        finally:
            (tmp_path / "aside").rename(folder / standalone.CODE)


def test_the_card_says_what_it_is(folder):
    card = RepoCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.pipeline_tag == "text-to-image"
    for heading in ("Metrics", "Training data", "Limits", "How to reproduce"):
        assert f"\n## {heading}\n" in card.text
    assert "trust_remote_code=True" in card.text and "pictures" in card.text
    for stage in re.findall(r"--config (training/\w+\.yaml)", card.text):
        assert yaml.safe_load((folder / stage).read_text())["train"]["steps"] > 0
    assert len(list((folder / "training").iterdir())) == 3
    for path in folder.rglob("*"):
        if path.suffix in (".md", ".yaml", ".json", ".py"):
            assert str(folder.parent) not in path.read_text(), f"{path} names a folder of whoever trained it"
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert listed == {name: file_hash(folder / name) for name in listed} and standalone.CODE in listed


def test_the_report_s_numbers_are_shown_for_its_own_stages_alone(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    pipeline = Pipeline.from_run(run)
    (run / "report").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(run / "report" / "grid.png")
    (run / "pipeline" / "README.md").write_text("| measure | value |\n|---|---|\n| exact | 82 % |\n")
    for stages, part in ((dict(pipeline.config.stages), "| exact | 82 % |"), ({}, "other stages")):
        (run / "report" / "report.json").write_text(json.dumps({"protocol": {"stages": stages}}))
        standalone.write(pipeline, tmp_path / "folder", run)
        text = (tmp_path / "folder" / "README.md").read_text()
        assert part in text and "![grid](grid.png)" in text and "not stated" in text


def test_folders_of_whoever_trained_it_are_cut():
    config = {"data": {"source": "/home/me/pictures", "resolution": 64}, "more": ["C:\\me\\b", "user/name", "~/c"]}
    assert standalone._without_folders(config) == {
        "data": {"source": "pictures", "resolution": 64},
        "more": ["b", "user/name", "c"],
    }


def test_what_is_refused(tiny_run, tmp_path, capsys, monkeypatch):
    assert_refused(["export", tiny_run, "--license", "mit"], capsys, "--license", "--to FOLDER")
    assert_refused(["export", tiny_run, "--to", tmp_path / "a", "--out", tmp_path / "b"], capsys, "--out")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "letter.txt").write_text("mine")
    assert_refused(["export", tiny_run, "--to", tmp_path / "c"], capsys, "other files")
    # nobody answers there
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(["export", str(tiny_run), "--to", str(tmp_path / "d"), "--push-to-hub", "user/name"]) == 2
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'd'}\n" and err.count("error:") == 1 and "is written but not uploaded" in err
    assert Pipeline.from_pretrained(tmp_path / "d").text_adapter is not None
