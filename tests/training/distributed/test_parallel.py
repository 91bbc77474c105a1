"""Two processes against one at the same global batch, and what happens when one of them dies."""

import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_mini import stages
from sd_mini.processes import wait_for_everyone
from tests.support.faults import Fsdp2, KillAt, RaiseAt, StopAt
from tests.support.launching import (
    ROOT,
    SMOKE,
    arguments,
    assert_equal_runs,
    launch,
    launch_apart,
    lines,
    on_two_ranks,
    prepared,
    trace,
    weights,
)
from tests.training.engine.test_players import Game, gradients, made_loop
from training.distributed.processes import join_processes
from training.engine.loop import Stop
from training.storage import checkpoint

STAGES = ("autoencoder", "text_encoder", "noise_predictor")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def torchrun(stage, run, *more):
    # `--`, as torchrun would take our --run for an abbreviation of its own --run-path
    line = [*TORCHRUN, "-m", "--", f"training.{stage}", *arguments(stage, run, *more)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


# the stage whose batch holds the most, and, with more time, the others
@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[pytest.mark.slow] * (stage != "noise_predictor")) for stage in STAGES]
)
def test_every_step_sees_the_same(smoke_run, tmp_path, stage):
    """Ids, noise, timesteps, captions and their dropout, augmentation: a hash of every row of every global batch."""
    options = ["--steps", "6", "--train.trace", "true", "--train.checkpoint_every", "2"]
    options += ["--augment.mirror", "0.5", "--augment.shift", "2"] if stage != "noise_predictor" else []
    ways = {"whole": (1, 1, None), "fours": (4, 1, None), "ragged": (3, 1, KillAt(5)), "two": (1, 2, None)}
    ways["two_ragged"] = (3, 2, None)
    traces = {}
    for name, (accumulation, ranks, fault) in ways.items():
        run = prepared(stage, smoke_run, tmp_path / name)
        more = [*options, "--train.accumulation", str(accumulation)]
        if fault is not None:
            assert all(launch_apart(stage, run, *more, fault=fault, ranks=ranks)[0])
        codes, said = launch_apart(stage, run, *more, ranks=ranks)
        assert not any(codes), said
        traces[name] = trace(run / stage)
    names = {
        "autoencoder": {"pixels", "noise", "posterior_noise"},
        "text_encoder": {"pictures", "thumbnails", "caption"},
    }
    names["noise_predictor"] = {"latents", "noise", "timesteps", "prompt_embeds", "prompt_mask"}
    assert len(traces["whole"]) == 6 * 8 and set(traces["whole"][0, 0]) >= {"id", *names[stage]}
    assert all(found == traces["whole"] for found in traces.values())


@pytest.mark.parametrize("stage", [*STAGES, "few_steps", "autoregressive", "normalizing_flow"])
def test_two_processes_are_one_at_the_same_global_batch(smoke_run, tmp_path, stage):
    """Fifty steps: every loss within 1e-5, every learning rate the same."""
    more = ["--steps", "50", "--train.log_every", "1", "--train.valid_every", "25"]
    if stage == "autoencoder":
        # what rounding turns over grows: 4e-4 after 35 steps with L1, whose gradient is a sign, 6e-5 at a rate of 5e-4
        more += ["--loss.l1", "0", "--loss.gradient", "0", "--train.lr", "2e-4"]
    one, two = (prepared(stage, smoke_run, tmp_path / name) for name in ("one", "two"))
    assert launch(stage, one, *more) == 0
    if stage == "noise_predictor":
        process = torchrun(stage, two, *more)
        assert (process.communicate(timeout=120), process.returncode)[1] == 0
    else:  # the environment that torchrun makes, without its start
        codes, said = launch_apart(stage, two, *more, ranks=2)
        assert codes == [0, 0], said
    left, right = lines(one / stage), lines(two / stage)
    assert [line.keys() for line in left] == [line.keys() for line in right] and len(left) == 52
    for a, b in zip(left, right, strict=True):
        assert all(b[name] == a[name] for name in ("lr", "muon_lr") if name in a)
        assert all(b[name] == pytest.approx(a[name], rel=1e-5) for name in a if "loss" in name)


