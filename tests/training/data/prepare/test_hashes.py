"""Hashes against imagehash and brute force: what counts as the same picture and the same caption."""

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from training.benchmarks.planted import draw
from training.data.prepare import hashes
from training.data.prepare.near import groups, near_pairs, picture_pairs

SIDE = hashes.SIDE


def small(picture):
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def number(bits):
    return int("".join("01"[int(bit)] for bit in bits.ravel()), 2)


def test_the_hash_is_imagehash_s():
    rng = np.random.default_rng(0)
    grey = [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)) for _ in range(20)]
    ours, mirrored = hashes.perceptual_hashes(np.stack([np.asarray(one.convert("RGB")) for one in grey]))
    for own, turned, picture in zip(ours.tolist(), mirrored.tolist(), grey, strict=True):
        assert own == number(imagehash.phash(picture, highfreq_factor=3).hash)
        assert turned == number(imagehash.phash(ImageOps.mirror(picture), highfreq_factor=3).hash)


def test_edits_stay_near_and_other_pictures_do_not():
    pictures = [draw(np.random.default_rng(seed)) for seed in range(60)]
    edits = {
        "half": lambda one: one.resize((one.width // 2, one.height // 2), Image.Resampling.LANCZOS),
        "darker": lambda one: ImageEnhance.Brightness(one).enhance(0.8),
        "mirrored": ImageOps.mirror,
    }
    stacked = np.stack([small(one) for one in pictures])
    own, _ = hashes.perceptual_hashes(stacked)
    for edit in edits.values():
        edited = np.stack([small(edit(one)) for one in pictures])
        first, mirrored = hashes.perceptual_hashes(edited)
        distance = np.minimum(np.bitwise_count(own ^ first), np.bitwise_count(own ^ mirrored))
        assert distance.max() <= 10
        assert hashes.correlations(hashes.thumbnails(stacked), hashes.thumbnails(edited)).min() >= 0.97
    others = np.bitwise_count(own[:, None] ^ own) + 64 * np.eye(len(own), dtype=np.int64)
    assert others.min() > 10


def test_the_thumbnail_tells_colours_apart_that_the_hash_does_not():
    red, blue = (np.full((1, SIDE, SIDE, 3), 255, np.uint8) for _ in range(2))
    red[:, 6:18, 6:18], blue[:, 6:18, 6:18] = (150, 0, 0), (0, 0, 255)
    assert np.bitwise_count(hashes.perceptual_hashes(red)[0] ^ hashes.perceptual_hashes(blue)[0])[0] <= 10
    assert hashes.correlations(hashes.thumbnails(red), hashes.thumbnails(blue))[0] < 0.97
    assert hashes.correlations(hashes.thumbnails(red), hashes.thumbnails(red // 2))[0] > 0.999


def clustered(count, seed):
    """Hashes of which many are a few bits apart."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**63, count // 8, dtype=np.uint64)
    found = rng.choice(centres, count)
    for _ in range(3):  # each three bits away from its centre
        found = found ^ (np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64))
    return found


@pytest.mark.parametrize("bits", [0, 3, 10])
def test_near_pairs_are_those_of_brute_force(bits):
    index, queries = clustered(400, seed=1), clustered(400, seed=1)[::-1]
    found = {pair for a, b in near_pairs(index, queries, bits) for pair in zip(a.tolist(), b.tolist(), strict=True)}
    expected = np.argwhere(np.bitwise_count(queries[:, None] ^ index) <= bits)
    assert found == set(map(tuple, expected.tolist())) and len(found) >= 400


def test_a_crowd_of_one_hash_is_compared_in_chunks(monkeypatch):
    monkeypatch.setattr("training.data.prepare.near._PAIRS", 50)
    same = np.zeros(30, np.uint64)
    a, b = picture_pairs(same, same, ~same, 2)
    assert len(a) == 30 * 30 and set(a.tolist()) == set(b.tolist()) == set(range(30))


def test_groups_hang_together():
    found = groups(np.array([5, 9, 1]), np.array([9, 7, 2]))
    assert sorted(group.tolist() for group in found) == [[1, 2], [5, 7, 9]]
    assert groups(np.array([], np.int64), np.array([], np.int64)) == []


@pytest.mark.parametrize(
    ("a", "b", "is_same"),
    [
        ("A red car.", "a red  CAR", True),
        ("waving hand light skin tone", "waving hand dark skin tone", False),
        ("handshake medium-dark skin tone light skin tone", "handshake light skin tone medium-dark skin tone", False),
        ("cat", "dog", False),
        ("☀️", "🌙", False),
    ],
)  # fmt: skip
def test_captions_that_count_as_the_same(a, b, is_same):
    assert (hashes.jaccard(a, b) >= 0.9) == is_same
    assert (hashes.caption_key(a) == hashes.caption_key(b)) == is_same


def test_jaccard_of_multisets_by_hand():
    # {a, b, a b} and {a, b, b, a b, b b, a b b}: 3 of 6
    assert hashes.jaccard("a b", "a b b") == 0.5


def test_captions_that_are_alike_share_a_band():
    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(200)]
    for _ in range(50):
        own = rng.choice(words, 45).tolist()
        other = [*own[:20], "another", *own[21:]]
        a, b, far = hashes.caption_bands([" ".join(own), " ".join(other), " ".join(rng.choice(words, 45))], 20)
        assert set(a) & set(b) and not set(a) & set(far)
    assert hashes.caption_bands(["too short"], 20) == [None]
