import json
import os
import shutil

import pytest
import torch

from sd_mini import files, stages
from sd_mini.pipelines.text_to_image import Pipeline


def test_a_stage_is_checked_file_by_file(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run / "autoencoder" / "final", tmp_path / "vae")
    assert stages.load_stage(folder, "autoencoder").parts["autoencoder"].training is False
    weights = folder / "autoencoder" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 4
    weights.write_bytes(raw)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: is not the file that was exported"):
        stages.load_stage(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="is missing"):
        stages.load_stage(folder)


def test_the_contract_names_what_it_is(tiny_run):
    contract = stages.read_contract(tiny_run / "noise_predictor" / "final")
    for kind in ("text_encoder", "autoencoder"):
        assert contract["trained_against"][kind] == stages.read_contract(tiny_run / kind / "final")["hash"]
    with pytest.raises(ValueError, match="expected a autoencoder stage, this is a text_encoder stage"):
        stages.load_stage(tiny_run / "text_encoder" / "final", "autoencoder")
    with pytest.raises(ValueError, match="no autoencoder stage here"):
        stages.load_stage(tiny_run / "nothing", "autoencoder")


def test_stages_that_do_not_belong_together_are_refused(tiny_run, tmp_path):
    vae = stages.load_stage(tiny_run / "autoencoder" / "final")
    with torch.no_grad():
        next(vae.parts["autoencoder"].parameters()).add_(1)
    contract = {k: v for k, v in vae.contract.items() if k not in ("kind", "hash", "files", "versions")}
    other = stages.export(tmp_path / "other", "autoencoder", vae.parts, contract)
    with pytest.raises(ValueError, match="was trained against autoencoder") as error:
        Pipeline.from_stages(
            tiny_run / "text_encoder" / "final", tmp_path / "other", tiny_run / "noise_predictor" / "final"
        )
    assert vae.hash[:12] in str(error.value) and other[:12] in str(error.value)


def test_an_atomic_folder_is_all_or_nothing(tmp_path):
    target = tmp_path / "out"
    with files.atomic_folder(target) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(RuntimeError), files.atomic_folder(target) as partial:
        (partial / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]
    with files.atomic_folder(target) as partial:
        (partial / "b").write_text("3")
    assert os.listdir(target) == ["b"]


def test_no_stage_holds_a_pickle(tiny_run):
    suffixes = {p.suffix for p in tiny_run.rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".jinja", ".md"}, suffixes
    assert json.loads((tiny_run / "pipeline" / "model_index.json").read_text())["_class_name"] == "Pipeline"
