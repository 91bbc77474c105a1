"""diffusers' own pipelines and ours around the same tiny weights, which are random."""

import torch
from diffusers import AutoencoderKL

from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.stages.start import wrapped

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DIM, LENGTH, SCALING = 32, 24, 0.18215
SAFETY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def autoencoder_kl(channels=4, scaling=SCALING, **more):
    torch.manual_seed(0)
    levels = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        latent_channels=channels, scaling_factor=scaling, sample_size=32, **levels, **blocks, **more
    ).eval()


def joined(talking_pipeline, network, vae, scheduler, objective, cls=Pipeline):
    """A pipeline of ours. A stock pipeline subtracts one number from all raw latents and multiplies them by another,
    where ours have a mean and a standard deviation a channel: shift_factor and 1 / scaling_factor."""
    autoencoder, config = wrapped(vae), vae.config
    channels = config.latent_channels
    autoencoder.set_statistics(
        torch.full((channels,), config.shift_factor or 0.0), torch.full((channels,), 1 / config.scaling_factor)
    )
    parts = {"noise_predictor": network, "autoencoder": autoencoder.eval(), "scheduler": scheduler}
    made = cls(**talking_pipeline.components | parts, resolution=32, objective=objective)
    made.set_progress_bar_config(disable=True)
    return made
