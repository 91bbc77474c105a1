"""The same pictures as diffusers' own image-to-image and inpainting pipelines make of the same weights.

What differs by design, and how the two are made equal: a stock pipeline draws its latents from the distribution that
the encoder gives, where ours take its mean, so the encoder here leaves a standard deviation of 3e-7, and a generator of
ours first skips the numbers of that draw.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

from sd_mini import ImageToImagePipeline, InpaintingPipeline
from tests.support.networks import UNET
from tests.support.stock import DIM, LENGTH, SAFETY, SCHEDULE, autoencoder_kl, joined

SIDE, STEPS = 32, 4
SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
]
STRENGTHS = [0.4, 0.7, 1.0]  # of 4 steps 1.6 and 2.8, which the two families round apart


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generators(skipped=None):
    """One a picture; ours skip the draw of the latents."""
    made = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    for generator in made if skipped is not None else []:
        torch.randn(skipped, generator=generator)
    return made


def narrow(vae):
    """The encoder's standard deviations => 3e-7; by the weights of its log variances."""
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = -30
    return vae


def pictures():
    noise = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    return [Image.fromarray(cells).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for cells in noise]


def masks():
    """A disc for the first picture; for the second grey levels that the threshold parts."""
    y, x = np.mgrid[:SIDE, :SIDE]
    disc = 255 * ((x - 12) ** 2 + (y - 18) ** 2 < 80)
    return [Image.fromarray(values.astype(np.uint8)) for values in (disc, 8 * x)]


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(2)
    return UNet2DConditionModel(sample_size=SIDE // 2, cross_attention_dim=DIM, **UNET).eval()


@pytest.fixture(scope="module")
def vae():
    return narrow(autoencoder_kl())


def embeds():
    prompt, negative = draw(2, 2, LENGTH, DIM, seed=1)
    stock = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    return stock, stock | {"prompt_mask": mask, "negative_prompt_mask": mask}


def assert_equal(made, expected):
    assert expected.shape == made.shape and expected.std() > 0.01
    assert (expected[0] - expected[1]).abs().max() > 0.01
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def stable_diffusion(cls, unet, vae, scheduler):
    stock = cls(vae=vae, unet=unet, scheduler=scheduler, text_encoder=None, tokenizer=None, **SAFETY)
    stock.set_progress_bar_config(disable=True)
    return stock


def fields_of(scheduler, kind):
    once = {"clip_sample": False, "steps_offset": 1} if scheduler in (DDIMScheduler, DDPMScheduler) else {}
    return {**SCHEDULE, "prediction_type": kind, **once}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(
    ("kind", "scheduler"), [*(("epsilon", scheduler) for scheduler in SCHEDULERS), ("v_prediction", DDIMScheduler)]
)
def test_stable_diffusion_from_a_picture(talking_pipeline, unet, vae, kind, scheduler, strength):
    fields = fields_of(scheduler, kind)
    stock = stable_diffusion(StableDiffusionImg2ImgPipeline, unet, vae, scheduler(**fields))
    theirs, ours = embeds()
    more = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "strength": strength, "output_type": "pt"}
    expected = stock(image=pictures(), generator=generators(), **theirs, **more).images
    objective = {"kind": kind, "schedule": "scaled_linear"}
    pipeline = joined(talking_pipeline, unet, vae, scheduler(**fields), objective, ImageToImagePipeline)
    made = pipeline(image=pictures(), generator=generators((1, 4, 16, 16)), **ours, **more).images
    assert_equal(made, expected)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_stable_diffusion_repaints(talking_pipeline, unet, vae, scheduler, strength):
    fields = fields_of(scheduler, "epsilon")
    stock = stable_diffusion(StableDiffusionInpaintPipeline, unet, vae, scheduler(**fields))
    theirs, ours = embeds()
    more = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "strength": strength, "output_type": "pt"}
    given = {"image": pictures(), "mask_image": masks()}
    # what the other network of nine channels reads: by itself it would be drawn too, between our draws
    unread = {"masked_image_latents": torch.zeros(2, 4, 16, 16)}
    expected = stock(generator=generators(), **given, **unread, **theirs, **more).images
    objective = {"kind": "epsilon", "schedule": "scaled_linear"}
    pipeline = joined(talking_pipeline, unet, vae, scheduler(**fields), objective, InpaintingPipeline)
    made = pipeline(generator=generators((1, 4, 16, 16)), **given, **ours, **more).images
    assert_equal(made, expected)


