"""The family `autoregressive` trained by its smoke recipe: its codes, its likelihood, what it refuses."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from sd_mini import stages
from sd_mini.autoencoder.model import Autoencoder
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.launching import SMOKE, error_line, launch, prepared
from training.generators.autoregressive import task
from training.generators.autoregressive.config import AutoregressiveConfig
from training.generators.autoregressive.task import AutoregressiveTask


@pytest.fixture(scope="module")
def run(smoke_run, tmp_path_factory):
    run = prepared("autoregressive", smoke_run, tmp_path_factory.mktemp("autoregressive"))
    assert launch("autoregressive", run) == 0
    return run


def test_it_is_joined_and_draws_codes_that_decoding_takes_unchanged(run):
    pipeline = Pipeline.from_run(run, predictor="autoregressive")
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 2.0, "generator": [torch.Generator().manual_seed(i) for i in range(2)]}
    latents = pipeline(["a red circle", "a blue square"], output_type="latent", **settings).images
    autoencoder, codes = pipeline.autoencoder, pipeline.latent_generator.codes
    assert latents.shape == (2, 4, 8, 8)
    found = autoencoder.codes(latents * autoencoder.std + autoencoder.mean)
    assert torch.equal(codes[found.indices].permute(0, 3, 1, 2), latents)
    with torch.no_grad():
        decoded = autoencoder.network.decode(found.vectors, force_not_quantize=True).sample
        expected = torch.nn.functional.pixel_shuffle(decoded, autoencoder.config.patch_size)
        torch.testing.assert_close(autoencoder.decode(latents), expected, rtol=0, atol=1e-5)


def test_its_held_out_score_is_the_likelihood_of_the_pictures_codes(run):
    """Against the exported network, on codes made of the pictures themselves."""
    config = AutoregressiveConfig.model_validate(_config(run))
    trained = AutoregressiveTask(config, run)
    pipeline = Pipeline.from_run(run, predictor="autoregressive")
    pixels = trained.valid_pictures.pixels(np.arange(16))
    captions = [own[0] for own in trained.valid_pictures.captions]
    with torch.no_grad():
        raw = pipeline.autoencoder.raw_latents(pixels)[0]
        codes = pipeline.autoencoder.codes(raw).indices.flatten(1)
        logits = pipeline.latent_generator(codes, *pipeline.encode_prompt(captions))
    nats = -logits.log_softmax(-1).gather(-1, codes[..., None]).mean((1, 2))
    scores = stages.read_contract(run / "autoregressive" / "final")["scores"]
    # a latent midway between two codes may go to either, by how its batch was rounded
    assert scores["loss"] == pytest.approx(float(nats.mean()), rel=1e-3)
    assert scores["bits_per_code"] == pytest.approx(scores["loss"] / math.log(2))
    assert scores["bits_per_dimension"] == pytest.approx(scores["bits_per_code"] / 4)
    assert scores["loss"] < math.log(32) + 0.1  # a guess among all codes


def _config(run):
    import yaml

    return yaml.safe_load((run / "autoregressive" / "config.yaml").read_text())


def with_codes(run, folder, change):
    """A copy of the run's first two stages whose code book `change` has written into."""
    shutil.copytree(run / "text_encoder", folder / "text_encoder")
    stage = stages.load_stage(run / "autoencoder" / "final", "autoencoder")
    autoencoder: Autoencoder = stage.parts["autoencoder"]
    with torch.no_grad():
        change(autoencoder.network.quantize.embedding.weight)
    contract = {k: v for k, v in stage.contract.items() if k not in ("kind", "hash", "files", "versions")}
    stages.export(folder / "autoencoder" / "final", "autoencoder", {"autoencoder": autoencoder}, contract)
    return folder


def test_what_has_no_codes_or_hardly_any_is_refused(smoke_run, run, tmp_path, capsys):
    other = prepared("noise_predictor", smoke_run, tmp_path / "dc")
    assert launch("autoregressive", other) == 2
    assert "is of kind dc, which has no codes; expected kind vq" in error_line(capsys.readouterr().err)

    def all_alike(book):  # the first is the nearest to everything
        book[:] = torch.arange(32.0)[:, None] + 100

    assert launch("autoregressive", with_codes(run, tmp_path / "collapsed", all_alike)) == 2
    line = error_line(capsys.readouterr().err)
    assert "its code book has collapsed: perplexity 1.0 of 32 codes, expected at least 4; train it again" in line


