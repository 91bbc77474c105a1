import numpy as np
import pytest
import torch
from torch import nn

from training.optim.ema import WIDTHS, gamma_of_width, nearest_width, posthoc_coefficients
from training.optim.update import PowerEMA
from training.storage.snapshots import due


def profile(steps: int, width: float) -> np.ndarray:
    """EDM2's power-function profile over updates 1..steps, in closed form: what each update's weights weigh."""
    return np.diff((np.arange(steps + 1) / steps) ** (gamma_of_width(width) + 1))


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponent_of_the_paper(width, gamma):
    # EDM2 (Karras et al. 2024), sec. 3.1: widths 5 % and 10 % are gamma 16.97 and 6.94
    assert gamma_of_width(width) == pytest.approx(gamma, abs=0.01)


@pytest.mark.parametrize("every", [1, 4])
def test_averages_are_the_power_function_profiles(every):
    """In closed form; brought up to date every fourth update, the fourth's weights count for all four."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema, values = PowerEMA([weight]), np.random.default_rng(0).normal(size=40)
    for step in range(every, 41, every):
        weight.data.fill_(values[step - 1])
        ema.update([weight], step, step - every)
    for width in WIDTHS:
        weights = profile(40, width).reshape(-1, every).sum(1)
        assert ema.averages[width][0].item() == pytest.approx((weights * values[every - 1 :: every]).sum(), rel=1e-12)
    assert weight.item() == values[-1]


def test_the_random_start_is_forgotten_at_once():
    weight = nn.Parameter(torch.randn(3, 3))
    ema = PowerEMA([weight])
    with torch.no_grad():
        weight.add_(1)
    ema.update([weight], 1, 0)
    assert all(torch.equal(average, weight) for (average,) in ema.averages.values())


def test_refused_width():
    with pytest.raises(ValueError, match=r"ema_width 0\.5"):
        gamma_of_width(0.5)
    assert nearest_width(0.03) == 0.05 and nearest_width(0.2) == 0.1


@pytest.mark.parametrize(
    ("count", "width", "within"),
    [(8, 0.05, 1e-6), (8, 0.1, 1e-6), (8, 0.07, 0.04), (8, 0.2, 0.07), (16, 0.03, 0.05), (16, 0.2, 0.01)],
)
def test_any_width_from_snapshots(count, width, within):
    """Against the average of that width itself, over random walks: the error as a part of what the nearest tracked
    width would have been wrong by."""
    steps = 1000
    walk = np.random.default_rng(1).normal(size=(steps, 500)).cumsum(0)
    taken = [step for step in range(1, steps + 1) if due(step, steps, count)]
    snapshots = [(step, tracked) for step in taken for tracked in WIDTHS]
    values = np.stack([profile(step, tracked) @ walk[:step] for step, tracked in snapshots])
    wanted = profile(steps, width) @ walk
    error = posthoc_coefficients(snapshots, steps, width) @ values - wanted
    nearest = profile(steps, nearest_width(width)) @ walk - wanted
    assert np.square(error).mean() ** 0.5 < within * np.square(nearest).mean() ** 0.5 + 1e-9


def edm2_correlation(a_step, a_width, b_step, b_width):
    """EDM2's reference, phema.py, `power_function_correlation`, written from the paper's app. C.3."""
    a_exp, b_exp = gamma_of_width(a_width), gamma_of_width(b_width)
    ratio = a_step / b_step
    numerator = (a_exp + 1) * (b_exp + 1) * ratio ** (b_exp if a_step < b_step else -a_exp)
    return numerator / ((a_exp + b_exp + 1) * max(a_step, b_step))


@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.25, 0.28])
def test_coefficients_are_the_references_and_sum_to_one(count, width):
    steps = 1000
    taken = [step for step in range(1, steps + 1) if due(step, steps, count)]
    snapshots = [(step, tracked) for step in taken for tracked in WIDTHS]
    # as the reference solves it: A x = b, divided by the sum
    gram = np.array([[edm2_correlation(*a, *b) for b in snapshots] for a in snapshots])
    wanted = np.array([edm2_correlation(*a, steps, width) for a in snapshots])
    reference = np.linalg.solve(gram, wanted)
    found = posthoc_coefficients(snapshots, steps, width)
    np.testing.assert_allclose(found, reference / reference.sum(), rtol=0, atol=1e-6 * np.abs(reference).max())
    assert abs(found.sum() - 1) < 1e-12


@pytest.mark.parametrize("width", [0.15, 0.25, 0.28])
def test_a_wide_average_of_walks_far_from_zero(width):
    """Around 10, where a sum below 1 shows: what is lost is a share of the weights themselves."""
    steps = 1000
    walk = 10 + 0.01 * np.random.default_rng(2).normal(size=(steps, 500)).cumsum(0)
    snapshots = [(step, tracked) for step in range(1, steps + 1) if due(step, steps, 8) for tracked in WIDTHS]
    values = np.stack([profile(step, tracked) @ walk[:step] for step, tracked in snapshots])
    made = posthoc_coefficients(snapshots, steps, width) @ values
    np.testing.assert_allclose(made, profile(steps, width) @ walk, rtol=0.01)


def test_no_snapshot_of_the_step_is_refused():
    with pytest.raises(ValueError, match="expected a snapshot of that step"):
        posthoc_coefficients([(10, 0.05), (10, 0.1)], 12, 0.07)


@pytest.mark.parametrize(("steps", "count"), [(6, 2), (100, 8), (7, 8), (2000, 8), (10, 0), (13, 5)])
def test_snapshots_are_spread_evenly_to_the_last_step(steps, count):
    taken = [step for step in range(1, steps + 1) if due(step, steps, count)]
    assert len(taken) == min(count, steps) and (not count or taken[-1] == steps)
    gaps = np.diff([0, *taken])
    assert not count or gaps.max() - gaps.min() <= 1
