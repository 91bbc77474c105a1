import copy
import io

import pytest
import torch
from diffusers import PRXTransformer2DModel

from sd_mini import noise_predictor
from sd_mini.cpu import fused
from sd_mini.cpu.native import library
from tests.support.system import missing


@pytest.fixture
def pair():
    """A network as it is built here, and the stock one with its weights."""
    torch.manual_seed(0)
    network = {"hidden_size": 32, "num_heads": 2, "depth": 2, "mlp_ratio": 3.0}
    ours = noise_predictor.build("prx", network, (4, 8, 8), 24)
    for parameter in ours.parameters():  # a fresh PRX has its attention gated off
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    stock = PRXTransformer2DModel(**{k: v for k, v in ours.config.items() if not k.startswith("_")})
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@pytest.fixture
def written(monkeypatch):
    """How often the written network has run: () => int."""
    runs = []
    run = fused._run
    monkeypatch.setattr(fused, "_run", lambda *given: runs.append(None) or run(*given))
    return lambda: len(runs)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_the_states_that_are_read_and_their_gradient(pair, written, monkeypatch, native, number):
    """A loss of the velocity and of a block's states together, against a hook on the stock network's block."""
    if not native:
        monkeypatch.setattr(fused, "library", lambda *shape: None)
    elif library(2, 16, 16, 6) is None:
        missing("no C compiler (cc); apt-get install gcc")
    monkeypatch.setattr(fused, "cores", lambda: 2)  # so that the batch is cut
    ours, stock = pair
    given, states = inputs(17), []
    stock.blocks[number].register_forward_hook(lambda module, args, made: states.append(made))
    with fused.states_of(ours, ours.blocks[number]) as found:
        outputs = [network(**given).sample for network in (ours, stock)]
    assert written() == 1 and ours.read is None
    torch.testing.assert_close(found, states, rtol=1e-5, atol=1e-5)
    a, b = torch.randn_like(outputs[0]), torch.randn_like(states[0])
    for output, read in zip(outputs, (*found, *states), strict=True):
        ((output * a).sum() + (read * b).sum()).backward()
    for own, other in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), fused.states_of(ours, ours.blocks[number]) as found:
        ours(**given)
    torch.testing.assert_close(found[0], states[0].detach(), rtol=1e-5, atol=1e-5)


def test_the_states_of_a_network_that_is_not_written_out(pair):
    """In float64 it runs as diffusers wrote it: the same list, by a hook that is gone afterwards."""
    ours, stock = (network.double() for network in pair)
    given = {name: value if name == "attention_mask" else value.double() for name, value in inputs(2).items()}
    states = []
    stock.blocks[1].register_forward_hook(lambda module, args, made: states.append(made))
    with fused.states_of(ours, ours.blocks[1]) as found:
        ours(**given), stock(**given)
    torch.testing.assert_close(found, states)
    assert not ours.blocks[1]._forward_hooks


def inputs(n, side=8):
    mask = torch.rand(n, 6) < 0.6
    return {
        "hidden_states": torch.randn(n, 4, side, side),
        "timestep": torch.rand(n),
        "encoder_hidden_states": torch.randn(n, 6, 24),
        "attention_mask": mask,
    }


def assert_equal(ours, stock, given, tolerance=1e-5):
    outputs = [network(**given).sample for network in (ours, stock)]
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    target = torch.randn_like(outputs[0])
    for network, output in zip((ours, stock), outputs, strict=True):
        network.zero_grad()
        (output * target).sum().backward()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=10 * tolerance, atol=10 * tolerance)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(**given, return_dict=False)[0], outputs[1].detach(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("n", "threads"), [(3, 1), (3, 2), (17, 2)])
