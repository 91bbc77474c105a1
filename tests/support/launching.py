"""Launches of the stages for the tests: in this process, in a child that may be killed, on two ranks.

Children come from a fork server that has imported everything, so one costs a fork instead of seconds of imports.
"""

import json
import multiprocessing
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from sd_mini.config import command
from training.autoencoder import task as autoencoder
from training.few_steps import task as few_steps
from training.generators.autoregressive import task as autoregressive
from training.generators.gan import task as gan
from training.generators.normalizing_flow import task as normalizing_flow
from training.generators.prior import task as prior
from training.generators.regression import task as regression
from training.generators.vae import task as vae
from training.noise_predictor import task as noise_predictor
from training.reward import task as reward
from training.storage import checkpoint
from training.text_encoder import task as text_encoder

ROOT = Path(__file__).parent.parent.parent
SMOKE = ROOT / "training" / "configs" / "smoke"
MAINS = {"autoencoder": autoencoder.main, "text_encoder": text_encoder.main, "noise_predictor": noise_predictor.main}
FAMILIES = {  # the other ways from text to latents
    "gan": gan.main,
    "vae": vae.main,
    "regression": regression.main,
    "autoregressive": autoregressive.main,
    "normalizing_flow": normalizing_flow.main,
    "prior": prior.main,
}
TUNED = {"few_steps": few_steps.main, "reward": reward.main}  # from stage 3
PROGRAMS = MAINS | TUNED | FAMILIES
RECIPES = {"autoencoder": "autoencoder_dc"}
Fault = Callable[[], None]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.support.launching"])


def arguments(stage: str, run: Path, *more: str) -> list[str]:
    """Of the smoke recipe, unless `more` brings its own --config."""
    config = () if "--config" in more else ("--config", str(SMOKE / f"{RECIPES.get(stage, stage)}.yaml"))
    return [*config, "--run", str(run), *more]


def launch(stage: str, run: Path, *more: str) -> int:
    """In this process; the exit code."""
    return command(PROGRAMS[stage], arguments(stage, run, *more))


def prepared(stage: str, smoke_run: Path, run: Path) -> Path:
    """`run`, with what `stage` stands on: of the smoke run stages 1 and 2 under a noise predictor or another generator,
    all three under one that is tuned, else nothing. The autoencoder under `autoregressive` is of kind vq."""
    under = dict.fromkeys(["noise_predictor", *FAMILIES], ("autoencoder", "text_encoder"))
    under |= {"autoencoder": (), "text_encoder": ()}
    for name in under.get(stage, MAINS):
        source = smoke_run
        if (stage, name) == ("autoregressive", "autoencoder"):
            source = smoke_run / "vq"
            if not source.exists():
                assert launch(name, source, "--config", str(SMOKE / "autoencoder_vq.yaml")) == 0
        shutil.copytree(source / name, run / name)
    return run


def launch_apart(
    stage: str, run: Path, *more: str, fault: Fault | None = None, ranks: int = 1
) -> tuple[list[int], str]:
    """In children of their own, one a rank, `fault` planted in each: (exit codes, what they said on stderr)."""
    port = _free_port()
    said = run.with_name(f"{run.name}-{stage}.stderr")
    said.unlink(missing_ok=True)
    children = [
        _server.Process(target=_child, args=(stage, arguments(stage, run, *more), fault, said, rank, ranks, port))
        for rank in range(ranks)
    ]
    codes = run_all(children)
    return codes, said.read_text()


def apart(function: Callable, *args: object) -> int:
    """`function(*args)` in a child; its exit code, -9 when it was killed."""
    return run_all([_server.Process(target=function, args=args)])[0]


def on_two_ranks(function: Callable, *args: object) -> list[int]:
    """`function(*args)` on two gloo ranks; their exit codes."""
    port = _free_port()
    return run_all([_server.Process(target=_ranked, args=(function, args, rank, 2, port)) for rank in range(2)])


def run_all(children: list) -> list[int]:
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    stuck = [child for child in children if child.exitcode is None]
    for child in stuck:
        child.kill()
        child.join()
    assert not stuck, "children had to be killed after two minutes"
    return [child.exitcode for child in children]


def _child(stage: str, argv: list[str], fault: Fault | None, said: Path, rank: int, ranks: int, port: int) -> None:
    with said.open("a") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    _join(rank, ranks, port)
    # how often a loader's worker looks whether its parent is still there; it holds up `join` for so long
    torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.2
    if fault is not None:
        fault()
    sys.exit(command(PROGRAMS[stage], argv))


def _ranked(function: Callable, args: tuple, rank: int, ranks: int, port: int) -> None:
    _join(rank, ranks, port)
    function(*args)


def _join(rank: int, ranks: int, port: int) -> None:
    """The environment that torchrun gives its workers."""
    if ranks > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in (where | {"RANK": rank, "LOCAL_RANK": rank}).items()}
    os.environ["ACCELERATE_USE_CPU"] = "true"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def error_line(text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text, text
    return errors[0]


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without the timings, which no two runs share."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read]


def trace(folder: Path) -> dict[tuple[int, int], dict]:
    """What every row of every step was, from all processes; a row that was seen again has to have been the same."""
    rows: dict[tuple[int, int], dict] = {}
    for path in folder.glob("trace-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            assert rows.setdefault((line["step"], line["row"]), line) == line
    return rows


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    newest, complaints = checkpoint.newest(folder / "checkpoints")
    assert not complaints
    return {f"{p.stem}/{k}": v for p in newest.glob("*.safetensors") for k, v in load_file(p).items()}


def assert_equal_runs(a: Path, b: Path) -> None:
    """Weights, moments, averages, learning rates and logged metrics, bit for bit."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert lines(a) == lines(b)
