"""What it costs, measured side by side in one process tree: medians, spreads and ratios.

python -m training.benchmarks [--only PART] [--out FILE] [--config FILE] [--run RUN] [--any.field value]
    stage 3: training, mfu, time_to_score, pipeline, profile; RUN is a finished run such as runs/shapes
python -m training.benchmarks loop STAGE --config FILE --run RUN
python -m training.benchmarks save
python -m training.benchmarks encode TEXT_STAGE
python -m training.benchmarks decode AUTOENCODER
python -m training.benchmarks autoencoder --config FILE --run RUN
python -m training.benchmarks curves CONFIG CONFIG --seconds 60
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from sd_mini import shapes
from sd_mini.cli.main import Parser
from sd_mini.errors import UserError
from sd_mini.files import atomic_text, check_writable, read_json
from sd_mini.stages.contract import load_stage, read_contract
from sd_mini.text_encoder.adapter import TextStage
from training.benchmarks.autoencoder import autoencoder_cost
from training.benchmarks.curves import curves
from training.benchmarks.pipeline import pipeline_speed
from training.benchmarks.predictor import parsed, profiled, training_speed, utilisation
from training.benchmarks.score import time_to_score
from training.distributed.processes import join_processes, tune_cpu
from training.engine.batches import iterate
from training.engine.launch import parse
from training.engine.loop import Loop
from training.engine.task import Origin
from training.storage import cache, checkpoint
from training.text_encoder.data import CHUNK

WARM_UP, MEASURED = 10, 100  # updates


class Clock:
    """Adds up the time that is spent in what it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return timed


def loop_cost(stage: str, argv: Sequence[str]) -> None:
    """Share of a step that is neither forward, backward nor optimizer, log lines included; on the CPU.

    Validation, previews and checkpoints come on top, each at its own price.
    """
    program = import_module(f"training.{stage}.task").main
    launched = parse(program.config, stage, argv)
    if launched is None:
        return
    join_processes()
    with tempfile.TemporaryDirectory() as folder:
        config = launched.config.train.model_copy(update={"ema_snapshots": 0})
        task = program.make_task(launched)
        loop = Loop(task, config, Path(folder) / stage, Origin(time.perf_counter(), {}), list(launched.log_with))
        loop.folder.mkdir()
        loop.watch.start({}, 0)
        (learner,) = loop.learners
        clock, steps = Clock(), []
        learner.objective.forward = clock.around("forward", learner.objective.forward)
        loop.accelerator.backward = clock.around("backward", loop.accelerator.backward)
        learner.optimizer.step = clock.around("optimizer", learner.optimizer.step)
        mark = time.perf_counter()
        for inputs in iterate(loop.steps, 0, WARM_UP + MEASURED, config.workers):
            if loop.step == WARM_UP:
                loop.log()  # which measures the machine's peak the first time
                clock.seconds, steps, mark = {}, [], time.perf_counter()
            loop.update(inputs)
            loop.watch.bar.update()
            if loop.step % config.log_every == 0:
                loop.log()
            now = time.perf_counter()
            steps.append(now - mark)
            mark = now
        loop.watch.finish()
        total = sum(steps)
        shares = {**clock.seconds, "the loop": total - sum(clock.seconds.values())}
        print(f"{MEASURED} updates, {1000 * statistics.median(steps):.1f} ms each (median)")
        for name, seconds in shares.items():
            print(f"{name:>10} {1000 * seconds / MEASURED:8.2f} ms {100 * seconds / total:6.2f} %")


