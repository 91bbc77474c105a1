"""Pictures by caption: against the rule written out, and in a report of data whose captions repeat."""

from collections import Counter

import numpy as np
import pytest

from eval.features.features import Extractor
from eval.makers.questions import PromptSet, Question
from eval.measure import measure
from eval.metrics.by_caption import BY_CAPTION, nearest_labels
from eval.metrics.kid import kernel_distance
from eval.metrics.registry import Sample, Tools
from eval.report.headline import headline
from eval.report.page import render

NAMES = ["a cat", "a dog", "a red fish"]


def test_nearest_labels():
    draw = np.random.default_rng(0)
    known, asked = draw.normal(size=(60, 4)), draw.normal(size=(25, 4))
    labels = [NAMES[i] for i in draw.integers(0, 3, 60)]
    for row, found in zip(asked, nearest_labels(asked, known, labels), strict=True):
        near = [labels[i] for i in sorted(range(60), key=lambda i: ((known[i] - row) ** 2).sum())[:5]]
        most = max(Counter(near).values())
        assert found == next(label for label in near if near.count(label) == most)


def colours(captions, seed, mistaken=0):
    """Pictures of one channel a caption; the first `mistaken` of the next one."""
    draw = np.random.default_rng(seed)
    pictures = draw.integers(0, 60, (len(captions), 3, 8, 8), dtype=np.uint8)
    for i, caption in enumerate(captions):
        pictures[i, (NAMES.index(caption) + (i < mistaken)) % 3] += 180
    return pictures


def means(pictures):
    return pictures.float().mean((2, 3)) / 100


@pytest.fixture
def question():
    asked, real = NAMES * 12, NAMES * 20
    return Question([PromptSet("test", asked, colours(asked, 0))], colours(real, 1), True, "pets", "0" * 64, real)


def test_a_report_says_how_each_caption_does(question, tmp_path):
    extractor = Extractor("own", "FD-own", "1", "none", means)
    asked = question.splits[0].captions
    made = colours(asked, 2, mistaken=6)
    found = measure(question, {"test": made}, None, Tools([extractor], tmp_path)).scores["by_caption"]["FD-own"]
    assert found["found_made"] == pytest.approx(30 / 36) and found["n"] == 36
    assert 30 / 36 - 0.2 < found["low_made"] < 30 / 36 < found["high_made"]
    for caption in NAMES:
        own = found["captions"][caption]
        assert (own["n"], own["n_reference"], own["found_made"]) == (12, 20, pytest.approx(10 / 12))
        rows, theirs = (np.array([c == caption for c in names]) for names in (asked, question.reference_captions))
        features = [extractor(x) for x in (made[rows], np.asarray(question.reference)[theirs])]
        assert own["kid_made"] == pytest.approx(kernel_distance(*features))
    report = {"by_caption": {"FD-own": found}}
    assert [row.value for row in headline(report)] == ["83.3 %"]
    page = render({**report, "remarks": [], "seconds": {}, "protocol": {"data": "pets"}}, [], {})
    assert all(f"<td>{caption}</td>" in page for caption in NAMES)


def test_real_pictures_that_are_in_the_reference_are_not_compared_with_themselves(question, tmp_path):
    extractor = Extractor("own", "FD-own", "1", "none", means)
    made = colours(question.splits[0].captions, 2)
    for is_apart in (True, False):
        asked = Question(question.splits, question.reference, is_apart, "pets", "0" * 64, question.reference_captions)
        sample = Sample(
            asked, made, {"made": made, "real": asked.splits[0].pictures}, None, Tools([extractor], tmp_path)
        )
        assert ("found_real" in BY_CAPTION.measure(sample)["FD-own"]) is is_apart


def test_without_enough_pictures_of_each_caption_there_is_no_such_part(question, tmp_path):
    few = PromptSet("test", question.splits[0].captions[:20], question.splits[0].pictures[:20])
    for other in (
        Question([few], question.reference, True, "pets", "0" * 64, question.reference_captions),
        Question(question.splits, question.reference, True, "pets", "0" * 64),
    ):
        made = colours(other.splits[0].captions, 2)
        extractor = Extractor("own", "FD-own", "1", "none", means)
        assert BY_CAPTION.name not in measure(other, {"test": made}, None, Tools([extractor], tmp_path)).scores
