"""The family `autoregressive`: an exact likelihood of the codes of a `vq` autoencoder, given the prompt.

accelerate launch -m training.generators.autoregressive --config training/configs/shapes/autoregressive.yaml --run RUN
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from sd_mini.autoencoder.model import code_frequencies, perplexity
from sd_mini.data.batches import Batch
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.errors import UserError
from sd_mini.generators.autoregressive import AutoregressiveGenerator
from training.engine import launch
from training.generators.autoregressive.config import AutoregressiveConfig
from training.generators.autoregressive.losses import AutoregressiveObjective
from training.generators.autoregressive.palette import nearest_codes, palette_of
from training.generators.task import GeneratorTask

CHECKED = 256  # training pictures whose codes are looked at before the training
MOVED = 1e-3  # fraction of codes that the cache may change


class AutoregressiveTask(GeneratorTask):
    family = "autoregressive"

    def make_network(self) -> AutoregressiveGenerator:
        book, sizes, sampling = self._code_book(), self.config.network, self.config.sampling
        network = AutoregressiveGenerator(
            self.latent_shape, self.dim, len(book), **sizes.model_dump(), **sampling.model_dump()
        )
        network.codes.copy_(book)
        return network

    def _code_book(self) -> Tensor:
        """Codes as standardised latents (K, C), so that decoding takes what is drawn like any other latents; zeros for
        a palette, which `make_objective` finds."""
        autoencoder, palette = self.autoencoder, self.config.palette
        kind, expected = autoencoder.config.kind, "small_picture" if palette else "vq"
        if kind != expected:
            why = f"whose latents are no colours for palette {palette}" if palette else "which has no codes"
            raise UserError(
                f"autoencoder {self.vae.folder}: is of kind {kind}, {why}; expected kind {expected} "
                f"(training/configs/shapes/{expected}.yaml)"
            )
        if palette:
            return torch.zeros(palette, self.latent_shape[0])
        book = autoencoder.network.quantize.embedding.weight.detach()
        return (book - autoencoder.mean.flatten()) / autoencoder.std.flatten()

    def make_objective(self, network: nn.Module, pictures: CaptionedPictures) -> AutoregressiveObjective:
        assert isinstance(network, AutoregressiveGenerator)
        if self.config.palette:
            latents = self.train.take(rows := np.arange(min(CHECKED, self.count)), [0.0] * len(rows))["latents"]
            network.codes.copy_(palette_of(latents.cpu(), self.config.palette))
        else:
            self._check_codes(pictures)
        self.codes = network.codes
        objective = AutoregressiveObjective(network)
        one = self.one_picture()
        self.announce(objective, {"codes": self._codes(one.pop("latents")), **one})
        return objective

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """A batch's codes (b, h w), prompt_embeds (b, L, D) and prompt_mask (b, L)."""
        rows = self.rows(batch)
        return {"codes": self._codes(rows.pop("latents")), **rows}

    def validate(self, objective: AutoregressiveObjective, rows: slice) -> dict[str, np.ndarray]:
        """Of each held-out picture given its first caption: nats and bits a code, and bits a latent value."""
        losses, device = [], next(objective.parameters()).device
        for part in map(np.asarray, self.valid_pictures.runs(rows, 256)):
            taken = self.valid.take(part, [0.0] * len(part))
            inputs = {"codes": self._codes(taken.pop("latents")), **taken}
            with torch.no_grad():
                losses.append(objective(**{name: value.to(device) for name, value in inputs.items()})[0].cpu())
        nats = torch.cat(losses).double().numpy()
        bits = nats / math.log(2)
        return {"loss": nats, "bits_per_code": bits, "bits_per_dimension": bits / self.latent_shape[0]}

    def _codes(self, latents: Tensor) -> Tensor:
        """Standardised latents (b, C, h, w) => their codes, (b, h w) int64, in raster order."""
        autoencoder = self.autoencoder
        if self.config.palette:
            return nearest_codes(latents, self.codes.to(latents.device))
        mean, std = (part.to(latents.device) for part in (autoencoder.mean, autoencoder.std))
        book = autoencoder.network.quantize.embedding.weight.detach().to(latents.device)
        return nearest_codes(latents * std + mean, book)

    def _check_codes(self, pictures: CaptionedPictures) -> None:
        """Raises UserError for a code book of which hardly anything is used, and for a cache that changes the codes."""
        rows, count = np.arange(min(CHECKED, self.count)), self.autoencoder.network.config.num_vq_embeddings
        with torch.no_grad():
            codes = self.autoencoder.codes(self.autoencoder.raw_latents(pictures.pixels(rows))[0]).indices.flatten(1)
        used, least = float(perplexity(code_frequencies(codes, count))), max(4, count // 64)
        if used < least:
            raise UserError(
                f"autoencoder {self.vae.folder}: its code book has collapsed: perplexity {used:.1f} of {count} codes, "
                f"expected at least {least}; train it again with model.unit_codes true, a loss.commitment of 0.25, a "
                "smaller learning rate, or fewer codes"
            )
        cached = self._codes(self.train.take(rows, [0.0] * len(rows))["latents"].cpu())
        if (moved := float((cached != codes).double().mean())) > MOVED:
            raise UserError(
                f"cache_dtype {self.config.cache_dtype}: {moved:.2%} of the codes of its latents are not those of the "
                "pictures; expected float32"
            )


main = launch.Program(
    AutoregressiveConfig, "autoregressive", lambda launched: AutoregressiveTask(launched.config, launched.run)
)
