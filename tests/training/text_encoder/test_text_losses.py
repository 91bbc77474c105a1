"""The terms of stage 1 apart, against their closed forms."""

import math

import pytest
import torch

from training.text_encoder.losses import LayoutHead, infonce_losses, siglip_losses, twin_losses


def test_siglip_is_the_papers_sum_over_pairs():
    logits, positive = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[True, False, True]])
    z = torch.tensor([1.0, -1.0, 1.0])
    assert siglip_losses(logits, positive).item() == pytest.approx(torch.log(1 + torch.exp(-z * logits)).sum().item())


def test_infonce_is_cross_entropy_where_one_is_right_and_their_share_where_several_are():
    torch.manual_seed(0)
    logits, right = torch.randn(4, 6), torch.tensor([0, 5, 2, 2])
    positive = torch.nn.functional.one_hot(right, 6).bool()
    expected = torch.nn.functional.cross_entropy(logits, right, reduction="none")
    torch.testing.assert_close(infonce_losses(logits, positive), expected)
    positive[:, 1] = True
    expected = -(logits.softmax(1) * positive).sum(1).log()
    torch.testing.assert_close(infonce_losses(logits, positive), expected)


def test_of_two_texts_the_nearer_is_a_coin_that_the_difference_weighs():
    """-log sigmoid(true - false): log 2 for a tie, nothing for a certainty, the difference for a certain mistake."""
    true, false = torch.tensor([[1.0], [50.0], [-50.0]]), torch.tensor([[1.0], [-50.0], [50.0]])
    assert twin_losses(true, false).tolist() == pytest.approx([math.log(2), 0, 100], abs=1e-6)


def test_the_layout_term_reaches_the_words_residual_and_never_padding():
    torch.manual_seed(0)
    head, tokens = LayoutHead(16, 2), torch.randn(2, 5, 16, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    guess = head(tokens, mask)
    assert guess.shape == (2, 3, 8, 8)
    guess.square().sum().backward()
    assert tokens.grad[1, 2:].abs().max() == 0 and (tokens.grad[mask].abs().sum(-1) > 0).all()
