"""The batch of step k: samples, randomness, augmentation and workers; and stopping at the end of a step."""

import signal

import numpy as np
import pytest
import torch

from sd_mini.data.batches import Batch, Order, Steps, generator, iterate, row_slices
from training.distributed.processes import rows_of_process
from training.engine.augment import AugmentConfig, augment
from training.engine.loop import Stop


def test_every_epoch_sees_every_sample_once():
    ids = np.concatenate([Order(seed=3, count=10, batch_size=4).ids(k) for k in range(5)])
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert list(ids[:10]) != list(ids[10:])


def test_order_is_a_pure_function_of_seed_and_step():
    ahead = [Order(1, 50, 16).ids(k) for k in range(9)]
    back = [Order(1, 50, 16).ids(k) for k in reversed(range(9))][::-1]
    assert all((a == b).all() for a, b in zip(ahead, back, strict=True))
    assert not (Order(1, 50, 16).ids(0) == Order(2, 50, 16).ids(0)).all()


def test_a_batch_larger_than_the_data_set_is_several_epochs():
    assert np.bincount(Order(0, 3, 9).ids(0)).tolist() == [3, 3, 3]


def test_parts_draw_what_the_whole_draws():
    ids = Order(0, 100, 8).ids(5)
    for processes, accumulation in [(2, 1), (1, 4), (2, 2), (1, 5), (3, 1)]:
        slices = [s for per_pass in row_slices(8, processes, accumulation) for s in per_pass]
        whole, parts = Batch(0, 5, ids, slice(0, 8)), [Batch(0, 5, ids, s) for s in slices]
        assert np.concatenate([p.own_ids for p in parts]).tolist() == ids.tolist()
        assert torch.equal(torch.cat([p.normal("noise", 3) for p in parts]), whole.normal("noise", 3))
        assert torch.equal(torch.cat([p.uniform("u") for p in parts]), whole.uniform("u"))
        assert torch.equal(torch.cat([p.stratified("t") for p in parts]), whole.stratified("t"))


def test_names_and_steps_are_independent_draws():
    draws = [torch.randn(2000, generator=generator(0, *key)) for key in [(0, "a"), (0, "b"), (1, "a")]]
    assert torch.corrcoef(torch.stack(draws)).fill_diagonal_(0).abs().max() < 0.1


@pytest.mark.parametrize("second", ["normal", "uniform", "uniform_all", "stratified"])
def test_a_name_is_drawn_once(second):
    batch = Batch(0, 5, np.arange(8), slice(0, 8))
    batch.normal("timesteps")
    with pytest.raises(ValueError, match="step 5: 'timesteps' is drawn twice"):
        getattr(batch, second)("timesteps")


def test_stratified_draws_fill_every_part_of_a_batch_and_over_the_steps():
    batches = [Batch(2, step, np.arange(64), slice(0, 64)) for step in range(3000)]
    parts = (torch.stack([b.stratified("t") for b in batches]) * 64).long()
    assert torch.equal(parts.sort(1).values, torch.arange(64).expand(3000, -1))
    # a row's part says nothing of the row: each is in the lower half half of the time
    assert ((parts < 32).double().mean(0) - 0.5).abs().max() < 4 * 0.5 / 3000**0.5
    # 50 steps of batches of 3: each of 10 parts has its 15 draws, give or take two at its ends
    few = torch.cat([Batch(1, step, np.arange(3), slice(0, 3)).stratified("t") for step in range(50)])
    assert (torch.histc(few, 10, 0, 1) - 15).abs().max() <= 2
    starts = torch.stack([Batch(seed, 0, np.arange(1), slice(0, 1)).stratified("t")[0] for seed in range(2000)])
    assert starts.mean().item() == pytest.approx(0.5, abs=0.03) and starts.std().item() == pytest.approx(
        12**-0.5, abs=0.02
    )


def test_any_two_names_are_uncorrelated():
    batches = [Batch(2, step, np.arange(64), slice(0, 64)) for step in range(3000)]
    draws = {
        "t": torch.stack([b.stratified("t") for b in batches]).flatten(),
        "caption": torch.cat([b.uniform("caption") for b in batches]),
        "dropout": torch.cat([b.uniform("dropout") for b in batches]),
        "noise": torch.cat([b.normal("noise") for b in batches]),
        "posterior_noise": torch.cat([b.normal("posterior_noise") for b in batches]),
    }
    # of the values and of their squares, in which a normal and a uniform draw of one generator hang together by 0.31
    values = torch.stack([x for draw in draws.values() for x in (draw.double(), draw.double().square())])
    found = torch.corrcoef(values)
    same_draw = torch.eye(len(draws), dtype=torch.bool).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert found[~same_draw].abs().max() < 0.01


PIXELS = torch.arange(8 * 3 * 6 * 6, dtype=torch.float32).view(8, 3, 6, 6)


def batch(step=0, rows=slice(0, 8)):
    return Batch(0, step, Order(0, 64, 8).ids(step), rows)


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
    return Steps(lambda b: {"noise": b.normal("noise", 2)}, Order(5, 20, 8), rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_make_the_same_steps_in_order_and_leave_the_global_generator(workers):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    items = list(iterate(steps(), 3, 9, workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert [item.step for item in items] == list(range(3, 9))
    for item in items:
        direct = steps()[item.step]
        assert (item.ids == direct.ids).all() and item.rows == direct.rows
        assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(item.passes, direct.passes, strict=True))


@pytest.mark.parametrize(("count", "processes"), [(7, 2), (16, 3), (5, 5), (1000, 7)])
def test_every_row_is_some_process_and_no_row_is_twos(count, processes):
    rows = [list(range(count))[rows_of_process(count, processes, rank)] for rank in range(processes)]
    assert [row for part in rows for row in part] == list(range(count))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_recorded_and_the_handlers_restored(number, code):
    before = signal.getsignal(number)
    with Stop(processes=1) as stop:
        assert not stop.is_asked()
        signal.raise_signal(number)
        assert stop.is_asked() and stop.exit_code == code
    assert signal.getsignal(number) is before


def test_weights_say_how_often_a_sample_is_drawn_and_every_epoch_rounds_them_down_or_up():
    weights = np.array([0.25, 1.0, 2.5, 0.25, 3.0])
    order, epochs = Order(seed=1, count=5, batch_size=7, weights=weights), 400
    ids = np.concatenate([order.ids(step) for step in range(epochs)])  # an epoch is 7 draws
    for epoch in ids.reshape(epochs, 7):
        counts = np.bincount(epoch, minlength=5)
        assert (counts >= np.floor(weights)).all() and (counts <= np.ceil(weights)).all()
    assert np.abs(np.bincount(ids) / epochs - weights).max() < 0.08  # 3 standard errors of a rounding's mean
    assert (Order(1, 5, 7, weights).ids(321) == order.ids(321)).all()


def test_weights_of_one_are_every_sample_once_an_epoch():
    order = Order(seed=0, count=6, batch_size=6, weights=np.ones(6))
    assert all(sorted(order.ids(step)) == list(range(6)) for step in range(5))