def save_cost(rounds: int = 7, parameters: int = 100_000_000) -> None:
    """A checkpoint of so many parameters, with moments and two averages, against a plain write of the same bytes."""
    tensors = {
        file: {f"w{i}": torch.randn(parameters // 25) for i in range(25 * size)}
        for file, size in (("model", 1), ("optimizer", 2), ("ema-0.05", 1), ("ema-0.1", 1))
    }
    seconds: dict[str, list[float]] = {"plain": [], "plain, synced": [], "checkpoint": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        for number in tqdm(range(rounds), desc="rounds"):
            for name in seconds:  # interleaved, so that a slow spell of the disk meets all three
                os.sync()
                start = time.perf_counter()
                if name == "checkpoint":
                    checkpoint.save(root, number, tensors, {}, 1)
                else:
                    _plain_write(root, tensors, synced=name != "plain")
                seconds[name].append(time.perf_counter() - start)
                for path in root.glob("*.safetensors"):
                    path.unlink()
    plain = statistics.median(seconds["plain"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:>14} {median:6.2f} s [{min(values):.2f}, {max(values):.2f}] {median / plain:5.2f} x plain")


def _plain_write(root: Path, tensors: dict[str, dict[str, torch.Tensor]], synced: bool) -> None:
    for file, values in tensors.items():
        save_file(values, root / f"{file}.safetensors")
        if synced:
            checkpoint.sync(root / f"{file}.safetensors")


def encode_cost(folder: str, count: int = 100_000) -> None:
    """So many unique captions through a text stage into a cache on disk: seconds, and how the memory grew.

    The captions are those of shapes scenes, each numbered, so that no two are alike and their lengths differ.
    """
    stage = TextStage.from_parts(load_stage(folder, "text_encoder").parts)
    scenes = shapes.sample_scenes(count, "train", seed=1)
    captions = [f"{i} {shapes.caption(scene, i % 4)}" for i, scene in enumerate(scenes)]
    join_processes()
    tune_cpu(1)
    page = os.sysconf("SC_PAGE_SIZE")

    def anonymous() -> int:
        fields = Path("/proc/self/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * page

    def encode_rows(rows: slice) -> dict[str, np.ndarray]:
        with torch.no_grad():
            made = stage.encode(captions[rows], warn=False)
        memory.append(anonymous())
        return {"tokens": made.tokens.numpy(), "mask": made.mask.numpy()}

    memory: list[int] = []
    with tempfile.TemporaryDirectory(dir=".") as home:
        start = time.perf_counter()
        cache.encode(Path(home), {"benchmark": folder}, count, encode_rows, "captions", chunk=CHUNK)
        seconds = time.perf_counter() - start
    settled = memory[len(memory) // 4]
    print(f"{count} captions in {seconds:.1f} s, {count / seconds:.0f} a second")
    print(f"memory after a quarter {settled / 2**20:.0f} MiB, at most {(max(memory) - settled) / 2**20:+.1f} MiB later")


def decode_cost(folder: str, batch: int = 64, rounds: int = 15) -> None:
    """Pictures a second that a stage's decoder makes of its own latents, at the size it was trained at."""
    stage = load_stage(folder, "autoencoder")
    join_processes()
    tune_cpu(1)
    autoencoder = stage.parts["autoencoder"].to(memory_format=torch.channels_last)
    latents = torch.randn(batch, *stage.contract["latent_shape"])
    rates = []
    with torch.inference_mode():
        for _ in range(rounds + 3):
            start = time.perf_counter()
            autoencoder.decode(latents)
            rates.append(batch / (time.perf_counter() - start))
    rates = sorted(rates[3:])
    print(f"{statistics.median(rates):.0f} pictures/s [{rates[0]:.0f}, {rates[-1]:.0f}], batches of {batch}")


PARTS: dict[str, Callable[[Sequence[str]], Any]] = {
    "training": training_speed,
    "mfu": utilisation,
    "time_to_score": time_to_score,
    "pipeline": pipeline_speed,
    "profile": profiled,
}


def stage_3(argv: Sequence[str]) -> None:
    """All parts, or `--only` one; a table, and with `--out` what is in it as JSON, those of other parts kept."""
    parser = Parser(prog="python -m training.benchmarks", description=stage_3.__doc__)
    parser.add_argument("--only", choices=list(PARTS), help="one part; all if left out")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"), help="(%(default)s)")
    parser.add_argument("--config", default="training/configs/shapes/noise_predictor.yaml", help="(%(default)s)")
    parser.add_argument("--run", default="runs/shapes", help="whose stages 1 and 2 are trained (%(default)s)")
    options, overrides = parser.parse_known_args(argv)
    given = ["--config", options.config, "--run", options.run, *overrides]
    launched = parsed(given)
    check_writable(options.out)
    for kind in ("text_encoder", "autoencoder"):
        read_contract(launched.run / kind / "final", kind)
    found = read_json(options.out) or {}
    found["machine"] = {"cores": os.cpu_count(), "torch": torch.__version__, "device": _device()}
    for name in [options.only] if options.only else PARTS:
        print(f"# {name}")
        found[name] = PARTS[name](given)
        atomic_text(options.out, json.dumps(found, indent=2) + "\n")
    print(options.out)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def main(argv: Sequence[str]) -> None:
    if list(argv) == ["save"]:
        save_cost()
    elif len(argv) == 2 and argv[0] == "encode":
        encode_cost(argv[1])
    elif len(argv) == 2 and argv[0] == "decode":
        decode_cost(argv[1])
    elif len(argv) >= 2 and argv[0] == "autoencoder":
        autoencoder_cost(argv[1:])
    elif len(argv) >= 2 and argv[0] == "curves":
        curves(argv[1:])
    elif len(argv) >= 2 and argv[0] == "loop":
        loop_cost(argv[1], argv[2:])
    elif not argv or argv[0].startswith("--"):
        stage_3(argv)
    else:
        raise UserError(
            "expected no name (stage 3), `save`, `encode TEXT_STAGE`, `decode AUTOENCODER`, "
            "`loop STAGE --config FILE --run RUN`, `autoencoder --config FILE --run RUN` or `curves CONFIG CONFIG`"
        )
