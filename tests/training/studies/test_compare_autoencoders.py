"""Two autoencoders judged by the stage 3 that is trained over each, as the command line does it."""

import json

import pytest

from sd_mini.stages.contract import read_contract
from tests.support.launching import SMOKE, launch
from training.studies import compare_autoencoders


def compare(out, text_encoder, *autoencoders):
    own = ["--config", str(SMOKE / "noise_predictor.yaml"), "--text_encoder", str(text_encoder), "--out", str(out)]
    return compare_autoencoders.main([*map(str, autoencoders), *own, "--steps", "2", "--prompts", "3"])


@pytest.mark.slow
def test_both_are_trained_over_alike_and_measured(smoke_run, tmp_path, capfd):
    other = tmp_path / "other"
    assert launch("autoencoder", other, "--config", str(SMOKE / "autoencoder_small_picture.yaml")) == 0
    folders = [run / "autoencoder" / "final" for run in (smoke_run, other)]
    assert compare(tmp_path / "out", smoke_run / "text_encoder" / "final", *folders) == 0
    rows = json.loads((tmp_path / "out" / "compared.json").read_text())["autoencoders"]
    assert [row["latent_shape"] for row in rows] == [[4, 8, 8], [3, 8, 8]]
    for row, folder in zip(rows, folders, strict=True):
        assert row["psnr"] > 0 and row["exact"]["test"]["n"] == 3 and 0 <= row["ceiling"]["test"] <= 1
        contract = read_contract(tmp_path / "out" / row["run"] / "noise_predictor" / "final")
        assert contract["trained_against"]["autoencoder"] == read_contract(folder)["hash"] and contract["steps"] == 2
    assert f"{folders[0]}: latents 4 x 8 x 8" in capfd.readouterr().out


def test_one_alone_or_twice_the_same_is_no_comparison(smoke_run, tmp_path, capsys):
    folder = smoke_run / "autoencoder" / "final"
    for folders in ([folder], [folder, folder]):
        assert compare(tmp_path / "out", smoke_run / "text_encoder" / "final", *folders) == 2
        assert "expected at least two autoencoders" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
