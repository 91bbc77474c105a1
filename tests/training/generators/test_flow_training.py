"""The family `normalizing_flow` trained by its smoke recipe."""

import math

import numpy as np
import pytest
import torch

from sd_mini import stages
from sd_mini.data.batches import generator
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.launching import launch, prepared


@pytest.fixture(scope="module")
def run(smoke_run, tmp_path_factory):
    run = prepared("normalizing_flow", smoke_run, tmp_path_factory.mktemp("flow"))
    assert launch("normalizing_flow", run) == 0
    return run


def test_it_is_joined_and_draws_by_guidance(run):
    pipeline = Pipeline.from_run(run, predictor="normalizing_flow")
    pipeline.set_progress_bar_config(disable=True)

    def drawn(scale):
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        prompts = ["a red circle", "a blue square"]
        return pipeline(prompts, guidance_scale=scale, generator=seeds, output_type="latent").images

    assert drawn(1).shape == (2, 4, 8, 8)
    assert not torch.equal(drawn(1), drawn(3))
    assert stages.read_contract(run / "normalizing_flow" / "final")["noise_std"] == 0.1


def test_its_held_out_score_is_the_likelihood_of_latents_with_noise(run):
    from sd_mini import shapes
    from sd_mini.images import to_pixels

    pipeline = Pipeline.from_run(run, predictor="normalizing_flow")
    scenes = shapes.sample_scenes(16, "test", 0)
    with torch.no_grad():
        latents = pipeline.autoencoder.encode(to_pixels(shapes.draw_batch(scenes, 32)))
        noise = torch.stack([torch.randn(4, 8, 8, generator=generator(0, i, "validation")) for i in range(16)])
        prompt = pipeline.encode_prompt([shapes.captions(scene)[0] for scene in scenes])
        logs = pipeline.latent_generator.log_likelihoods(latents + 0.1 * noise, *prompt)
    scores = stages.read_contract(run / "normalizing_flow" / "final")["scores"]
    assert scores["loss"] == pytest.approx(float(-logs.mean()) / 256, abs=1e-3)  # the cache holds float16
    assert scores["bits_per_dimension"] == pytest.approx(scores["loss"] / math.log(2))
    assert np.isfinite(scores["loss"])