def test_a_cache_that_changes_codes_is_refused(smoke_run, tmp_path, capsys, monkeypatch):
    """Of thousands of codes some are so near to each other that float16 tells them no longer apart; float32 does."""
    monkeypatch.setattr(task, "MOVED", 0.0)
    shutil.copytree(smoke_run / "text_encoder", tmp_path / "text_encoder")
    many = ["--config", str(SMOKE / "autoencoder_vq.yaml"), "--model.network.num_vq_embeddings", "8192"]
    assert launch("autoencoder", tmp_path, *many, "--steps", "1") == 0
    assert launch("autoregressive", tmp_path, "--cache_dtype", "float16") == 2
    assert "cache_dtype float16: " in (line := error_line(capsys.readouterr().err)) and "expected float32" in line
    assert launch("autoregressive", tmp_path, "--steps", "1") == 0


def test_pixel_by_pixel_in_colours_that_stand_for_the_pictures(smoke_run, tmp_path, capsys):
    pixels = tmp_path / "pixels"
    shutil.copytree(smoke_run / "text_encoder", pixels / "text_encoder")
    assert launch("autoencoder", pixels, "--config", str(SMOKE / "autoencoder_small_picture.yaml"), "--steps", "2") == 0
    assert launch("autoregressive", pixels, "--palette", "5000") == 2
    assert "palette 5000: the training pictures have " in error_line(capsys.readouterr().err)
    assert launch("autoregressive", pixels, "--palette", "12", "--steps", "2") == 0
    pipeline = Pipeline.from_run(pixels, predictor="autoregressive")
    pipeline.set_progress_bar_config(disable=True)
    colours = pipeline.latent_generator.codes
    drawn = pipeline("a red circle", output_type="latent").images
    assert drawn.shape == (1, 3, 8, 8)
    assert all((colours == pixel).all(1).any() for pixel in drawn[0].flatten(1).T)
    # k-means has come to rest: each colour is the mean of the training pixels that are nearest to it
    config = AutoregressiveConfig.model_validate(_config(pixels))
    latents = AutoregressiveTask(config, pixels).train.take(np.arange(64), [0.0] * 64)["latents"]
    vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)
    nearest = (vectors[:, None] - colours).square().sum(2).argmin(1)
    means = torch.stack([vectors[nearest == number].mean(0) for number in range(12)])
    torch.testing.assert_close(means, colours, rtol=0, atol=2e-2)
    assert (vectors - colours[nearest]).square().mean() < 0.1  # of values of variance 1
    assert launch("autoregressive", prepared("autoregressive", smoke_run, tmp_path / "vq"), "--palette", "12") == 2
    line = error_line(capsys.readouterr().err)
    assert "is of kind vq, whose latents are no colours for palette 12; expected kind small_picture" in line


def test_unit_codes_are_trained_saved_and_loaded(smoke_run, tmp_path):
    run = tmp_path / "unit"
    more = ["--config", str(SMOKE / "autoencoder_vq.yaml"), "--model.unit_codes", "true"]
    assert launch("autoencoder", run, *more) == 0
    stage = stages.load_stage(run / "autoencoder" / "final", "autoencoder")
    autoencoder = stage.parts["autoencoder"]
    lengths = autoencoder.network.quantize.embedding.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(32), rtol=0, atol=1e-6)
    with torch.no_grad():
        raw = autoencoder.raw_latents(torch.rand(2, 3, 32, 32) * 2 - 1)[0]
    torch.testing.assert_close(raw.norm(dim=1), torch.ones(2, 8, 8), rtol=0, atol=1e-6)
    # the nearest code is that of the largest cosine
    book = autoencoder.network.quantize.embedding.weight
    cosines = torch.einsum("bchw,kc->bhwk", raw, book)
    assert torch.equal(autoencoder.codes(raw).indices, cosines.argmax(-1))
    scores = json.loads((run / "autoencoder" / "final" / "stage.json").read_text())["scores"]
    assert 1 <= scores["code_perplexity"] <= 32
