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
from tests.support.launching import error_line, launch, lines, prepared
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
    task = AutoregressiveTask(config, run)
    pipeline = Pipeline.from_run(run, predictor="autoregressive")
    pixels = task.valid_pictures.pixels(np.arange(16))
    captions = [own[0] for own in task.valid_pictures.captions]
    with torch.no_grad():
        raw = pipeline.autoencoder.raw_latents(pixels)[0]
        codes = pipeline.autoencoder.codes(raw).indices.flatten(1)
        logits = pipeline.latent_generator(codes, *pipeline.encode_prompt(captions))
    nats = -logits.log_softmax(-1).gather(-1, codes[..., None]).mean((1, 2))
    scores = stages.read_contract(run / "autoregressive" / "final")["scores"]
    assert scores["loss"] == pytest.approx(float(nats.mean()), rel=1e-4)
    assert scores["bits_per_code"] == pytest.approx(scores["loss"] / math.log(2))
    assert scores["bits_per_dimension"] == pytest.approx(scores["bits_per_code"] / 4)
    assert scores["loss"] < math.log(32) + 0.1  # a guess among all codes
    rate = [line["right"] for line in lines(run / "autoregressive") if "right" in line]
    assert rate and 0 <= rate[0] <= 1


def _config(run):
    import yaml

    return yaml.safe_load((run / "autoregressive" / "config.yaml").read_text())


def test_what_has_no_codes_or_hardly_any_is_refused(smoke_run, run, tmp_path, capsys):
    other = prepared("noise_predictor", smoke_run, tmp_path / "dc")
    assert launch("autoregressive", other) == 2
    assert "is of kind dc, which has no codes; expected kind vq" in error_line(capsys.readouterr().err)
    # all codes alike: the first is the nearest to everything
    collapsed = tmp_path / "collapsed"
    shutil.copytree(run / "text_encoder", collapsed / "text_encoder")
    stage = stages.load_stage(run / "autoencoder" / "final", "autoencoder")
    autoencoder: Autoencoder = stage.parts["autoencoder"]
    with torch.no_grad():
        autoencoder.network.quantize.embedding.weight[:] = torch.arange(32.0)[:, None] + 100
    contract = {k: v for k, v in stage.contract.items() if k not in ("kind", "hash", "files", "versions")}
    stages.export(collapsed / "autoencoder" / "final", "autoencoder", {"autoencoder": autoencoder}, contract)
    assert launch("autoregressive", collapsed) == 2
    line = error_line(capsys.readouterr().err)
    assert "its code book has collapsed: perplexity 1.0 of 32 codes, expected at least 4; train it again" in line


def test_a_cache_that_changes_codes_is_refused(run, tmp_path, capsys):
    """Of two codes beside each other float16 tells the latents near the middle no longer apart."""
    close = tmp_path / "close"
    shutil.copytree(run / "text_encoder", close / "text_encoder")
    stage = stages.load_stage(run / "autoencoder" / "final", "autoencoder")
    autoencoder: Autoencoder = stage.parts["autoencoder"]
    with torch.no_grad():
        book = autoencoder.network.quantize.embedding.weight
        book[16:] = book[:16] + 1e-3 * book.std() * torch.randn(book[:16].shape, generator=torch.Generator().manual_seed(0))
    contract = {k: v for k, v in stage.contract.items() if k not in ("kind", "hash", "files", "versions")}
    stages.export(close / "autoencoder" / "final", "autoencoder", {"autoencoder": autoencoder}, contract)
    assert launch("autoregressive", close, "--cache_dtype", "float16") == 2
    assert "cache_dtype float16: " in (line := error_line(capsys.readouterr().err)) and "expected float32" in line
    assert launch("autoregressive", close, "--steps", "1") == 0


def test_unit_codes_are_trained_saved_and_loaded(smoke_run, tmp_path):
    from tests.support.launching import SMOKE

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
