"""Drawing code by code with a cache against the network's own probabilities, all at once."""

import math

import pytest
import torch

from sd_mini.draws import uniforms
from sd_mini.errors import UserError
from sd_mini.generators.autoregressive import AutoregressiveGenerator, drawn_codes

SHAPE, DIM, CODES = (3, 2, 4), 6, 12


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = AutoregressiveGenerator(SHAPE, DIM, CODES, width=16, layers=2, heads=2, mlp_width=24).eval()
    with torch.no_grad():
        network.codes.normal_()
        for parameter in network.parameters():  # far from the start, where all codes are about as likely
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def prompts(batch, seed=1):
    mask = torch.arange(5) < torch.tensor([[3], [5], [1]]).repeat(batch, 1)[:batch]
    return torch.randn(batch, 5, DIM, generator=torch.Generator().manual_seed(seed)), mask


def seeded(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def indices(network, latents):
    return torch.cdist(latents.permute(0, 2, 3, 1).flatten(1, 2), network.codes).argmin(-1)


def test_drawn_with_the_cache_is_drawn_from_the_likelihoods_logits(network):
    prompt, null = prompts(3), prompts(3, seed=2)
    latents = network.draw(prompt, null, seeded(3), guidance=3.0)
    assert latents.shape == (3, *SHAPE)
    codes, numbers = indices(network, latents), uniforms((8,), seeded(3))
    with torch.no_grad():
        with_prompt, without = network(codes, *prompt), network(codes, *null)
    # Ho & Salimans 2022, eq. 6, on logits
    logits = without + 3 * (with_prompt - without)
    assert torch.equal(torch.stack([drawn_codes(logits[:, i], numbers[:, i]) for i in range(8)], 1), codes)


def test_a_picture_is_drawn_alike_in_any_batch(network):
    prompt = prompts(3)
    together = network.draw(prompt, None, seeded(3))
    alone = network.draw((prompt[0][2:], prompt[1][2:]), None, seeded(1, first=2))
    assert torch.equal(together[2:], alone)


def test_probabilities_of_all_pictures_sum_to_one():
    """Over every sequence of two codes of three; and what the mask hides changes nothing."""
    torch.manual_seed(0)
    network = AutoregressiveGenerator((2, 1, 2), DIM, 3, width=8, layers=1, heads=1, mlp_width=8).double().eval()
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    tokens = torch.randn(1, 4, DIM, dtype=torch.float64).expand(9, -1, -1)
    mask = (torch.arange(4) < 2).expand(9, -1)
    with torch.no_grad():
        network.codes.normal_()
        logs = network(every, tokens, mask).log_softmax(-1).gather(-1, every[..., None]).sum((1, 2))
        hidden = tokens.clone()
        hidden[:, 2:] += 5
        assert torch.equal(network(every, hidden, mask), network(every, tokens, mask))
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_codes_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()
    numbers = torch.arange(1000) / 1000 + 0.0005
    counts = drawn_codes(logits.expand(1000, 4), numbers).bincount(minlength=4)
    assert counts.tolist() == [500, 0, 300, 200]
    # temperature 1/2 squares the probabilities; the two likeliest of them stay
    expected = [round(1000 * p / (0.25 + 0.09)) for p in (0.25, 0, 0.09, 0)]
    assert drawn_codes(logits.expand(1000, 4), numbers, 0.5, 2).bincount(minlength=4).tolist() == expected
    assert drawn_codes(logits.expand(1000, 4), numbers, 0.0).unique().tolist() == [0]
    assert not math.isnan(float(drawn_codes(logits[None], torch.tensor([1 - 2**-24]))))


def test_saved_it_draws_the_same_and_its_attributes_can_be_assigned(network, tmp_path):
    network.save_pretrained(tmp_path)
    loaded = AutoregressiveGenerator.from_pretrained(tmp_path)
    prompt = prompts(2)
    assert torch.equal(loaded.draw(prompt, None, seeded(2)), network.draw(prompt, None, seeded(2)))
    loaded.top_k = 1
    likeliest = loaded.draw(prompt, None, seeded(2))
    loaded.top_k, loaded.temperature = 0, 0.0
    assert torch.equal(loaded.draw(prompt, None, seeded(2, first=5)), likeliest)
    loaded.temperature = -1
    with pytest.raises(UserError, match="temperature -1, top_k 0: expected at least 0"):
        loaded.draw(prompt, None, seeded(2))


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="width 18 for 4 heads; expected a multiple of 8"):
        AutoregressiveGenerator(SHAPE, DIM, CODES, width=18, heads=4)
