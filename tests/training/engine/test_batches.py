import numpy as np
import pytest
import torch

from training.engine.batches import Batch, batch_ids, generator, row_slices


def test_every_epoch_sees_every_sample_once():
    ids = np.concatenate([batch_ids(seed=3, step=k, count=10, batch_size=4) for k in range(5)])
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert list(ids[:10]) != list(ids[10:])


def test_order_is_a_pure_function_of_seed_and_step():
    ahead = [batch_ids(1, k, 50, 16) for k in range(9)]
    back = [batch_ids(1, k, 50, 16) for k in reversed(range(9))][::-1]
    assert all((a == b).all() for a, b in zip(ahead, back, strict=True))
    assert not (batch_ids(1, 0, 50, 16) == batch_ids(2, 0, 50, 16)).all()


def test_a_batch_larger_than_the_data_set_is_several_epochs():
    assert np.bincount(batch_ids(0, 0, 3, 9)).tolist() == [3, 3, 3]


def test_parts_draw_what_the_whole_draws():
    ids = batch_ids(0, 5, 100, 8)
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
