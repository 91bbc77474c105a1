"""Killed by SIGKILL wherever it hurts, then started again by the same command: every bit of the straight run."""

import shutil

import pytest

from sd_mini import images, shapes, stages
from tests.support.faults import KillAt, StopAt
from tests.support.launching import (
    MAINS,
    assert_equal_runs,
    error_line,
    launch,
    launch_apart,
    lines,
    prepared,
    trace,
)

# 64 samples in batches of 8: an epoch is 8 steps; a step is three ragged passes of 2, 3 and 3
STRAIGHT = ["--steps", "23", "--train.accumulation", "3", "--train.trace", "true", "--train.preview_every", "100"]
STRAIGHT += ["--train.checkpoint_every", "5", "--train.valid_every", "7", "--train.ema_snapshots", "3"]
AUGMENTED = ["--augment.mirror", "0.5", "--augment.shift", "3"]
STEP_1, MID_EPOCH, EPOCH_END, IN_A_WINDOW = KillAt(1), KillAt(12), KillAt(16), KillAt(19, passes=2)


@pytest.fixture(scope="module", params=[*MAINS, "few_steps"])  # the others have tests of their own
def straight(request, smoke_run, tmp_path_factory):
    """(stage, the options, where the stage was trained in one go)."""
    stage = request.param
    options = STRAIGHT + (AUGMENTED if stage in ("autoencoder", "text_encoder") else [])
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
        expected = (143, "stopped at step 9 of 23") if type(kill) is StopAt else (-9, "")
        assert codes == [expected[0]] and expected[1] in said, said
    codes, said = launch_apart(stage, run, *options)
    assert codes == [0] and f"resumed at step {9 if type(kills[-1]) is StopAt else 15}" in said
    assert_equal_runs(run / stage, folder)
    assert trace(run / stage) == trace(folder)
    assert len(trace(folder)) == 23 * 8
    exported = [stages.read_contract(path / "final")["hash"] for path in (run / stage, folder)]
    assert exported[0] == exported[1]


def test_a_finished_training_goes_on_to_more_steps_by_the_new_schedule(tmp_path, capsys):
    more = ["--train.log_every", "1", "--train.schedule", "linear"]
    longer, straight = tmp_path / "longer", tmp_path / "straight"
    assert launch("autoencoder", longer, "--steps", "6", *more) == 0
    assert launch("autoencoder", longer, "--steps", "12", *more) == 0
    assert "resumed at step 6 of 12 (of 6 before: the learning rate follows" in capsys.readouterr().err
    assert launch("autoencoder", straight, "--steps", "12", *more) == 0
    rates = [
        {line["step"]: line["lr"] for line in lines(run / "autoencoder") if "lr" in line} for run in (longer, straight)
    ]
    assert rates[0].keys() == rates[1].keys() and rates[0][6] != rates[1][6]
    assert all(rates[0][step] == rates[1][step] for step in range(7, 13))
    assert stages.read_contract(longer / "autoencoder" / "final")["steps"] == 12
    # the same again is done; fewer than are done cannot be had
    assert launch("autoencoder", longer, "--steps", "12", *more) == 0
    assert "already trained" in capsys.readouterr().out
    assert launch("autoencoder", longer, "--steps", "6", *more) == 2
    assert "train.steps was 12, now 6" in error_line(capsys.readouterr().err)
    assert stages.read_contract(longer / "autoencoder" / "final")["steps"] == 12


@pytest.mark.parametrize(
    "change",
    [
        ["--train.accumulation", "2"],
        ["--train.gradient_checkpointing", "true"],
        ["--train.compile", "eager"],
        ["--resident", "true"],
        ["--steps", "5"],
    ],
)
def test_what_changes_no_sum_does_not_stop_a_resume(smoke_run, tmp_path, change):
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    assert launch_apart("noise_predictor", run, fault=KillAt(4))[0] == [-9]
    codes, said = launch_apart("noise_predictor", run, *change)
    assert codes == [0] and "resumed at step 3" in said, said


def test_the_same_pictures_elsewhere_are_the_same_data(tmp_path, capsys):
    def data(folder):
        at = ["--data.source", str(folder), "--data.split", "train", "--data.count", "8"]
        return [*at, "--valid.source", str(folder), "--valid.split", "train", "--valid.count", "4"]

    scenes = shapes.sample_scenes(8, "train", 0)
    (tmp_path / "here").mkdir()
    for number, picture in enumerate(images.to_pil(shapes.draw_batch(scenes, 32))):
        picture.save(tmp_path / "here" / f"{number}.png")
    run = tmp_path / "run"
    assert launch_apart("autoencoder", run, *data(tmp_path / "here"), fault=KillAt(4))[0] == [-9]
    (tmp_path / "here").rename(tmp_path / "there")
    codes, said = launch_apart("autoencoder", run, *data(tmp_path / "there"))
    assert codes == [0] and "resumed at step 3" in said, said
    # other pictures are not
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "there", other)
    images.to_pil(shapes.draw_batch(scenes[1:2], 32))[0].save(other / "0.png")
    assert launch("autoencoder", run, *data(other), "--steps", "12") == 2
    assert "was trained on data" in error_line(capsys.readouterr().err)


def test_stopped_at_its_last_step_a_training_is_done_and_what_follows_does_not_begin(tmp_path):
    codes, said = launch_apart("autoencoder", tmp_path / "run", fault=StopAt(5))
    assert codes == [143] and "6 steps in" in said, said
    assert stages.read_contract(tmp_path / "run" / "autoencoder" / "final")["steps"] == 6


def test_an_edited_caption_does_not_stop_the_autoencoder(tmp_path):
    folder, scenes = tmp_path / "data", shapes.sample_scenes(8, "train", 0)
    folder.mkdir()
    for number, picture in enumerate(images.to_pil(shapes.draw_batch(scenes, 32))):
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    data = ["--data.source", str(folder), "--data.count", "8", "--valid.source", str(folder), "--valid.count", "4"]
    data += ["--valid.split", "train"]
    run = tmp_path / "run"
    assert launch_apart("autoencoder", run, *data, fault=KillAt(4))[0] == [-9]
    (folder / "3.txt").write_text("another caption")
    codes, said = launch_apart("autoencoder", run, *data)
    assert codes == [0] and "resumed at step 3" in said, said


def test_a_training_that_ends_where_no_snapshot_was_planned_has_one(tmp_path):
    """Of 12 steps 4 are kept; it is stopped at 5 and told to end there, at a width that is made of snapshots."""
    options = ["--train.ema_width", "0.07", "--train.ema_snapshots", "4", "--train.checkpoint_every", "1"]
    run = tmp_path / "run"
    assert launch_apart("autoencoder", run, "--steps", "12", *options, fault=StopAt(4))[0] == [143]
    codes, said = launch_apart("autoencoder", run, "--steps", "5", *options)
    assert codes == [0], said
    assert stages.read_contract(run / "autoencoder" / "final")["steps"] == 5
