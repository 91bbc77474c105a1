import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from sd_mini import noise_predictor
from sd_mini.config import read
from sd_mini.data.batches import Batch
from tests.support.launching import SMOKE
from tests.support.networks import NETWORKS
from training.noise_predictor.config import PredictorConfig
from training.noise_predictor.losses import ObjectiveConfig, PredictorObjective, log_losses
from training.noise_predictor.task import PredictorTask


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_kind_learns_and_never_sees_padding(kind):
    torch.manual_seed(0)
    network = noise_predictor.build(kind, NETWORKS[kind], (4, 8, 8), 24)
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.8])
    tokens, mask = torch.randn(2, 6, 24), torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    objective, losses = PredictorObjective(network, ObjectiveConfig()), []
    for _ in range(12):
        loss = objective(latents, noise, t, tokens, mask)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        made = noise_predictor.predict(network, latents, t, tokens, mask)
        assert made.shape == latents.shape
        torch.testing.assert_close(
            noise_predictor.predict(network, latents, t, tokens + 9 * ~mask[..., None], mask), made, rtol=0, atol=1e-5
        )
        seen = noise_predictor.predict(network, latents, t, tokens + 9 * mask[..., None], mask)
        assert (seen - made).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "network", "says"),
    [
        ("dit", {}, "kind 'dit' is unknown"),
        ("prx", {"depht": 3}, "'depht' is unknown to PRXTransformer2DModel"),
        ("prx", {"context_in_dim": 99}, "context_in_dim is 99, but the other stages decide 24"),
        ("unet", {"in_channels": 3}, "in_channels is 3, but the other stages decide 4"),
        ("prx", {"patch_size": 3}, "patch_size 3 does not divide"),
        ("prx", {"depth": -1}, "depth is -1; expected at least 1 block"),
    ],
)
def test_networks_that_do_not_fit(kind, network, says):
    with pytest.raises(ValueError, match=says):
        noise_predictor.build(kind, NETWORKS.get(kind, {}) | network, (4, 8, 8), 24)


def test_a_weight_on_the_direction_adds_it_to_the_squared_error():
    torch.manual_seed(0)
    network = noise_predictor.build("prx", NETWORKS["prx"], (4, 8, 8), 24)
    given = (torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.8]), torch.randn(2, 6, 24))
    given = (*given, torch.ones(2, 6, dtype=torch.bool))
    with torch.no_grad():
        plain, nothing = PredictorObjective(network, ObjectiveConfig())(*given)
        both, metrics = PredictorObjective(network, ObjectiveConfig(direction=0.5))(*given)
    assert not nothing and metrics["error"].item() == pytest.approx(plain.mean().item())
    assert both.mean().item() == pytest.approx(plain.mean().item() + 0.5 * metrics["direction"].item(), rel=1e-5)


def test_under_the_logarithm_every_sample_counts_alike():
    """Its gradient is each sample's own over that one's error; what is logged as the error stays the squared one."""
    torch.manual_seed(0)
    network = noise_predictor.build("prx", NETWORKS["prx"], (4, 8, 8), 24)
    latents = torch.randn(2, 4, 8, 8) * torch.tensor([0.1, 3.0])[:, None, None, None]
    given = (latents, torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.8]), torch.randn(2, 6, 24))
    given = (*given, torch.ones(2, 6, dtype=torch.bool))
    errors, _ = PredictorObjective(network, ObjectiveConfig())(*given)
    losses, metrics = PredictorObjective(network, ObjectiveConfig(weighting="log"))(*given)
    torch.testing.assert_close(losses.exp(), errors)
    assert metrics["error"].item() == pytest.approx(errors.mean().item())
    weights = [p for p in network.parameters() if p.requires_grad]
    by_hand = torch.autograd.grad((errors / errors.detach()).sum(), weights, allow_unused=True)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), weights, allow_unused=True), by_hand)
    assert log_losses(torch.zeros(1)).isfinite()


def test_of_several_draws_a_sample_s_noise_is_the_nearest(halfway, tmp_path):
    run = halfway.parent
    config = str(SMOKE / "noise_predictor.yaml")
    one, four = (PredictorTask(read(PredictorConfig, config, ["--objective.noise_draws", str(k)]), run) for k in (1, 4))
    plain, nearest = (task.inputs(Batch(0, 3, np.arange(8), slice(2, 6))) for task in (one, four))
    assert torch.equal(plain["latents"], nearest["latents"])
    draws = Batch(0, 3, np.arange(8), slice(2, 6)).normal("noise", 4, *one.latent_shape)
    distance = (draws - nearest["latents"][:, None]).flatten(2).norm(dim=2)
    for number, best in enumerate(distance.argmin(1).tolist()):
        assert torch.equal(nearest["noise"][number], draws[number, best])


def test_an_interval_that_is_none_is_refused_with_its_config():
    with pytest.raises(ValueError, match=r"guidance_interval \(0.9, 0.1\): expected two noise levels"):
        read(PredictorConfig, None, ["--sampling.interval", "[0.9, 0.1]"])


def share_below(t, density, uniform_share, mode_scale=1.29):
    """P(timestep < t) in closed form, before the shift: Esser et al. 2024, eq. 19 and 20, mixed with U(0, 1)."""
    if density == "logit_normal":
        drawn = norm.cdf(math.log(t) - math.log1p(-t)) if 0 < t < 1 else t
    elif density == "mode":  # 1 - u - s (cos^2(pi u / 2) - 1 + u) falls in u: P(f(u) < t) = 1 - f^-1(t)
        drawn = 1 - brentq(lambda u: 1 - u - mode_scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u) - t, 0, 1)
    else:
        return t
    return uniform_share * t + (1 - uniform_share) * drawn


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("density", ["logit_normal", "uniform", "mode"])
def test_the_task_s_own_timesteps_follow_the_density(smoke_run, density, shift):
    """500 steps of batches of 64: each tenth of t holds its share within 2 %."""
    options = ["--objective.density", density, "--objective.shift", str(shift), "--train.batch_size", "64"]
    task = PredictorTask(read(PredictorConfig, str(SMOKE / "noise_predictor.yaml"), options), smoke_run)
    ids = np.arange(64)
    drawn = torch.cat([task.inputs(Batch(0, step, ids, slice(0, 64)))["timesteps"] for step in range(500)])
    edges = [i / 10 for i in range(11)]
    # t' = s t / (1 + (s - 1) t) read backwards
    below = [share_below(t / (shift - (shift - 1) * t), density, 0.1) for t in edges]
    found = np.histogram(drawn.numpy(), edges)[0] / len(drawn)
    np.testing.assert_allclose(found, np.diff(below), rtol=0.02)
