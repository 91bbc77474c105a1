"""What every step is made of: changes to pictures drawn by (seed, step), workers that change nothing, stopping."""

import signal

import numpy as np
import pytest
import torch

from training.distributed.processes import rows_of_process
from training.engine.augment import AugmentConfig, augment
from training.engine.batches import Batch, Steps, batch_ids, iterate, row_slices
from training.engine.loop import Stop
from training.engine.metrics import FiniteCheck

PIXELS = torch.arange(8 * 3 * 6 * 6, dtype=torch.float32).view(8, 3, 6, 6)


def batch(step=0, rows=slice(0, 8)):
    return Batch(0, step, batch_ids(0, step, 64, 8), rows)


def test_no_augmentation_changes_nothing():
    assert torch.equal(augment(PIXELS, batch(), AugmentConfig()), PIXELS)


def test_mirror_turns_whole_pictures_about_as_often_as_said():
    turned = 0
    for step in range(100):
        for before, after in zip(PIXELS, augment(PIXELS, batch(step), AugmentConfig(mirror=0.3)), strict=True):
            assert torch.equal(after, before) or torch.equal(after, before.flip(-1))
            turned += torch.equal(after, before.flip(-1))
    assert 180 < turned < 300  # 240 of 800 expected, standard deviation 13


def test_shift_moves_by_whole_pixels_and_repeats_the_edge():
    seen = set()
    for step in range(60):
        for before, after in zip(PIXELS, augment(PIXELS, batch(step), AugmentConfig(shift=2)), strict=True):
            padded = np.pad(before.numpy(), ((0, 0), (2, 2), (2, 2)), mode="edge")
            places = [
                (r, c) for r in range(5) for c in range(5) if (padded[:, r : r + 6, c : c + 6] == after.numpy()).all()
            ]
            assert len(places) == 1
            seen |= set(places)
    assert len(seen) == 25


def test_a_part_of_the_batch_is_changed_as_in_the_whole():
    config = AugmentConfig(mirror=0.5, shift=2)
    whole = augment(PIXELS, batch(3), config)
    parts = [augment(PIXELS[rows], batch(3, rows), config) for rows in (slice(0, 3), slice(3, 8))]
    assert torch.equal(torch.cat(parts), whole)


def steps():
    rows = [r[0] for r in row_slices(8, 1, 3)]
    return Steps(lambda b: {"noise": b.normal("noise", 2)}, 20, 5, 8, rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_make_the_same_steps_in_order_and_leave_the_global_generator(workers):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    made = list(iterate(steps(), 3, 9, workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert [item.step for item in made] == list(range(3, 9))
    for item in made:
        direct = steps()[item.step]
        assert (item.ids == direct.ids).all() and item.rows == direct.rows
        assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(item.passes, direct.passes, strict=True))


@pytest.mark.parametrize(("count", "processes"), [(7, 2), (16, 3), (5, 5), (1000, 7)])
def test_every_row_is_some_process_and_no_row_is_twos(count, processes):
    rows = [list(range(count))[rows_of_process(count, processes, rank)] for rank in range(processes)]
    assert [row for part in rows for row in part] == list(range(count))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_the_handlers_put_back(number, code):
    before = signal.getsignal(number)
    with Stop(processes=1) as stop:
        assert not stop.is_asked()
        signal.raise_signal(number)
        assert stop.is_asked() and stop.exit_code == code
    assert signal.getsignal(number) is before


@pytest.mark.gpu
def test_a_norm_on_the_device_is_looked_at_a_step_later():
    finite = FiniteCheck()
    finite.record(0, np.arange(2), torch.tensor(1.0, device="cuda"), [])
    finite.check()
    losses = [(np.arange(2), torch.tensor([1.0, float("nan")], device="cuda"))]
    finite.record(1, np.arange(2), torch.tensor(float("nan"), device="cuda"), losses)
    with pytest.raises(ValueError, match=r"step 1: the gradient is not finite, and the loss of \[1\] is not"):
        finite.check()
