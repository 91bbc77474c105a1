import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from sd_mini import shapes
from sd_mini.data import captioned
from sd_mini.stages.contract import load_stage
from sd_mini.text_encoder import matcher as matcher_module
from sd_mini.text_encoder.adapter import TextStage
from sd_mini.text_encoder.matcher import (
    MEASURED,
    ImageEmbeds,
    Matcher,
    TextEmbeds,
    edges,
    late_scores,
    measured_caption,
    recalls,
    similarity,
    text_scores,
    twins,
)


def test_recall_by_hand():
    """Four pictures along the axes; the texts lean from their own picture towards the next one."""
    pictures = torch.eye(4)
    texts = torch.eye(4) + torch.tensor([0.0, 2.0, 0.6, 2.0])[:, None] * torch.eye(4).roll(1, dims=1)
    texts /= texts.norm(dim=1, keepdim=True)
    found = recalls(pictures @ texts.T, ["a", "b", "c", "d"], slice(0, 4))
    assert found["recall_at_1"].tolist() == [1, 0, 1, 0] and found["recall_at_5"].tolist() == [1] * 4
    assert found["recall_of_captions_at_1"].tolist() == [1, 1, 0, 0]


def test_a_picture_of_the_same_caption_is_as_right():
    pictures, texts = torch.eye(3), torch.eye(3)[[1, 1, 2]]
    found = recalls(pictures @ texts[1:].T, ["same", "same", "other"], slice(0, 3))
    assert found["recall_at_1"].tolist() == [1, 1, 1]
    assert recalls(pictures @ texts.T, ["a", "b", "c"], slice(0, 3))["recall_at_1"].tolist() == [0, 1, 1]


def test_parts_of_the_rows_score_as_the_whole():
    torch.manual_seed(0)
    pictures, texts = (torch.nn.functional.normalize(torch.randn(9, 4), dim=-1) for _ in range(2))
    captions = list("abcdefgha")
    whole = recalls(pictures @ texts[:8].T, captions, slice(0, 9))
    parts = [recalls(pictures @ texts[:8].T, captions, slice(a, b)) for a, b in pairwise((0, 4, 9))]
    for name, scores in whole.items():
        assert np.array_equal(scores, np.concatenate([part[name] for part in parts]))


def test_twins_of_scenes_are_never_true_and_keep_the_phrasing():
    """Without the words that name what may be changed, a caption and its twin are the same text."""
    pictures = captioned.load(captioned.DataConfig(count=200, resolution=32))
    spoken = (*shapes.COLOURS, *shapes.SHAPES, *shapes.SIZES, "two", "three", "four", "left", "right", "above", "below")
    named = re.compile("|".join(sorted({*spoken, *shapes.PLACES, "to the", " of"}, key=len, reverse=True)))
    for number, captions in enumerate(pictures.captions):
        for caption, other in zip(captions, twins(pictures, number, 0), strict=True):
            assert other not in captions
            bare = [re.sub(r"\W|es\b|s\b", "", named.sub("", text)) for text in (caption, other)]
            assert bare[0] == bare[1]
    assert [measured_caption(pictures, i) for i in range(3)] == [i % len(pictures.captions[i]) for i in range(3)]


def test_a_swap_is_a_caption_of_the_swapped_scene():
    scene = shapes.sample_scene(0, 3, kinds=("two_objects",))
    other, _ = shapes.swapped(scene, 1)
    assert other.canonical() != scene.canonical()


def test_twins_of_other_captions_are_their_own_words():
    captions = [["a dog by a mat"], ["cat"], ["cat"], ["red circle", "blue circle"]]
    pictures = captioned.CaptionedPictures(np.zeros((4, 3, 4, 4), np.uint8), captions, "test")
    assert sorted(twins(pictures, 0, 0)[0].split()) == sorted(captions[0][0].split())
    assert twins(pictures, 1, 0) == ["red circle"]  # the next one is the same
    assert {t for s in range(60) for t in twins(pictures, 3, s)}.isdisjoint(captions[3])
    alike = captioned.CaptionedPictures(np.zeros((2, 3, 4, 4), np.uint8), [["cat"], ["cat"]], "test")
    with pytest.raises(ValueError, match="every caption is 'cat'"):
        twins(alike, 0, 0)


