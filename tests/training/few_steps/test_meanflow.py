import math

import pytest
import torch

from sd_mini.diffusion.objective import predict
from sd_mini.sampling.loop import Guidance
from tests.support.networks import DIM, inputs, tiny
from training.few_steps.config import MeanFlowConfig
from training.few_steps.meanflow import ERROR_FLOOR, MeanFlowObjective, guided_velocity, solver_target, two_times
from training.few_steps.reflow import pair_noise

NULL = torch.zeros(1, 6, DIM), torch.tensor([[True] + [False] * 5])


def uniforms(count):
    return torch.rand(3, count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target", ["identity", "solver"])
def test_half_is_velocity_and_the_rest_ends_where_it_may(target):
    config = MeanFlowConfig(flow_share=0.5, grid_share=1.0, target=target)
    t, r = two_times(*uniforms(20_000), config, (1, 2, 4))
    assert (t >= r).all() and r.min() >= 0 and t.max() <= 1
    assert (t == r).float().mean().item() == pytest.approx(0.5, abs=0.02)
    t, r = t[t > r], r[t > r]
    assert {round(value, 6) for value in r.tolist()} == {0, 0.25, 0.5, 0.75}
    whole = torch.isin(t - r, torch.tensor([0.25, 0.5, 1.0])).float().mean().item()
    assert whole == pytest.approx(1.0 if target == "solver" else 0.25, abs=0.02)
    # each number of steps as often, and of each of its steps as much: the whole way is a third of those from 0 and less
    if target == "solver":
        assert ((t - r) == 1).float().mean().item() == pytest.approx(1 / 3, abs=0.02)


def test_two_draws_are_ordered_logit_normals():
    config = MeanFlowConfig(flow_share=0.0, grid_share=0.0, start_mean=0.4, end_mean=-1.2)
    t, r = two_times(*uniforms(50_000), config, (1, 2, 4))
    assert (t > r).all()
    # the sum keeps what the order exchanges: sigmoid(N(0.4, 1)) and sigmoid(N(-1.2, 1)) have these means
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    expected = torch.sigmoid(normal + 0.4).mean() + torch.sigmoid(normal - 1.2).mean()
    assert (t + r).mean().item() == pytest.approx(expected.item(), abs=0.01)


def test_velocity_is_guided_within_the_interval_alone():
    network, (latents, _, tokens, mask) = tiny(), inputs()
    timesteps, guidance = torch.tensor([0.2, 0.8]), Guidance(3.0, 0.0, 0.5, 0.9)
    with torch.no_grad():
        found = guided_velocity(network, guidance, latents, timesteps, (tokens, mask), NULL)
        conditional = predict(network, latents, timesteps * 1000, tokens, mask)
        without = predict(network, latents, timesteps * 1000, NULL[0].expand(2, -1, -1), NULL[1].expand(2, -1))
    torch.testing.assert_close(found[0], conditional[0])
    torch.testing.assert_close(found[1], without[1] + 3 * (conditional[1] - without[1]))


def test_the_solver_s_target_is_the_way_of_its_own_steps():
    """v = x cos t has the flow x_r = x_t exp(sin r - sin t), and Euler's steps come near it."""

    def velocity(x, t, rows):
        assert len(x) == len(t) == len(rows)
        return x * torch.cos(t).view(-1, 1, 1, 1)

    x = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, r = torch.tensor([1.0, 0.75, 0.5], dtype=torch.float64), torch.tensor([0.0, 0.5, 0.375], dtype=torch.float64)
    first = velocity(x, t, torch.arange(3))
    eighths = solver_target(velocity, x, t, r, first, steps=8)
    for row, count in enumerate((8, 2, 1)):
        by_hand = x[row].clone()
        for i in range(count):
            by_hand -= by_hand * math.cos(float(t[row]) - i / 8) / 8
        torch.testing.assert_close(x[row] - (t - r)[row] * eighths[row], by_hand)
    exact = x * (1 - torch.exp(torch.sin(r) - torch.sin(t)) ** 1).view(-1, 1, 1, 1) / (t - r).view(-1, 1, 1, 1)
    torch.testing.assert_close(solver_target(velocity, x, t, r, first, steps=20_000), exact, rtol=0, atol=1e-4)


def test_an_unguided_start_has_no_error_in_its_velocity():
    network, (latents, _, tokens, mask) = tiny(), inputs()
    times = torch.tensor([0.2, 0.8])
    objective = MeanFlowObjective(network, tiny(), NULL, Guidance(1.0), MeanFlowConfig(), 1, 4)
    losses, logged = objective(latents, torch.randn_like(latents), times, times, tokens, mask)
    assert losses.tolist() == pytest.approx([math.log(ERROR_FLOOR)] * 2)
    assert logged["flow"].item() == 0
    assert not any(name.startswith("others") for name in objective.state_dict())


@pytest.mark.parametrize("target", ["identity", "solver"])
def test_gradients_reach_the_network_and_no_one_else(target):
    teacher, (latents, _, tokens, mask) = tiny().requires_grad_(False), inputs()
    objective = MeanFlowObjective(tiny(), teacher, NULL, Guidance(3.0), MeanFlowConfig(target=target), 1, 4)
    losses, logged = objective(
        latents, torch.randn_like(latents), torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.5]), tokens, mask
    )
    losses.mean().backward()
    assert all(p.grad is not None for p in objective.parameters()) and logged["average"] > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_a_pair_s_noise_is_its_own():
    whole = pair_noise(0, range(4), (2, 3, 3))
    assert torch.equal(pair_noise(0, [2, 0], (2, 3, 3)), whole[[2, 0]])
    assert not torch.equal(pair_noise(1, range(4), (2, 3, 3)), whole)
