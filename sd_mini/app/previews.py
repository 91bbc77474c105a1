"""Small pictures of latents while they are denoised: by the run's own decoder where that is fast, else by a linear map.

A preview is computed from a copy of the latents and draws nothing at random that a picture depends on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from sd_mini import images

if TYPE_CHECKING:
    from sd_mini.pipelines.text_to_image import Pipeline

FAST = 0.03  # seconds; a decoder that takes longer would slow the sampling down by what it shows
_SAMPLES = 32  # decoded to fit the linear map: with 8 x 8 latent cells each, two thousand equations
_SIDE = 16  # latent cells a side of a sample, at most


class Previews:
    """Latents (1, C, h, w) => a picture of them, by the faster of two ways, chosen by measuring one decoding."""

    def __init__(self, pipeline: Pipeline):
        self.autoencoder = pipeline.autoencoder
        shape = pipeline.latent_shape(pipeline.config.resolution, pipeline.config.resolution)
        self.cells = shape[1] * shape[2]  # up to which a decoding has been measured
        self._map: Tensor | None = None
        self.seconds = self._measured(shape)
        self.decodes = self.seconds <= FAST

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Image.Image:
        """The first of the latents as RGB: as large as the picture, or a pixel for each latent cell."""
        latents = latents[:1].to(self.autoencoder.device, self.autoencoder.dtype)
        if self.decodes and latents[0, 0].numel() <= self.cells:
            pixels = self.autoencoder.decode(latents)
        else:
            if self._map is None:
                self._map = fit_linear(self._samples(latents), self._decoded)
            pixels = apply_linear(self._map, latents)
        # NaN is shown as grey: that the model has diverged is said when the picture itself is decoded
        return images.to_pil(images.to_uint8(pixels.float().nan_to_num(0.0)))[0]

    def _measured(self, shape: tuple[int, int, int]) -> float:
        """Seconds that the decoder takes for one picture of the training's size, the best of three after a first."""
        latents = torch.zeros((1, *shape), device=self.autoencoder.device, dtype=self.autoencoder.dtype)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            self._decoded(latents).cpu()  # which waits for a GPU
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    def _samples(self, latents: Tensor) -> Tensor:
        """Random latents, standard normal, of one value in blocks of 4 x 4 cells, as pictures are smooth."""
        side = min(_SIDE, *latents.shape[2:])
        generator = torch.Generator().manual_seed(0)  # its own: nobody else's draws may move
        shape = (_SAMPLES, latents.shape[1], -(-side // 4), -(-side // 4))
        blocks = torch.randn(shape, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return blocks[..., :side, :side].to(latents)

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        return torch.cat([self.autoencoder.decode(one[None]) for one in latents])


def fit_linear(latents: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """(C + 1, 3): RGB in [-1, 1] of a latent cell by its channels and 1, by least squares on decoded latents."""
    pixels = decode(latents).float()
    cells = torch.nn.functional.adaptive_avg_pool2d(pixels, (latents.shape[2], latents.shape[3]))  # (N, 3, h, w)
    return torch.linalg.lstsq(_rows(latents), cells.movedim(1, -1).reshape(-1, 3)).solution


def apply_linear(weights: Tensor, latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) => pixels (N, 3, h, w) in [-1, 1]."""
    count, _, height, width = latents.shape
    return (_rows(latents) @ weights).view(count, height, width, 3).movedim(-1, 1).clamp(-1, 1)


def _rows(latents: Tensor) -> Tensor:
    """(N, C, h, w) => (N h w, C + 1), the last column 1."""
    channels = latents.float().movedim(1, -1).flatten(0, 2)
    return torch.cat([channels, torch.ones_like(channels[:, :1])], 1)
