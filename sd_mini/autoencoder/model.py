"""Pixels <=> standardised latents. Sole owner of the latents' mean and standard deviation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from sd_mini.autoencoder.small_picture import SmallPicture
from sd_mini.autoencoder.tiling import in_tiles, reach_of
from sd_mini.draws import Draws
from sd_mini.errors import UserError
from sd_mini.offload import brings_in

KINDS = {
    "dc": AutoencoderDC,
    "kl": AutoencoderKL,
    "vq": VQModel,
    "tiny": AutoencoderTiny,
    "small_picture": SmallPicture,
}
_CHANNEL_FIELDS = dict.fromkeys(KINDS, ("in_channels", "out_channels")) | {"dc": ("in_channels",)}
_LEVELS = {
    "dc": "encoder_block_out_channels",
    "kl": "block_out_channels",
    "vq": "block_out_channels",
    "tiny": "encoder_block_out_channels",
}


class Codes(NamedTuple):
    """The codebook's vectors nearest to latents, `vectors` (B, C, h, w), and their numbers, `indices` (B, h, w)."""

    vectors: Tensor
    indices: Tensor


class Autoencoder(ModelMixin, ConfigMixin):
    """A diffusers autoencoder, and the per-channel statistics that make its latents mean 0, std 1.

    `kind` is "dc" (AutoencoderDC), "kl" (AutoencoderKL), "vq" (VQModel; its latents are those before the codebook,
    which decoding applies, as in latent diffusion over it: Rombach et al. 2022, section 3.1), "tiny" (AutoencoderTiny)
    or "small_picture" (SmallPicture); `network_config` holds that class's own fields. With `patch_size` p above 1 the
    network works on p x p pixels folded into channels (space-to-depth): on a CPU most of a convolutional autoencoder's
    time goes into its first and last layers at full resolution.
    With `unit_codes` the latents of kind "vq" and its codes are l2-normalised, so that the nearest code is that of the
    largest cosine (Yu et al. 2022, "ViT-VQGAN", section 3.2).
    `latents_mean` and `latents_std` are measured over the training set when training has ended, never copied: the
    noise predictor's unit-variance noise is only right for latents of unit variance.
    """

    config: Any  # diffusers' FrozenDict, whose entries, the arguments of __init__, are attributes too

    @register_to_config
    def __init__(
        self,
        kind: str = "dc",
        network_config: dict[str, Any] | None = None,
        patch_size: int = 1,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        unit_codes: bool = False,
    ):
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"autoencoder: kind {kind!r} is unknown; expected one of {', '.join(KINDS)}")
        if kind == "small_picture" and patch_size > 1:
            raise UserError(f"autoencoder: patch_size {patch_size} folds pixels, and small_picture keeps a picture; 1")
        if unit_codes and kind != "vq":
            raise UserError(f"autoencoder: unit_codes is of kind vq, and this is of kind {kind}; leave it out")
        self.network = build(kind, network_config or {}, 3 * patch_size**2)
        if unit_codes:
            register_parametrization(self.network.quantize.embedding, "weight", _UnitRows(), unsafe=True)
        # VQModel reads its codebook outside any layer's call
        self._supports_group_offloading = getattr(self.network, "_supports_group_offloading", True)
        channels = self.latent_channels
        self.register_buffer("mean", _per_channel(latents_mean, channels, 0.0), persistent=False)
        self.register_buffer("std", _per_channel(latents_std, channels, 1.0), persistent=False)

    @property
    def latent_channels(self) -> int:
        config = self.network.config
        if self.config.kind == "small_picture":
            return config.in_channels
        return getattr(config, "vq_embed_dim", None) or config.latent_channels

    @property
    def stride(self) -> int:
        """Pixels along one side of a latent cell."""
        config = self.network.config
        if self.config.kind == "small_picture":
            return config.factor
        return self.config.patch_size * 2 ** (len(config[_LEVELS[self.config.kind]]) - 1)

    @property
    def encoder_parts(self) -> list[nn.Module]:
        """What decides the latents, and with a codebook their codes; the rest is the decoder."""
        names = ("encoder", "quant_conv", "quantize")
        return [part for name in names if (part := getattr(self.network, name, None)) is not None]

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution."""
        return [layer for layer in self.network.decoder.modules() if isinstance(layer, nn.Conv2d)][-1].weight

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Picture size => (C, h, w). Raises ValueError with the two nearest sizes that the stride divides."""
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % self.stride:
                below = max(side // self.stride, 1) * self.stride
                near = f"{below} or {below + self.stride}"
                raise UserError(f"{name} {side}: expected a multiple of {self.stride}; the nearest are {near}")
        return self.latent_channels, height // self.stride, width // self.stride

    def raw_latents(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """pixels => (latents before standardisation, log variance or None). For training and measuring only."""
        self.latent_shape(*pixels.shape[-2:])
        encoded = self.network.encode(nn.functional.pixel_unshuffle(pixels, self.config.patch_size))
        if self.config.kind == "kl":
            return encoded.latent_dist.mean, encoded.latent_dist.logvar
        latents = encoded.latent if self.config.kind == "dc" else encoded.latents
        return nn.functional.normalize(latents, dim=1) if self.config.unit_codes else latents, None

    @brings_in
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] => latents (B, C, h, w) of mean 0 and std 1 a channel."""
        return (self.raw_latents(pixels)[0] - self.mean) / self.std

    @property
    def draws_pixels(self) -> bool:
        """Whether the decoder draws a picture from noise, as a diffusion super-resolver does."""
        return self.config.kind == "small_picture" and self.network.config.enlarger == "diffusion"

    def decode_raw(self, raw: Tensor, draws: Draws | None = None) -> Tensor:
        """Latents before standardisation => pixels. For training only."""
        decoded = self.network.decode(raw, draws) if self.draws_pixels else self.network.decode(raw)
        return nn.functional.pixel_shuffle(decoded.sample, self.config.patch_size)

    @brings_in
    def decode(self, latents: Tensor, tile: int | None = None, draws: Draws | None = None) -> Tensor:
        """latents (B, C, h, w), standardised => pixels (B, 3, H, W), about [-1, 1] (not clamped).

        With `tile`, larger latents are decoded in overlapping squares of so many cells a side, so that memory depends
        on the square and not on the picture; see `tiling.in_tiles`. `draws`: each picture's generator, of which a
        decoder that draws its pictures has a use (seed 0 for each if left out).

        Raises UserError for a tile of such a decoder: squares drawn apart would not fit together.
        """
        raw = latents * self.std + self.mean
        if tile is None or max(raw.shape[-2:]) <= tile:
            return self.decode_raw(raw, draws)
        if self.draws_pixels:
            raise UserError(f"tile {tile}: this decoder draws pictures from noise, whole; leave the tile out")
        reach = reach_of(self.decode_raw, self.network.decoder, self.latent_channels)
        return in_tiles(self.decode_raw, raw, tile, self.stride, reach)

    def codes(self, raw: Tensor) -> Codes:
        """Latents before standardisation => their codes; only of kind "vq". The vectors carry the codebook's gradient.

        van den Oord et al. 2017 (VQ-VAE), eq. 1.
        """
        with torch.no_grad():
            indices = self.network.quantize(raw)[2][2].view(len(raw), *raw.shape[2:])
        return Codes(self.network.quantize.embedding(indices).permute(0, 3, 1, 2), indices)

    @torch.no_grad()
    def start_codebook(self, raw: Tensor, generator: torch.Generator) -> None:
        """Let the codebook begin as latents that occur, of `raw` (B, C, h, w): codes far from all stay unused."""
        book, vectors = self.network.quantize.embedding, raw.permute(0, 2, 3, 1).flatten(0, 2)
        chosen = spread_vectors(vectors, len(book.weight), generator)
        noise = torch.randn(book.weight.shape, generator=generator) * vectors.std(0).cpu() / 10  # no two codes alike
        codes = chosen + noise.to(vectors.device)
        if self.config.unit_codes:
            book.weight = codes  # normalised by its parametrization
        else:
            book.weight.copy_(codes)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the measured statistics of the raw latents, (C,) each, in the config that is saved.

        Raises ValueError for a channel that carries nothing (std 0 or not finite).
        """
        if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 1e-6).all()):
            raise UserError(
                f"autoencoder: latent std a channel is {[round(s, 6) for s in std.tolist()]}; expected all above 0: "
                "a dead channel means too many latent channels or too few training steps"
            )
        self.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        self.mean.copy_(mean[None, :, None, None])
        self.std.copy_(std[None, :, None, None])


