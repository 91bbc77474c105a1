"""`sd-mini init`: a commented recipe, sized for the pictures and the machine at hand.

The values are those of two recipes that were measured, training/configs/pictures (two cores, 64 px) and
training/configs/emoji_gpu (one H200, 128 px); the sizes, batches and times follow from the data and the device.
"""

from __future__ import annotations

import argparse
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_mini.config import read
from sd_mini.errors import UserError
from sd_mini.files import check_writable, written_to

# what the measured recipes took, and the float32 (CPU) or bfloat16 (GPU) matrix products a second of their machines
_MEASURED = {"cpu": (14 * 60, 290e9), "cuda": (321, 700e12)}
_FIELDS = (
    "text_column",
    "image_column",
    "aliases_column",
    "template",
    "split",
    "count",
    "max_aspect",
    "crop",
    "mirror",
)


def add_command(commands: Any) -> None:
    parser = commands.add_parser("init", help="write a recipe for your pictures and this machine")
    parser.set_defaults(run_command=run, takes_fields=True)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where three YAML files and a README are written")
    parser.add_argument(
        "--data", metavar="SOURCE", required=True, help="as data.source; further options are its fields: --text_column"
    )


def run(options: argparse.Namespace) -> None:
    folder = options.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and would be overwritten; give a new folder")
    check_writable(folder, "FOLDER")
    if options.data == "shapes":
        raise UserError("--data shapes: has its recipe already, training/configs/shapes; give pictures of yours")
    from sd_mini.data.captioned import DataConfig
    from sd_mini.data.preflight import counted

    source = Path(options.data)
    name = str(source.absolute()) if source.exists() else options.data  # a recipe is launched from the checkout
    config = read(DataConfig, None, ["--source", name, *options.rest])
    rows, sizes = counted(config)
    side = int(sorted(min(size) for size in sizes.tolist())[len(sizes) // 2])
    recipe = Recipe(folder, config, rows, side, *machine())
    texts = {f"{stage}.yaml": getattr(recipe, stage)() for stage in STAGES} | {"README.md": recipe.readme()}
    with written_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    print(*recipe.summary(), sep="\n")


STAGES = ("autoencoder", "text_encoder", "noise_predictor")


def machine() -> tuple[str, float]:
    """The device, "cpu" or "cuda", and the floating-point operations a second of its matrix products, by a trial."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # which waits for the device
        best = min(best, time.perf_counter() - start)
    return device, 2 * side**3 / best


@dataclass(frozen=True)
class Recipe:
    """The three stages' files for `rows` pictures of about `side` px, the shorter one, on a device.

    `flops`: floating-point operations a second, as `machine` measures them.
    """

    folder: Path
    data: Any
    rows: int
    side: int
    device: str
    flops: float

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def resolution(self) -> int:
        """The recipe's own, or less where pictures would have to be enlarged by half and more."""
        own = 128 if self.is_gpu else 64
        while own > 32 and own > 1.5 * self.side:
            own //= 2
        return own

    @property
    def train_rows(self) -> int:
        """Without the rows that are held out."""
        return max(1, round(self.rows * (1 - self.share)))

    @property
    def share(self) -> float:
        """Held out: of few rows more than usual, so that some are."""
        return max(self.data.share, min(0.25, 8 / self.rows))

    def batch(self, wanted: int) -> int:
        return min(wanted, self.train_rows)

    @property
    def hours(self) -> float:
        seconds, flops = _MEASURED[self.device]
        cells = (self.resolution / (128 if self.is_gpu else 64)) ** 2
        return seconds / 3600 * cells * flops / self.flops

    @property
    def disk(self) -> float:
        """GB: pictures as bytes, latents and captions as floats, and about 40 copies of the weights."""
        a_row = 3 * self.resolution**2 + 4 * 16 * (self.resolution // 8) ** 2 + 4 * 4 * 32 * 192
        weights = 114e6 if self.is_gpu else 5e6
        return (self.rows * a_row + 40 * 4 * weights) / 1e9

    def _data(self, resolution: int) -> str:
        """The data field: the source, what was given, and what of the rest a user is likely to change."""
        import yaml

        given = {n: getattr(self.data, n) for n in _FIELDS if n in self.data.model_fields_set}
        fields = {"source": self.data.source, "resolution": resolution, **given}
        lines = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000).splitlines()
        held_out = [f"valid: {{share: {self.share:.2f}}}  # held out, by what they show"]
        return "\n".join(["data:", *(f"  {line}" for line in lines), *held_out])

    def _train(self, **fields: Any) -> str:
        notes = {
            "steps": "updates of the weights; more is better until the held-out score stops",
            "batch_size": "pictures an update",
            "lr": "AdamW's, of norms, biases and embeddings",
            "muon_lr": "Muon's, of the weight matrices",
            "mixed_precision": "half the memory and twice the speed on a GPU",
            "compile": "a minute at the start, faster from then on",
            "ema_width": "of the average of the weights that is exported, as a share of the updates",
            "preview_every": "updates between two pictures in samples/",
            "checkpoint_every": "updates between two checkpoints, from which an interrupted launch goes on",
        }
        if self.is_gpu:
            fields |= {"mixed_precision": "bf16", "compile": "inductor"}
        lines = (f"  {n}: {v}" + (f"  # {notes[n]}" if n in notes else "") for n, v in fields.items())
        return "\n".join(["train:", *lines]) + "\n"

    def autoencoder(self) -> str:
        blocks, layers = ("[64, 128]", "[128, 256]"), ("[1, 2]", "[2, 2]")
        if not self.is_gpu:
            blocks, layers = ("[32, 64]", "[64, 128]"), ("[1, 1]", "[1, 1]")
        cells = self.resolution // 8
        train = self._train(
            steps=3000 if self.is_gpu else 4000,
            batch_size=self.batch(16 if self.is_gpu else 8),
            lr=2.5e-3,
            muon_lr=0.05,
            clip_norm=20.0,
            warmup_steps=50,
            schedule="linear",
            ema_width=0.05,
            ema_every=4,
            preview_every=1000,
            checkpoint_every=1000,
        )
        return (
            f"# Stage 2, the autoencoder: {self.resolution} px <=> {cells} x {cells} latents of 16 channels. It "
            f"needs no captions.\n{self._data(self.resolution)}\n"
            "model:\n  kind: dc  # a deep-compression autoencoder; kl, vq, tiny and small_picture are the others\n"
            "  patch_size: 4\n  network:\n    latent_channels: 16  # more: sharper pictures, harder to generate\n"
            f"    encoder_block_out_channels: {blocks[0]}\n    decoder_block_out_channels: {blocks[1]}\n"
            f"    encoder_layers_per_block: {layers[0]}\n    decoder_layers_per_block: {layers[1]}\n"
            "    encoder_qkv_multiscales: [[], []]\n    decoder_qkv_multiscales: [[], []]\n"
            "    upsample_block_type: interpolate\n"
            "loss: {l1: 0, log_l2: 1.0, kl: 0.02, latent_noise: 0.1}  # lpips, a discriminator: docs/autoencoders.md\n"
            f"{train}"
        )

    def text_encoder(self) -> str:
        train = self._train(
            steps=300,
            batch_size=self.batch(64),
            lr=2.0e-3,
            muon_lr=0.03,
            warmup_steps=30,
            schedule="cosine",
            preview_every=100,
            checkpoint_every=100,
        )
        return (
            "# Stage 1, the text encoder and its adapter: captions against pictures, which need no more than 32 px.\n"
            f"{self._data(32)}\n"
            "# a small CLIP from nothing; CLIP, T5 and others by folder or hub name: docs/text_encoders.md\n"
            "encoder: {vocab_size: 4096, dim: 192, layers: 1, heads: 3, max_length: 32}\n"
            "adapter: {dim: 192, depth: 1, heads: 3, residual_scale: 1.0}\n"
            "tower: {width: 64, patch: 2}  # sees the pictures; is thrown away after this stage\n"
            "twins: 4  # wrong captions a picture, with one word changed\n"
            "loss: {siglip: 0.1, late: 0.1, layout: 20.0}\n"
            f"{train}"
        )

    def noise_predictor(self) -> str:
        network = "{patch_size: 2, hidden_size: 192, num_heads: 6, depth: 6, mlp_ratio: 2.5}"
        numbers: dict[str, Any] = {"steps": 1500, "batch_size": self.batch(64), "lr": 2.0e-3, "muon_lr": 0.02}
        objective = "{caption_dropout: 0.1, uniform_share: 0.1}"
        if self.is_gpu:
            network = "{patch_size: 1, hidden_size: 1024, num_heads: 16, depth: 5, mlp_ratio: 3.0}"
            numbers = {"steps": 500, "batch_size": self.batch(512), "lr": 3.0e-4, "muon_lr": 0.02}
            objective = "{caption_dropout: 0.1, uniform_share: 0.1, shift: 1.5}"
        train = self._train(
            **numbers,
            warmup_steps=50 if self.is_gpu else 100,
            schedule="linear",
            ema_width=0.1,
            preview_every=500,
            checkpoint_every=300,
        )
        return (
            "# Stage 3, the noise predictor: from noise to latents, step by step, led by the prompt.\n"
            f"{self._data(self.resolution)}\n"
            "captions_per_picture: 4  # of a picture with several, how many are encoded\n"
            f"network:\n  kind: prx  # pixart, unet and others: docs/noise_predictors.md\n  network: {network}\n"
            f"objective: {objective}  # caption_dropout trains the null condition of guidance\n"
            "sampling: {steps: 20, guidance: 3.0}  # the pipeline's defaults; they can be changed at each call\n"
            f"{train}"
        )

    def summary(self) -> list[str]:
        unit = f"{60 * self.hours:.0f} minutes" if self.hours < 2 else f"{self.hours:.1f} hours"
        return [
            f"{self.folder}: a recipe for {self.rows:,} pictures of about {self.side} px, at {self.resolution} px on "
            f"{'one GPU' if self.is_gpu else 'the CPU'}",
            f"estimate: {unit} for all three stages, right within a factor of two, and {self.disk:.1f} GB of disk",
            f"next: see {self.folder / 'README.md'}",
        ]

    def readme(self) -> str:
        own = shlex.quote(str(self.folder))
        run = shlex.quote(f"runs/{self.folder.absolute().name}")
        fields = [
            f"--{n} {shlex.quote(str(getattr(self.data, n)))}" for n in _FIELDS if n in self.data.model_fields_set
        ]
        look = " ".join(["sd-mini data", shlex.quote(str(self.data.source)), *fields, "--sheet sheet.png"])
        launches = "\n".join(
            f"accelerate launch -m training.{stage} --config {own}/{stage}.yaml --run {run}" for stage in STAGES
        )
        return (
            f"# {self.folder.absolute().name}\n\n{'. '.join(line.partition(': ')[2] for line in self.summary()[:2])}.\n"
            f"{self.rows - self.train_rows:,} of the rows are held out, by what they show.\n\n"
            "From the checkout of sd_mini:\n\n"
            f"```sh\n{look}\n{launches}\nsd-mini export {run}\n"
            f'sd-mini generate {run} "PROMPT" --out a.png\npython -m eval {run}/pipeline --out {run}/report\n```\n\n'
            "The first two stages may run in any order. An interrupted launch goes on where it was when the same\n"
            "command is given again. `runs/` then holds pictures of what each stage has learned (`samples/`).\n\n"
            "What to change first: `train.steps` (longer), `data.resolution` (all three sizes of a stage's data), and\n"
            "`data.max_aspect: 2` where pictures are not square. Every field: `docs/config.md`.\n"
        )
