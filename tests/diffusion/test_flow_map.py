import copy
import math

import pytest
import torch

from sd_mini import cpu, noise_predictor
from sd_mini.diffusion.flow_map import check_network, default_end_blocks, mean_flow_target, predict_average
from sd_mini.diffusion.objective import predict
from sd_mini.errors import UserError
from tests.support.networks import DIM, PIXART, SHAPE, inputs, tiny


def accelerated(network):
    made = copy.deepcopy(network)
    assert cpu.accelerate(made) is None
    return made


@pytest.mark.parametrize("prepare", [lambda network: network, accelerated], ids=["stock", "kernels"])
def test_with_equal_times_it_is_the_velocity_network_bit_for_bit(prepare):
    network = prepare(tiny(depth=3))
    latents, timesteps, tokens, mask = inputs()
    with torch.no_grad():
        velocity = predict(network, latents, timesteps, tokens, mask)
        assert torch.equal(predict_average(network, latents, timesteps, timesteps, tokens, mask, 1), velocity)


@pytest.mark.parametrize("end_blocks", [1, 2])
def test_the_last_blocks_and_the_final_layer_read_the_end_time(end_blocks):
    """Against diffusers' own forward pass, whose last modules are handed the other embedding by hooks."""
    network = tiny(depth=3)
    latents, timesteps, tokens, mask = inputs()
    ends = torch.tensor([50.0, 0.0])
    found = predict_average(network, latents, timesteps, ends, tokens, mask, end_blocks)
    end = network._compute_timestep_embedding(ends / 1000, torch.float32)
    for block in network.blocks[-end_blocks:]:
        block.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {"temb": end}), with_kwargs=True)
    network.final_layer.register_forward_pre_hook(lambda _, args: (args[0], end))
    expected = predict(network, latents, timesteps, tokens, mask)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, predict(tiny(depth=3), latents, timesteps, tokens, mask), atol=1e-4)


def test_the_kernels_compute_both_times_and_all_gradients():
    stock = tiny(depth=3)
    fast = accelerated(stock)
    latents, timesteps, tokens, mask = inputs()
    ends = torch.tensor([50.0, 0.0])
    outputs = [predict_average(network, latents, timesteps, ends, tokens, mask, 1) for network in (stock, fast)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(output.square().sum(), list(network.parameters()))
        for output, network in zip(outputs, (stock, fast), strict=True)
    ]
    for (name, _), left, right in zip(stock.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5 * float(left.abs().max() + 1), msg=name)


def test_networks_that_cannot_be_given_two_times_are_refused():
    network = tiny(depth=3)
    check_network(network, default_end_blocks(3))
    for count in (0, 3):
        with pytest.raises(UserError, match=f"{count} blocks are to read the end time.*expected 1 to 2"):
            check_network(network, count)
    with pytest.raises(UserError, match=r"PixArtTransformer2DModel cannot be given two times.*method reflow"):
        check_network(noise_predictor.build("pixart", PIXART, SHAPE, DIM), 1)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_the_target_is_a_gaussian_s_average_velocity(spread):
    """Data N(0, s^2): x_t has the standard deviation d(t) = sqrt((1-t)^2 s^2 + t^2), the flow keeps x / d(t), so the
    velocity is x d'(t) / d(t) and the average velocity x (d(t) - d(r)) / (d(t) (t - r))."""

    def deviation(t):
        return ((1 - t) ** 2 * spread**2 + t**2).sqrt()

    def average(x, t):
        r = torch.minimum(ends, t - 1e-12)
        return x * ((deviation(t) - deviation(r)) / (deviation(t) * (t - r))).view(-1, 1, 1, 1)

    t = torch.tensor([0.2, 0.5, 0.8, 0.97], dtype=torch.float64)
    ends = torch.tensor([0.0, 0.1, 0.75, 0.2], dtype=torch.float64)
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slope = (t - (1 - t) * spread**2) / deviation(t)
    velocity = x * (slope / deviation(t)).view(-1, 1, 1, 1)
    found = mean_flow_target(average, x, t, ends, velocity, epsilon=0.005)
    torch.testing.assert_close(found, average(x, t), rtol=0, atol=3e-3)
    # of second order: half the distance, a quarter of the error
    errors = [(mean_flow_target(average, x, t, ends, velocity, e) - average(x, t)).abs().max() for e in (8e-3, 4e-3)]
    assert float(errors[0] / errors[1]) == pytest.approx(4, rel=0.1)


def test_the_derivative_is_the_jacobian_vector_product():
    torch.manual_seed(0)
    x, velocity = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    weights = torch.randn(32, 32, dtype=torch.float64) / math.sqrt(32)
    t, ends = torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64), torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)

    def average(x, t):
        return torch.tanh(x.flatten(1) @ weights + torch.sin(3 * t)[:, None] + ends[:, None]).view_as(x)

    _, derivative = torch.func.jvp(average, (x, t), (velocity, torch.ones_like(t)))
    expected = velocity - (t - ends).view(-1, 1, 1, 1) * derivative
    found = mean_flow_target(average, x, t, ends, velocity, epsilon=1e-4)
    # at t = 1 the difference is one-sided, so of first order
    torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=1e-2)