class Pooled(ModelMixin, ConfigMixin):
    """Stable Diffusion 3's transformer, called as our pipelines call a network: with the same pooled text always."""

    def __init__(self, transformer, pooled):
        super().__init__()
        self.register_to_config()
        self.transformer, self.pooled = transformer, pooled

    def forward(self, latents, timestep, encoder_hidden_states, encoder_attention_mask, return_dict):
        pooled = self.pooled.expand(len(latents), -1)
        return self.transformer(latents, encoder_hidden_states, pooled, timestep, return_dict=return_dict)


@pytest.fixture(scope="module")
def flow_parts():
    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=DIM,
        pooled_projection_dim=8,
    ).eval()
    return transformer, narrow(autoencoder_kl(16, scaling=1.5, shift_factor=0.06)), draw(1, 8, seed=4)


def stable_diffusion_3(cls, parts, given, **more):
    transformer, vae, pooled = parts
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    stock = cls(transformer, FlowMatchEulerDiscreteScheduler(), vae, **dict.fromkeys(names))
    stock.set_progress_bar_config(disable=True)
    pooled = pooled.expand(2, -1)
    # evenly down to the picture, as ours steps
    sigmas = np.linspace(1, 1 / STEPS, STEPS)
    text = given | {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    return stock(height=SIDE, width=SIDE, sigmas=sigmas, generator=generators(), **text, **more).images


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("stock", [StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline])
def test_stable_diffusion_3(talking_pipeline, flow_parts, strength, stock):
    """On the linear path, the strength's steps are rounded up."""
    transformer, vae, pooled = flow_parts
    theirs, ours = embeds()
    more = {"image": pictures(), "guidance_scale": 4.0, "strength": strength, "output_type": "pt"}
    unread, cls = {}, ImageToImagePipeline
    if stock is StableDiffusion3InpaintPipeline:
        more["mask_image"], cls = masks(), InpaintingPipeline
        unread = {"masked_image_latents": torch.zeros(2, 16, 16, 16)}
        more["output_type"] = "latent"  # as the stock pipeline decodes them without its shift_factor
    expected = stable_diffusion_3(stock, flow_parts, theirs, **more, **unread)
    scheduler, network = FlowMatchEulerDiscreteScheduler(), Pooled(transformer, pooled)
    pipeline = joined(talking_pipeline, network, vae, scheduler, {"kind": "flow"}, cls)
    skipped = generators((1, 16, 16, 16))
    made = pipeline(generator=skipped, num_inference_steps=STEPS, **ours, **more).images
    assert_equal(made, expected)


def test_latents_instead_of_a_picture(talking_pipeline, unet, vae):
    stock = stable_diffusion(
        StableDiffusionImg2ImgPipeline, unet, vae, DDIMScheduler(**fields_of(DDIMScheduler, "epsilon"))
    )
    theirs, ours = embeds()
    latents = draw(2, 4, 16, 16, seed=7)
    more = {"image": latents, "num_inference_steps": STEPS, "strength": 0.6, "output_type": "pt", "guidance_scale": 4.0}
    expected = stock(generator=generators(), **theirs, **more).images
    objective = {"kind": "epsilon", "schedule": "scaled_linear"}
    pipeline = joined(talking_pipeline, unet, vae, stock.scheduler, objective, ImageToImagePipeline)
    assert_equal(pipeline(generator=generators(), **ours, **more).images, expected)
