"""What is left of a picture after the autoencoder alone: the ceiling for whatever is made through its decoder.

python -m eval.metrics.reconstruction runs/shapes/autoencoder/final --data shapes --out runs/shapes/reconstruction
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.data_options import SHAPES, add_data, asked_data, check_columns, recorded_data
from eval.features.features import open_features
from eval.features.reference import FeatureSet
from eval.judge.judge import judge, summarise
from eval.judge.objects import MIN_SIDE
from eval.metrics.bootstrap import prompt_interval
from eval.metrics.registry import Metric, Row, Sample
from sd_mini import images, shapes
from sd_mini.autoencoder.model import Autoencoder
from sd_mini.cli.arguments import Parser, check_target, whole_number
from sd_mini.config import command
from sd_mini.data.captioned import load
from sd_mini.files import CONTRACT, atomic_folder, written_to
from sd_mini.memory import keep_freed_memory
from sd_mini.progress import progress
from sd_mini.stages.start import load_autoencoder
from sd_mini.vision.lpips import load_lpips

REPORT, WORST, FIRST, SPECTRA = "reconstruction.json", "worst.png", "first.png", "spectra.png"
SHOWN = 20
FIRST_SCENE_SEED = 1000  # of scenes that training did not look at, neither to learn nor to watch itself
# prompts a split; with the world's mix of kinds, test then asks for about 175 single objects and 200 pairs
PROMPTS = {"test": 500, "heldout_pairs": 300, "heldout_relations": 300}


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, pictures: np.ndarray, batch: int) -> np.ndarray:
    """(N, 3, H, W) uint8 => their reconstructions, the same shape and range, `batch` at a time."""
    parts = []
    for start in progress(range(0, len(pictures), batch), desc="reconstructions", unit="batch", delay=2):
        pixels = images.to_pixels(pictures[start : start + batch]).to(autoencoder.device, autoencoder.dtype)
        parts.append(images.to_uint8(autoencoder.decode(autoencoder.encode(pixels))).cpu().numpy())
    return np.concatenate(parts)


def reconstruction_scores(pictures: np.ndarray, reconstructed: np.ndarray) -> dict[str, float]:
    """Two (N, 3, H, W) uint8 => their distances.

    psnr: dB, the mean of each picture's own, with its 95 % interval over pictures as psnr_low, psnr_high (infinite, and
    without one, where a picture comes back without any error); psnr_global: dB of the mean squared error over all of
    them, which a bad picture pulls down more; ssim: the mean of each picture's own (`images.ssim`, over 0 to 255), of
    pictures of at least 11 px; n.
    """
    own = images.psnr(pictures, reconstructed)
    with np.errstate(divide="ignore"):
        together = -10 * np.log10(np.mean(10 ** (-own / 10)))
    scores = {"psnr": float(own.mean()), "psnr_global": float(together), "n": len(pictures)}
    if np.isfinite(own).all():
        scores["psnr_low"], scores["psnr_high"] = prompt_interval(own, [str(i) for i in range(len(own))])
    if min(pictures.shape[2:]) >= images.SSIM_WINDOW:
        scores["ssim"] = float(_ssim(pictures, reconstructed).mean())
    return scores


def _ssim(pictures: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    parts = []
    for start in range(0, len(pictures), 64):
        a, b = (torch.from_numpy(p[start : start + 64]).double() for p in (pictures, reconstructed))
        parts.append(images.ssim(a, b, 255.0).numpy())
    return np.concatenate(parts)


def ceiling(
    autoencoder: Autoencoder, split: str, count: int, resolution: int, seed: int, batch: int, level: int = 1
) -> dict:
    """True drawings of `count` scenes through the autoencoder, judged: what no picture made through it can beat."""
    scenes = shapes.sample_scenes(count, split, FIRST_SCENE_SEED + seed, level=level)
    made = reconstruct(autoencoder, shapes.draw_batch(scenes, resolution), batch)
    return summarise([judge(picture, scene) for picture, scene in zip(made, scenes, strict=True)])


@torch.no_grad()
def latent_statistics(autoencoder: Autoencoder, pictures: np.ndarray, batch: int) -> dict[str, list[float]]:
    """(N, 3, H, W) uint8 => mean and std a channel of the standardised latents, and their spectrum."""
    parts = [
        autoencoder.encode(images.to_pixels(part).to(autoencoder.device)).double().cpu()
        for part in np.array_split(pictures, -(-len(pictures) // batch))
    ]
    latents = torch.cat(parts)
    return {
        "mean": latents.mean((0, 2, 3)).tolist(),
        "std": latents.std((0, 2, 3)).tolist(),
        "spectrum": spectrum(latents.numpy()),
    }


def spectrum(values: np.ndarray) -> list[float]:
    """(N, C, H, W) => the mean power at each whole distance from frequency 0, up to the shorter side's half.

    White noise has its variance everywhere; at 0 stands H W times the squared mean.
    """
    power = np.abs(np.fft.fft2(values, norm="ortho")) ** 2
    height, width = values.shape[2:]
    down, across = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    ring = np.rint(np.hypot(down, across) * min(height, width)).astype(int)
    mean = power.mean((0, 1))
    return [float(mean[ring == r].mean()) for r in range(min(height, width) // 2 + 1)]


def measure(autoencoder: Autoencoder, pictures: np.ndarray, options: argparse.Namespace) -> tuple[dict, np.ndarray]:
    """=> reconstruction.json without its protocol, and the reconstructions."""
    made = reconstruct(autoencoder, pictures, options.batch)
    scores: dict[str, Any] = reconstruction_scores(pictures, made)
    if options.lpips is not None:
        scores["lpips"] = _lpips(pictures, made, options.lpips)
    if options.inception is not None:
        extract = open_features("inception" if options.inception == "download" else f"inception={options.inception}")
        scores["rfid"] = FeatureSet.of(extract(pictures)).distance(FeatureSet.of(extract(made)))
    scores["latents"] = latent_statistics(autoencoder, pictures, options.batch)
    scores["spectrum"] = {"pictures": spectrum(pictures / 127.5 - 1), "reconstructions": spectrum(made / 127.5 - 1)}
    if options.data == SHAPES and options.resolution >= MIN_SIDE:
        scores["ceiling"] = {
            split: ceiling(
                autoencoder,
                split,
                min(n, options.count or n),
                options.resolution,
                options.seed,
                options.batch,
                options.level,
            )
            for split, n in PROMPTS.items()
        }
    return scores, made


@torch.no_grad()
def _lpips(pictures: np.ndarray, made: np.ndarray, weights: str) -> float:
    module = load_lpips("alex", None if weights == "download" else weights)
    pairs = zip(*(np.array_split(part, -(-len(part) // 64)) for part in (pictures, made)), strict=True)
    return float(torch.cat([module(*map(images.to_pixels, pair)).view(-1) for pair in pairs]).mean())


def plot(scores: dict[str, Any], path: Path) -> None:
    """Draw the spectra of the pictures and their reconstructions, and of the latents."""
    from matplotlib.figure import Figure  # a second

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, power in scores["spectrum"].items():
        left.semilogy(power, label=name)
    right.semilogy(scores["latents"]["spectrum"], color="black")
    left.set(title="pixels", xlabel="periods a picture", ylabel="power")
    right.set(title="standardised latents", xlabel="periods a picture")
    left.legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    return command(_main, argv)


def _main(argv: Sequence[str]) -> None:
    keep_freed_memory()
    options = _parser().parse_args(argv)
    check_target(options.out, REPORT)
    stage = Path(options.autoencoder)  # RUN/autoencoder/final, which was trained by the config beside it, or another's
    recorded = recorded_data(stage.parent) if (stage / CONTRACT).is_file() else {}
    config = asked_data(options, recorded, "valid", "test")
    check_columns(options, config.source)
    options.data, options.level = config.source, config.level
    autoencoder, contract = load_autoencoder(options.autoencoder)
    autoencoder.eval()
    if options.resolution is None:
        options.resolution = (contract or {}).get("resolution", 64)
    autoencoder.latent_shape(options.resolution, options.resolution)
    count = options.count or (500 if options.data == SHAPES else config.count)
    seed = FIRST_SCENE_SEED + options.seed if options.data == SHAPES else 0
    asked = {"resolution": options.resolution, "seed": seed}
    if config.side == "all":  # of one side the rows are known once all have been read
        asked["count"] = count
    data = load(config.model_copy(update=asked), pictures_only=True)
    if count is not None and count < len(data):
        data = data.select(range(count))
    pictures = np.asarray(data.pictures)
    scores, made = measure(autoencoder, pictures, options)
    scores["protocol"] = {
        "data": data.name,
        "fingerprint": data.fingerprint,
        "resolution": options.resolution,
        **({"level": config.level} if options.data == SHAPES else {}),
        "autoencoder": (contract or {}).get("hash"),
        "kind": autoencoder.config.kind,
        "parameters": sum(p.numel() for p in autoencoder.parameters()),
        "scene_seed": seed,
    }
    print(table(scores), flush=True)  # first, as writing may fail
    write(options.out, scores, pictures, made)
    print(options.out / REPORT)


def write(folder: Path, scores: dict[str, Any], pictures: np.ndarray, made: np.ndarray) -> None:
    """reconstruction.json, the spectra, and each above its reconstruction: the first 20 pictures, and the 20 of the
    lowest PSNR."""
    own = images.psnr(pictures, made)
    with written_to(folder), atomic_folder(folder, keep=True) as partial:
        (partial / REPORT).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        plot(scores, partial / SPECTRA)
        for name, chosen in ((FIRST, range(len(own))), (WORST, np.argsort(own, kind="stable"))):
            chosen = list(chosen)[:SHOWN]
            labels = [f"{own[i]:.1f} dB" for i in chosen]
            pairs = [np.concatenate([pictures[i], made[i]], axis=1) for i in chosen]
            images.grid(pairs, columns=10, labels=labels, scale=max(1, 96 // pictures.shape[-1])).save(partial / name)


def table(scores: dict[str, Any]) -> str:
    lines = [
        f"PSNR {scores['psnr']:.2f} dB a picture, {scores['psnr_global']:.2f} dB of all, n {scores['n']}"
        + "".join(f", {name.upper()} {scores[name]:.4f}" for name in ("ssim", "lpips", "rfid") if name in scores)
    ]
    std = scores["latents"]["std"]
    lines.append(f"latents: std a channel from {min(std):.3f} to {max(std):.3f}")
    for split, summary in scores.get("ceiling", {}).items():
        exact = summary["all"]
        interval = f"[{100 * exact['low']:.1f}, {100 * exact['high']:.1f}]"
        lines.append(f"ceiling on {split}: {100 * exact['exact']:.1f} % {interval} of {exact['n']:.0f}")
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(prog="python -m eval.metrics.reconstruction", description="Measure an autoencoder alone.")
    parser.add_argument(
        "autoencoder", metavar="AUTOENCODER", help="an exported stage, a diffusers folder or a hub name"
    )
    add_data(parser, "the `valid` part of the run that AUTOENCODER lies in", "test", ("image_column",))
    parser.add_argument("--out", required=True, type=Path, help="folder of the report; an older one is replaced")
    parser.add_argument(
        "--count", type=whole_number(2), help="pictures (shapes: 500, and 300 of the held-out splits; else all)"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the scenes (%(default)s)")
    parser.add_argument("--resolution", type=whole_number(1), help="px; the stage's own, or 64")
    parser.add_argument("--batch", type=whole_number(1), default=64, help="pictures at a time (%(default)s)")
    parser.add_argument("--lpips", metavar="FILE", help="LPIPS, by torchvision's AlexNet weights, or 'download'")
    parser.add_argument("--inception", metavar="FILE", help="rFID, by torch-fidelity's weights, or 'download'")
    return parser


def _measure(sample: Sample) -> dict[str, Any] | None:
    from eval.analysis.blame import AUTOENCODER  # which reconstructs by this file

    if AUTOENCODER not in sample.sets:
        return None
    pictures = sample.question.splits[0].pictures
    assert pictures is not None  # what was reconstructed
    part = reconstruction_scores(pictures, sample.sets[AUTOENCODER])
    if np.isfinite(part["psnr"]):
        return part
    sample.remarks.append(
        "reconstruction left out: a picture comes back without any error, which is infinitely many dB"
    )
    return None


def _rows(part: Mapping[str, Any]) -> list[Row]:
    interval = f"{part['psnr_low']:.2f}–{part['psnr_high']:.2f}"
    return [Row("reconstruction, PSNR", f"{part['psnr']:.2f} dB PSNR", interval, str(part["n"]))]


def _lines(part: Mapping[str, Any]) -> list[str]:
    return [f"reconstruction: {part['psnr']:.2f} dB PSNR over {part['n']} pictures"]


RECONSTRUCTION = Metric("reconstruction", _measure, _rows, _lines)


if __name__ == "__main__":
    sys.exit(main())
