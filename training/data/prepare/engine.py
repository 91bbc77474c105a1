"""Where tasks run: in this process, in processes of this machine, or on Ray's workers. What they write is the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_sentinels
from typing import Any, NamedTuple

from tqdm import tqdm

from sd_mini.errors import UserError
from training.data.prepare.config import PrepareConfig

ATTEMPTS = 3  # of a task whose worker dies
# tasks are as many as cores: each keeps to one thread
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Task(NamedTuple):
    """A call that writes one file whole or not at all; made twice, it writes the same."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        self.function(*self.arguments)


def run_all(config: PrepareConfig, tasks: Sequence[Task], title: str, done: int = 0) -> None:
    """Run the tasks, in any order, with a bar that begins at `done`. Raises what a task raises."""
    workers = min(config.workers or _cores(), max(len(tasks), 1))
    if config.engine == "ray":
        finished = _on_ray(config, tasks)
    elif workers == 1:
        finished = _here(tasks)
    else:
        finished = _in_processes(workers, tasks)
    for _ in tqdm(finished, desc=title, initial=done, total=done + len(tasks), unit="shard", delay=1):
        pass


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _here(tasks: Iterable[Task]) -> Iterator[None]:
    for task in tasks:
        yield task()


def _in_processes(workers: int, tasks: Sequence[Task]) -> Iterator[None]:
    """A pool; where one of its processes dies, another pool goes on with what is left."""
    left = dict.fromkeys(range(len(tasks)), 0)  # task => attempts begun when a pool broke
    while left:
        with _pool(workers) as pool:
            running = {pool.submit(tasks[number]): number for number in left}
            try:
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        del left[running.pop(future)]
                        yield
            except BrokenProcessPool:
                first = min(left)  # tasks begin in order: a task that kills its process is among the first
                left[first] += 1
                if left[first] == ATTEMPTS:
                    raise UserError(
                        f"a worker process died {ATTEMPTS} times near {tasks[first].arguments[-1]}: out of memory, or "
                        "killed; run the same command again, with fewer --workers or smaller --shard_rows"
                    ) from None


@contextmanager
def _pool(workers: int) -> Generator[ProcessPoolExecutor]:
    with _environment(_ONE_THREAD):
        # spawned: a fork would copy the locks of this process's threads
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker)
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the program, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker holds both ends of the pool's pipe: without this it would outlive a program that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_sentinels([parent.sentinel])
    os._exit(1)


@contextmanager
def _environment(values: Mapping[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _on_ray(config: PrepareConfig, tasks: Sequence[Task]) -> Iterator[None]:
    """One task a shard, on any worker of the cluster; Ray runs a task again whose worker dies."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray: needs Ray; pip install -e '.[cluster]' gives it") from None

    with _environment({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}):
        try:
            ray.init(
                address=config.address,
                num_cpus=None if config.address is not None else config.workers or _cores(),
                include_dashboard=False if config.address is None else None,
                runtime_env={"env_vars": {**_ONE_THREAD, "PYTHONPATH": os.pathsep.join(_import_paths())}},
                log_to_driver=False,
                logging_level="error",
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"--address {config.address}: {' '.join(str(error).split())}") from error
        try:
            remote = ray.remote(max_retries=ATTEMPTS, num_cpus=1)(_call)
            pending = [remote.remote(*task) for task in tasks]
            while pending:
                done, pending = ray.wait(pending, num_returns=1)
                try:
                    ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    raise UserError(
                        f"a Ray worker died {ATTEMPTS + 1} times on one shard ({type(error).__name__}); run the same "
                        "command again, with smaller --shard_rows"
                    ) from error
                yield
        finally:
            ray.shutdown()


def _call(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    function(*arguments)


def _import_paths() -> list[str]:
    """Where a worker finds this program: the checkout, then what the user set."""
    checkout = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3))
    return [checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
