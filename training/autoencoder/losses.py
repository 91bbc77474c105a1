"""Stage 2's loss: terms of the reconstruction, and terms of the latents."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sd_mini import images
from sd_mini.autoencoder.model import Autoencoder, code_frequencies, perplexity
from sd_mini.config import Config
from training.autoencoder import adversarial
from training.engine.learner import Others


class Term(Config):
    """A term of the loss. A number alone is its weight."""

    brief = "WEIGHT or {weight: W, start: UPDATE}"

    weight: float = Field(ge=0)
    """0 leaves it out"""
    start: int = Field(0, ge=0)
    """the update from which it counts"""

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        # YAML calls 1e-4 a string
        return {"weight": value} if isinstance(value, int | float | str) and not isinstance(value, bool) else value


OFF = Term(weight=0)
SOFTNESS = 0.05  # squared distance over which a latent moves unit codes beside the nearest


class AutoencoderLossConfig(Config):
    """The terms, each `{weight: W, start: UPDATE}` or its weight alone; 0 leaves a term out."""

    l1: Term = Term(weight=1)
    l2: Term = OFF
    log_l2: Term = OFF
    """logarithm of a picture's l2, which is its PSNR but for sign and scale: every picture has the same weight"""
    charbonnier: Term = OFF
    """sqrt(error^2 + 0.001^2): L1 that is smooth at 0"""
    gradient: Term = OFF
    """L1 of the differences between neighbouring pixels: edges, without a network's weights"""
    ssim: Term = OFF
    """1 - SSIM, over 11 x 11 pixels"""
    focal_frequency: Term = OFF
    """squared error of the spectra, each frequency weighted by its own error"""
    lpips: Term = OFF
    """distance of a pretrained network's features; see lpips_network and lpips_weights"""
    kl: Term = Term(weight=1e-4)
    """pull of the latents towards N(0, I); nothing where the encoder is not trained"""
    commitment: Term = Term(weight=0.25)
    """of kind vq: pull of the latents towards their codes, and four times as much of the codes towards the latents"""
    equivariance: Term = OFF
    """the terms up to gradient once more, with latents and pictures downsampled and rotated (EQ-VAE)"""
    latent_noise: Term = OFF
    """weight: standard deviation of noise on the latents while training, as the network gives them (and as they are
    standardised, with a teacher); neighbours in latent space then decode alike"""
    distillation: Term = Term(weight=1)
    """with model.teacher: squared distance of the latents from its"""
    adversarial: Term = OFF
    """minus a discriminator's logit of the reconstruction; trains the decoder alone; see `adversary`"""
    lpips_network: str = "vgg"
    """vgg or alex"""
    lpips_weights: str | None = None
    """torchvision's weights file of that network; null: downloaded"""

    def begun(self, step: int) -> dict[str, Term]:
        """The terms that count at an update, by name."""
        terms = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: t for name, t in terms if isinstance(t, Term) and t.weight and step >= t.start}


def charbonnier(error: Tensor) -> Tensor:
    return (error.square() + 1e-6).sqrt().mean((1, 2, 3))


def gradient(error: Tensor) -> Tensor:
    return error.diff(dim=-1).abs().mean((1, 2, 3)) + error.diff(dim=-2).abs().mean((1, 2, 3))


# of the difference of two pictures alone, (B, 3, H, W) => (B,)
OF_ERROR = {
    "l1": lambda error: error.abs().mean((1, 2, 3)),
    "l2": lambda error: error.square().mean((1, 2, 3)),
    "log_l2": lambda error: (error.square().mean((1, 2, 3)) + 1e-5).log(),  # up to 56 dB
    "charbonnier": charbonnier,
    "gradient": gradient,
}


def ssim(decoded: Tensor, pixels: Tensor) -> Tensor:
    """1 - SSIM of pixels in [-1, 1] => (B,). Its variances need float32."""
    with torch.autocast(decoded.device.type, enabled=False):
        return 1 - images.ssim(decoded.float(), pixels, 2.0)


# focal frequency loss, Jiang et al. 2021, alpha 1: a frequency's weight is the root of its error over the largest
def focal_frequency(decoded: Tensor, pixels: Tensor) -> Tensor:
    """=> (B,), each channel's spectrum weighted by itself."""
    distance = torch.view_as_real(torch.fft.fft2((decoded - pixels).float(), norm="ortho")).square().sum(-1)
    weight = distance.detach().sqrt()
    weight = weight / weight.amax((2, 3), keepdim=True).clamp(min=1e-8)
    return (weight * distance).mean((1, 2, 3))


