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
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.repocard import RepoCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from eval.makers.sources import Ours, open_source
from sd_mini import Pipeline
from sd_mini.cli import commands as cli
from sd_mini.files import MANIFEST, file_hash
from sd_mini.pipelines import joining, standalone
from tests.cli.test_cli import PROMPT, assert_refused
from tests.pipelines.test_adapters import on_the_hub
from tests.support.launching import launch, prepared

SCRIPT = f"""
import importlib.util, sys
assert importlib.util.find_spec("sd_mini").origin is None
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


def run_apart(script, folder, place):
    """A script beside which there is no sd_mini, on a standalone folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    environment |= {"PYTHONPATH": str(without_sd_mini(place / "packages")), "HF_HOME": str(place / "hf")}
    (place / "a.py").write_text(script)
    (place / "sd_mini").mkdir()  # a folder that only happens to have the name
    # -S: no .pth file of this environment, which could name the checkout
    command = [sys.executable, "-S", "a.py", str(folder)]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "packages that were not found" not in done.stderr


def test_another_family_s_generator_goes_with_the_folder(smoke_run, tmp_path):
    run = prepared("gan", smoke_run, tmp_path / "run")
    assert launch("gan", run, "--log_with", "none") == 0
    assert cli.main(["export", str(run), "--predictor", "gan", "--to", str(tmp_path / "folder")]) == 0
    script = re.sub(", num_inference_steps=3", "", SCRIPT)
    run_apart(script, tmp_path / "folder", tmp_path)
    ours = Pipeline.from_pretrained(tmp_path / "folder")
    expected = ours(PROMPT, generator=torch.Generator().manual_seed(1)).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(expected))


def test_stock_diffusers_makes_the_same_picture(folder, tmp_path):
    run_apart(SCRIPT, folder, tmp_path)
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


def test_a_hub_name_takes_what_is_loaded_and_no_more(folder, tmp_path):
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    taken = list(filter_repo_objects(names, allow_patterns=list(joining._PARTS)))
    assert standalone.CODE not in taken and not any(name.endswith(".py") for name in taken)
    for name in taken:
        (tmp_path / "part" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, tmp_path / "part" / name)
    on_the_hub(tmp_path / "hub", "user/shapes", tmp_path / "part")
    ours = Pipeline.from_pretrained("user/shapes", cache_dir=tmp_path / "hub", local_files_only=True)
    assert ours.config.stages == Pipeline.from_pretrained(folder).config.stages


def test_a_user_s_own_files_are_kept_and_not_uploaded(folder, tiny_run, tmp_path, monkeypatch):
    own = shutil.copytree(folder, tmp_path / "own")
    (own / ".env").write_text("SECRET=1")
    standalone.write(Pipeline.from_run(tiny_run), own)
    assert (own / ".env").is_file()
    sent = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda hub, name, **options: RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda hub, **options: sent.update(options))
    standalone.push(own, "user/name")
    found = [path.relative_to(own).as_posix() for path in own.rglob("*") if path.is_file()]
    kept = set(filter_repo_objects(found, allow_patterns=sent["allow_patterns"]))
    assert kept == set(found) - {".env"} and sent["repo_id"] == "user/name"
    # `save_pretrained` has written the manifest by then
    monkeypatch.setattr(HfApi, "upload_folder", lambda hub, folder_path, **options: sent.update(
        manifest=(folder_path / MANIFEST).read_text(), listed=options["allow_patterns"]))  # fmt: skip
    Pipeline.from_run(tiny_run).save_pretrained(tmp_path / "plain", push_to_hub=True, repo_id="user/name")
    assert json.loads(sent["manifest"])["files"].keys() == set(sent["listed"]) - {MANIFEST}


def test_the_card_says_what_it_is(folder):
    card = RepoCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.pipeline_tag == "text-to-image"
    for heading in ("Metrics", "Training data", "Limits", "How to reproduce"):
        assert f"\n## {heading}\n" in card.text
    assert "trust_remote_code=True" in card.text and re.search(r"\n- autoencoder: .*, [0-9,]+ pictures\n", card.text)
    for stage in re.findall(r"--config FOLDER/(training/\w+\.yaml)", card.text):
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
    for stages, part in ((dict(pipeline.config.stages), "| exact | 82 % |"), ({}, "on other stages")):
        (run / "report" / "report.json").write_text(json.dumps({"protocol": {"stages": stages}}))
        standalone.write(pipeline, tmp_path / "folder", run)
        text = (tmp_path / "folder" / "README.md").read_text()
        assert part in text and "not stated" in text
        assert ("![grid](grid.png)" in text) == (tmp_path / "folder" / "grid.png").is_file() == bool(stages)


def test_folders_of_whoever_trained_it_are_cut():
    places = [
        "/home/me/a",
        "C:\\me\\a",
        "~/a",
        "file:///home/me/a",
        "\\\\server\\me\\a",
        "../me/secret/a",
        "me/secret/a",
    ]
    kept = ["user/name", "a photo of {article} {label}, http://x/y/z", "a"]
    config = {"data": {"source": places, "resolution": 64}, "more": kept}
    assert standalone._without_folders(config) == {"data": {"source": ["a"] * 7, "resolution": 64}, "more": kept}


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