def test_two_processes_have_the_discriminator_of_one(tmp_path):
    """Its logits and the weight of its verdict, which is by the gradients of the whole batch, on ragged ranks too."""
    config = ["--config", str(SMOKE / "autoencoder_tiny.yaml"), "--train.batch_size", "7", "--train.log_every", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch("autoencoder", one, *config) == 0
    codes, said = launch_apart("autoencoder", two, *config, ranks=2)
    assert codes == [0, 0], said
    left, right = lines(one / "autoencoder"), lines(two / "autoencoder")
    assert sum("adaptive_weight" in line for line in left) == 3
    for a, b in zip(left, right, strict=True):
        for name in a.keys() & {"loss", "adaptive_weight", "discriminator.loss", "discriminator.real_logits"}:
            assert b[name] == pytest.approx(a[name], rel=2e-4)


def save_gradients(folder, accumulation):
    loop = made_loop(folder / f"two-{accumulation}", Game(dtype=torch.float64), accumulation=accumulation)
    for number, learner in enumerate(loop.learners):
        loop.accumulate(learner, loop.steps[4])
        if loop.rank == 0:
            found = {str(i): g for i, g in enumerate(gradients(learner))}
            save_file(found, folder / f"{accumulation}-{number}.safetensors")


@pytest.mark.parametrize("accumulation", [1, 4, 3])
def test_gradients_in_float64(tmp_path, accumulation):
    """Within 1e-10 of one process and one pass; three passes on two ranks are ragged: 1, 1, 1, 2, 1, 2 of 8."""
    assert on_two_ranks(save_gradients, tmp_path, accumulation) == [0, 0]
    whole = made_loop(tmp_path / "one", Game(dtype=torch.float64))
    for number, learner in enumerate(whole.learners):
        whole.accumulate(learner, whole.steps[4])
        found = load_file(tmp_path / f"{accumulation}-{number}.safetensors")
        for i, expected in enumerate(gradients(learner)):
            torch.testing.assert_close(found[str(i)], expected, rtol=1e-10, atol=1e-13)


def validate_seven(folder):
    task = Game()
    task.valid_count = 7
    loop = made_loop(folder, task)
    loop.watch.start({}, 0)
    loop.inspection.validate(loop.step)
    assert loop.inspection.scores == {"rows": 3.0}, (
        loop.inspection.scores
    )  # (0 + ... + 6) / 7: nothing twice, nothing left out


def test_seven_held_out_samples_on_two_ranks(tmp_path):
    assert on_two_ranks(validate_seven, tmp_path / "run") == [0, 0]
    assert lines(tmp_path / "run") == [{"step": 0, "valid/rows": 3.0}]


@pytest.mark.parametrize("fault", [KillAt(3, rank=1), RaiseAt(3, rank=1)])
def test_when_a_rank_dies_or_raises_every_rank_ends(tmp_path, fault):
    started = time.monotonic()
    codes, said = launch_apart("text_encoder", tmp_path / "run", "--steps", "100000", fault=fault, ranks=2)
    assert codes[0] not in (0, None) and codes[1] == (-9 if type(fault) is KillAt else 1), said
    assert time.monotonic() < started + 60
    assert not (tmp_path / "run" / "text_encoder" / "final").exists()


@pytest.mark.slow
def test_when_a_rank_is_killed_torchrun_ends_them_all(tmp_path):
    process = torchrun("autoencoder", tmp_path, "--steps", "100000", "--train.log_every", "1")
    log = tmp_path / "autoencoder" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = children_of(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() < killed + 60
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("policy", [pytest.param("NO_WRAP", marks=pytest.mark.slow), "TRANSFORMER_BASED_WRAP"])
def test_fsdp2_trains_saves_resumes_and_exports_the_same_stage(smoke_run, tmp_path, policy):
    """Muon and all: sharded over two ranks, killed, resumed, and gone on with by a single process."""
    stage, more = "noise_predictor", ["--steps", "8", "--train.checkpoint_every", "2", "--train.log_every", "1"]
    one, two = (prepared(stage, smoke_run, tmp_path / name) for name in ("one", "two"))
    assert launch(stage, one, *more) == 0
    assert all(launch_apart(stage, two, *more, fault=Fsdp2(policy, KillAt(5)), ranks=2)[0])
    shutil.copytree(two, tmp_path / "single")
    codes, said = launch_apart(stage, two, *more, fault=Fsdp2(policy), ranks=2)
    assert codes == [0, 0] and "resumed at step 4" in said
    assert launch(stage, tmp_path / "single", *more) == 0
    for run in (two, tmp_path / "single"):
        for a, b in zip(lines(one / stage), lines(run / stage), strict=True):
            assert all(b[name] == pytest.approx(a[name], rel=1e-4) for name in a)
        found, expected = weights(run / stage), weights(one / stage)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
        assert stages.load_stage(run / stage / "final", stage).parts.keys() == {"noise_predictor"}
    assert checkpoint.newest(two / stage / "checkpoints")[1] == []


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [pytest.param("text_encoder", 2, marks=pytest.mark.slow), ("text_encoder", 3), ("autoencoder", 3)],
)
def test_killed_on_several_ranks_equals_straight_through(tmp_path, stage, ranks):
    more = ["--steps", "8", "--train.checkpoint_every", "3", "--train.log_every", "4", "--train.valid_every", "3"]
    codes, said = launch_apart(stage, tmp_path / "straight", *more, ranks=ranks)
    assert not any(codes), said
    assert all(launch_apart(stage, tmp_path / "killed", *more, fault=KillAt(7), ranks=ranks)[0])
    codes, said = launch_apart(stage, tmp_path / "killed", *more, ranks=ranks)
    assert not any(codes) and "resumed at step 6" in said
    assert_equal_runs(tmp_path / "killed" / stage, tmp_path / "straight" / stage)


def test_stopped_on_two_ranks_both_save_and_end_well(tmp_path):
    more = ["--steps", "8", "--train.checkpoint_every", "8"]
    codes, said = launch_apart("text_encoder", tmp_path / "run", *more, fault=StopAt(4), ranks=2)
    assert codes == [143, 143] and "stopped at step 5 of 8" in said
    assert checkpoint.newest(tmp_path / "run" / "text_encoder" / "checkpoints")[0].name == "step-00000005"


def test_fsdp2_of_every_other_stage(tmp_path):
    for stage in STAGES[:2]:
        codes, said = launch_apart(stage, tmp_path / "run", fault=Fsdp2(), ranks=2)
        assert codes == [0, 0], said
        assert stages.load_stage(tmp_path / "run" / stage / "final", stage)


def wait_longer_than_the_group_does():
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=1))
    join_processes()
    if rank == 0:  # as where it measures, and the other has nothing to do
        time.sleep(4)
    wait_for_everyone()
    with Stop(2) as stop:
        if rank == 0:
            time.sleep(4)
        assert not stop.is_asked()
    # what is not waited for so, the group's own collectives, gives up
    if rank == 0:
        time.sleep(4)
    else:
        with pytest.raises(RuntimeError, match=r"(?i)time"):
            torch.distributed.barrier()


def test_a_process_that_works_alone_is_waited_for_however_long():
    assert on_two_ranks(wait_longer_than_the_group_does) == [0, 0]
