"""What a training records and shows, and what that costs."""

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from sd_mini.config import read
from tests.support.faults import KillAt
from tests.support.launching import MAINS, SMOKE, launch, launch_apart, lines, weights
from training.distributed import processes
from training.engine import flops, loop
from training.engine.launch import Launch
from training.engine.learner import Speed, _speed_up
from training.engine.metrics import FiniteCheck
from training.engine.task import Origin, TrainConfig


def board(folder):
    events = EventAccumulator(str(folder / "logs"), size_guidance={"images": 0})
    events.Reload()
    return events


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    """By default, and after a kill too: the steps that are made again replace those that were lost."""
    assert launch_apart("autoencoder", tmp_path / "run", "--train.log_every", "1", fault=KillAt(5))[0] == [-9]
    assert launch_apart("autoencoder", tmp_path / "run", "--train.log_every", "1")[0] == [0]
    folder = tmp_path / "run" / "autoencoder"
    logged, events = lines(folder), board(folder)
    for name in ("loss", "grad_norm", "lr", "l1", "valid/psnr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name])) for line in logged if name in line]
    assert [event.step for event in events.Images("samples")] == [3, 6]
    assert {"images_per_second", "model_flops_utilisation"} <= set(events.Tags()["scalars"])
    assert all(0 < event.value < 1.5 for event in events.Scalars("model_flops_utilisation"))


@pytest.mark.parametrize(
    ("name", "says"),
    [("tensorbord", "expected none or one of"), ("wandb", "pip install wandb"), ("none,mlflow", "pip install mlflow")],
)
def test_a_tracker_that_is_not_there_is_refused(tmp_path, capsys, name, says):
    assert launch("autoencoder", tmp_path / "run", "--log_with", name) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_without_trackers_the_lines_are_written_all_the_same(tmp_path):
    assert launch("autoencoder", tmp_path, "--log_with", "none") == 0
    assert not (tmp_path / "autoencoder" / "logs").exists() and len(lines(tmp_path / "autoencoder")) == 3


def test_the_bar_shows_speed_loss_gradient_and_utilisation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sd_mini.progress.is_seen", lambda: True)  # as on a terminal
    assert launch("text_encoder", tmp_path, "--train.log_every", "1") == 0
    bar = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert all(word in bar for word in ("6/6 [", "loss=", "grad=", "img/s=", "MFU="))


def test_a_log_file_has_lines_instead_of_the_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.engine.metrics._A_LINE_EVERY", 0)
    assert launch("text_encoder", tmp_path, "--train.log_every", "3") == 0
    err = capsys.readouterr().err
    assert "step/s" not in err
    lines = [line for line in err.splitlines() if "step 3 of 6" in line or "step 6 of 6" in line]
    assert len(lines) == 2 and all(word in lines[0] for word in ("loss ", "grad ", "img/s ", "MFU "))


def predictor_loop(smoke_run, folder, **train):
    config = read(MAINS["noise_predictor"].config, SMOKE / "noise_predictor.yaml")
    stages = {name: str(smoke_run / name / "final") for name in ("text_encoder", "autoencoder")}
    task = MAINS["noise_predictor"].make_task(Launch(config.model_copy(update=stages), folder, folder / "stage"))
    (folder / "stage").mkdir(parents=True)
    own = config.train.model_copy(update=train)
    training = loop.Loop(task, own, folder / "stage", Origin(0.0, {}), [])
    training.watch.start({}, 0)
    return training


def test_nothing_is_read_from_the_device_between_log_lines(smoke_run, tmp_path, monkeypatch):
    """No .item() and the like on the hot path of stage 3, Muon and all: each would make the host wait for a GPU."""
    training = predictor_loop(smoke_run, tmp_path)
    inputs = [training.steps[step] for step in range(5)]
    training.update(inputs[0])
    reads = []

    def noting(name, method):
        def read_out(tensor, *args):
            reads.append(name)
            return method(tensor, *args)

        return read_out

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
    for step in (1, 2, 3, 4):
        training.update(inputs[step])
    assert not reads
    assert torch.tensor(2.0).item() == 2.0 and reads == ["item"]


@pytest.mark.gpu
def test_no_update_waits_for_the_gpu(smoke_run, tmp_path):
    training = predictor_loop(smoke_run, tmp_path)
    inputs = [training.steps[step] for step in range(6)]
    for step in range(3):
        training.update(inputs[step])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 6):
            training.update(inputs[step])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_flops_of_a_linear_layer_and_of_what_is_frozen():
    """2 B m n forward, twice that backward; a frozen first layer needs no gradient at all."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.second(self.first(x)).sum(1), {}

    inputs, module = {"x": torch.randn(10, 8)}, Two()
    names = {name for name, _ in module.named_parameters()}
    first, second = 2 * 10 * 8 * 16, 2 * 10 * 16 * 4
    # the input needs no gradient, so the first layer has one product backward, the second two
    assert flops.count_flops(module, names, inputs) == 2 * first + 3 * second
    names = {"second.weight", "second.bias"}
    assert flops.count_flops(module, names, inputs) == first + 2 * second
    assert all(p.grad is None for p in module.parameters())


def test_prompts_count_as_long_as_they_are_and_not_their_padding():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 16)

        def forward(self, prompt_embeds, prompt_mask):
            return self.layer(prompt_embeds).sum((1, 2)), {}

    mask = torch.arange(6) < torch.tensor([[1], [4], [2], [3]])  # 2.5 tokens on average
    inputs, module = {"prompt_embeds": torch.randn(4, 6, 8), "prompt_mask": mask}, Reads()
    names = [name for name, _ in module.named_parameters()]
    assert flops.count_flops(module, names, inputs) == 2 * (2 * 10 * 8 * 16)  # forward, and the weight's gradient
    inputs["prompt_mask"] = mask | True
    assert flops.count_flops(module, names, inputs) == 2 * (2 * 24 * 8 * 16)


def test_the_peak_is_a_speed_this_machine_can_have():
    assert 1e9 < flops.measured_peak(torch.device("cpu"), torch.float32) < 1e14


def predictor(smoke_run, tmp_path, *more):
    folders = [
        part for name in ("text_encoder", "autoencoder") for part in (f"--{name}", str(smoke_run / name / "final"))
    ]
    options = ["--train.log_every", "1", "--log_with", "none", *folders, *more]
    assert launch("noise_predictor", tmp_path, *options) == 0
    return lines(tmp_path / "noise_predictor")


def test_ways_to_run_the_passes_change_nothing_but_rounding(smoke_run, tmp_path):
    """Compiled by blocks, and with states computed again in the backward pass."""
    plain = predictor(smoke_run, tmp_path / "plain")
    for name, option in (
        ("compiled", ["--train.compile", "aot_eager"]),
        ("again", ["--train.gradient_checkpointing", "true"]),
    ):
        for a, b in zip(plain, predictor(smoke_run, tmp_path / name, *option), strict=True):
            assert all(b[key] == pytest.approx(a[key], rel=1e-5) for key in a)


def test_blocks_are_compiled_one_graph_for_all():
    """Regional: the blocks of a list, not what is around them."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(3))
            self.out = nn.Linear(2, 1)

        def forward(self, noise, real):
            for block in self.blocks:
                noise = block(noise)
            return self.out(noise)[:, 0], {}

    module = Blocks()
    _speed_up(module, Speed(compile=backend))
    module(torch.randn(4, 2, requires_grad=True), None)
    assert len(compiled) == 1 and sum(node.op == "call_function" for node in compiled[0].graph.nodes) >= 2