# KL(N(m, s^2) || N(0, 1)) a latent value, Kingma & Welling 2014, appendix B; with s fixed, m^2 / 2 is all that is left
def kl_term(mean: Tensor, log_variance: Tensor | None) -> Tensor:
    """(B, C, h, w) => (B,)."""
    divergence = mean.square()
    if log_variance is not None:
        divergence = divergence + log_variance.exp() - 1 - log_variance
    return 0.5 * divergence.mean((1, 2, 3))


class Change(NamedTuple):
    """One size and one rotation for a batch: `side` in cells of the latents, `turns` in right angles."""

    side: int
    turns: int

    def places(self) -> Tensor:
        """(side^2,): the source cell of each cell of the rotated latents."""
        return torch.arange(self.side**2).view(self.side, self.side).rot90(self.turns).flatten()

    def of_pixels(self, pixels: Tensor, stride: int) -> Tensor:
        """(B, 3, R, R) => (B, 3, R', R'), downsampled by area and rotated."""
        return resized(pixels, self.side * stride).rot90(self.turns, (-2, -1))


def drawn_change(cells: int, size: float, turn: float) -> Change:
    """Two draws from U[0, 1) => a change of latents `cells` a side: a quarter of them to all, by any right angle."""
    smallest = max(1, cells // 4)
    return Change(smallest + int(size * (cells - smallest + 1)), int(turn * 4))


def resized(tensor: Tensor, side: int) -> Tensor:
    return nn.functional.interpolate(tensor, size=(side, side), mode="area")


class AutoencoderObjective(nn.Module):
    """pixels => the weighted sum of the terms, one a picture.

    Inputs `weight_TERM` are those of the terms that have begun; only these are computed. Called but not trained:
    `perceptual` (LPIPS), `teacher` (an Autoencoder whose standardised latents are learned) and `discriminator`.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        perceptual: nn.Module | None = None,
        teacher: Autoencoder | None = None,
        discriminator: nn.Module | None = None,
        adaptive: bool = True,
    ):
        super().__init__()
        self.autoencoder, self.adaptive = autoencoder, adaptive
        self.others = Others([perceptual, teacher, discriminator])
        self.encoder_is_trained = any(p.requires_grad for part in autoencoder.encoder_parts for p in part.parameters())

    def forward(
        self,
        pixels: Tensor,
        noise: Tensor,
        posterior_noise: Tensor,
        turned: Tensor | None = None,
        places: Tensor | None = None,
        pixel_noise: Tensor | None = None,
        times: Tensor | None = None,
        levels: Tensor | None = None,
        **weights: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pixels (b, 3, R, R); both noises like the latents; for equivariance `turned` and `places`, a Change's; of a
        decoder that draws its pictures `pixel_noise` like the pixels, and U[0, 1) `times` and `levels` (b,)."""
        w = {name.removeprefix("weight_"): value for name, value in weights.items()}
        autoencoder = self.autoencoder

        # Encode, add noise, decode.
        raw, log_variance = self._latents(pixels)
        if pixel_noise is not None and times is not None and levels is not None:
            latents = noised = raw
            amounts = levels * w.get("latent_noise", levels.new_zeros(()))
            decoded = self._denoised(pixels, raw, noise, amounts, pixel_noise, times)
        else:
            latents, noised = self._decoder_inputs(pixels, raw, log_variance, noise, posterior_noise, w)
            decoded = autoencoder.decode_raw(noised)

        # Terms of the reconstruction and of the latents.
        terms = {} if not self.encoder_is_trained else {"kl": kl_term(raw, log_variance)}
        if self.others[1] is not None:
            terms["distillation"] = (raw - latents).square().mean((1, 2, 3))
        terms |= self._reconstruction(decoded, pixels, w)
        metrics = {}
        if autoencoder.config.kind == "vq" and self.encoder_is_trained:
            terms["commitment"], used = self._commitment(noised)
            metrics |= used
        if "equivariance" in w:
            assert turned is not None and places is not None  # inputs of this term
            terms["equivariance"] = self._equivariance(latents, turned, places, w)
        total = sum((w[name] * term for name, term in terms.items() if name in w), decoded.new_zeros(len(decoded)))
        metrics |= {name: term.mean() for name, term in terms.items()}

        # The adversarial term, scaled to the others (VQGAN, eq. 7).
        if "adversarial" in w:
            adversarial_losses = self._adversarial(noised, decoded)
            balance = total.new_ones(())
            if self.adaptive:
                balance = adversarial.balance(total, adversarial_losses, autoencoder.last_layer)
            total = total + w["adversarial"] * balance * adversarial_losses
            metrics |= {"adversarial": adversarial_losses.mean(), "adaptive_weight": balance}
        return total, metrics

    def _decoder_inputs(
        self,
        pixels: Tensor,
        raw: Tensor,
        log_variance: Tensor | None,
        noise: Tensor,
        posterior_noise: Tensor,
        w: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """(latents: the teacher's if there is one, else the encoder's; the same with noise, which are decoded)."""
        latents = raw
        if self.others[1] is not None:
            with torch.no_grad():
                latents = self.others[1].encode(pixels)
        noised = latents + w["latent_noise"] * noise if "latent_noise" in w else latents
        if log_variance is not None and self.encoder_is_trained and self.others[1] is None:
            noised = noised + (0.5 * log_variance).exp() * posterior_noise
        return latents, noised

    def _denoised(
        self, pixels: Tensor, raw: Tensor, noise: Tensor, amounts: Tensor, pixel_noise: Tensor, times: Tensor
    ) -> Tensor:
        """What a diffusion decoder takes for the pixels at `times`, beside small pictures with so much noise each: the
        terms are then of denoised pictures."""
        decoder: Any = self.autoencoder.network.decoder
        return decoder.denoised(pixels, pixel_noise, times, raw + amounts.view(-1, 1, 1, 1) * noise, amounts)

    @torch.no_grad()
    def reconstructions(self, pixels: Tensor, noise: Tensor, posterior_noise: Tensor, **more: Tensor) -> Tensor:
        """What the discriminator is trained on: the decoder's outputs of this update, by the same noise."""
        w = {name.removeprefix("weight_"): value for name, value in more.items()}
        raw = self.autoencoder.raw_latents(pixels)
        _, noised = self._decoder_inputs(pixels, *raw, noise, posterior_noise, w)
        return self.autoencoder.decode_raw(noised)

    def _latents(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log variance in float32, whatever the passes' precision: the terms are means over many values."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_is_trained):
            raw, log_variance = self.autoencoder.raw_latents(pixels)
        return raw.float(), None if log_variance is None else log_variance.float()

    def _reconstruction(self, decoded: Tensor, pixels: Tensor, w: dict[str, Tensor]) -> dict[str, Tensor]:
        error = decoded.float() - pixels
        terms = {name: of(error) for name, of in OF_ERROR.items() if name in w}
        if "ssim" in w:
            terms["ssim"] = ssim(decoded, pixels)
        if "focal_frequency" in w:
            terms["focal_frequency"] = focal_frequency(decoded, pixels)
        if "lpips" in w:
            terms["lpips"] = self.others[0](decoded, pixels).view(-1)
        return terms

    def _commitment(self, latents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Commitment and codebook loss, van den Oord et al. 2017, eq. 3, divided by beta = 0.25, by soft assignment
        where the codes are of length 1; and the codes used."""
        codes = self.autoencoder.codes(latents)
        to_codes = (latents - codes.vectors.detach()).square().mean((1, 2, 3))
        to_latents = (codes.vectors - latents.detach()).square().mean((1, 2, 3))
        if self.autoencoder.config.unit_codes:
            to_latents = self._soft_distances(latents.detach().float())
        count, places = self.autoencoder.network.config.num_vq_embeddings, codes.indices.numel()
        frequencies = code_frequencies(codes.indices, count)
        most = min(count, places)  # that a pass can use
        return to_codes + 4 * to_latents, {
            "codes_used": (frequencies > 0).float().sum() / most,
            "code_perplexity": perplexity(frequencies) / most,
        }

    def _soft_distances(self, latents: Tensor) -> Tensor:
        """Squared distances of unit latents (B, C, h, w) from unit codes, weighed by how near they are, (B,): a code
        that is nearest to no latent still moves towards those that are near it."""
        book = self.autoencoder.network.quantize.embedding.weight.float()
        with torch.autocast(latents.device.type, enabled=False):
            squares = 2 - 2 * latents.flatten(2).transpose(1, 2) @ book.T  # (B, h w, K), of vectors of length 1
        weights = torch.softmax(-squares.detach() / SOFTNESS, dim=-1)
        return (weights * squares).sum(-1).mean(1) / latents.shape[1]

    def _equivariance(self, latents: Tensor, turned: Tensor, places: Tensor, w: dict[str, Tensor]) -> Tensor:
        """Kouzelis et al. 2025 (EQ-VAE), eq. 4: the decoded change of the latents is the change of the picture."""
        side = turned.shape[-1] // self.autoencoder.stride
        small = resized(latents, side).flatten(2)[..., places].unflatten(2, (side, side))
        error = self.autoencoder.decode_raw(small).float() - turned
        return cast(Tensor, sum(w[name] * of(error) for name, of in OF_ERROR.items() if name in w))

    def _adversarial(self, noised: Tensor, decoded: Tensor) -> Tensor:
        """Minus the discriminator's mean logit of the reconstruction, (b,), with a gradient to the decoder alone."""
        if self.encoder_is_trained:
            decoded = self.autoencoder.decode_raw(noised.detach())
        return adversarial.generator_losses(self.others[2], decoded)
