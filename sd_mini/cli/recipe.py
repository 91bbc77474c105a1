"""The recipe that `sd-mini init` writes: three YAML files and a README.

The values are those of two recipes that were measured, training/configs/pictures (two cores, 64 px) and
training/configs/emoji_gpu (one H200, 128 px); the sizes, batches and times follow from the data and the device.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_mini.memory import total

_MEASURED_MEMORY = 140.0  # GB, of the H200
# seconds of the measured recipes, and what their machines' matrix products reach, operations a second: two cores in
# float32, measured; the H200 in bfloat16, seven tenths of its data sheet's 989e12
_MEASURED = {"cpu": (14 * 60, 290e9), "cuda": (321, 700e12)}
_DECIDED = {"source", "resolution", "share", "bucket_step", "side"}  # fields of the data that the recipe writes itself
STAGES = ("autoencoder", "text_encoder", "noise_predictor")


@dataclass(frozen=True)
class Machine:
    """device: "cpu" or "cuda"; flops: operations a second of its matrix products; memory: GB, of the device itself."""

    device: str
    flops: float
    memory: float = 16.0
    has_bf16: bool = True

    @classmethod
    def here(cls) -> Machine:
        """This machine, by a trial."""
        import torch

        has_gpu = torch.cuda.is_available()
        has_bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        side, dtype = (4096, torch.bfloat16 if has_bf16 else torch.float16) if has_gpu else (1024, torch.float32)
        a = torch.ones(side, side, device="cuda" if has_gpu else "cpu", dtype=dtype)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # which waits for the device
            best = min(best, time.perf_counter() - start)
        memory = torch.cuda.get_device_properties(0).total_memory if has_gpu else total()
        return cls("cuda" if has_gpu else "cpu", 2 * side**3 / best, memory / 1e9, has_bf16)


@dataclass(frozen=True)
class Recipe:
    """The three stages' files for `rows` pictures of about `side` px, the shorter one, on a machine."""

    folder: Path
    data: Any
    rows: int
    side: int
    machine: Machine

    @property
    def is_gpu(self) -> bool:
        return self.machine.device == "cuda"

    @property
    def resolution(self) -> int:
        """As asked for, else the recipe's own, or less where pictures would have to be enlarged by half and more."""
        if "resolution" in self.data.model_fields_set:
            return self.data.resolution
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
        """No more than there are rows, nor, of a GPU's recipe, than a smaller one than it was measured on holds."""
        share = min(1.0, self.machine.memory / _MEASURED_MEMORY) if self.is_gpu else 1.0
        fitting = 2 ** math.floor(math.log2(max(8.0, wanted * share)))
        return min(wanted, fitting, self.train_rows)

    @property
    def stride(self) -> int:
        """Pixels a latent cell: half the usual of pictures of 32 px, which would else have 4 x 4 cells."""
        return 4 if self.resolution <= 32 else 8

    def _bucket_step(self, resolution: int) -> int:
        """Of sizes that are not square: whole patches of the noise predictor, and several sizes to choose from."""
        cell = 2 * self.stride if resolution == self.resolution else 1  # the text stage has no latents
        return min(16, max(cell, resolution // 4))

    @property
    def hours(self) -> float:
        seconds, flops = _MEASURED[self.machine.device]
        cells = (self.resolution / (128 if self.is_gpu else 64)) ** 2
        return seconds / 3600 * cells * flops / self.machine.flops

    @property
    def disk(self) -> float:
        """GB: pictures as bytes, latents and captions as floats, and about 40 copies of the weights."""
        a_row = 3 * self.resolution**2 + 4 * 16 * (self.resolution // self.stride) ** 2 + 4 * 4 * 32 * 192
        weights = 114e6 if self.is_gpu else 5e6
        return (self.rows * a_row + 40 * 4 * weights) / 1e9

    def _data(self, resolution: int) -> str:
        """The data field: the source, what was given, and what of the rest a user is likely to change."""
        import yaml

        fields = {"source": self.data.source, "resolution": resolution, **self._given}
        if self.data.max_aspect > 1:
            fields["bucket_step"] = min(self.data.bucket_step, self._bucket_step(resolution))
        lines = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000).splitlines()
        held_out = [f"valid: {{share: {self.share:.2f}}}  # held out, by what they show"]
        return "\n".join(["data:", *(f"  {line}" for line in lines), *held_out])

    @property
    def _given(self) -> dict[str, Any]:
        """The data's fields that the user has set, but for those that the recipe decides."""
        return self.data.model_dump(mode="json", include=self.data.model_fields_set - _DECIDED)

    def _train(self, **fields: Any) -> str:
        notes = {
            "steps": "updates of the weights; more is better until the held-out score stops",
            "batch_size": "pictures an update",
            "lr": "AdamW's, of norms, biases and embeddings",
            "muon_lr": "Muon's, of the weight matrices",
            "mixed_precision": "less memory, and faster on a GPU",
            "compile": "slow at the start, faster from then on",
            "ema_width": "of the average of the weights that is exported, as a share of the updates",
            "preview_every": "updates between two pictures in samples/",
            "checkpoint_every": "updates between two checkpoints, from which an interrupted launch goes on",
        }
        if self.is_gpu:
            fields |= {"mixed_precision": "bf16"} if self.machine.has_bf16 else {}
            fields |= {"compile": "inductor"}
        lines = (f"  {n}: {v}" + (f"  # {notes[n]}" if n in notes else "") for n, v in fields.items())
        return "\n".join(["train:", *lines]) + "\n"

    def autoencoder(self) -> str:
        blocks, layers = ("[64, 128]", "[128, 256]"), ("[1, 2]", "[2, 2]")
        if not self.is_gpu:
            blocks, layers = ("[32, 64]", "[64, 128]"), ("[1, 1]", "[1, 1]")
        cells = self.resolution // self.stride
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
            f"  patch_size: {self.stride // 2}\n  network:\n"
            "    latent_channels: 16  # more: sharper pictures, harder to generate\n"
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
            f"estimate: {unit} for all three stages (by matrix products a second), {self.disk:.1f} GB of disk",
            f"next: see {self.folder / 'README.md'}",
        ]

    def readme(self) -> str:
        own = shlex.quote(str(self.folder.absolute()))
        run = shlex.quote(f"runs/{self.folder.absolute().name}")
        fields = [f"--{name} {_word(value)}" for name, value in self._given.items()]
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


def _word(value: Any) -> str:
    """A field's value as a word of a command line."""
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))
