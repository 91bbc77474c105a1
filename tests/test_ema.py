import numpy as np
import pytest
import torch
from torch import nn

from training.ema import PowerEMA, gamma_of_width


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponent_of_the_paper(width, gamma):
    # EDM2 (Karras et al. 2024), sec. 3.1: widths 5 % and 10 % are gamma 16.97 and 6.94
    assert gamma_of_width(width) == pytest.approx(gamma, abs=0.01)


def test_average_is_the_power_function_profile():
    """After n updates w_t weighs (t / n)^(g + 1) - ((t - 1) / n)^(g + 1): EDM2's profile, in closed form."""
    module, width = nn.Linear(1, 1, bias=False).double(), 0.1
    ema, values = PowerEMA(module, width), np.random.default_rng(0).normal(size=40)
    for step, value in enumerate(values, start=1):
        module.weight.data.fill_(value)
        ema.update(module, step)
    edges = (np.arange(41) / 40) ** (gamma_of_width(width) + 1)
    assert ema.module.weight.item() == pytest.approx((np.diff(edges) * values).sum(), rel=1e-12)
    assert module.weight.item() == values[-1]


def test_the_random_start_is_forgotten_at_once():
    module = nn.Linear(3, 3)
    ema = PowerEMA(module, 0.1)
    with torch.no_grad():
        module.weight.add_(1)
    ema.update(module, 1)
    assert torch.equal(ema.module.weight, module.weight)


def test_refused_width():
    with pytest.raises(ValueError, match=r"ema_width 0\.5"):
        gamma_of_width(0.5)
