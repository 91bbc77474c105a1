"""Pixels <=> standardised latents. Sole owner of the latents' mean and standard deviation."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

KINDS = {"dc": AutoencoderDC, "kl": AutoencoderKL}
_CHANNEL_FIELDS = {"dc": ("in_channels",), "kl": ("in_channels", "out_channels")}


class Autoencoder(ModelMixin, ConfigMixin):
    """A diffusers autoencoder, and the per-channel statistics that make its latents mean 0, std 1.

    `kind` is "dc" (AutoencoderDC) or "kl" (AutoencoderKL); `network_config` holds that class's own fields. With
    `patch_size` p above 1 the network works on p x p pixels folded into channels (space-to-depth): on a CPU most of a
    convolutional autoencoder's time goes into its first and last layers at full resolution.
    `latents_mean` and `latents_std` are measured over the training set when training has ended, never copied: the
    noise predictor's unit-variance noise is only right for latents of unit variance.
    """

    @register_to_config
    def __init__(
        self,
        kind: str = "dc",
        network_config: dict[str, Any] | None = None,
        patch_size: int = 1,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"autoencoder: kind {kind!r} is unknown; expected one of {', '.join(KINDS)}")
        self.network = build(kind, network_config or {}, 3 * patch_size**2)
        channels = self.latent_channels
        self.register_buffer("mean", _per_channel(latents_mean, channels, 0.0), persistent=False)
        self.register_buffer("std", _per_channel(latents_std, channels, 1.0), persistent=False)

    @property
    def latent_channels(self) -> int:
        return self.network.config.latent_channels

    @property
    def stride(self) -> int:
        """Pixels along one side of a latent cell."""
        config = self.network.config
        blocks = config.encoder_block_out_channels if self.config.kind == "dc" else config.block_out_channels
        return self.config.patch_size * 2 ** (len(blocks) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Picture size => (C, h, w). Raises ValueError with the two nearest sizes that the stride divides."""
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % self.stride:
                below = max(side // self.stride, 1) * self.stride
                near = f"{below} or {below + self.stride}"
                raise ValueError(f"{name} {side}: expected a multiple of {self.stride}; the nearest are {near}")
        return self.latent_channels, height // self.stride, width // self.stride

    def raw_latents(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """pixels => (latents before standardisation, log variance or None). For training and measuring only."""
        self.latent_shape(*pixels.shape[-2:])
        encoded = self.network.encode(nn.functional.pixel_unshuffle(pixels, self.config.patch_size))
        if self.config.kind == "kl":
            return encoded.latent_dist.mean, encoded.latent_dist.logvar
        return encoded.latent, None

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] => latents (B, C, h, w) of mean 0 and std 1 a channel."""
        return (self.raw_latents(pixels)[0] - self.mean) / self.std

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Latents before standardisation => pixels. For training only."""
        return nn.functional.pixel_shuffle(self.network.decode(raw).sample, self.config.patch_size)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w), standardised => pixels (B, 3, H, W), about [-1, 1] (not clamped)."""
        return self.decode_raw(latents * self.std + self.mean)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the measured statistics of the raw latents, (C,) each, in the config that is saved.

        Raises ValueError for a channel that carries nothing (std 0 or not finite).
        """
        if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 1e-6).all()):
            raise ValueError(
                f"autoencoder: latent std a channel is {[round(s, 6) for s in std.tolist()]}; expected all above 0: "
                "a dead channel means too many latent channels or too few training steps"
            )
        self.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        self.mean.copy_(mean[None, :, None, None])
        self.std.copy_(std[None, :, None, None])


def build(kind: str, network: dict[str, Any], channels: int = 3) -> nn.Module:
    """Kind and config => the untrained diffusers network on pictures of so many channels.

    Raises ValueError for a field its class does not know and for widths that do not fit together.
    """
    cls = KINDS[kind]
    network = dict.fromkeys(_CHANNEL_FIELDS[kind], channels) | network
    known = set(cls._get_init_keys(cls)) - {"self"}
    if unknown := sorted(set(network) - known):
        raise ValueError(f"autoencoder: network field {unknown[0]!r} is unknown to {cls.__name__}")
    try:
        return cls(**network)
    except (AssertionError, IndexError, RuntimeError, TypeError, ZeroDivisionError) as error:
        shown = ", ".join(f"{k}={v}" for k, v in network.items())
        raise ValueError(
            f"autoencoder: {cls.__name__}({shown}) cannot be built: {error or 'widths do not fit'}"
        ) from None


def _per_channel(values: list[float] | None, channels: int, default: float) -> Tensor:
    if values is not None and len(values) != channels:
        raise ValueError(f"autoencoder: {len(values)} latent statistics for {channels} latent channels")
    return torch.tensor(values if values is not None else [default] * channels).view(1, channels, 1, 1)
