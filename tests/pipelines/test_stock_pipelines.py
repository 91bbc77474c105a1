"""The same picture as diffusers' own pipelines make of the same weights, embeddings, noise and scheduler."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from tests.support.networks import UNET
from tests.support.stock import DIM, LENGTH, SCHEDULE, autoencoder_kl, joined


@pytest.fixture(scope="module")
def vae():
    return autoencoder_kl()


@pytest.fixture(scope="module")
def given():
    """Embeddings of two prompts and of what to lead away from, all tokens read, and noise."""
    draws = torch.Generator().manual_seed(1)
    prompt, negative = torch.randn(2, 2, LENGTH, DIM, generator=draws)
    return prompt, negative, torch.ones(2, LENGTH, dtype=torch.bool), torch.randn(2, 4, 16, 16, generator=draws)


def ours(talking_pipeline, network, vae, scheduler, kind):
    return joined(talking_pipeline, network, vae, scheduler, {"kind": kind, "schedule": "scaled_linear"})


def made_by(pipeline, given, **more):
    prompt, negative, mask, noise = given
    embeds = {"prompt_embeds": prompt, "prompt_mask": mask}
    embeds |= {"negative_prompt_embeds": negative, "negative_prompt_mask": mask}
    return pipeline(**embeds, latents=noise.clone(), output_type="pt", **more).images


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_stable_diffusion(talking_pipeline, vae, given, scheduler, kind, rescale):
    torch.manual_seed(2)
    unet = UNet2DConditionModel(sample_size=16, cross_attention_dim=DIM, **UNET).eval()
    fields = {**SCHEDULE, "prediction_type": kind}
    fields |= {"clip_sample": False, "steps_offset": 1} if scheduler is DDIMScheduler else {}
    stock = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        scheduler=scheduler(**fields),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    prompt, negative, _, noise = given
    sampling = {"num_inference_steps": 5, "guidance_scale": 4.0, "guidance_rescale": rescale}
    embeds = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    expected = stock(**embeds, latents=noise.clone(), output_type="pt", **sampling).images
    made = made_by(ours(talking_pipeline, unet, vae, scheduler(**fields), kind), given, **sampling)
    assert expected.std() > 0.01
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def test_stable_diffusion_by_ddpm_draws_the_same_noise(talking_pipeline, vae, given):
    torch.manual_seed(2)
    unet = UNet2DConditionModel(sample_size=16, cross_attention_dim=DIM, **UNET).eval()
    fields = {**SCHEDULE, "clip_sample": False, "steps_offset": 1}
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    stock = StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=DDPMScheduler(**fields), **parts, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    prompt, negative, _, noise = given

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    embeds = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "latents": noise.clone()}
    sampling = {"num_inference_steps": 5, "guidance_scale": 4.0}
    expected = stock(**embeds, generator=generators(), output_type="pt", **sampling).images
    pipeline = ours(talking_pipeline, unet, vae, DDPMScheduler(**fields), "epsilon")
    torch.testing.assert_close(
        made_by(pipeline, given, generator=generators(), **sampling), expected, rtol=0, atol=1e-5
    )


def test_pixart(talking_pipeline, vae, given):
    torch.manual_seed(3)
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=DIM,
        norm_num_groups=4,
        use_additional_conditions=False,
    ).eval()
    stock = PixArtAlphaPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
        text_encoder=None,
        tokenizer=None,
    )
    stock.set_progress_bar_config(disable=True)
    prompt, negative, mask, noise = given
    mask = mask.clone()
    mask[1, 9:] = False  # a shorter prompt
    sampling = {"num_inference_steps": 5, "guidance_scale": 4.0}
    expected = stock(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=prompt,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=mask,
        latents=noise.clone(),
        height=32,
        width=32,
        use_resolution_binning=False,
        output_type="pt",
        **sampling,
    ).images
    pipeline = ours(talking_pipeline, transformer, vae, DPMSolverMultistepScheduler(**SCHEDULE), "epsilon")
    made = made_by(pipeline, (prompt, negative, mask, noise), **sampling)
    assert expected.std() > 0.01
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
