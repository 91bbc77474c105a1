"""Distances between sets of features, against closed forms, brute force and the reference implementations."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import _compute_fid

from eval.features.moments import statistics
from eval.features.reference import FeatureSet
from eval.metrics import kid
from eval.metrics.bootstrap import few_prompts, prompt_interval
from eval.metrics.cmmd import cmmd
from eval.metrics.distances import infinity, moved_by_prompts
from eval.metrics.fid import frechet_distance, frechet_infinity, null_bias
from eval.metrics.kid import kernel_distance
from eval.metrics.prdc import precision_recall_density_coverage

ROOT = Path(__file__).parents[3]


def normal(*shape, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(size=shape) + shift


def mixed(count, dim, seed=0):
    """Features with correlations, of unlike scales."""
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(count, dim)) @ draw.normal(size=(dim, dim)) + draw.normal(size=dim)).astype(np.float32)


def test_frechet_of_shifted_unit_gaussians_at_inception_s_width():
    dim = 2048
    assert frechet_distance(np.zeros(dim), np.eye(dim), np.ones(dim), np.eye(dim)) == pytest.approx(dim, rel=1e-9)


@pytest.mark.parametrize("dim", [16, 1100])  # of a small one by torch, of a large one by SciPy
def test_frechet_of_diagonal_gaussians_in_any_rotation(dim):
    """|m1 - m2|^2 + sum (s1 - s2)^2."""
    draw = np.random.default_rng(1)
    mean_a, mean_b = draw.normal(size=(2, dim))
    std_a, std_b = draw.uniform(0.1, 1.1, (2, dim))
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((std_a - std_b) ** 2)
    turn = np.linalg.qr(draw.normal(size=(dim, dim)))[0]
    covs = [turn @ np.diag(std**2) @ turn.T for std in (std_a, std_b)]
    for turned in ((turn @ mean_a, covs[0], turn @ mean_b, covs[1]), (turn @ mean_b, covs[1], turn @ mean_a, covs[0])):
        assert frechet_distance(*turned) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(*map(torch.from_numpy, turned)) == pytest.approx(expected, rel=1e-9)


def test_frechet_against_the_references_at_full_rank():
    a, b = mixed(600, 48, seed=1), mixed(700, 48, seed=2)
    own = statistics(a), statistics(b)
    found = frechet_distance(*own[0], *own[1])
    theirs = [fid_features_to_statistics(torch.from_numpy(part.astype(np.float64))) for part in (a, b)]
    fidelity = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    torchmetrics = float(_compute_fid(*map(torch.from_numpy, (*own[0], *own[1]))))
    root = scipy.linalg.sqrtm(own[0][1] @ own[1][1]).real
    by_hand = np.sum((own[0][0] - own[1][0]) ** 2) + np.trace(own[0][1] + own[1][1] - 2 * root)
    assert [found / other for other in (fidelity, torchmetrics, by_hand)] == pytest.approx([1, 1, 1], abs=1e-6)


@pytest.mark.parametrize("counts", [(10, 12), (10, 200), (200, 10)])
def test_frechet_of_fewer_pictures_than_features(counts):
    """tr (Ca Cb)^1/2 by the singular values of the features themselves, which knows no rounded zeros."""
    a, b = (mixed(count, 64, seed).astype(np.float64) for seed, count in enumerate(counts))
    x, y = ((part - part.mean(0)) / math.sqrt(len(part) - 1) for part in (a, b))
    between = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.sum(x * x) + np.sum(y * y) - 2 * between
    assert frechet_distance(*statistics(a), *statistics(b)) == pytest.approx(expected, rel=1e-9)


def test_identical_sets_are_at_no_distance():
    features = mixed(100, 32)
    for count in (100, 8):  # full rank, and less
        own = statistics(features[:count])
        assert abs(frechet_distance(*own, *own)) < 1e-9 * np.trace(own[1])
    assert cmmd(features, features) == 0
    assert precision_recall_density_coverage(features, features)["coverage"] == 1
    assert kernel_distance(features, features) < 0  # unbiased: pairs of a picture with its copy are counted between


def test_what_no_distance_can_be_taken_of():
    with pytest.raises(ValueError, match="1 pictures have no covariance; expected at least 2"):
        statistics(normal(1, 4))
    with pytest.raises(ValueError, match=r"kernel_distance: got 1 and 3 pictures"):
        kernel_distance(normal(1, 4), normal(3, 4))
    with pytest.raises(ValueError, match=r"cmmd: got features of shapes \(3, 4\) and \(3, 5\)"):
        cmmd(normal(3, 4), normal(3, 5))
    with pytest.raises(ValueError, match=r"\(4,\), \(4, 4\), \(5,\), \(5, 5\).*same network"):
        frechet_distance(np.zeros(4), np.eye(4), np.zeros(5), np.eye(5))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(np.zeros(4), np.eye(4), np.full(4, np.nan), np.eye(4))
    with pytest.raises(ValueError, match="NaN"):
        statistics(np.full((3, 4), np.nan))
    with pytest.raises(ValueError, match="5 and 9 pictures, expected at least 6"):
        precision_recall_density_coverage(normal(5, 4), normal(9, 4))
    with pytest.raises(ValueError, match="too few for a line"):
        frechet_infinity(normal(19, 4), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="63 pictures are too few for a line over 16 features; expected at least 64"):
        frechet_infinity(normal(63, 16), np.zeros(16), np.eye(16))
    with pytest.raises(ValueError, match="too large for exact sums"):
        statistics(np.full((3, 4), 1e7))


def cubic_mean(a, b, dim):
    """E (x . y / d + 1)^3 of x ~ N(a 1, I), y ~ N(b 1, I), by the moments of x . y."""
    both, squares = dim * a * b, dim * (a * a + b * b + 1)
    moments = both, both**2 + squares, both**3 + 3 * both * squares + 6 * both
    return 1 + 3 * moments[0] / dim + 3 * moments[1] / dim**2 + moments[2] / dim**3


def test_kid_of_shifted_gaussians():
    exact = cubic_mean(0, 0, 64) + cubic_mean(0.5, 0.5, 64) - 2 * cubic_mean(0, 0.5, 64)
    assert exact == pytest.approx(0.97107, abs=1e-5)
    found = [kernel_distance(normal(1500, 64, seed=s), normal(1500, 64, seed=99 + s, shift=0.5)) for s in range(8)]
    error = np.std(found, ddof=1) / math.sqrt(len(found))
    assert error < 0.01 and abs(np.mean(found) - exact) < 4 * error


def test_kid_against_torch_fidelity_of_one_subset_that_is_the_set():
    a, b = (torch.from_numpy(mixed(300, 24, seed)) for seed in (1, 2))
    theirs = kid_features_to_metric(
        a, b, kid_subsets=1, kid_subset_size=300, kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=0, verbose=False,
    )["kernel_inception_distance_mean"]  # fmt: skip
    assert kernel_distance(a.numpy(), b.numpy()) == pytest.approx(theirs, rel=1e-6)


def test_a_picture_s_part_in_kid_says_how_far_it_varies():
    """The spread of the estimate over sets drawn anew, the other set kept, against one set's own parts."""
    other = normal(400, 8, seed=99, shift=0.7)
    sets = [normal(200, 8, seed=s) for s in range(200)]
    found = np.std([kernel_distance(one, other) for one in sets])
    said = [kid.each_picture(one, other).std() / math.sqrt(200) for one in sets[:20]]
    assert np.mean(said) == pytest.approx(found, rel=0.15)


