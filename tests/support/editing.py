"""Small pictures and masks to start from."""

import numpy as np
import torch
from PIL import Image

from sd_mini import images

# the right half is white
HALF = Image.fromarray(np.repeat([[0, 255]], 16, 1).repeat(32, 0).astype(np.uint8))


def picture(seed=0, size=(32, 32)):
    """A smooth one, RGB."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def latents_of(pipeline, *pictures):
    pixels = images.to_pixels(np.stack([images.decode(one) for one in pictures]))
    with torch.no_grad():
        return pipeline.autoencoder.encode(pixels)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]
