"""Invertible, with the determinant that autograd has, a density that integrates to 1, and guided as the product."""

import math

import pytest
import torch

from sd_mini.draws import normals
from sd_mini.errors import UserError
from sd_mini.generators.normalizing_flow import NormalizingFlow, guided_normals

SHAPE, DIM = (2, 4, 4), 6


def made(dtype=torch.float32, shape=SHAPE, **fields):
    torch.manual_seed(0)
    settings = {"patch_size": 2, "width": 16, "depths": (1, 1, 2), "heads": 2, "mlp_width": 24} | fields
    network = NormalizingFlow(shape, DIM, **settings).to(dtype).eval().requires_grad_(False)
    for parameter in network.parameters():  # far from the identity, which it begins as
        parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def prompts(batch, dtype=torch.float32, seed=1):
    draws = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor([[3], [5], [1]]).repeat(batch, 1)[:batch]
    return torch.randn(batch, 5, DIM, dtype=dtype, generator=draws), mask


def seeded(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def test_its_inverse_with_the_cache_gives_the_latents_back():
    network, prompt, latents = made(), prompts(3), torch.randn(3, *SHAPE)
    noise, log_determinant = network(latents, *prompt)
    assert (noise - network.to_tokens(latents)).abs().mean() > 0.1 and log_determinant.abs().min() > 0.1
    assert (network.inverse(noise, prompt) - latents).abs().max() < 1e-4
    assert torch.equal(network.to_latents(network.to_tokens(latents)), latents)


def test_its_determinant_is_autograds():
    network, prompt = made(torch.float64), prompts(1, torch.float64)
    latents = torch.randn(1, *SHAPE, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, *prompt)[0].flatten(), latents)
    expected = torch.linalg.slogdet(jacobian.view(32, 32)).logabsdet
    assert network(latents, *prompt)[1].item() == pytest.approx(expected.item(), abs=1e-4)  # Llama's norms: float32


def test_its_density_integrates_to_one():
    """Two values, by the midpoint rule."""
    network = made(torch.float64, (1, 1, 2), patch_size=1)
    at = (torch.arange(300, dtype=torch.float64) + 0.5) / 300 * 40 - 20
    latents = torch.cartesian_prod(at, at).view(-1, 1, 1, 2)
    tokens, mask = prompts(1, torch.float64)
    logs = network.log_likelihoods(latents, tokens.expand(len(latents), -1, -1), mask.expand(len(latents), -1))
    assert (logs.exp().sum() * (40 / 300) ** 2).item() == pytest.approx(1, abs=1e-3)


def test_a_normal_draw_becomes_latents_each_picture_by_its_own():
    network, prompt = made(), prompts(3)
    latents = network.draw(prompt, None, seeded(3))
    noise, _ = network(latents, *prompt)
    assert (noise - normals((4, 8), seeded(3))).abs().max() < 1e-4
    alone = network.draw((prompt[0][2:], prompt[1][2:]), None, seeded(1, first=2))
    torch.testing.assert_close(latents[2:], alone, rtol=1e-4, atol=1e-4)
    network.temperature = 0.5
    halved, _ = network(network.draw(prompt, None, seeded(3)), *prompt)
    assert (halved - 0.5 * noise).abs().max() < 1e-4


def test_its_noise_is_taken_away_as_bayes_does():
    """Of what begins as the identity, so that x is N(0, I) with its noise and without N(0, 1 - s^2): the mean of
    that, given x, is (1 - s^2) x."""
    torch.manual_seed(0)
    network = NormalizingFlow(SHAPE, DIM, width=16, depths=(1, 1), heads=2, mlp_width=24, noise_std=0.5)
    with torch.inference_mode():
        latents = network.draw(prompts(3), None, seeded(3))
    noise = network.to_latents(normals((4, 8), seeded(3)))
    torch.testing.assert_close(latents, 0.75 * noise)


def test_only_the_prompt_of_what_is_present_and_the_guidance_change_it():
    network, (tokens, mask), null = made(), prompts(2), prompts(2, seed=2)
    plain = network.draw((tokens, mask), None, seeded(2))
    hidden = torch.where(mask[..., None], tokens, tokens + 5)
    assert torch.equal(network.draw((hidden, mask), None, seeded(2)), plain)
    assert not torch.allclose(network.draw((tokens + 1, mask), None, seeded(2)), plain, atol=0.1)
    # away from its own prompt guidance leads nowhere; at 0 it is the null condition's picture
    same = network.draw((tokens, mask), (tokens, mask), seeded(2), guidance=3.0)
    assert torch.allclose(same, plain, atol=1e-4)
    guided = network.draw((tokens, mask), null, seeded(2), guidance=3.0)
    assert not torch.allclose(guided, plain, atol=0.1)


def test_guided_normals_are_the_normalised_product():
    """p^g q^(1 - g) on a grid, of which mean and variance are measured."""
    means, null_means, scales, null_scales, guidance = 0.5, -0.25, 0.5, 0.8, 2.5
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    logs = guidance * torch.distributions.Normal(means, scales).log_prob(x)
    logs = logs + (1 - guidance) * torch.distributions.Normal(null_means, null_scales).log_prob(x)
    weights = torch.softmax(logs, 0)
    mean = (weights * x).sum()
    variance = (weights * (x - mean).square()).sum()
    arguments = (torch.tensor(value, dtype=torch.float64) for value in (means, null_means))
    logs_of = (torch.tensor(math.log(value), dtype=torch.float64) for value in (scales, null_scales))
    found_mean, found_log = guided_normals(*arguments, *logs_of, guidance)
    assert found_mean.item() == pytest.approx(mean.item(), abs=1e-6)
    assert found_log.exp().item() == pytest.approx(variance.sqrt().item(), abs=1e-6)
    # a null condition that is surer than the prompt: finite, and as if equally sure
    wild = guided_normals(*(torch.tensor(v) for v in (0.5, -0.25, 0.0, -1.0)), 2.5)
    assert [value.item() for value in wild] == pytest.approx([0.5 + 1.5 * 0.75, 0.0])


def test_saved_it_is_the_same_and_bad_fields_are_refused(tmp_path):
    network, prompt = made(), prompts(2)
    network.save_pretrained(tmp_path)
    loaded = NormalizingFlow.from_pretrained(tmp_path)
    assert torch.equal(loaded.draw(prompt, None, seeded(2)), network.draw(prompt, None, seeded(2)))
    loaded.temperature = 0.5  # what is assigned is saved
    loaded.save_pretrained(tmp_path / "again")
    assert NormalizingFlow.from_pretrained(tmp_path / "again").temperature == 0.5
    loaded.temperature = -1
    with pytest.raises(UserError, match="temperature -1: expected at least 0"):
        loaded.draw(prompt, None, seeded(2))
    with pytest.raises(UserError, match=r"network.patch_size 3: expected a divisor of the latents' 4 x 4"):
        NormalizingFlow(SHAPE, DIM, patch_size=3)
    with pytest.raises(UserError, match=r"network.depths \[1, 0\]"):
        NormalizingFlow(SHAPE, DIM, depths=(1, 0))
