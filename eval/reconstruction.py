"""What is left of a picture after the autoencoder alone: the ceiling for whatever is made through its decoder."""

from __future__ import annotations

import numpy as np
import torch

from sd_mini import images
from sd_mini.autoencoder import Autoencoder


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, pictures: np.ndarray, batch: int) -> np.ndarray:
    """(N, 3, H, W) uint8 => their reconstructions, the same shape and range, `batch` at a time."""
    parts = []
    for start in range(0, len(pictures), batch):
        pixels = images.to_pixels(pictures[start : start + batch]).to(autoencoder.device, autoencoder.dtype)
        parts.append(images.to_uint8(autoencoder.decode(autoencoder.encode(pixels))).cpu().numpy())
    return np.concatenate(parts)


def reconstruction_psnr(pictures: np.ndarray, reconstructed: np.ndarray) -> dict[str, float]:
    """Two (N, 3, H, W) uint8 => {"psnr": dB, the mean of each picture's own, "n": N}."""
    return {"psnr": float(images.psnr(pictures, reconstructed).mean()), "n": len(pictures)}
