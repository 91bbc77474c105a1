"""Speed of the evaluators, each beside the reference implementation in the same process, taking turns.

python -m eval.benchmark frechet | moments | inception
python -m eval.benchmark report RUN
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from sd_mini.cli.arguments import Parser, whole_number
from sd_mini.config import command
from sd_mini.errors import UserError
from sd_mini.timing import Case, Spread

DIM = 2048


def main(argv: Sequence[str] | None = None) -> int:
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    options.run_command(options)


def _parser() -> Parser:
    parser = Parser(prog="python -m eval.benchmark", description="Speed of the evaluators beside their references.")
    commands = parser.add_subparsers(required=True, metavar="{frechet,moments,inception,report}")
    for name, run, what in (
        ("frechet", _frechet, "distance of two 2048-wide sets: ours, torchmetrics, torch-fidelity"),
        ("moments", _moments, "mean and covariance of 50,000 rows of 2048, streamed: seconds and peak memory"),
        ("inception", _inception, "pictures a second through Inception, untrained weights: ours, torch-fidelity"),
        ("report", _report, "the whole of python -m eval on a run"),
    ):
        sub = commands.add_parser(name, help=what)
        sub.set_defaults(run_command=run)
        sub.add_argument("--repeats", type=whole_number(1), default=3, help="of each, in turn (%(default)s)")
        if name == "report":
            sub.add_argument("run", metavar="RUN", type=Path)
        if name == "inception":
            sub.add_argument("--pictures", type=whole_number(1), default=128, help="of 64 px (%(default)s)")

    return parser


def _frechet(options: argparse.Namespace) -> None:
    import torch
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    from eval.features.moments import statistics as of
    from eval.metrics.fid import frechet_distance

    draw = np.random.default_rng(0)
    sets = [draw.normal(size=(3000, DIM)) @ (draw.normal(size=(DIM, DIM)) / DIM**0.5) for _ in range(2)]
    (mean_a, cov_a), (mean_b, cov_b) = (of(part.astype(np.float32)) for part in sets)
    tensors = [torch.from_numpy(part) for part in (mean_a, cov_a, mean_b, cov_b)]
    stats = [{"mu": mean, "sigma": cov} for mean, cov in ((mean_a, cov_a), (mean_b, cov_b))]
    contestants = {
        "ours": lambda: frechet_distance(mean_a, cov_a, mean_b, cov_b),
        "torchmetrics": lambda: float(_compute_fid(*tensors)),
        "torch-fidelity": lambda: fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"],
    }
    distances = Case("frechet", contestants, options.repeats).run().results
    for name in ("torchmetrics", "torch-fidelity"):
        print(f"relative difference to {name}: {abs(distances['ours'][-1] / distances[name][-1] - 1):.1e}")


def _moments(options: argparse.Namespace) -> None:
    def in_a_process() -> tuple[float, float, float]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(stream).result()

    turns = Case("moments", {"moments": in_a_process}, options.repeats, figures={}).run()
    seconds, before, peak = map(Spread.of, zip(*turns.results["moments"], strict=True))
    print(f"{seconds} s, peak {peak.median:.0f} MB, of which {before.median:.0f} MB are Python and numpy")


def stream(rows: int = 50_000, batch: int = 500) -> tuple[float, float, float]:
    """(seconds, MB before, MB at the peak) of this process, which has to be one of its own."""
    from eval.features.moments import Moments

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    moments, features = Moments(DIM), np.random.default_rng(0).normal(size=(batch, DIM)).astype(np.float32)
    before, start = peak(), time.perf_counter()
    for _ in range(rows // batch):
        moments.add(features)
    moments.mean_and_covariance()
    return time.perf_counter() - start, before, peak()


def _inception(options: argparse.Namespace) -> None:
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from eval.features.features import open_features

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            pass

    pictures = np.random.default_rng(0).integers(0, 256, (options.pictures, 3, 64, 64), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        empty, weights = Path(folder) / "empty.pth", Path(folder) / "weights.pth"
        torch.save({}, empty)
        torch.manual_seed(0)
        theirs = Untrained("inception", ["2048"], feature_extractor_weights_path=str(empty))
        torch.save(theirs.state_dict(), weights)
        extract = open_features(f"inception={weights}")

    @torch.inference_mode()
    def reference() -> np.ndarray:
        # 64 at a time, torch-fidelity's own default
        return torch.cat([theirs(part)[0] for part in torch.from_numpy(pictures).split(64)]).numpy()

    figures = {"s": float, "pictures/s": lambda seconds: options.pictures / seconds}
    contestants = {"ours": lambda: extract(pictures), "torch-fidelity": reference}
    results = Case("inception", contestants, options.repeats, figures=figures).run().results
    ours, expected = results["ours"][-1], results["torch-fidelity"][-1]
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f"largest difference, relative to the largest feature: {error:.1e}")


def _report(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report"
        cache = ["--cache", str(Path(folder) / "cache")]  # an empty one, as results of an earlier run would be reused
        arguments = ["-m", "eval", str(options.run), "--data", "shapes", "--out", str(out), *cache]

        def evaluation() -> None:
            if subprocess.run([sys.executable, *arguments], check=False, stdout=subprocess.DEVNULL).returncode:
                raise UserError(f"python {' '.join(arguments)} failed; see above")

        Case("report", {"whole evaluation": evaluation}, options.repeats).run()
        print(f"report.html {(out / 'report.html').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
