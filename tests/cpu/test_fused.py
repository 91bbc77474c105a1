import copy
import io

import pytest
import torch
from diffusers import PRXTransformer2DModel

from sd_mini import noise_predictor
from sd_mini.cpu import accelerate, fused, stock_copy
from sd_mini.cpu.kernels import compiled, compiler
from tests.support.system import missing


@pytest.fixture
def pair():
    """An accelerated network, and the stock one with its weights."""
    if compiler() is None:
        missing("no C compiler (cc); apt-get install gcc")
    torch.manual_seed(0)
    network = {"hidden_size": 32, "num_heads": 2, "depth": 2, "mlp_ratio": 3.0}
    ours = noise_predictor.build("prx", network, (4, 8, 8), 24)
    for parameter in ours.parameters():  # a fresh PRX has its attention gated off
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    assert accelerate(ours) is None
    return ours, stock_copy(ours)


@pytest.fixture
def fused_runs(monkeypatch):
    """How often the kernels have computed a forward pass: () => int."""
    runs = []
    run = fused._run
    monkeypatch.setattr(fused, "_run", lambda *args: runs.append(None) or run(*args))
    return lambda: len(runs)


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


@pytest.mark.parametrize(("n", "threads"), [(3, 1), (3, 2), (17, 2)])
def test_an_accelerated_network_is_the_stock_network(pair, fused_runs, n, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal(*pair, inputs(n))
        assert_equal(*pair, {**inputs(n, side=4), "attention_mask": None})
    finally:
        torch.set_num_threads(before)
    assert fused_runs() == 4


def test_weights_lent_for_one_call_and_frozen_ones(pair, fused_runs):
    ours, stock = pair
    given, lent = inputs(3), {name: 2 * p.detach() for name, p in stock.named_parameters()}
    made = torch.func.functional_call(ours, lent, kwargs=given).sample
    torch.testing.assert_close(made, torch.func.functional_call(stock, lent, kwargs=given).sample, rtol=1e-5, atol=1e-4)
    ours.txt_in.requires_grad_(False)
    ours(**given).sample.sum().backward()
    assert ours.txt_in.weight.grad is None and ours.img_in.weight.grad is not None and fused_runs() == 2


def tiny_prx(**fields):
    fields = {"hidden_size": 32, "num_heads": 2, "depth": 1, "context_in_dim": 24, "axes_dim": [8, 8]} | fields
    return PRXTransformer2DModel(in_channels=4, **fields)


NOT_ACCELERATED = {
    "another class": (lambda: torch.nn.Linear(2, 2), "Linear"),
    "other widths": (lambda: tiny_prx(num_heads=4, axes_dim=[4, 4]), "8 wide; the CPU kernels expect a multiple of 16"),
    "another first layer": (lambda: tiny_prx(bottleneck_size=8), "bottleneck_size"),
    "another dtype": (lambda: tiny_prx().double(), "float64"),
    "another device": (lambda: tiny_prx().to("meta"), "on meta"),
}


@pytest.mark.parametrize("case", NOT_ACCELERATED)
def test_what_cannot_be_accelerated_stays_as_it_is(case):
    make, reason = NOT_ACCELERATED[case]
    network = make()
    assert reason in accelerate(network) and "forward" not in vars(network)


@pytest.mark.parametrize(("cc", "reason"), [("no-such-compiler", "there is no C compiler"), ("false", "failed")])
def test_without_a_working_compiler_the_network_stays_as_it_is(monkeypatch, capfd, cc, reason):
    monkeypatch.setenv("CC", cc)
    compiled.cache_clear()
    network = tiny_prx()
    try:
        assert reason in accelerate(network) and "forward" not in vars(network)
    finally:
        compiled.cache_clear()
    assert ("false cannot compile kernels.c" in capfd.readouterr().err) == (cc == "false")


def test_large_scores_and_gradients_stay_finite(pair, fused_runs):
    ours, stock = pair
    for network in pair:
        for block in network.blocks:
            block.attention.norm_q.weight.data.mul_(40)
            block.gate_proj.weight.data.mul_(40)
    assert_equal(ours, stock, inputs(3), tolerance=1e-3)
    assert fused_runs()


def hooked(network):
    network.blocks[0].register_forward_hook(lambda module, given, output: output)


def checkpointed(network):
    network.enable_gradient_checkpointing()


def test_kernels_are_compiled_once_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.cache_clear()
    try:
        assert compiled(2, 16) is not None
        (library,) = (tmp_path / "sd_mini" / "kernels").iterdir()
        written = library.stat()
        compiled.cache_clear()  # as in another process
        assert compiled(2, 16) is not None
        assert library.stat().st_mtime_ns == written.st_mtime_ns
        assert compiled(1, 16) is not None  # another shape is another library
        assert len(list(library.parent.iterdir())) == 2
    finally:
        compiled.cache_clear()


def block_compiled(network):
    network.blocks[1].compile(backend="eager")


def replaced(network):
    class Other(torch.nn.Linear):
        pass

    network.blocks[0].gate_proj.__class__ = Other


@pytest.mark.parametrize("change", [hooked, checkpointed, block_compiled, replaced])
def test_a_changed_network_runs_as_diffusers_wrote_it(pair, fused_runs, change):
    ours, stock = pair
    change(ours)
    assert_equal(ours, stock, inputs(3))
    assert not fused_runs()


def test_inputs_that_the_kernels_do_not_cover(pair, fused_runs):
    ours, stock = pair
    given = inputs(3)
    given["hidden_states"].requires_grad_(True)
    gradients = []
    for network in pair:
        gradients += torch.autograd.grad(network(**given).sample.sum(), given["hidden_states"])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert ours(**inputs(3)).sample.dtype == stock(**inputs(3)).sample.dtype
    assert_equal(*pair, inputs(1, side=46))  # more tokens than the kernels take
    assert not fused_runs()


@pytest.mark.parametrize(("n", "threads"), [(3, 1), (17, 2)])
def test_under_autocast_it_errs_no_more_than_the_stock_network(pair, fused_runs, n, threads, monkeypatch):
    """Both against the stock network in float32: outputs and gradients, by bfloat16's products of 8 bits."""
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
    assert fused_runs() == 1
    for exact, theirs, own in zip(*found, strict=True):
        scale = exact.norm()
        assert 1e-5 < (own - exact).norm() / scale < 0.03
        assert (own - exact).norm() <= 1.2 * (theirs - exact).norm() + 1e-3 * scale


def test_what_is_no_number_stays_none_in_bfloat16(pair):
    """So that a training that has come to that is stopped, as in float32."""
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


def test_copies_and_saved_folders_are_the_stock_ones(pair, fused_runs, tmp_path):
    ours, _ = pair
    given, twin = inputs(3), copy.deepcopy(ours)
    with torch.no_grad():
        before = ours(**given).sample
        for parameter in ours.parameters():
            parameter.zero_()
        assert torch.equal(twin(**given).sample, before)  # the copy runs with its own weights
    assert fused_runs() == 2
    twin.save_pretrained(tmp_path)
    again = PRXTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**given).sample, before, rtol=0, atol=1e-5)
    torch.save(twin.state_dict(), io.BytesIO())
