import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from sd_mini import diffusion
from sd_mini.diffusion.objective import Process, TimeConfig


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
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    t = diffusion.sample_timesteps(uniform, "logit_normal", uniform_share=0.0)
    # P(t < sigmoid(z)) is the normal distribution function at z
    for z in (-1.0, 0.0, 0.7):
        share = (t < 1 / (1 + math.exp(-z))).float().mean().item()
        assert share == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))), abs=0.005)
    assert torch.equal(diffusion.sample_timesteps(uniform, "uniform"), uniform)


def test_a_tenth_uniform_reaches_both_ends():
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    t = diffusion.sample_timesteps(uniform, "logit_normal", uniform_share=0.1)
    plain = uniform < 0.1
    torch.testing.assert_close(t[plain], uniform[plain] / 0.1)
    assert t[plain].min() < 0.01 and t[plain].max() > 0.99


def test_shift_is_sd3s():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert diffusion.sample_timesteps(t, "uniform", shift=3.0).tolist() == [0.0, 0.5, 1.0]


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


def test_the_mode_density_is_diffusers():
    torch.manual_seed(0)
    expected = compute_density_for_timestep_sampling("mode", 100_000, mode_scale=1.29)
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    ours = diffusion.sample_timesteps(uniform, "mode", uniform_share=0.0)
    quantiles = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(torch.quantile(ours, quantiles), torch.quantile(expected, quantiles), rtol=0, atol=0.01)


def test_the_schedules_are_the_papers():
    """The ends of Stable Diffusion's schedule and of DDPM's, and iDDPM's cosine in closed form."""
    scaled = diffusion.alphas_cumprod("scaled_linear")
    assert (scaled[0].item(), scaled[-1].item()) == pytest.approx((0.99915, 0.0046601), rel=1e-4)
    linear = diffusion.alphas_cumprod("linear")
    assert (linear[0].item(), linear[-1].item()) == pytest.approx((0.9999, 4.0358e-5), rel=1e-3)
    at = torch.arange(1, 1001, dtype=torch.float64)[:900]  # further on the betas are cut at 0.999

    def cosine(t):
        return torch.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = cosine(at) / cosine(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(diffusion.alphas_cumprod("cosine")[:900].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero", [False, True])
def test_the_schedules_are_diffusers(schedule, zero):
    scheduler = DDPMScheduler(**diffusion.BETAS[schedule], rescale_betas_zero_snr=zero)
    ours = diffusion.alphas_cumprod(schedule, zero)
    torch.testing.assert_close(ours, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_with_zero_snr_nothing_is_left_at_the_end():
    plain, rescaled = (diffusion.alphas_cumprod("scaled_linear", zero) for zero in (False, True))
    assert rescaled[-1] == 0 and rescaled[0].item() == pytest.approx(plain[0].item(), rel=1e-6)
    # algorithm 1: sqrt(alpha) shifted and scaled, linearly
    root, expected = rescaled.double().sqrt(), plain.double().sqrt()
    slope, offset = (expected[0] / (expected[0] - expected[-1])), expected[-1]
    torch.testing.assert_close(root, (expected - offset) * slope, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["flow", "flow_x", "epsilon", "v_prediction", "sample"])
def test_a_right_answer_has_no_error(kind):
    """What a network that knows the picture would say, in each kind's units, meets its target."""
    process = Process(kind=kind, schedule=None if kind.startswith("flow") else "cosine")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 3, 4, 4, generator=generator)
    t = process.times(torch.tensor([0.1, 0.4, 0.6, 0.9]))
    noised = process.noised(latents, noise, t)
    said = {"flow": noise - latents, "flow_x": latents, "epsilon": noise, "sample": latents}.get(kind)
    if said is None:  # v: the direction in which the angle grows, Salimans & Ho 2022, app. D
        alphas = diffusion.alphas_cumprod("cosine")[t].view(-1, 1, 1, 1)
        said = (noised * alphas.sqrt() - latents) / (1 - alphas).sqrt()
    answer, target = process.answer(said, noised, t), process.target(latents, noise, noised, t)
    torch.testing.assert_close(answer, target, rtol=1e-4, atol=1e-4)
    if kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        torch.testing.assert_close(noised, scheduler.add_noise(latents, noise, t))
    if kind == "v_prediction":
        torch.testing.assert_close(target, scheduler.get_velocity(latents, noise, t))


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction", "sample"])
def test_min_snr_is_one_weight_of_the_picture_s_error(kind):
    """Whatever is predicted, weight times its squared error is min(SNR, 5) times that of the sample it implies."""
    config = TimeConfig(kind=kind, schedule=None if kind == "flow" else "scaled_linear", weighting="min_snr")
    t = config.times(torch.tensor([0.03, 0.2, 0.5, 0.9]))
    latents, noise = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noised = config.noised(latents, noise, t)
    wrong = latents + 0.1  # a clean sample that is off by 0.1 everywhere, and what a network would have said then
    if kind == "flow":
        sides = t.view(-1, 1, 1, 1).double()
        said, snr = (noised - wrong) / sides, ((1 - t) / t) ** 2
    else:
        alphas = diffusion.alphas_cumprod("scaled_linear")[t].view(-1, 1, 1, 1).double()
        eps = (noised - alphas.sqrt() * wrong) / (1 - alphas).sqrt()
        said = {"epsilon": eps, "sample": wrong, "v_prediction": alphas.sqrt() * eps - (1 - alphas).sqrt() * wrong}[
            kind
        ]
        snr = compute_snr(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), t)
    errors = (said - config.target(latents, noise, noised, t)).square().mean((1, 2, 3))
    expected = snr.clamp(max=5) * 0.01
    torch.testing.assert_close((config.weights(t) * errors).float(), expected.float(), rtol=1e-3, atol=1e-6)


def test_cosmap_is_a_density():
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    weights = diffusion.cosmap_weights(t)
    assert torch.trapezoid(weights, t).item() == pytest.approx(1, abs=1e-6)
    assert weights[0].item() == pytest.approx(2 / math.pi) and weights[50_000].item() == pytest.approx(4 / math.pi)