def test_bfloat16_passes_over_float32_weights(smoke_run, tmp_path):
    plain = predictor(smoke_run, tmp_path / "plain")
    half = predictor(smoke_run, tmp_path / "half", "--train.mixed_precision", "bf16")
    losses = [[line["loss"] for line in run if "loss" in line] for run in (plain, half)]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)
    assert {value.dtype for value in weights(tmp_path / "half" / "noise_predictor").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("has", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": False}, "no"), ({}, "no")],
)
def test_precision_is_chosen_by_what_the_cpu_multiplies_in(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    cpu = torch.device("cpu")
    assert processes.chosen_precision("auto", cpu) == expected
    assert [processes.chosen_precision(asked, cpu) for asked in (None, "no", "bf16")] == [None, "no", "bf16"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_muon_multiplies_in_the_precision_of_the_passes(smoke_run, tmp_path, precision):
    (learner,) = predictor_loop(smoke_run, tmp_path, mixed_precision=precision).learners
    assert learner.raw_optimizer.half == (precision == "bf16")


def test_no_mixed_precision_as_yaml_reads_it():
    assert TrainConfig(**yaml.safe_load("mixed_precision: no")).mixed_precision == "no"
    with pytest.raises(ValueError, match="mixed_precision"):
        TrainConfig(mixed_precision=True)


def test_float16_is_refused(tmp_path, capsys):
    assert launch("autoencoder", tmp_path / "run", "--train.mixed_precision", "fp16") == 2
    assert "train.mixed_precision: got 'fp16'" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_norm_on_the_device_is_checked_a_step_later():
    finite = FiniteCheck()
    finite.record(0, np.arange(2), torch.tensor(1.0, device="cuda"), [])
    finite.check()
    losses = [(np.arange(2), torch.tensor([1.0, float("nan")], device="cuda"))]
    finite.record(1, np.arange(2), torch.tensor(float("nan"), device="cuda"), losses)
    with pytest.raises(ValueError, match=r"step 1: the gradient is not finite, and the loss of \[1\] is not"):
        finite.check()