def test_cmmd_of_shifted_gaussians():
    """2 * 1000 (1 + 2 / 100)^(-d / 2) (1 - exp(-|shift|^2 / 204)), beside the bias of the terms on the diagonal."""
    exact = 2000 * 1.02**-32 * (1 - math.exp(-16 / 204))
    assert exact == pytest.approx(80.056, abs=1e-3)
    count = 2000
    found = [cmmd(normal(count, 64, seed=s), normal(count, 64, seed=99 + s, shift=0.5)) for s in range(4)]
    bias = 2 * 1000 * (1 - 1.02**-32) / count
    assert np.mean(found) == pytest.approx(exact + bias, abs=0.8)


def test_cmmd_by_hand():
    a, b = normal(7, 3), normal(5, 3, seed=1)
    kernels = [np.exp(-(cdist(*pair) ** 2) / 200).mean() for pair in ((a, a), (b, b), (a, b))]
    assert cmmd(a, b) == pytest.approx(1000 * (kernels[0] + kernels[1] - 2 * kernels[2]), rel=1e-9)


def test_prdc_by_brute_force():
    real, made = normal(150, 8), np.concatenate([normal(100, 8, seed=1), normal(60, 8, seed=2, shift=3)])
    own, its, both = cdist(real, real), cdist(made, made), cdist(real, made)
    real_radii, made_radii = np.sort(own)[:, 5], np.sort(its)[:, 5]
    in_real, in_made = both <= real_radii[:, None], both <= made_radii[None]
    assert precision_recall_density_coverage(real, made) == pytest.approx(
        {
            "precision": in_real.any(0).mean(),
            "recall": in_made.any(1).mean(),
            "density": in_real.sum(0).mean() / 5,
            "coverage": in_real.any(1).mean(),
        }
    )


@pytest.mark.slow
def test_prdc_as_its_paper_s_code_shows_it():
    """The README of clovaai/generative-evaluation-prdc: 10,000 of N(0, I) each, d = 1000, one draw of 1.056 density."""
    found = precision_recall_density_coverage(normal(10_000, 1000), normal(10_000, 1000, seed=1))
    assert found.pop("density") == pytest.approx(1.056, abs=0.25)  # from 0.87 to 1.05 in six draws of our own
    assert found == pytest.approx({"precision": 0.477, "recall": 0.471, "coverage": 0.974}, abs=0.03)


