"""Stop at the best: which weights are exported, when training ends early, and that a resume changes neither."""

import json
import os
import shutil
import signal
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from sd_mini import stages
from sd_mini.errors import UserError
from tests.support.faults import KillAt
from tests.support.launching import assert_equal_runs, error_line, launch, launch_apart, lines, prepared
from training.engine.best import Best, BestKeeper
from training.engine.metrics import Watch

SHORT = ["--steps", "12", "--train.valid_every", "2", "--train.checkpoint_every", "3", "--train.preview_every", "100"]


def looks(folder):
    return [(line["step"], line["valid/loss"]) for line in lines(folder) if "valid/loss" in line]


def options(word):
    return [*SHORT, "--train.keep_best", f"{word} valid/loss"]


def test_the_best_and_the_looks_since(tmp_path):
    rows = [{"step": step, "eval/exact": value} for step, value in ((2, 0.1), (4, 0.7), (6, 0.7), (8, 0.2))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 9, "loss": 1}]))
    assert BestKeeper(tmp_path, "highest eval/exact", 3).best() == Best(4, 0.7, 2)
    assert BestKeeper(tmp_path, "lowest eval/exact", 3).best() == Best(2, 0.1, 3)
    assert [BestKeeper(tmp_path, f"{word} eval/exact", 3).is_over for word in ("highest", "lowest")] == [False, True]


@pytest.mark.parametrize(("word", "best"), [("lowest", min), ("highest", max)])
def test_the_best_weights_are_exported_whatever_came_after(smoke_run, tmp_path, word, best):
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    assert launch("noise_predictor", run, *options(word)) == 0
    folder = run / "noise_predictor"
    step, value = best(looks(folder), key=lambda look: look[1])
    contract = stages.read_contract(folder / "final", "noise_predictor")
    assert contract["best"] == {"step": step, "score": "valid/loss", "value": value}
    assert contract["scores"]["loss"] == value and contract["steps"] == 12
    # a training that ends there, by the same rates, has these weights
    kept = load_file(folder / "best" / "weights.safetensors")
    network = stages.load_stage(folder / "final", "noise_predictor").parts["noise_predictor"].state_dict()
    for name, weight in network.items():
        assert torch.equal(weight, kept[f"network.{name}"])


# the loss falls at each look, so the first is its highest, and two more are the patience
EARLY = [*SHORT, "--train.keep_best", "highest valid/loss", "--train.patience", "2"]


@pytest.fixture(scope="module")
def early(smoke_run, tmp_path_factory):
    """A training that ended by its patience."""
    run = prepared("noise_predictor", smoke_run, tmp_path_factory.mktemp("early") / "run")
    codes, said = launch_apart("noise_predictor", run, *EARLY)
    assert codes == [0] and "stopped at step 6: nothing better in 2 looks" in said, said
    return run


def test_training_ends_where_nothing_better_comes(early):
    folder = early / "noise_predictor"
    assert [step for step, _ in looks(folder)] == [2, 4, 6]
    contract = stages.read_contract(folder / "final", "noise_predictor")
    assert contract["best"]["step"] == 2 and contract["steps"] == 6


@dataclass(frozen=True)
class KillBetween:
    """SIGKILL when the best weights of a look have been written, and its scores have not."""

    step: int

    def __call__(self) -> None:
        write = Watch.write_scores

        def killing(watch, step, *rest):
            if step == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
            write(watch, step, *rest)

        Watch.write_scores = killing


@pytest.mark.parametrize("kill", [KillAt(5), KillBetween(2)], ids=["in a step", "within a look"])
def test_a_kill_changes_neither_the_best_nor_the_end(early, smoke_run, tmp_path, kill):
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    options = [*EARLY, "--train.checkpoint_every", "2"] if type(kill) is KillBetween else EARLY
    codes, said = launch_apart("noise_predictor", run, *options, fault=kill)
    assert codes == [-9], said
    codes, said = launch_apart("noise_predictor", run, *options)
    assert codes == [0], said
    assert_equal_runs(run / "noise_predictor", early / "noise_predictor")
    hashes = [stages.read_contract(r / "noise_predictor" / "final")["hash"] for r in (early, run)]
    assert hashes[0] == hashes[1]


def test_what_ended_goes_on_with_more_patience_alone(early, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(early, run)
    assert launch("noise_predictor", run, *EARLY) == 0 and "already trained" in capsys.readouterr().out
    assert launch("noise_predictor", run, *EARLY, "--train.patience", "4") == 0
    contract = stages.read_contract(run / "noise_predictor" / "final", "noise_predictor")
    assert contract["steps"] == 10 and contract["best"]["step"] == 2


def test_a_best_that_was_not_kept_is_refused_at_the_resume(smoke_run, tmp_path, capsys):
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    assert launch("noise_predictor", run, *SHORT) == 0
    longer = ["--steps", "14", *SHORT[2:], "--train.keep_best", "highest valid/loss"]
    assert launch("noise_predictor", run, *longer) == 2
    assert "the best look so far is of step 2, whose weights were not kept" in error_line(capsys.readouterr().err)


def test_a_score_that_is_not_finite_is_refused(tmp_path):
    keeper = BestKeeper(tmp_path, "highest eval/exact", None)
    with pytest.raises(UserError, match="is nan at step 3"):
        keeper.look(3, {"eval/exact": float("nan")}, torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--train.keep_best", "valid/loss"], "expected lowest or highest and a score"),
        (["--train.keep_best", "lowest loss"], "expected lowest or highest and a score"),
        (["--train.patience", "2"], "train.patience 2: counts looks at train.keep_best"),
        (["--train.keep_best", "highest eval/exact"], "nothing evaluates the pipeline; set evaluate.every"),
        (["--train.keep_best", "lowest valid/lost"], "no such score; there are valid/loss, valid/loss_t0.05"),
    ],
)
def test_a_wish_that_cannot_be_meant_is_refused(smoke_run, tmp_path, capsys, more, says):
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    assert launch("noise_predictor", run, *SHORT, *more) == 2
    assert says in error_line(capsys.readouterr().err)
