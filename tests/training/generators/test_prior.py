"""The losses of prior, text and decoder, part by part."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from sd_mini.config import check
from sd_mini.diffusion.objective import TimeConfig, alphas_cumprod
from sd_mini.errors import UserError
from sd_mini.generators.prior import PriorGenerator
from sd_mini.noise_predictor.network import predict
from training.generators.prior.losses import PriorObjective
from training.generators.prior.task import PriorConfig

FIELDS = {"patch_size": 2, "hidden_size": 32, "num_heads": 2, "depth": 1, "mlp_ratio": 2.0}
PRIOR = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
SHAPE, LENGTH, DIM, BATCH = (4, 4, 4), 5, 16, 3


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = PriorGenerator("prior", SHAPE, LENGTH, DIM, "prx", FIELDS, PRIOR)
    nn.init.normal_(made.body.final_layer.linear.weight, std=0.1)
    for statistic in (made.prior.network.clip_mean, made.prior.network.clip_std):
        statistic.copy_(torch.rand(1, DIM) + 0.1)
    return made


def batch():
    torch.manual_seed(1)
    return {
        "latents": torch.randn(BATCH, *SHAPE),
        "embeddings": normalize(torch.randn(BATCH, DIM), dim=1),
        "noise": torch.randn(BATCH, *SHAPE),
        "timesteps": torch.tensor([0.1, 0.5, 0.9]),
        "prior_noise": torch.randn(BATCH, DIM),
        "prior_timesteps": torch.tensor([10, 500, 999]),
        "is_kept": torch.tensor([1.0, 0.0, 1.0]),
        "prompt_embeds": torch.randn(BATCH, LENGTH, DIM),
        "prompt_mask": torch.tensor([[True] * n + [False] * (LENGTH - n) for n in (5, 3, 1)]),
    }


def test_the_three_losses_by_hand(network):
    rows = batch()
    losses, logged = PriorObjective(network, TimeConfig(weighting="log"))(**rows)
    losses.sum().backward()
    assert network.prior.network.clip_std.grad is None and network.prior.text.weight.grad.any()
    with torch.no_grad():
        words, mask, x = rows["prompt_embeds"], rows["prompt_mask"], rows["embeddings"]
        z = (x - network.prior.network.clip_mean) / network.prior.network.clip_std
        # the prior: Ho et al. 2020, eq. 4, and DALL-E 2's eq. 2
        a = alphas_cumprod("cosine")[rows["prior_timesteps"]][:, None]
        text = torch.stack([network.prior.text(own[held].mean(0)) for own, held in zip(words, mask, strict=True)])
        noised = a.sqrt() * z + (1 - a).sqrt() * rows["prior_noise"]
        answer = network.prior.network(noised, rows["prior_timesteps"], text, words, mask).predicted_image_embedding
        prior, of_text = (answer - z).square().mean(1), (text - z).square().mean(1)
        # the decoder, the second row without its embedding
        t = rows["timesteps"][:, None, None, None]
        own = [
            network.condition((words[i : i + 1], mask[i : i + 1]), None if i == 1 else x[i : i + 1]) for i in range(3)
        ]
        condition = [torch.cat(parts) for parts in zip(*own, strict=True)]
        velocity = predict(
            network.body, (1 - t) * rows["latents"] + t * rows["noise"], 1000 * rows["timesteps"], *condition
        )
        error = (velocity - (rows["noise"] - rows["latents"])).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.detach(), error.log() + prior + of_text, rtol=1e-4, atol=1e-4)
    assert logged["decoder"].item() == pytest.approx(error.mean().item(), rel=1e-4)
    assert logged["prior"].item() == pytest.approx(prior.mean().item(), rel=1e-4)


def test_the_parts_do_not_train_each_other(network):
    """The text's embedding learns by its own loss alone, and the prior's error reaches no weight of the decoder."""
    objective = PriorObjective(network, TimeConfig())
    objective(**batch())[0].sum().backward()
    of_text = network.prior.text.weight.grad.clone()
    network.zero_grad()
    rows = batch()
    z = network.prior.standardised(rows["embeddings"])
    found = network.prior.text_embeddings(rows["prompt_embeds"], rows["prompt_mask"])
    (found - z).square().mean(1).sum().backward()
    torch.testing.assert_close(network.prior.text.weight.grad, of_text)


def test_standardised_embeddings_and_back(network):
    x = normalize(torch.randn(4000, DIM) + 1, dim=1)
    network.prior.set_statistics(x)
    z = network.prior.standardised(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(DIM), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(DIM))
    torch.testing.assert_close(network.prior.embeddings(z), x)
    assert math.isclose(float(network.prior.embeddings(3 * z).norm(dim=1).max()), 1, rel_tol=1e-5)


def test_what_the_decoder_cannot_learn_is_refused():
    with pytest.raises(UserError, match=r"times\.kind epsilon: the decoder predicts the velocity"):
        check(PriorConfig, {"times": {"kind": "epsilon", "schedule": "cosine"}}, "prior.yaml")
    with pytest.raises(UserError, match="guidance_interval"):
        check(PriorConfig, {"sampling": {"interval": [0.9, 0.1]}}, "prior.yaml")