def test_density_and_coverage_of_one_distribution():
    """Naeem et al. 2020: density is expected at 1, coverage at 1 - (N - 1) ... (N - k) / ((2 N - 1) ... (2 N - k))."""
    found = [
        precision_recall_density_coverage(normal(300, 16, seed=s), normal(300, 16, seed=99 + s)) for s in range(12)
    ]
    coverage = 1 - math.prod((300 - i) / (600 - i) for i in range(1, 6))
    assert np.mean([one["density"] for one in found]) == pytest.approx(1, abs=0.03)
    assert np.mean([one["coverage"] for one in found]) == pytest.approx(coverage, abs=0.01)


def test_the_bias_of_few_pictures_is_what_it_is_said_to_be():
    """Two sets of one Gaussian, of equal and of unlike variances."""
    assert null_bias(np.eye(24), 600, 600) == pytest.approx(24 * 29 / (2 * 600))
    stds = 0.8 ** np.arange(24)
    for std in (np.ones(24), stds):
        found = [
            frechet_distance(
                *statistics(normal(400, 24, seed=s) * std), *statistics(normal(900, 24, seed=50 + s) * std)
            )
            for s in range(20)
        ]
        assert np.mean(found) == pytest.approx(null_bias(np.diag(std**2), 400, 900), rel=0.05)


def test_the_line_leaves_the_bias_out():
    dim, count, exact = 24, 600, 4.0
    shift = np.full(dim, 2 / math.sqrt(dim))
    found = [frechet_infinity(normal(count, dim, seed=s) + shift, np.zeros(dim), np.eye(dim), seed=s) for s in range(6)]
    assert abs(np.mean([value for value, _ in found]) - exact) < 0.2  # the bias alone would be 0.29


def test_the_line_s_interval_is_one():
    """Sets drawn anew from one Gaussian: how far the value spreads, and how often its interval holds the truth."""
    dim, count, exact, prompts = 16, 400, 4.0, [str(i) for i in range(400)]
    known = FeatureSet(np.zeros((2, dim)), np.zeros(dim), np.eye(dim))
    found = []
    for seed in range(40):
        seen = FeatureSet.of(normal(count, dim, seed=seed) + 2 / math.sqrt(dim))
        found.append(infinity(seen, known, moved_by_prompts(seen, known, prompts)))
    reach = [(one["fd_infinity_high"] - one["fd_infinity_low"]) / 2 for one in found]
    assert np.mean(reach) == pytest.approx(1.96 * np.std([one["fd_infinity"] for one in found]), rel=0.25)
    held = [one["fd_infinity_low"] <= exact <= one["fd_infinity_high"] for one in found]
    assert sum(held) >= 35  # of 40; 38 are expected, and the fit's error alone would hold 30


def test_the_interval_counts_prompts_and_not_pictures():
    draw = np.random.default_rng(0)
    values = np.repeat(draw.normal(size=50), 8)  # eight like pictures of each of 50 prompts
    prompts = np.repeat([f"prompt {i}" for i in range(50)], 8)
    low, high = prompt_interval(values, prompts)
    expected = 2 * 1.96 * values.std() / math.sqrt(50)
    assert high - low == pytest.approx(expected, rel=0.15) and low < values.mean() < high
    assert prompt_interval(values, prompts) == (low, high)


def test_the_interval_is_within_captions_where_they_are_few():
    """Ten captions far apart, 200 pictures each: pictures are drawn anew, so the captions' spread is not in it."""
    draw = np.random.default_rng(0)
    values = np.repeat(100 * draw.normal(size=10), 200) + draw.normal(size=2000)
    prompts = np.repeat([f"a photo of {i}" for i in range(10)], 200).tolist()
    low, high = prompt_interval(values, prompts)
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(2000), rel=0.15) and low < values.mean() < high
    assert few_prompts(prompts) == 10 and few_prompts(prompts[::200]) is None
    # and of the Frechet distance: sets of ten captions whose features lie apart
    centres = np.repeat(3 * draw.normal(size=(10, 8)), 60, axis=0)
    seen, known = (FeatureSet.of((centres + draw.normal(size=centres.shape)).astype(np.float32)) for _ in range(2))
    moved = moved_by_prompts(seen, known, np.repeat(list("abcdefghij"), 60).tolist())
    anew = [
        FeatureSet.of((centres + draw.normal(size=centres.shape)).astype(np.float32)).distance(known) for _ in range(40)
    ]
    assert moved.std() == pytest.approx(np.std(anew), rel=0.5)


def test_an_interval_needs_a_prompt_for_each_value():
    with pytest.raises(ValueError, match="3 values for 2 prompts"):
        prompt_interval([1, 2, 3], ["a", "b"])
