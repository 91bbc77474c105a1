"""Means and covariances, added up batch by batch: numpy's numbers, and the same bits however they are cut."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.features.moments import BLOCK, Moments, statistics
from tests.eval.metrics.test_metrics import mixed

ROOT = Path(__file__).parents[3]


def test_moments_are_numpy_s():
    features = mixed(1000, 40)
    mean, cov = statistics(features)
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-10)
    assert np.array_equal(cov, cov.T)


def added(features, batch):
    moments = Moments(features.shape[1])
    for start in range(0, len(features), batch):
        moments.add(features[start : start + batch])
    return moments


def same_bits(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_and_parts_leave_the_same_bits():
    features = mixed(5 * BLOCK + 77, 300)
    expected = statistics(features)
    for batch in (1, 7, 64, 1000):
        assert same_bits(added(features, batch).mean_and_covariance(), expected)
    parts = [
        added(features[: 2 * BLOCK], 50),
        added(features[2 * BLOCK : 3 * BLOCK], 9),
        added(features[3 * BLOCK :], 8),
    ]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        whole = Moments(300)
        for number in order:
            whole.merge(parts[number])
        assert same_bits(whole.mean_and_covariance(), expected)


def test_parts_that_are_too_large_together_do_not_merge():
    """Two sums that are within the limit and would overflow as one."""
    half = np.full((20, 2), 3.5e5, dtype=np.float32)  # 20 (3.5e5)^2 = 2.4e12, the limit is 4.4e12
    one, other = added(half, 20), added(half, 20)
    before = one.mean_and_covariance()
    with pytest.raises(ValueError, match="too large for exact sums over 40 rows"):
        one.merge(other)
    assert same_bits(one.mean_and_covariance(), before)


def test_the_number_of_threads_leaves_the_same_bits():
    """Processes that share a machine have fewer each."""
    code = (
        "import hashlib, numpy as np; from eval.features.moments import statistics\n"
        "mean, cov = statistics(np.random.default_rng(0).normal(size=(1300, 300)).astype(np.float32))\n"
        "print(hashlib.sha256(mean.tobytes() + cov.tobytes()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            cwd=ROOT,
            env={**os.environ, "OPENBLAS_NUM_THREADS": number, "OMP_NUM_THREADS": number},
        ).stdout
        for number in ("1", "2")
    }
    assert len(found) == 1


def test_the_statistics_can_be_asked_for_between_batches():
    features = mixed(700, 12)
    moments = added(features[:300], 64)
    moments.mean_and_covariance()
    moments.add(features[300:])
    assert same_bits(moments.mean_and_covariance(), statistics(features))


def test_memory_does_not_grow_with_the_pictures():
    """A process of its own, 512 wide: what 8,192 rows take beyond 1,024 is less than one more covariance."""
    code = (
        "import resource, sys, numpy as np; from eval.features.moments import Moments\n"
        "moments, rows = Moments(512), np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32)\n"
        "for _ in range(int(sys.argv[1])): moments.add(rows)\n"
        "moments.mean_and_covariance(); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, n], check=True, capture_output=True, cwd=ROOT).stdout)
        for n in ("4", "32")
    ]
    assert peaks[1] - peaks[0] < 2 * 1024  # KiB
