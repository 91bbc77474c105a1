"""Killed by SIGKILL wherever it hurts, then started again by the same command: every bit of the straight run."""

import pytest

from sd_mini import stages
from tests.faults import KillAt, StopAt
from tests.launching import MAINS, assert_equal_runs, launch_apart, prepared, trace

# 64 samples in batches of 8: an epoch is 8 steps; a step is three ragged passes of 2, 3 and 3
STRAIGHT = ["--steps", "23", "--train.accumulation", "3", "--train.trace", "true", "--train.preview_every", "100"]
STRAIGHT += ["--train.checkpoint_every", "5", "--train.valid_every", "7", "--train.ema_snapshots", "3"]
AUGMENTED = ["--augment.mirror", "0.5", "--augment.shift", "3"]
STEP_1, MID_EPOCH, EPOCH_END, IN_A_WINDOW = KillAt(1), KillAt(12), KillAt(16), KillAt(19, passes=2)


@pytest.fixture(scope="module", params=MAINS)
def straight(request, smoke_run, tmp_path_factory):
    """(stage, the options, where the stage was trained in one go)."""
    stage = request.param
    options = STRAIGHT + (AUGMENTED if stage != "noise_predictor" else [])
    run = prepared(stage, smoke_run, tmp_path_factory.mktemp("straight"))
    codes, said = launch_apart(stage, run, *options)
    assert codes == [0], said
    return stage, options, run / stage


@pytest.mark.parametrize(
    ("workers", "kills"),
    [(0, [STEP_1, MID_EPOCH, EPOCH_END, IN_A_WINDOW]), (2, [MID_EPOCH, IN_A_WINDOW]), (2, [StopAt(8, passes=1)])],
)
def test_killed_and_started_again_equals_straight_through(straight, smoke_run, tmp_path, workers, kills):
    stage, options, folder = straight
    run = prepared(stage, smoke_run, tmp_path / "run")
    options = [*options, "--train.workers", str(workers)]
    for kill in kills:
        codes, said = launch_apart(stage, run, *options, fault=kill)
        # preempted, it ends the step in which it was told so
        expected = (0, "stopped at step 9 of 23") if type(kill) is StopAt else (-9, "")
        assert codes == [expected[0]] and expected[1] in said, said
    codes, said = launch_apart(stage, run, *options)
    assert codes == [0] and f"goes on from step {9 if type(kills[-1]) is StopAt else 15}" in said
    assert_equal_runs(run / stage, folder)
    assert trace(run / stage) == trace(folder)
    assert len(trace(folder)) == 23 * 8
    exported = [stages.read_contract(path / "final", stage)["hash"] for path in (run / stage, folder)]
    assert exported[0] == exported[1]
