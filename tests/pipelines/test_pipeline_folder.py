"""A pipeline's folder: every file and tensor is the one that was saved, and what others put there is theirs."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_mini import files, stages
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.weights import pipeline_variant, variant_of

NETWORKS = ("autoencoder", "text_encoder", "text_adapter", "noise_predictor")


@pytest.fixture
def folder(tiny_run, tmp_path):
    return shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")


def without_a_tensor(folder, part):
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[1]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("part", NETWORKS)
def test_a_file_that_was_changed_is_refused_by_its_name(folder, part):
    without_a_tensor(folder, part)
    with pytest.raises(ValueError, match=rf"{part}/\w+\.safetensors: is not the file that was exported"):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("part", NETWORKS)
def test_a_tensor_that_is_missing_is_refused_by_its_name(folder, part, capfd):
    (folder / files.MANIFEST).unlink()  # as a folder of before there was one
    name = without_a_tensor(folder, part)
    capfd.readouterr()
    with pytest.raises(ValueError, match=rf"{part}: its weights lack {name}; give"):
        Pipeline.from_pretrained(folder)
    assert "MISSING" not in capfd.readouterr().err


def test_an_older_folder_without_a_manifest_loads(folder, tiny_run):
    (folder / files.MANIFEST).unlink()
    again, before = Pipeline.from_pretrained(folder), Pipeline.from_pretrained(tiny_run / "pipeline")
    for name in NETWORKS:
        assert stages.model_hash(getattr(again, name)) == stages.model_hash(getattr(before, name))


def test_loading_prints_nothing(folder, capfd):
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
    capfd.readouterr()
    Pipeline.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")


def test_each_part_that_is_loaded_is_logged_as_diffusers_does(folder, caplog):
    with caplog.at_level("INFO", "diffusers.pipelines.pipeline_utils"):
        pipeline = Pipeline.from_pretrained(folder)
    parts = {name: type(part).__name__ for name, part in pipeline.components.items() if part is not None}
    expected = {f"Loaded {name} as {cls} from `{name}` subfolder of {folder}." for name, cls in parts.items()}
    assert sorted(caplog.messages) == sorted(expected)


def test_a_user_s_own_files_break_nothing_and_stay(folder):
    (folder / "README.md").write_text("my own")
    (folder / "noise_predictor" / "notes.txt").write_text("mine, too")
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("a report")
    (folder / "link").symlink_to("README.md")
    pipeline = Pipeline.from_pretrained(folder)
    pipeline.noise_predictor.register_to_config(note="new")  # so that something of ours is written anew
    pipeline.save(folder)
    assert (folder / "README.md").read_text() == (folder / "link").read_text() == "my own"
    assert os.readlink(folder / "link") == "README.md"
    assert (folder / "noise_predictor" / "notes.txt").read_text() == "mine, too"
    assert (folder / "report" / "report.html").read_text() == "a report"
    assert set(files.written(folder)) == {
        *json.loads((folder / files.MANIFEST).read_text())["files"],
        files.MANIFEST,
    }
    assert not {"README.md", "link", "noise_predictor/notes.txt"} & set(files.written(folder))
    Pipeline.from_pretrained(folder)


def test_what_was_ours_and_is_no_more_goes(folder):
    """Weights that an earlier save has left would be loaded beside the new ones."""
    old = folder / "noise_predictor" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    old.write_text("")
    manifest = json.loads((folder / files.MANIFEST).read_text())
    manifest["files"]["noise_predictor/" + old.name] = files.file_hash(old)
    (folder / files.MANIFEST).write_text(json.dumps(manifest))
    pipeline = Pipeline.from_pretrained(shutil.copytree(folder, folder.with_name("copy")))
    pipeline.save(folder)
    assert not old.exists()


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    Pipeline.from_pretrained(folder).save(link)
    assert link.is_symlink() and sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipeline"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_umask_s_mode(folder, tmp_path, mask):
    pipeline, before = Pipeline.from_pretrained(folder), os.umask(mask)
    try:
        pipeline.save(tmp_path / "saved")
        pipeline.save_pretrained(tmp_path / "plainly")
        part = {"autoencoder": pipeline.autoencoder}
        stages.export(tmp_path / "stage", "autoencoder", part, {})
    finally:
        os.umask(before)
    for path in (p for name in ("saved", "plainly", "stage") for p in (tmp_path / name).rglob("*") if p.is_file()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


def test_half_precision_and_variants(folder, tmp_path):
    half = Pipeline.from_pretrained(folder, dtype=torch.float16)
    assert {getattr(half, name).dtype for name in NETWORKS} == {torch.float16}
    half.save_pretrained(tmp_path / "p", variant="fp16")
    assert pipeline_variant(tmp_path / "p") == "fp16"
    again = Pipeline.from_pretrained(tmp_path / "p")  # which holds nothing else
    assert {getattr(again, name).dtype for name in NETWORKS} == {torch.float32}
    for name in NETWORKS:
        for a, b in zip(getattr(half, name).parameters(), getattr(again, name).parameters(), strict=True):
            assert torch.equal(a.float(), b)
    whole = Pipeline.from_pretrained(folder)
    whole.save_pretrained(tmp_path / "p")  # beside it
    assert pipeline_variant(tmp_path / "p") is None
    for variant, expected in ((None, whole), ("fp16", again)):
        found = Pipeline.from_pretrained(tmp_path / "p", variant=variant)
        assert stages.model_hash(found.noise_predictor) == stages.model_hash(expected.noise_predictor)
    without_a_tensor(tmp_path / "p", "text_adapter")
    with pytest.raises(ValueError, match=r"text_adapter/\S+: is not the file that was exported"):
        Pipeline.from_pretrained(tmp_path / "p")


@pytest.mark.parametrize(
    ("files", "variant"),
    [
        (["model.safetensors"], None),
        (["model.fp16.safetensors"], "fp16"),
        (["model.fp16.safetensors", "model.safetensors"], None),
        (["diffusion_pytorch_model.bf16-00001-of-00002.safetensors"], "bf16"),
        (["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"], "fp16"),
        (["model.fp16.safetensors", "someone_s_lora.safetensors"], "fp16"),
        ([], None),
    ],
)
def test_which_variant_a_folder_holds(tmp_path, files, variant):
    for file in files:
        (tmp_path / file).touch()
    assert variant_of(tmp_path) == variant


def test_foreign_folders_in_a_stage_are_no_parts_of_it(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run / "text_encoder" / "final", tmp_path / "final")
    for name in (".ipynb_checkpoints", "notes"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    (folder / "text_adapter" / ".ipynb_checkpoints").mkdir()
    (folder / ".DS_Store").touch()
    stage = stages.load_stage(folder, "text_encoder")
    assert set(stage.parts) == {"tokenizer", "text_encoder", "text_adapter", "matcher"}


def test_a_stage_that_is_exported_again_keeps_a_user_s_files(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run / "autoencoder" / "final", tmp_path / "final")
    (folder / "notes.md").write_text("mine")
    (folder / "autoencoder" / "empty").mkdir()
    stage = stages.load_stage(folder)
    (folder / "autoencoder" / "config.json").chmod(0o600)
    stages.export(folder, "autoencoder", stage.parts, {"latent_shape": [1]})
    assert (folder / "notes.md").read_text() == "mine" and (folder / "autoencoder" / "empty").is_dir()
    assert stages.read_contract(folder)["latent_shape"] == [1]
    stages.load_stage(folder)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux alone has it; not even root can write there")
def test_a_place_that_takes_nothing_is_found_out_and_one_line():
    with pytest.raises(ValueError, match=r"--out /proc/self/x: nothing can be written in /proc/\d+ \(") as error:
        files.check_writable(Path("/proc/self/x"))
    assert "\n" not in str(error.value)


def test_a_pipeline_that_cannot_be_saved_is_one_line(tiny_run, tmp_path, monkeypatch):
    pipeline = Pipeline.from_pretrained(tiny_run / "pipeline")
    with pytest.raises(ValueError, match="cannot be written"):
        pipeline.save(tmp_path / ("a" * 300))  # longer than a name may be
    assert not list(tmp_path.iterdir())
