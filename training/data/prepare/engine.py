"""Where tasks run: in this process, in processes of this machine, or on Ray's workers. What they write is the same."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait as wait_for_sentinels
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sd_mini.errors import UserError
from sd_mini.progress import progress
from training.data.prepare.config import PrepareConfig

ATTEMPTS = 3  # at a task whose worker dies
# there are as many tasks at once as cores: each keeps to one thread
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Task(NamedTuple):
    """A call that writes one file whole or not at all; made twice, it writes the same."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        self.function(*self.arguments)


class Engine(Protocol):
    """Runs tasks in any order and yields after each; what a task raises is raised. It starts nothing before it is
    called, and what it starts is kept for the next call."""

    def __call__(self, tasks: Sequence[Task]) -> Iterator[None]: ...


@contextmanager
def open_engine(config: PrepareConfig) -> Generator[Engine]:
    """The engine of a config; its workers end with the context."""
    workers = config.workers or _cores()
    with ExitStack() as stack:
        if config.engine == "ray":
            yield _Ray(workers, config.address, stack)
        elif workers == 1:
            yield _in_this_process
        else:
            yield _Processes(workers, stack)


def run_all(engine: Engine, tasks: Sequence[Task], title: str, done: int = 0) -> None:
    """Run the tasks with a bar that begins at `done`."""
    for _ in progress(engine(tasks), desc=title, initial=done, total=done + len(tasks), unit="shard", delay=1):
        pass


def run_missing(engine: Engine, paths: Sequence[Path], title: str, make_task: Callable[[int, Path], Task]) -> None:
    """The tasks of the files that are not there yet: a file under its own name is whole."""
    missing = [make_task(number, path) for number, path in enumerate(paths) if not path.is_file()]
    if missing:
        run_all(engine, missing, title, done=len(paths) - len(missing))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_this_process(tasks: Sequence[Task]) -> Iterator[None]:
    for task in tasks:
        yield task()


class _Processes:
    """A pool; where one of its processes dies, another pool goes on with what is left."""

    def __init__(self, workers: int, stack: ExitStack):
        self.workers, self.stack = workers, stack
        self.pool: ProcessPoolExecutor | None = None

    def __call__(self, tasks: Sequence[Task]) -> Iterator[None]:
        left = dict.fromkeys(range(len(tasks)), 0)  # task => pools that broke while it was the first of those left
        while left:
            pool = self._open_pool()
            running = {pool.submit(tasks[number]): number for number in left}
            try:
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        del left[running.pop(future)]
                        yield
            except BrokenProcessPool:
                self.pool = None
                first = min(left)  # tasks begin in order: one that kills its process soon is the first left
                left[first] += 1
                if left[first] == ATTEMPTS:
                    raise UserError(
                        f"worker processes died {ATTEMPTS} times near {tasks[first].arguments[-1]}: out of memory, or "
                        "killed; run the same command again, with fewer --workers or smaller --shard_rows"
                    ) from None

    def _open_pool(self) -> ProcessPoolExecutor:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(self.workers, _context(), initializer=_begin_worker)
            self.stack.enter_context(_environment(_ONE_THREAD))
            self.stack.callback(self.pool.shutdown, wait=True, cancel_futures=True)
        return self.pool


def _context() -> Any:
    """No plain fork, which copies the locks of this process's threads. The program lets its fork server import once
    what tasks need (__main__)."""
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


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


class _Ray:
    """One task a shard, on any worker of the cluster; Ray runs a task again whose worker dies."""

    def __init__(self, workers: int, address: str | None, stack: ExitStack):
        try:
            import ray  # noqa: F401  # only its absence is of use here: it is said before any work
        except ImportError:
            raise UserError("--engine ray: needs Ray; pip install -e '.[cluster]' gives it") from None
        self.workers, self.address, self.stack = workers, address, stack

    def __call__(self, tasks: Sequence[Task]) -> Iterator[None]:
        import ray
        import ray.exceptions

        if not ray.is_initialized():
            self._connect()
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
                    f"Ray workers died {ATTEMPTS + 1} times on one shard ({type(error).__name__}); run the same "
                    "command again, with smaller --shard_rows"
                ) from error
            yield

    def _connect(self) -> None:
        """Join the cluster at `address`, or start one here."""
        import ray

        environment = {**_ONE_THREAD, "PYTHONPATH": os.pathsep.join(_import_paths())}
        options: dict[str, Any] = {"runtime_env": {"env_vars": environment}}
        if self.address is None:
            # workers inherit this process's environment: another one by `runtime_env` would start each of them twice
            self.stack.enter_context(_environment({**environment, "RAY_USAGE_STATS_ENABLED": "0"}))
            options = {"num_cpus": self.workers, "include_dashboard": False}
        try:
            ray.init(address=self.address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"--address {self.address}: {' '.join(str(error).split())}") from error
        self.stack.callback(ray.shutdown)


def _call(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    function(*arguments)


def _import_paths() -> list[str]:
    """Where a worker finds this program: the checkout, then what the user set."""
    checkout = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3))
    return [checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
