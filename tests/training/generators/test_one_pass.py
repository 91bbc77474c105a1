"""The losses of gan, vae and regression against closed forms and torch's own distributions."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from sd_mini.config import check
from sd_mini.errors import UserError
from sd_mini.generators.one_pass import OnePassGenerator
from sd_mini.noise_predictor.network import build, predict
from training.generators.adversary import (
    AdversaryConfig,
    Discriminator,
    DiscriminatorNetwork,
    DiscriminatorObjective,
    adversarial_losses,
    gradient_penalties,
    relativistic_losses,
)
from training.generators.gan.task import GanConfig, GanObjective
from training.generators.one_pass import OnePassConfig, energy_scores
from training.generators.regression.task import RegressionObjective
from training.generators.vae.task import VaeObjective

FIELDS = {"patch_size": 2, "hidden_size": 32, "num_heads": 2, "depth": 1, "mlp_ratio": 2.0}
SHAPE = (4, 4, 4)


@pytest.fixture
def prompt():
    return torch.randn(3, 5, 16), torch.tensor([[True] * n + [False] * (5 - n) for n in (5, 3, 1)])


def network(family="gan"):
    torch.manual_seed(0)
    made = OnePassGenerator(family, SHAPE, 16, "prx", FIELDS)
    nn.init.normal_(made.body.final_layer.linear.weight, std=0.1)
    return made


def discriminator():
    torch.manual_seed(1)
    return Discriminator(SHAPE, 16, DiscriminatorNetwork(hidden_size=32, depth=1, num_heads=2))


def test_the_energy_score_of_a_gaussian():
    """E|x - y| - E|y - y'| / 2 of N(0, I) against itself, by root mean squares, tends to sqrt(2) / 2."""
    torch.manual_seed(0)
    x, y, z = torch.randn(3, 64, 8, 32, 32)
    assert energy_scores(x, y, z).mean() == pytest.approx(math.sqrt(2) / 2, abs=2e-3)
    # proper: what is drawn too narrow or too wide scores worse
    assert energy_scores(x, 0.5 * y, 0.5 * z).mean() > 0.75 and energy_scores(x, 2 * y, 2 * z).mean() > 0.75


def test_the_energy_score_of_squares_is_the_mean_of_their_own():
    torch.manual_seed(0)
    x, y, z = torch.randn(3, 5, 4, 4, 4)
    corners = [(..., slice(i, i + 2), slice(j, j + 2)) for i in (0, 2) for j in (0, 2)]
    expected = sum(energy_scores(x[at], y[at], z[at]) for at in corners) / 4
    torch.testing.assert_close(energy_scores(x, y, z, side=2), expected)


def test_with_energy_a_gan_s_loss_is_both_terms(prompt):
    critic, generator = discriminator(), network()
    objective = GanObjective(0.5, generator, critic)
    real, draw, second = torch.randn(3, 3, *SHAPE)
    losses, logged = objective(real, draw, *prompt, second_draw=second, weight=torch.tensor(0.25))
    with torch.no_grad():
        first, other = generator(draw, *prompt), generator(second, *prompt)
        energy = sum(energy_scores(real, first, other, side) for side in (2, 4, None)) / 3
        adversarial = relativistic_losses(critic(first, *prompt), critic(real, *prompt))
    torch.testing.assert_close(losses.detach(), 0.5 * energy + 0.25 * adversarial)
    assert set(logged) == {"energy", "adversarial"}
    alone, logged = objective(real, draw, *prompt, second_draw=second)  # before the adversary has begun
    torch.testing.assert_close(alone.detach(), 0.5 * energy)
    assert set(logged) == {"energy"}


def test_the_penalty_estimates_the_squared_gradient(prompt):
    torch.manual_seed(2)
    critic, x = discriminator(), torch.randn(1, *SHAPE, requires_grad=True)
    one = prompt[0][:1], prompt[1][:1]
    (slope,) = torch.autograd.grad(critic(x, *one).sum(), x)
    with torch.no_grad():
        many = 4000
        stepped = critic(x + 1e-2 * torch.randn(many, *SHAPE), *(part.expand(many, *part.shape[1:]) for part in one))
        found = gradient_penalties(stepped, critic(x, *one), 1e-2).mean()
    assert found == pytest.approx(float(slope.square().sum()), rel=0.1)  # 4 standard errors: sqrt(2 / 4000) each


def test_the_relativistic_losses_by_hand():
    real, false = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = torch.tensor([math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))])
    torch.testing.assert_close(relativistic_losses(real, false), expected)


