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


def test_the_nearest_of_the_draws_is_taken():
    generator = torch.Generator().manual_seed(0)
    latents, draws = torch.randn(4, 2, 3, 3, generator=generator), torch.randn(4, 5, 2, 3, 3, generator=generator)
    found = diffusion.nearest_noise(latents, draws)
    for latent, several, one in zip(latents, draws, found, strict=True):
        assert torch.equal(one, min(several, key=lambda noise: (noise - latent).norm()))
    # Of d = 256 values, 2 n.x - |n|^2 spreads by sqrt(4 d + 2 d), and the largest of four draws lies 1.03 of that above
    # the mean: the correlation is 1.03 * 2 / sqrt(6 d), and the variance as much below 1
    latents, draws = (
        torch.randn(800, 1, 16, 16, generator=generator),
        torch.randn(800, 4, 1, 16, 16, generator=generator),
    )
    chosen, expected = diffusion.nearest_noise(latents, draws), 1.0294 * 2 / math.sqrt(6 * 256)
    assert (chosen * latents).mean().item() == pytest.approx(expected, abs=0.01)
    assert chosen.mean().item() == pytest.approx(0, abs=0.01)
    assert chosen.var().item() == pytest.approx(1 - expected, abs=0.015)


def test_directions():
    target = torch.tensor([[[[3.0, 4.0]]]]).expand(3, 1, 1, 2)
    velocity = torch.tensor([[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0]]).view(3, 1, 1, 2)
    assert diffusion.direction_losses(velocity, target).tolist() == pytest.approx([0, 2, 1], abs=1e-6)
