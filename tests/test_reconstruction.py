"""Reconstruction through the autoencoder alone, against the same by hand."""

import math

import numpy as np
import pytest
import torch

from eval.reconstruction import reconstruct, reconstruction_psnr
from sd_mini import shapes
from sd_mini.stages import load_stage


@pytest.fixture(scope="module")
def autoencoder(tiny_run):
    return load_stage(tiny_run / "autoencoder" / "final", "autoencoder").parts["autoencoder"]


@pytest.fixture(scope="module")
def drawn():
    return shapes.draw_batch(shapes.sample_scenes(5, "test", seed=3), 32)


def test_reconstruct_is_encode_and_decode(autoencoder, drawn):
    found = reconstruct(autoencoder, drawn, batch=2)  # the last batch is a part of one
    with torch.no_grad():
        pixels = torch.from_numpy(drawn).float() / 127.5 - 1
        expected = (autoencoder.decode(autoencoder.encode(pixels)).clamp(-1, 1) + 1) * 127.5
    assert found.shape == drawn.shape and found.dtype == np.uint8
    # half a step of 8 bits, and what another batch size changes in the last bits
    assert np.abs(found - expected.numpy()).max() <= 0.5 + 1e-2
    assert np.abs(found.astype(int) - drawn).mean() < 25  # a picture, not noise: the fixture's autoencoder is trained


def test_psnr_is_the_mean_of_each_pictures_own():
    black = np.zeros((2, 3, 4, 4), dtype=np.uint8)
    other = black.copy()
    other[0] += 255
    other[1] += 51
    # 10 log10(255^2 / 255^2) = 0 dB, 10 log10(255^2 / 51^2) = 20 log10(5) dB
    assert reconstruction_psnr(black, other) == {"psnr": pytest.approx(20 * math.log10(5) / 2), "n": 2}