def test_the_written_network_is_the_stock_network(pair, written, n, threads, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(fused, "library", lambda *shape: None)
    elif library(2, 16, 16, 6) is None:
        missing("no C compiler (cc); apt-get install gcc")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal(*pair, inputs(n))
        assert_equal(*pair, {**inputs(n, side=4), "attention_mask": None})
    finally:
        torch.set_num_threads(before)
    assert written() == 4


def test_weights_lent_for_one_call_and_frozen_ones(pair, written):
    ours, stock = pair
    given, lent = inputs(3), {name: 2 * p.detach() for name, p in stock.named_parameters()}
    made = torch.func.functional_call(ours, lent, kwargs=given).sample
    torch.testing.assert_close(made, torch.func.functional_call(stock, lent, kwargs=given).sample, rtol=1e-5, atol=1e-4)
    ours.txt_in.requires_grad_(False)
    ours(**given).sample.sum().backward()
    assert ours.txt_in.weight.grad is None and ours.img_in.weight.grad is not None and written() == 2


def test_nothing_is_compiled_without_a_compiler_or_for_other_widths(monkeypatch):
    assert library(2, 8, 16, 6) is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert library.__wrapped__(2, 16, 16, 6) is None
    monkeypatch.setenv("CC", "false")  # which compiles nothing
    assert library.__wrapped__(2, 16, 16, 6) is None


def test_large_scores_and_gradients_stay_finite(pair, written):
    ours, stock = pair
    for network in pair:
        for block in network.blocks:
            block.attention.norm_q.weight.data.mul_(40)
            block.gate_proj.weight.data.mul_(40)
    assert_equal(ours, stock, inputs(3), tolerance=1e-3)
    assert written()


def hooked(network):
    network.blocks[0].register_forward_hook(lambda module, given, output: output)


def checkpointed(network):
    network.enable_gradient_checkpointing()


def compiled(network):
    network.blocks[1].compile(backend="eager")


def replaced(network):
    class Other(torch.nn.Linear):
        pass

    network.blocks[0].gate_proj.__class__ = Other


@pytest.mark.parametrize("change", [hooked, checkpointed, compiled, replaced])
def test_a_changed_network_runs_as_it_is(pair, written, change):
    ours, stock = pair
    change(ours)
    assert_equal(ours, stock, inputs(3))
    assert not written()


def test_inputs_that_are_not_what_it_was_written_for(pair, written):
    ours, stock = pair
    given = inputs(3)
    given["hidden_states"].requires_grad_(True)
    gradients = []
    for network in pair:
        gradients += torch.autograd.grad(network(**given).sample.sum(), given["hidden_states"])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert ours(**inputs(3)).sample.dtype == stock(**inputs(3)).sample.dtype
    assert not written()


@pytest.mark.parametrize(("n", "threads"), [(3, 1), (17, 2)])
def test_under_autocast_it_errs_no_more_than_the_stock_network(pair, written, n, threads, monkeypatch):
    """Both against the stock network in float32: outputs and gradients, by bfloat16's products of 8 bits."""
    if library(2, 16, 16, 6, True) is None:
        missing("no C compiler (cc); apt-get install gcc")
    monkeypatch.setattr(fused, "cores", lambda: threads)
    ours, stock = pair
    given, found = inputs(n), []
    target = torch.randn_like(given["hidden_states"])
    for network, cast in ((stock, False), (stock, True), (ours, True)):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            output = network(**given).sample
            assert output.dtype == (torch.bfloat16 if cast else torch.float32)
            (output.float() * target).sum().backward()
        found.append([output.detach().float(), *(p.grad for p in network.parameters())])
        assert all(p.grad.dtype == torch.float32 for p in network.parameters())
    assert written() == 1
    for exact, theirs, own in zip(*found, strict=True):
        scale = exact.norm()
        assert 1e-5 < (own - exact).norm() / scale < 0.03
        assert (own - exact).norm() <= 1.2 * (theirs - exact).norm() + 1e-3 * scale


def test_without_a_compiler_the_stock_network_runs_under_autocast(pair, written, monkeypatch):
    monkeypatch.setattr(fused, "library", lambda *shape: None)
    ours, stock = pair
    given = inputs(3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(ours(**given).sample, stock(**given).sample, rtol=0.02, atol=0.02)
    assert not written()


def test_what_is_no_number_stays_none_in_bfloat16(pair):
    """So that a training that has come to that is stopped, as in float32."""
    if library(2, 16, 16, 6, True) is None:
        missing("no C compiler (cc); apt-get install gcc")
    given = inputs(3)
    given["hidden_states"].view(torch.int32)[1, 0, 0, 0] = 0x7FFFFFFF  # a NaN that rounding carries over
    with torch.autocast("cpu", torch.bfloat16):
        output = pair[0](**given).sample
    assert output[1].isnan().all() and output[[0, 2]].isfinite().all()


def test_a_second_backward_pass_is_refused(pair):
    output = pair[0](**inputs(3)).sample.sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        output.backward()


def test_copies_and_saved_folders_are_the_stock_ones(pair, written, tmp_path):
    ours, _ = pair
    given, twin = inputs(3), copy.deepcopy(ours)
    with torch.no_grad():
        before = ours(**given).sample
        for parameter in ours.parameters():
            parameter.zero_()
        assert torch.equal(twin(**given).sample, before)  # the copy runs with its own weights
    assert written() == 2
    twin.save_pretrained(tmp_path)
    again = PRXTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**given).sample, before, rtol=0, atol=1e-5)
    torch.save(twin.state_dict(), io.BytesIO())


def test_a_compiler_that_fails_is_named_and_torch_stands_in(pair, monkeypatch):
    monkeypatch.setenv("CC", "false")
    library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"false cannot compile fused_prx\.c"):
            assert_equal(*pair, inputs(3))
    finally:
        library.cache_clear()