# k-means++ seeding, Arthur & Vassilvitskii 2007, section 2.2
def spread_vectors(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Vectors (N, C) => `count` of them, (count, C), each drawn by its squared distance from those before it.

    By frequency alone most of them would be alike: most cells of a picture are background.
    """
    numbers = torch.rand(count, generator=generator, dtype=torch.float64).to(vectors.device)
    squares, chosen = vectors.new_ones(len(vectors)).double(), []
    for number in numbers:
        cumulative = squares.cumsum(0)
        place = torch.searchsorted(cumulative, number * cumulative[-1], right=True).clamp(max=len(vectors) - 1)
        chosen.append(vectors[place])
        distances = (vectors - chosen[-1]).double().square().sum(1)
        squares = distances if len(chosen) == 1 else torch.minimum(squares, distances)
    return torch.stack(chosen)


def code_frequencies(indices: Tensor, count: int) -> Tensor:
    """Codes of any shape => how often each of `count` codes is among them, (count,), which sum to 1."""
    # in float32, whatever the latents' dtype: bfloat16 holds whole numbers up to 256
    flat = indices.flatten()
    uses = torch.zeros(count, device=flat.device).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
    return uses / len(flat)


def perplexity(frequencies: Tensor) -> Tensor:
    """The number of codes that, used equally often, have the same entropy: 1 of a code book that has collapsed."""
    return torch.special.entr(frequencies).sum().exp()


class _UnitRows(nn.Module):
    """A matrix => its rows, l2-normalised; assigned rows are kept normalised."""

    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.normalize(weight, dim=1)

    right_inverse = forward


Autoencoder.__module__ = "sd_mini.autoencoder"  # the name in `model_index.json`, whichever file holds the class


def build(kind: str, network: dict[str, Any], channels: int = 3) -> Any:
    """Kind and config => the untrained diffusers network on pictures of so many channels.

    Raises ValueError for a field its class does not know and for widths that do not fit together.
    """
    cls = KINDS[kind]
    network = dict.fromkeys(_CHANNEL_FIELDS[kind], channels) | network
    known = set(cls._get_init_keys(cls)) - {"self"}
    if unknown := sorted(set(network) - known):
        raise UserError(f"autoencoder: network field {unknown[0]!r} is unknown to {cls.__name__}")
    try:
        return cls(**network)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        shown = ", ".join(f"{k}={v}" for k, v in network.items())
        raise UserError(
            f"autoencoder: {cls.__name__}({shown}) cannot be built: {error or 'widths do not fit'}"
        ) from None


def _per_channel(values: list[float] | None, channels: int, default: float) -> Tensor:
    if values is not None and len(values) != channels:
        raise UserError(f"autoencoder: {len(values)} latent statistics for {channels} latent channels")
    return torch.tensor(values if values is not None else [default] * channels).view(1, channels, 1, 1)
