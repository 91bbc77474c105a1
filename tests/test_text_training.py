from pathlib import Path

import numpy as np
import pytest
import torch

from sd_mini import data, shapes
from sd_mini.config import read
from training.batches import Batch, batch_ids
from training.text_encoder import LayoutHead, TextConfig, TextTask, hard_negative, siglip_losses

SMOKE = Path(__file__).parent.parent / "training" / "configs" / "smoke" / "text_encoder.yaml"


@pytest.fixture(scope="module")
def task():
    return TextTask(read(TextConfig, SMOKE))


def make_batch(task, rows=slice(0, 8)):
    return Batch(0, 0, batch_ids(0, 0, task.count, 8), rows)


def test_siglip_is_the_papers_sum_over_pairs():
    logits, positive = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[True, False, True]])
    z = torch.tensor([1.0, -1.0, 1.0])
    assert siglip_losses(logits, positive).item() == pytest.approx(torch.log(1 + torch.exp(-z * logits)).sum().item())


def test_each_picture_comes_with_a_caption_of_its_own(task):
    inputs = task.inputs(make_batch(task))
    rows = torch.arange(8)
    assert inputs["positive"][rows, inputs["own"]].all()
    for number, ids in zip(make_batch(task).own_ids, inputs["ids"][inputs["own"]], strict=True):
        assert task.stage.tokenizer.decode(ids, skip_special_tokens=True).strip() in task.train.captions[number]


def test_a_part_of_the_batch_sees_all_texts_and_its_own_pictures(task):
    whole, part = task.inputs(make_batch(task)), task.inputs(make_batch(task, slice(4, 8)))
    assert torch.equal(whole["ids"], part["ids"])
    for name in ("pixels", "own", "positive"):
        assert torch.equal(whole[name][4:], part[name])


def test_the_losses_of_the_parts_are_those_of_the_whole(task):
    objective = task.players["text_encoder"].objective.eval()
    with torch.no_grad():
        whole = objective(**task.inputs(make_batch(task)))[0]
        parts = [objective(**task.inputs(make_batch(task, rows)))[0] for rows in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_layout_term_reaches_the_words_residual_and_never_padding():
    torch.manual_seed(0)
    head, tokens = LayoutHead(16, 2), torch.randn(2, 5, 16, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    guess = head(tokens, mask)
    assert guess.shape == (2, 3, 8, 8)
    guess.square().sum().backward()
    assert tokens.grad[1, 2:].abs().max() == 0 and (tokens.grad[mask].abs().sum(-1) > 0).all()


def test_word_vectors_stay_the_words_identity(task):
    assert not task.stage.encoder.get_input_embeddings().weight.requires_grad
    assert not task.stage.adapter.word_in.weight.requires_grad


def test_hard_negatives_of_scenes_are_never_true():
    pictures = data.load(data.DataConfig(count=200, resolution=32))
    for number, captions in enumerate(pictures.captions):
        assert hard_negative(pictures, number, seed=0) not in captions


def test_hard_negatives_of_other_captions_swap_two_words():
    captions = [["a dog on a mat"], ["cat"], ["red red"]]
    pictures = data.CaptionedPictures(np.zeros((3, 3, 4, 4), np.uint8), captions, "test")
    swapped = hard_negative(pictures, 0, seed=0)
    assert sorted(swapped.split()) == sorted(captions[0][0].split()) and swapped != captions[0][0]
    assert hard_negative(pictures, 1, seed=0) == "red red" and hard_negative(pictures, 2, seed=0) == "a dog on a mat"


def test_a_swap_is_a_caption_of_the_swapped_scene():
    scene = shapes.sample_scene(0, 3, kinds=("two_objects",))
    twin, _ = shapes.swapped(scene, 1)
    assert twin.canonical() != scene.canonical()
