"""The same bytes whoever works and whatever is killed."""

import multiprocessing
import os
import random
import signal
import time
from contextlib import contextmanager

import psutil
import pytest

from sd_mini.errors import UserError
from training.benchmarks.planted import write_planted
from training.data.prepare.config import PrepareConfig
from training.data.prepare.engine import Task, open_engine, run_all, run_missing
from training.data.prepare.run import clean

ROWS = 220
_server = multiprocessing.get_context("forkserver")  # a child costs a fork, not the imports


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "source"
    write_planted(folder, ROWS, 10)
    return folder


def config(source, **fields):
    own = {"data": {"source": str(source)}, "test": {"source": str(source)}, "shard_rows": 40, "workers": 1}
    return PrepareConfig.model_validate({**own, **fields})


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    clean(config(source), out)
    assert len(list(out.glob("train-*"))) > 3
    return contents(out)


@contextmanager
def child(function, *arguments):
    process = _server.Process(target=function, args=arguments)
    process.start()
    yield process
    process.join()


def seconds_of_a_run(source, out):
    with child(clean, config(source), out):
        start = time.perf_counter()
    return time.perf_counter() - start


def check_kills(source, expected, folder, moments):
    """Kill a cleaning at each of the moments (s), rerun it, and compare."""
    for number, moment in enumerate(moments):
        out = folder / str(number)
        with child(clean, config(source), out) as process:
            time.sleep(moment)
            process.kill()
        clean(config(source), out)
        assert contents(out) == expected, f"killed after {moment:.2f} s"


def test_killed_and_rerun_gives_the_same_bytes(source, expected, tmp_path):
    duration = seconds_of_a_run(source, tmp_path / "whole")
    check_kills(source, expected, tmp_path, [share * duration for share in (0.4, 0.8)])


@pytest.mark.slow
def test_killed_at_twenty_random_moments(source, expected, tmp_path):
    duration = seconds_of_a_run(source, tmp_path / "whole")
    moments = random.Random(0)
    check_kills(source, expected, tmp_path, [moments.uniform(0, duration) for _ in range(20)])


def test_two_processes_give_the_same_bytes(source, expected, tmp_path):
    clean(config(source, workers=2), tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def die_once(folder, number):
    """Kill the worker at the first attempt."""
    mark = folder / f"tried-{number}"
    if number == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"done-{number}").touch()


def die(folder, number):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(folder, number):
    raise UserError(f"task {number} cannot be done")


def run(function, folder, count=4, **fields):
    tasks = [Task(function, (folder, number)) for number in range(count)]
    with open_engine(config("unused", workers=2, **fields)) as engine:
        run_all(engine, tasks, "tasks")


def test_a_worker_that_dies_costs_its_shard_alone(tmp_path):
    run(die_once, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tried-1", *(f"done-{number}" for number in range(4))}


def test_workers_that_die_again_and_again_are_an_error(tmp_path):
    with pytest.raises(UserError, match="died 3 times near 0"):
        run(die, tmp_path, count=1)


def test_what_a_task_raises_is_raised(tmp_path):
    with pytest.raises(UserError, match="task 0 cannot be done"):
        run(refuse, tmp_path, count=1)


def test_only_missing_files_are_made(tmp_path):
    paths = [tmp_path / str(number) for number in range(3)]
    paths[1].touch()
    made = []
    with open_engine(config("unused")) as engine:
        run_missing(engine, paths, "files", lambda number, path: made.append(number) or Task(made.append, (path,)))
    assert made == [0, 2, paths[0], paths[2]]


def kill_a_ray_worker(out):
    """Once the first shard is whole, the first Ray worker that runs a task."""
    while not list(out.glob(".work/data-*.parquet")):
        time.sleep(0.05)
    while True:
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words and words[0].startswith("ray::_call"):
                process.kill()
                return
        time.sleep(0.01)


@pytest.mark.slow
def test_ray_with_a_worker_killed_gives_the_same_bytes(source, expected, tmp_path):
    out = tmp_path / "out"
    with child(kill_a_ray_worker, out) as killer:
        clean(config(source, engine="ray", workers=2), out)
    assert killer.exitcode == 0
    assert contents(out) == expected


@pytest.mark.slow
def test_ray_workers_that_die_again_and_again_are_an_error(tmp_path):
    with pytest.raises(UserError, match="died 4 times on one shard"):
        run(die, tmp_path, count=1, engine="ray")
    with pytest.raises(UserError, match="task 0 cannot be done"):
        run(refuse, tmp_path, count=1, engine="ray")
