"""Draws among a picture's captions, against counts of what they should be."""

import numpy as np
import pytest

from sd_mini.data.caption_draws import drawn_captions

EVEN = (np.arange(12_000) + 0.5) / 12_000  # every part of [0, 1) alike


@pytest.mark.parametrize(
    ("count", "weights", "shares"),
    [
        (3, (1, 1, 1), [1 / 3, 1 / 3, 1 / 3]),
        (3, (2, 1, 1), [1 / 2, 1 / 4, 1 / 4]),
        (2, (2, 1, 1), [2 / 3, 1 / 3]),
        (4, (3, 1), [3 / 4, 1 / 4, 0, 0]),
        (3, (0, 1, 0), [0, 1, 0]),
        (1, (0, 1), [1]),
        (2, (0, 0, 5), [1 / 2, 1 / 2]),
    ],
)
def test_captions_are_drawn_by_weight(count, weights, shares):
    drawn = drawn_captions(EVEN, np.full(len(EVEN), count), weights)
    assert np.bincount(drawn, minlength=count) / len(EVEN) == pytest.approx(shares, abs=1e-3)


def test_pictures_of_other_counts_are_drawn_for_together():
    counts = np.array([1, 2, 3])
    assert drawn_captions(np.full(3, 0.999), counts, (1, 1, 1)).tolist() == [0, 1, 2]
    assert drawn_captions(np.zeros(3), counts, (0, 1, 1)).tolist() == [0, 1, 1]
