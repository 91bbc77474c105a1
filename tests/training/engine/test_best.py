"""Stop at the best: which weights are exported, when training ends early, and that a resume changes neither."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sd_mini import stages
from tests.support.faults import KillAt
from tests.support.launching import assert_equal_runs, error_line, launch, launch_apart, lines, prepared
from training.engine.best import Best, BestKeeper

SHORT = ["--steps", "12", "--train.valid_every", "2", "--train.checkpoint_every", "3", "--train.preview_every", "100"]
# so fast that the loss soon grows
DIVERGING = [*SHORT, "--train.lr", "0.3", "--train.schedule", "constant", "--train.warmup_steps", "0"]


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
    assert contract["scores"]["loss"] == value and contract["steps"] == 12 and not contract["stopped_early"]
    # a training that ends there, by the same rates, has these weights
    kept = load_file(folder / "best" / "weights.safetensors")
    network = stages.load_stage(folder / "final", "noise_predictor").parts["noise_predictor"].state_dict()
    for name, weight in network.items():
        assert torch.equal(weight, kept[f"network.{name}"])


def test_training_ends_where_nothing_better_comes_and_a_kill_changes_nothing(smoke_run, tmp_path):
    wish = [*DIVERGING, "--train.keep_best", "highest valid/loss_t0.05", "--train.patience", "2"]
    straight, killed = (prepared("noise_predictor", smoke_run, tmp_path / name) for name in ("straight", "killed"))
    codes, said = launch_apart("noise_predictor", straight, *wish)
    assert codes == [0], said
    values = [line["valid/loss_t0.05"] for line in lines(straight / "noise_predictor") if "valid/loss_t0.05" in line]
    at = values.index(max(values))
    assert len(values) == min(at + 3, 6)
    contract = stages.read_contract(straight / "noise_predictor" / "final", "noise_predictor")
    assert contract["best"]["step"] == 2 * (at + 1) and contract["steps"] == 2 * len(values)
    assert contract["stopped_early"] == (len(values) < 6)
    codes, said = launch_apart("noise_predictor", killed, *wish, fault=KillAt(5))
    assert codes == [-9], said
    codes, said = launch_apart("noise_predictor", killed, *wish)
    assert codes == [0], said
    assert_equal_runs(killed / "noise_predictor", straight / "noise_predictor")
    hashes = [stages.read_contract(r / "noise_predictor" / "final")["hash"] for r in (straight, killed)]
    assert hashes[0] == hashes[1]
    if contract["stopped_early"]:
        codes, said = launch_apart("noise_predictor", straight, *wish)
        assert codes == [0] and lines(straight / "noise_predictor") == lines(killed / "noise_predictor")


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