def test_the_generator_s_loss_trains_the_generator_alone(prompt):
    critic, generator = discriminator(), network()
    real, draw = torch.randn(2, 3, *SHAPE)
    drawn = generator(draw, *prompt)
    losses = adversarial_losses(critic, real, drawn, *prompt)
    torch.testing.assert_close(losses, relativistic_losses(critic(drawn, *prompt), critic(real, *prompt)))
    losses.sum().backward()
    assert all(p.grad is None for p in critic.parameters())
    assert generator.body.final_layer.linear.weight.grad.abs().sum() > 0


def test_the_discriminator_s_loss_by_its_parts(prompt):
    critic, generator = discriminator(), network()
    config = AdversaryConfig(weight=1.0, gradient_penalty=1.0, penalty_every=2, mismatched=0.5, step=0.01)
    real, draw, along, across = torch.randn(4, 3, *SHAPE)
    others = prompt[0].flip(0), prompt[1].flip(0)
    objective = DiscriminatorObjective(critic, generator, config)
    losses, logged = objective(real, draw, *prompt, along, across, other_embeds=others[0], other_mask=others[1])
    with torch.no_grad():
        drawn = generator(draw, *prompt)
        at, false, elsewhere = critic(real, *prompt), critic(drawn, *prompt), critic(real, *others)
        r1 = ((critic(real + 0.01 * along, *prompt) - at) / 0.01) ** 2
        r2 = ((critic(drawn + 0.01 * across, *prompt) - false) / 0.01) ** 2
        pair = torch.log1p(torch.exp(false - at)) + 0.5 * torch.log1p(torch.exp(elsewhere - at))
    torch.testing.assert_close(losses.detach(), pair + r1 + r2, rtol=1e-3, atol=1e-4)
    assert logged["r1"].item() == pytest.approx(r1.mean().item(), rel=1e-2)
    losses.sum().backward()
    assert all(p.grad is None for p in generator.parameters())
    without, logged = objective(real, draw, *prompt, other_embeds=others[0], other_mask=others[1])
    torch.testing.assert_close(without.detach(), pair, rtol=1e-4, atol=1e-5)
    assert set(logged) == {"margin"}


def test_the_bound_by_torch_s_own_distributions(prompt):
    channels, height, width = SHAPE
    torch.manual_seed(3)
    encoder = build("prx", FIELDS, (2 * channels, height, width), 16)
    nn.init.normal_(encoder.final_layer.linear.weight, std=0.1)
    objective = VaeObjective(network("vae"), encoder, 0.25, None)
    objective.log_spread.data.fill_(-0.5)
    latents, draw = torch.randn(2, 3, *SHAPE)
    with torch.no_grad():
        losses, _ = objective(latents, draw, *prompt)
        inputs = torch.cat([latents, torch.zeros_like(latents)], 1)
        mean, log_scale = predict(encoder, inputs, torch.ones(3), *prompt).chunk(2, 1)
        posterior = Normal(mean, log_scale.exp())
        decoded = objective.network(mean + log_scale.exp() * draw, *prompt)
        error = -Normal(decoded, math.exp(-0.5)).log_prob(latents).mean((1, 2, 3))
        divergence = kl_divergence(posterior, Normal(0.0, 1.0)).mean((1, 2, 3))
    torch.testing.assert_close(losses, error + 0.25 * divergence, rtol=1e-4, atol=1e-5)


def test_a_regression_learns_the_mean_of_all_answers(prompt):
    """The very gradient of its loss vanishes at the mean, and no draw enters."""
    objective = RegressionObjective(network("regression"), None)
    latents, draw = torch.randn(2, 3, *SHAPE)
    losses, _ = objective(latents, draw, *prompt)
    again, _ = objective(latents, torch.randn_like(draw), *prompt)
    assert torch.equal(losses, again)
    drawn = objective.network(torch.zeros_like(draw), *prompt)
    torch.testing.assert_close(losses, (drawn - latents).square().mean((1, 2, 3)))


def test_what_a_generator_of_one_pass_cannot_take_is_refused():
    with pytest.raises(UserError, match="guidance 3: a generator of one pass draws without"):
        check(OnePassConfig, {"guidance": 3.0}, "gan.yaml")
    with pytest.raises(UserError, match=r"data\.max_aspect 2: a generator of this family draws one shape"):
        check(OnePassConfig, {"data": {"source": "pictures", "max_aspect": 2.0}}, "gan.yaml")
    with pytest.raises(UserError, match=r"adversary\.start 5: until then there is no loss"):
        check(GanConfig, {"adversary": {"start": 5}}, "gan.yaml")
    with pytest.raises(UserError, match="weight"):
        check(GanConfig, {"adversary": {"weight": 0}}, "gan.yaml")
