"""A recipe with one thing changed at a time: which trainings are made, what is refused, what the table says."""

import json
import os

import pytest

from sd_mini.config import command
from tests.support.launching import SMOKE
from training.studies import ablations

ARMS = """
base: {}
early: {guide: 1, eval: [--autoguidance, --guidance, "2"]}
no guidance: {eval: [--guidance, "1"]}
direction: {noise_predictor: {objective.direction: 0.5}}
"""


def run(arms, source, tmp_path, *more, text=ARMS):
    arms.write_text(text)
    own = ["--config", str(SMOKE / "noise_predictor.yaml"), "--run", str(source), "--out", str(tmp_path / "out")]
    return command(ablations.main, [str(arms), *own, *more])


def test_arms_that_differ_in_their_pictures_alone_share_a_training(tmp_path):
    (tmp_path / "arms.yaml").write_text(ARMS)
    arms = ablations.arms_of(tmp_path / "arms.yaml")
    assert ablations.trainings(arms, 2) == [(2, ["base", "early", "no guidance"]), (2, ["direction"])]


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [
        ("base: {noise: {}}", [], "base: noise: unknown field"),
        ("base: {}\nx: {noise_predictor: {objective.kind: epsilon}}", [], "expected a schedule"),
        (ARMS, ["--only", "bas"], "--only 'bas': expected arms of"),
        (ARMS, ["--seeds", "-1"], "expected a whole number"),
        (ARMS, ["--jobs", "1000"], "--jobs 1000: expected at most one for each of"),
        ("", [], "expected arms"),
        ("no: {}", [], "expected arms, by names"),
        ("a b: {}\na-b: {}", [], "differ in more than punctuation"),
        ("a: {guide: 2}", [], "arm 'a': expected guide and eval"),
        ("a: {guide: 2000, eval: [--autoguidance]}", [], "arm 'a': guide 2000: expected at most 6"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(smoke_run, tmp_path, capsys, text, more, says):
    assert run(tmp_path / "arms.yaml", smoke_run, tmp_path, *more, text=text) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_table_has_means_spreads_and_what_a_seed_gained_over_its_own_base():
    def row(one):
        return dict.fromkeys(ablations.COLUMNS, one) | {"loss": 0.5}

    found = {"base/0": row(0.5), "base/1": row(0.7), "more/0": row(0.6), "more/1": row(0.9), "alone/7": row(0.25)}
    _, base, more, alone = ablations.table(found).splitlines()
    assert base.startswith("base") and "60.0 +- 14.1  (+0.0)" in base
    assert "75.0 +- 21.2 (+15.0)" in more
    assert "25.0 +-  0.0        " in alone


@pytest.mark.slow
def test_each_arm_is_trained_and_judged_and_a_second_start_finds_it_done(smoke_run, tmp_path, capsys):
    jobs = str(min(2, len(os.sched_getaffinity(0))))
    started = [tmp_path / "arms.yaml", smoke_run, tmp_path, "--seeds", "0", "--jobs", jobs, "--steps", "2"]
    assert run(*started) == 0
    found = json.loads((tmp_path / "out" / "ablations.json").read_text())["rows"]
    assert set(found) == {"base/0", "early/0", "no guidance/0", "direction/0"}
    assert all(0 <= row[column] <= 1 for row in found.values() for column in ablations.COLUMNS)
    assert found["base/0"]["loss"] == found["no guidance/0"]["loss"] != found["direction/0"]["loss"]
    before = capsys.readouterr().out
    assert run(*started) == 0
    assert capsys.readouterr().out == before
    assert run(*started[:-1], "3") == 2 and "arms of another recipe" in capsys.readouterr().err
    assert run(*started, text=ARMS.replace("0.5", "0.6")) == 2
    assert "'direction' changed something else there" in capsys.readouterr().err
