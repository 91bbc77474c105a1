"""What the benchmark of stage 3 compares is comparable, and what it writes is what was asked for."""

import json
from itertools import islice

import pytest
import torch

from sd_mini.config import command
from sd_mini.errors import UserError
from sd_mini.timing import Case, Spread, ratios
from tests.support.launching import SMOKE, prepared
from training.benchmarks import __main__ as benchmarks
from training.benchmarks import predictor as benchmark_predictor
from training.benchmarks.cleaning import cleaning
from training.benchmarks.loops import processes


@pytest.fixture
def argv(smoke_run, tmp_path):
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    return ["--config", str(SMOKE / "noise_predictor.yaml"), "--run", str(run)]


def test_the_spread_and_the_ratio_of_blocks():
    assert Spread.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert ratios([4.0, 9.0], [2.0, 3.0]) == (2.5, 2.0, 3.0)


def test_a_case_measures_every_contestant_in_every_round(capsys):
    calls = []
    contestants = {name: lambda name=name: calls.append(name) or len(calls) for name in ("ours", "theirs")}
    case = Case(
        "count", contestants, 2, 1, {"pictures/s": lambda seconds: 8 / seconds}, prepare=lambda: calls.append(0)
    )
    turns = case.run()
    assert calls == [0, "ours", 0, "theirs"] * 3  # the first round warms up
    assert turns.results == {"ours": [6, 10], "theirs": [8, 12]}
    assert all(len(seconds) == 2 for seconds in turns.seconds.values())
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours.startswith("  ours: ") and ours.endswith(" pictures/s") and theirs.endswith("times as long as ours")


def test_a_loop_in_a_process_is_advanced_by_blocks():
    with processes({"squares": squares}, block=3, warm_up=2) as (contestants, first):
        assert first == {"squares": 0}
        assert [contestants["squares"]() for _ in range(2)] == [25, 64]
    with pytest.raises(UserError, match="expected a loop"), processes({"none": refusing}):
        pass


def squares():
    yield from (number**2 for number in range(100))


def refusing():
    raise UserError("expected a loop")
    yield


def test_mfu_is_the_counted_flops_over_the_measured_peak(argv, monkeypatch):
    monkeypatch.setattr(benchmark_predictor, "WARM_UP", 1)
    found = benchmark_predictor.utilisation(argv, rounds=3)
    for name in ("forward_backward", "step"):
        assert 0 < found[name]["low"] <= found[name]["median"] <= found[name]["high"] < 1.5


@pytest.mark.parametrize("loop", [benchmark_predictor.reference, benchmark_predictor.cached_reference])
def test_the_plain_loops_train_the_network(argv, loop):
    """Their losses are of the size of ours on the same start, whose mean over noise is about 2, and finite."""
    losses = list(islice(loop(argv), 1, 7))
    assert all(1.0 < loss < 4.0 for loss in losses)


def test_the_profile_adds_up(argv, monkeypatch):
    monkeypatch.setattr(benchmark_predictor, "WARM_UP", 1)
    rows = benchmark_predictor.profiled(argv, updates=2)
    assert len(rows) == 20 and 0.5 < sum(row["share"] for row in rows) <= 1.001
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    # two blocks of six linear layers, each with its products forward and back, are seen and counted
    assert next(row["calls"] for row in rows if row["operation"] == "aten::mm") >= 2 * 6 * 2


def test_parts_are_added_to_the_file(argv, tmp_path, monkeypatch):
    out = tmp_path / "runner.json"
    monkeypatch.setattr(benchmark_predictor, "WARM_UP", 1)
    out.write_text('{"training": {"kept": 1}}')
    assert command(benchmarks.main, ["--only", "profile", "--out", str(out), *argv]) == 0
    found = json.loads(out.read_text())
    assert found["training"] == {"kept": 1} and len(found["profile"]) == 20
    assert found["machine"]["torch"] == torch.__version__


def test_a_run_without_stages_is_one_line(tmp_path, capsys):
    assert command(benchmarks.main, ["--run", str(tmp_path / "none"), "--out", str(tmp_path / "b.json")]) == 2
    said = capsys.readouterr().err.strip()
    assert "no text_encoder stage here" in said and "\n" not in said
    assert not (tmp_path / "b.json").exists()


def test_the_benchmark_of_cleaning_finds_what_was_planted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cleaning(["300"], rounds=1)
    printed = capsys.readouterr().out
    assert "pictures/s" in printed and "mirrored: 1 of 1, 100.00 %" in printed and "clean rows refused: 0 of" in printed
    assert not list(tmp_path.iterdir())
