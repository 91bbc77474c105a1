"""The same picture as diffusers' own pipelines make of the same weights, embeddings, noise and scheduler."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.stages.start import wrapped
from tests.support.networks import UNET

DIM, LENGTH, SCALING = 32, 24, 0.18215
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    levels = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(latent_channels=4, scaling_factor=SCALING, sample_size=32, **levels, **blocks).eval()


@pytest.fixture(scope="module")
def given():
    """Embeddings of two prompts and of what to lead away from, all tokens read, and noise."""
    draws = torch.Generator().manual_seed(1)
    prompt, negative = torch.randn(2, 2, LENGTH, DIM, generator=draws)
    return prompt, negative, torch.ones(2, LENGTH, dtype=torch.bool), torch.randn(2, 4, 16, 16, generator=draws)


def ours(talking_pipeline, network, vae, scheduler, kind):
    autoencoder = wrapped(vae)
    # a stock pipeline divides latents by one factor, and has no mean
    autoencoder.set_statistics(torch.zeros(4), torch.full((4,), 1 / SCALING))
    parts = {"noise_predictor": network, "autoencoder": autoencoder.eval(), "scheduler": scheduler}
    objective = {"kind": kind, "schedule": "scaled_linear"}
    joined = Pipeline(**talking_pipeline.components | parts, resolution=32, objective=objective)
    joined.set_progress_bar_config(disable=True)
    return joined


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
    joined = ours(talking_pipeline, unet, vae, DDPMScheduler(**fields), "epsilon")
    torch.testing.assert_close(made_by(joined, given, generator=generators(), **sampling), expected, rtol=0, atol=1e-5)


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
    joined = ours(talking_pipeline, transformer, vae, DPMSolverMultistepScheduler(**SCHEDULE), "epsilon")
    made = made_by(joined, (prompt, negative, mask, noise), **sampling)
    assert expected.std() > 0.01
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
