"""Noise to latents by invertible blocks: a normalizing flow of causal transformers over patches.

Zhai et al. 2024 (TarFlow, arXiv 2412.06329); Gu et al. 2025 (STARFlow, arXiv 2506.06276).
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from sd_mini.draws import Draws, normals
from sd_mini.errors import UserError
from sd_mini.generators.base import Condition, LatentGenerator
from sd_mini.generators.causal import CausalDecoder


class NormalizingFlow(LatentGenerator):
    """Blocks of `depths` layers, from the latents' side to the noise's, every second one in reversed order.

    `dim`: width of the prompt embeddings, which the last block alone is given: STARFlow's deep block, in front of the
    noise, behind shallow ones without a prompt (section 3.2). `patch_size` cells a side are one token.

    `noise_std`: of the noise on the standardised latents that it was trained with, which `sample` removes.
    `temperature` is the standard deviation of the draws in sampling: the field is the default, and the attribute of the
    same name may be assigned at any time (`pipeline.latent_generator.temperature = 0.9`).
    """

    is_guided = True
    assignable = ("temperature",)

    @register_to_config
    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        dim: int,
        patch_size: int = 2,
        width: int = 128,
        depths: tuple[int, ...] = (1, 1, 1, 4),
        heads: int = 4,
        mlp_width: int = 344,
        temperature: float = 1.0,
        noise_std: float = 0.0,
        family: str = "normalizing_flow",
    ):
        super().__init__()
        channels, height, columns = latent_shape
        if height % patch_size or columns % patch_size:
            raise UserError(f"network.patch_size {patch_size}: expected a divisor of the latents' {height} x {columns}")
        if not depths or min(depths) < 1:
            raise UserError(f"network.depths {list(depths)}: expected at least one block, of at least one layer each")
        self.temperature = temperature
        tokens, values = (height // patch_size) * (columns // patch_size), channels * patch_size**2
        self.blocks = nn.ModuleList(
            AffineBlock(tokens, values, dim if number == len(depths) - 1 else 0, width, depth, heads, mlp_width)
            for number, depth in enumerate(depths)
        )

    def forward(self, latents: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) => noise (B, T, V), and the logarithm of the determinant of the Jacobian, (B,)."""
        x, log_determinant = self.to_tokens(latents), latents.new_zeros(len(latents))
        for number, block in enumerate(self.blocks):
            is_last = number == len(self.blocks) - 1
            x, log_scales = block(_ordered(x, number), (prompt_embeds, prompt_mask) if is_last else None)
            x = _ordered(x, number)
            # TarFlow, eq. 5: the Jacobian of a block is triangular
            log_determinant = log_determinant - log_scales.sum((1, 2))
        return x, log_determinant

    def log_likelihoods(self, latents: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
        """log p(latents | prompt) in nats, (B,): the change of variables, TarFlow, eq. 2."""
        noise, log_determinant = self(latents, prompt_embeds, prompt_mask)
        return -0.5 * (noise.square() + math.log(2 * math.pi)).sum((1, 2)) + log_determinant

    def passes(self, guidance: float) -> int:
        """A pass for each token of each block, the last one's twice with guidance; and one that takes noise away."""
        tokens, guided = self._token_shape[0], guidance != 1
        return tokens * (len(self.blocks) + guided) + bool(self.config.noise_std)

    def sample(self, prompt: Condition, null: Condition | None, draws: Draws, guidance: float) -> Tensor:
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature:g}: expected at least 0")
        noise = normals(self._token_shape, draws).to(self.device, self.dtype)
        latents = self.inverse(self.temperature * noise, prompt, null, guidance)
        return self.denoised(latents, prompt) if self.config.noise_std else latents

    def denoised(self, latents: Tensor, prompt: Condition) -> Tensor:
        """Latents with noise => their mean without, by Tweedie's formula: x + s^2 grad log p(x | prompt).

        TarFlow, "Score based denoising".
        """
        with torch.inference_mode(False), torch.enable_grad():
            noised, tokens, mask = (tensor.detach().clone() for tensor in (latents, *prompt))
            noised.requires_grad_()
            (score,) = torch.autograd.grad(self.log_likelihoods(noised, tokens, mask).sum(), noised)
        return latents + self.config.noise_std**2 * score

    @torch.no_grad()
    def inverse(self, noise: Tensor, prompt: Condition, null: Condition | None = None, guidance: float = 1.0) -> Tensor:
        """Noise (B, T, V) => latents (B, C, h, w): the inverse of `forward`, guided where there is a null condition."""
        x = noise
        for number, block in reversed(list(enumerate(self.blocks))):
            is_last = number == len(self.blocks) - 1
            assert isinstance(block, AffineBlock)
            x = block.inverse(_ordered(x, number), prompt if is_last else None, null if is_last else None, guidance)
            x = _ordered(x, number)
        return self.to_latents(x)

    @property
    def _token_shape(self) -> tuple[int, int]:
        (channels, height, columns), p = self.config.latent_shape, self.config.patch_size
        return height * columns // p**2, channels * p**2

    def to_tokens(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) => (B, T, V), patches in raster order."""
        return nn.functional.pixel_unshuffle(latents, self.config.patch_size).flatten(2).transpose(1, 2)

    def to_latents(self, tokens: Tensor) -> Tensor:
        """(B, T, V) => (B, C, h, w)."""
        p, (_, height, columns) = self.config.patch_size, self.config.latent_shape
        cells = tokens.transpose(1, 2).unflatten(2, (height // p, columns // p))
        return nn.functional.pixel_shuffle(cells, p)


class AffineBlock(nn.Module):
    """z_i = (x_i - m_i) exp(-a_i), where m_i and a_i are of the prompt and of the tokens before i: TarFlow, eq. 4."""

    def __init__(self, tokens: int, values: int, dim: int, width: int, depth: int, heads: int, mlp_width: int):
        super().__init__()
        self.decoder = CausalDecoder(dim, width, depth, heads, mlp_width)
        # named as embeddings are: Muon is for the matrices between them
        self.token_embed = nn.Linear(values, width)
        self.first_embed = nn.Parameter(0.02 * torch.randn(1, width))
        self.place_embed = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.unembed = nn.Linear(width, 2 * values)
        nn.init.zeros_(self.unembed.weight)  # a block begins as the identity
        nn.init.zeros_(self.unembed.bias)

    def forward(self, x: Tensor, prompt: Condition | None) -> tuple[Tensor, Tensor]:
        """(B, T, V) => z and a, (B, T, V) each."""
        before = torch.cat([self.first_embed.expand(len(x), 1, -1), self.token_embed(x[:, :-1])], dim=1)
        hidden = self.decoder(before + self.place_embed, prompt)
        means, log_scales = self.unembed(hidden).to(x.dtype).chunk(2, dim=-1)
        return (x - means) * torch.exp(-log_scales), log_scales

    def inverse(self, z: Tensor, prompt: Condition | None, null: Condition | None, guidance: float) -> Tensor:
        """(B, T, V) => x, token after token: x_i = z_i exp(a_i) + m_i, TarFlow, eq. 6."""
        if null is not None and prompt is not None:  # both in one batch
            prompt = torch.cat([prompt[0], null[0]]), torch.cat([prompt[1], null[1]])
        copies = 1 if null is None else 2
        past = self.decoder.start(copies * len(z), z.shape[1], z, prompt)
        before, x = self.first_embed.expand(copies * len(z), -1), []
        for number, place in enumerate(self.place_embed):
            moments = self.unembed(self.decoder.step(before + place, past))
            means, log_scales = moments.chunk(2, dim=-1)
            if null is not None:
                means, log_scales = guided_normals(*means.chunk(2), *log_scales.chunk(2), guidance)
            x.append(z[:, number] * torch.exp(log_scales) + means)
            before = self.token_embed(x[-1]).repeat(copies, 1)
        return torch.stack(x, dim=1)


def guided_normals(
    means: Tensor, null_means: Tensor, log_scales: Tensor, null_log_scales: Tensor, guidance: float
) -> tuple[Tensor, Tensor]:
    """Mean and log scale of N(m, s)^g N(m_0, s_0)^(1 - g), normalised: STARFlow, eq. 7, with g = 1 + w.

    Where the null condition has the smaller scale it counts as equal, for the product may have no finite variance.
    """
    ratio = torch.exp(2 * (log_scales - null_log_scales)).clamp(max=1)
    precision = guidance - (guidance - 1) * ratio  # in units of the conditional one's
    return means + (guidance - 1) * ratio / precision * (means - null_means), log_scales - 0.5 * precision.log()


def _ordered(tokens: Tensor, number: int) -> Tensor:
    """In the order of block `number`; its own inverse."""
    return tokens.flip(1) if number % 2 else tokens
