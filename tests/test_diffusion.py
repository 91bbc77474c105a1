import math

import pytest
import torch

from sd_mini import diffusion


def test_path_and_velocity_agree():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    noised = diffusion.flow_noise(latents, noise, t)
    assert torch.equal(noised[0], latents[0]) and torch.equal(noised[-1], noise[-1])
    # the target is the derivative of the path, by finite differences
    step = 1e-6
    slope = (diffusion.flow_noise(latents, noise, t + step) - noised) / step
    torch.testing.assert_close(slope, diffusion.flow_target(latents, noise), rtol=0, atol=1e-8)


def test_timesteps_follow_the_logit_normal_density():
    generator = torch.Generator().manual_seed(0)
    normal, uniform = torch.randn(200_000, generator=generator), torch.rand(200_000, generator=generator)
    t = diffusion.sample_timesteps(normal, uniform, uniform_share=0.0)
    # P(t < sigmoid(z)) is the normal distribution function at z
    for z in (-1.0, 0.0, 0.7):
        share = (t < 1 / (1 + math.exp(-z))).float().mean().item()
        assert share == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))), abs=0.005)
    assert torch.equal(diffusion.sample_timesteps(normal, uniform, uniform_share=1.0), uniform)


def test_a_tenth_uniform_reaches_both_ends():
    generator = torch.Generator().manual_seed(1)
    normal, uniform = torch.zeros(100_000), torch.rand(100_000, generator=generator)
    t = diffusion.sample_timesteps(normal, uniform, uniform_share=0.1)
    assert (t != 0.5).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert t.min() < 0.01 and t.max() > 0.99
    assert t[t != 0.5].mean().item() == pytest.approx(0.5, abs=0.02)


def test_shift_is_sd3s():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert diffusion.sample_timesteps(t, t, 1.0, shift=3.0).tolist() == [0.0, 0.5, 1.0]
