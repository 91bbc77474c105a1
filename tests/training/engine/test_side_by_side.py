import pytest
import torch
from torch import nn

from training.engine import side_by_side as module
from training.engine.side_by_side import parts_of, side_by_side
from training.text_encoder.losses import split_by_length


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 2)


def test_parts_give_the_outputs_and_gradients_of_the_whole():
    """Rows, what all rows read, and weights: the sums that one pass through autograd makes."""
    torch.manual_seed(0)
    layer, spare = nn.Linear(4, 3).double(), nn.Linear(2, 2).double()
    rows, all_read = (torch.randn(5, 4).double().requires_grad_() for _ in range(2))
    numbers = torch.arange(5)

    def call(read, x, which):
        y = layer(x) * layer(read).mean(0)
        return {"y": y, "best": y.argmax(1), "loss": (y.sum(1) - which).square()}

    weights = [*layer.parameters(), *spare.parameters()]
    inputs = [rows, all_read, *weights]
    whole = call(all_read, rows, numbers)
    parts = [{"x": a, "which": b} for a, b in zip(rows.split([2, 3]), numbers.split([2, 3]), strict=True)]
    found = side_by_side(call, parts, {"read": all_read}, weights)
    gradients = []
    for made in (whole, {name: torch.cat([part[name] for part in found]) for name in whole}):
        total = (made["y"].sin() * made["loss"][:, None]).sum()
        gradients.append(torch.autograd.grad(total, inputs, allow_unused=True))
        for name, expected in whole.items():
            torch.testing.assert_close(made[name], expected)
    torch.testing.assert_close(*gradients)
    assert gradients[1][-1] is None and not found[0]["best"].requires_grad


def test_a_second_backward_pass_is_refused():
    weight = torch.ones(2, requires_grad=True)
    made = side_by_side(lambda x: {"y": x * weight}, [{"x": torch.ones(2)}] * 2, {}, [weight])
    made[0]["y"].sum().backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, torch.ones(2))
    with pytest.raises(RuntimeError, match="second backward"):
        made[0]["y"].sum().backward()


def dropping(network):
    network.append(nn.Dropout(0.1))


def attention_that_drops(network):
    network[0].attention_dropout = 0.1


def normed_by_the_batch(network):
    network.append(nn.BatchNorm1d(2))


def hooked(network):
    network[0].register_forward_hook(lambda *given: None)


def compiled(network):
    network[0].compile(backend="eager")


def halved(network):
    network.half()


def checkpointed(network):
    network[0].gradient_checkpointing = True


@pytest.mark.parametrize(
    "change", [dropping, attention_that_drops, normed_by_the_batch, hooked, compiled, halved, checkpointed]
)
def test_what_would_come_out_otherwise_stays_whole(two_cores, change):
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))
    assert parts_of(network, 8) == 2 and parts_of(network, 1) == 1
    change(network)
    assert parts_of(network, 8) == 1


def test_without_training_nothing_is_dropped(two_cores):
    assert parts_of(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval(), 8) == 2


def test_groups_hold_each_text_once_and_about_as_many_tokens():
    lengths = torch.randint(3, 20, (101,), generator=torch.Generator().manual_seed(0))
    shares = split_by_length(lengths, 3)
    assert torch.cat(shares).sort().values.tolist() == list(range(101))
    sums = [int(lengths[share].sum()) for share in shares]
    assert max(sums) - min(sums) <= 2 * 19
    assert lengths[shares[0]].max() <= lengths[shares[2]].min()


@pytest.mark.parametrize(("lengths", "count"), [([1, 100], 2), ([5, 5], 2), ([1, 1, 90], 3), ([90, 1, 1], 2)])
def test_every_share_has_a_text(lengths, count):
    assert all(map(len, split_by_length(torch.tensor(lengths), count)))