def test_scores_of_a_run_are_those_computed_plainly(tiny_run):
    """Against one text and one picture at a time, the late score by a loop over its words."""
    parts = load_stage(tiny_run / "text_encoder" / "final").parts
    stage, matcher = TextStage.from_parts(parts), parts["matcher"]
    assert matcher.is_late
    pictures = captioned.load(captioned.DataConfig(split="test", count=12, resolution=32))
    scores = text_scores(stage, matcher, pictures, pictures.pixel_parts(5), slice(0, 12))

    def plainly(number, text):
        vector, cells = (part[0] for part in matcher(pictures.pixels([number])))
        out = stage.encode([text])
        tokens = stage.adapter.raw(out.tokens)[out.mask]
        words = torch.nn.functional.normalize(matcher.word(tokens), dim=-1)
        late = sum(max(float(word @ cell) for cell in cells) for word in words) / len(words)
        return float(vector @ torch.nn.functional.normalize(out.pooled[0], dim=-1)) + late

    which = [measured_caption(pictures, i) for i in range(12)]
    captions = [pictures.captions[i][c] for i, c in enumerate(which)]
    with torch.no_grad():
        table = np.array([[plainly(i, text) for text in captions] for i in range(12)])
        wrong = [plainly(i, twins(pictures, i, MEASURED)[which[i]]) for i in range(12)]
    ranks = [int((table[i] > table[i, i] + 1e-6).sum()) for i in range(12)]
    assert scores["recall_of_captions_at_5"].tolist() == [float(rank < 5) for rank in ranks]
    ranks = [int((table[:, i] > table[i, i] + 1e-6).sum()) for i in range(12)]
    assert scores["recall_at_5"].tolist() == [float(rank < 5) for rank in ranks]
    assert scores["binding"].tolist() == [float(table[i, i] > wrong[i]) for i in range(12)]
    assert set(scores["binding_pooled"].tolist()) <= {0.0, 1.0}


def test_memory_is_bounded_whatever_the_number_of_captions(monkeypatch):
    """The late scores of many texts with many pictures, in pieces, are those of all at once."""
    torch.manual_seed(0)
    cells, words = torch.randn(70, 4, 8), torch.randn(41, 5, 8)
    mask = torch.rand(41, 5) < 0.7
    seen, said = ImageEmbeds(torch.randn(70, 6), cells), TextEmbeds(torch.randn(41, 6), words, mask)
    whole = seen.vector @ said.vector.T + late_scores(cells, words, mask)
    monkeypatch.setattr(matcher_module, "_TEXTS", 9)
    assert torch.allclose(similarity(seen, said), whole, atol=1e-5)


def test_edges_are_the_steepest_channels_and_the_same_in_other_colours():
    pixels = torch.zeros(1, 3, 6, 6)
    pixels[0, 0, 2:4, 2:4] = 0.5  # a red square
    found = edges(pixels)
    assert (
        found.shape == (1, 1, 6, 6) and found[0, 0, 2, 1] == 0.5 and found[0, 0, 3, 3].item() == pytest.approx(0.5**0.5)
    )
    assert found[0, 0, 2, 2] == 0 and torch.equal(found, edges(pixels[:, [2, 0, 1]]))
    flat = torch.full((1, 3, 4, 4), 0.3)
    assert edges(flat).abs().max() == 0


def test_the_matcher_takes_pixels_or_features():
    pixels, features = Matcher(16, width=16), Matcher(16, feature_dim=10)
    seen = pixels(torch.randn(2, 3, 32, 32))
    assert seen.vector.shape == features(torch.zeros(2, 10)).vector.shape == (2, 16)
    torch.testing.assert_close(seen.vector.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(seen.cells.norm(dim=2), torch.ones(2, 16))
    assert (
        features(torch.zeros(2, 10)).cells is None and Matcher(16, late_dim=0)(torch.zeros(2, 3, 32, 32)).cells is None
    )
