"""Guidance against closed forms and diffusers' own, and what a pipeline does with it."""

import math

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.sampling.loop import Guidance, guided, rescaled

PROMPTS = ["a red circle", "two blue squares"]


def test_guide():
    conditional, unconditional = torch.tensor([2.0]), torch.tensor([1.0])
    assert [guided(conditional, unconditional, s).item() for s in (0.0, 1.0, 3.0)] == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rescaling_is_diffusers(share):
    guided, conditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = rescale_noise_cfg(guided * 3, conditional, share)
    torch.testing.assert_close(rescaled(guided * 3, conditional, share), expected)
    if share == 1:
        spread = rescaled(guided * 3, conditional, 1.0).std((1, 2, 3))
        torch.testing.assert_close(spread, conditional.std((1, 2, 3)))


def test_what_no_picture_comes_out_of_is_refused():
    for scale in (math.nan, math.inf, -1.0, True, "2"):
        with pytest.raises(ValueError, match="guidance_scale"):
            Guidance(scale)
    for rescale in (math.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match="guidance_rescale"):
            Guidance(2.0, rescale)
    for low, high in ((0.5, 0.4), (-0.1, 1.0), (0.0, 1.5), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="guidance_interval"):
            Guidance(2.0, 0.0, low, high)


@pytest.fixture
def pipeline(talking_pipeline):
    return talking_pipeline


def made(pipeline, steps=4, **guidance):
    """(latents, pictures a pass of the network was called with, step by step)."""
    sizes = []
    hook = pipeline.noise_predictor.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    try:
        generator = [torch.Generator().manual_seed(i) for i in range(2)]
        out = pipeline(PROMPTS, num_inference_steps=steps, generator=generator, output_type="latent", **guidance)
    finally:
        hook.remove()
    return out.images, sizes


def test_outside_the_interval_half_is_not_computed(pipeline):
    """Of four steps from the noise levels 1, 0.75, 0.5, 0.25; the second and third are in [0.4, 0.8]."""
    whole, sizes = made(pipeline, guidance_scale=3.0)
    assert sizes == [4, 4, 4, 4]
    part, sizes = made(pipeline, guidance_scale=3.0, guidance_interval=(0.4, 0.8))
    assert sizes == [2, 4, 4, 2] and not torch.allclose(part, whole)
    none, sizes = made(pipeline, guidance_scale=3.0, guidance_interval=(0.6, 0.7))
    assert sizes == [2, 2, 2, 2]
    assert torch.equal(none, made(pipeline, guidance_scale=1.0)[0])


def test_rescaling_changes_the_picture(pipeline):
    plain, rescaled_too = (made(pipeline, guidance_scale=5.0, guidance_rescale=share)[0] for share in (0.0, 0.7))
    assert not torch.allclose(plain, rescaled_too)


def test_a_recipe_s_interval_is_the_default(pipeline, tmp_path):
    pipeline.register_to_config(default_interval=(0.4, 0.8))
    try:
        pipeline.save(tmp_path / "p")
        again = Pipeline.from_pretrained(tmp_path / "p")
        again.set_progress_bar_config(disable=True)
        assert made(again, guidance_scale=3.0)[1] == [2, 4, 4, 2]
        assert made(again, guidance_scale=3.0, guidance_interval=(0.0, 1.0))[1] == [4, 4, 4, 4]
    finally:
        pipeline.register_to_config(default_interval=(0.0, 1.0))


@pytest.mark.parametrize("given", [0.5, (0.1,), (0.1, 0.2, 0.3), "01"])
def test_an_interval_is_two_levels(pipeline, given):
    with pytest.raises(ValueError, match="guidance_interval"):
        pipeline(PROMPTS, guidance_interval=given)
