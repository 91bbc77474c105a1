"""What a reward teaches: closed forms of the loss, of how good a picture is, and of which pictures are taken."""

import numpy as np
import pytest
import torch

from sd_mini import noise_predictor
from sd_mini.diffusion.objective import Process
from training.noise_predictor.losses import answer_and_target
from training.reward.config import RewardConfig
from training.reward.losses import RewardObjective, nft_losses
from training.reward.rewards import rarity
from training.reward.rollouts import drawn_order, good, optimalities


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_the_gradient_at_the_old_policy_is_the_reward_s_share_of_the_error_s(beta):
    """At answer = old both errors are the old one, so d loss / d answer = (2 r - 1) beta * 2 (old - x) / (n scale)."""
    old, latents = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    optimality = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    answer = old.clone().requires_grad_(True)
    nft_losses(answer, old, lambda prediction: prediction, latents, optimality, beta).sum().backward()
    error = old - latents
    scale = error.abs().mean((1, 2, 3), keepdim=True)
    expected = (2 * optimality - 1)[:, None, None, None] * beta * 2 * error / (32 * scale)
    torch.testing.assert_close(answer.grad, expected)
    assert not answer.grad[1].abs().max() > 1e-15  # a picture at its prompt's mean holds the policy where it is


def test_descent_moves_towards_good_pictures_and_away_from_bad_ones():
    latents = torch.ones(2, 1, 1, 1)
    old = torch.zeros(2, 1, 1, 1)
    answer = old.clone().requires_grad_(True)
    optimizer = torch.optim.SGD([answer], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        nft_losses(answer, old, lambda prediction: prediction, latents, torch.tensor([1.0, 0.0]), 1.0).sum().backward()
        optimizer.step()
    assert answer[0].item() > 0.3 and answer[1].item() < -0.3


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "flow"},
        {"kind": "flow_x"},
        {"kind": "epsilon", "schedule": "scaled_linear"},
        {"kind": "v_prediction", "schedule": "cosine", "zero_snr": True},
        {"kind": "sample", "schedule": "linear"},
    ],
)
def test_the_true_answer_gives_the_true_latents(fields):
    process = Process(**fields)
    latents, noise = torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    timesteps = process.times(torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64))
    noised = process.noised(latents, noise, timesteps)
    answer = process.target(latents, noise, noised, timesteps)
    torch.testing.assert_close(process.clean(answer, noised, timesteps), latents, atol=1e-6, rtol=1e-5)


def test_the_anchor_and_real_pictures_are_terms_of_the_loss():
    """By weights: the loss is linear in each, and each term's mean is logged."""
    torch.manual_seed(0)
    fields = {"patch_size": 2, "hidden_size": 32, "num_heads": 2, "depth": 1, "mlp_ratio": 2.0}
    network, old, start = (noise_predictor.build("prx", fields, (2, 4, 4), 32) for _ in range(3))
    with torch.no_grad():
        for parameter in (*network.parameters(), *start.parameters()):  # which begin as zero functions
            parameter.add_(0.1 * torch.randn_like(parameter))
    rows = {
        "latents": torch.randn(3, 2, 4, 4),
        "noise": torch.randn(3, 2, 4, 4),
        "timesteps": torch.tensor([0.2, 0.5, 0.9]),
        "prompt_embeds": torch.randn(3, 5, 32),
        "prompt_mask": torch.ones(3, 5, dtype=torch.bool),
    }
    real = {f"real_{name}": value.flip(0) for name, value in rows.items()}
    inputs = {**rows, **real, "optimality": torch.rand(3), "means": torch.zeros(3, 1)}

    def losses(**weights):
        config = RewardConfig(rewards={"judge": 1.0}, **weights)
        with torch.no_grad():
            return RewardObjective(network, old, start, Process(), config)(**inputs)

    plain, _ = losses(anchor=0)
    anchored, logged = losses(anchor=0.5)
    assert logged["anchor"] > 0.01
    torch.testing.assert_close((anchored - plain).mean(), 0.5 * logged["anchor"])
    # stage 3's own loss there, by log of each row's squared error
    answer, target = answer_and_target(network, Process(), **{name: value.flip(0) for name, value in rows.items()})
    expected = 0.3 * (answer - target).square().mean((1, 2, 3)).log()
    torch.testing.assert_close(losses(anchor=0, real=0.3)[0] - plain, expected.detach())


def test_how_good_a_picture_is():
    total = np.array([1.0, 0, 0, 0, 1, 1, 1, 1])  # a prompt with one right of four, one with all
    found = optimalities(total, np.ones(8), 4)
    deviation = total.std()
    assert found[:4] == pytest.approx([1.0, *[0.5 - 0.5 * 0.25 / deviation] * 3])
    assert found[4:] == pytest.approx(0.5)  # nothing is learnt from what is alike
    # of the good ones the rarer is raised and the commoner lowered
    rare = np.array([0, 0, 0, 0, 1.0, 0.5, 0.5, 0])
    assert optimalities(total, rare, 4, novelty=1.0)[4:] == pytest.approx([0.75, 0.375, 0.375, 0.5])


def test_which_pictures_are_kept():
    total = np.array([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    assert good(total, 4).tolist() == [True, False, False, False, *[True] * 4, *[False] * 4]
    assert good(np.array([0.1, 0.3, 0.8, 0.9]), 2).tolist() == [False, True, False, True]


def test_rarity_is_one_over_how_many_are_alike():
    latents = torch.zeros(5, 2, 4, 4)
    latents[3:] = 1
    far = np.exp(-1 / (0.6 * 12 / 25))  # 12 of the 25 pairs lie apart
    expected = [1 / (3 + 2 * far)] * 3 + [1 / (2 + 3 * far)] * 2
    assert rarity(latents, np.ones(5, bool), 5) == pytest.approx(expected)
    assert rarity(latents, np.array([True, False, False, True, False]), 5) == pytest.approx(
        [1 / (1 + far), 0, 0, 1 / (1 + far), 0]
    )


def test_rows_are_taken_by_their_weights():
    order = drawn_order(np.array([1.0, 2.0, 1.0]), 40, 0, 3)
    assert np.bincount(order).tolist() == [10, 20, 10]
    assert (order == drawn_order(np.array([1.0, 2.0, 1.0]), 40, 0, 3)).all()
    assert (order != drawn_order(np.array([1.0, 2.0, 1.0]), 40, 0, 4)).any()
