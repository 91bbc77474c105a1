"""Code after code: the prompt's tokens, then those of a `vq` autoencoder in raster order.

Ramesh et al. 2021 (DALL-E), section 2.2; Sun et al. 2024 (LlamaGen), sections 2.2 to 2.4.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from sd_mini.draws import Draws, uniforms
from sd_mini.errors import UserError
from sd_mini.generators.base import Condition, LatentGenerator
from sd_mini.generators.causal import CausalDecoder


class AutoregressiveGenerator(LatentGenerator):
    """p(codes | prompt), the product over the cells of p(code of the cell | prompt, codes before it).

    `dim`: width of the prompt embeddings; `num_codes`: entries of the code book. Positions are two-dimensional by
    learned embeddings of the row and the column of the cell that is drawn next, added to the code before it; along the
    sequence the decoder's rotary positions count. The buffer `codes` (K, C) is the code book as standardised latents.
    Both embeddings of a code, as input and as output, are functions of its vector: codes that decode alike learn from
    each other, and the number of weights does not depend on the number of codes.

    `temperature` divides the guided logits, and with `top_k` above 0 only so many of the likeliest codes are drawn
    from: the fields are the defaults, and the attributes of the same names may be assigned at any time
    (`pipeline.latent_generator.temperature = 0.8`); temperature 0 takes the likeliest code.
    """

    is_guided = True
    assignable = ("temperature", "top_k")
    codes: Tensor

    @register_to_config
    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        dim: int,
        num_codes: int,
        width: int = 160,
        layers: int = 4,
        heads: int = 5,
        mlp_width: int = 480,
        temperature: float = 1.0,
        top_k: int = 0,
        family: str = "autoregressive",
    ):
        super().__init__()
        channels, height, columns = latent_shape
        self.temperature, self.top_k = temperature, top_k
        self.decoder = CausalDecoder(dim, width, layers, heads, mlp_width)
        self.input_embed, self.output_embed = _of_codes(channels, width), _of_codes(channels, width)
        self.first, self.row_embed, self.column_embed = (
            nn.Parameter(0.02 * torch.randn(count, width)) for count in (1, height, columns)
        )
        self.register_buffer("codes", torch.zeros(num_codes, channels))

    def forward(self, codes: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
        """Codes (B, h w) in raster order => logits (B, h w, K) of each, by the prompt and the codes before it."""
        before = torch.cat([self.first.expand(len(codes), 1, -1), self.input_embed(self.codes)[codes[:, :-1]]], dim=1)
        hidden = self.decoder(before + self._places(), (prompt_embeds, prompt_mask))
        return hidden @ self.output_embed(self.codes).T

    def passes(self, guidance: float) -> int:
        _, height, columns = self.config.latent_shape
        return height * columns * (1 if guidance == 1 else 2)

    def sample(self, prompt: Condition, null: Condition | None, draws: Draws, guidance: float) -> Tensor:
        (_, height, columns), batch = self.config.latent_shape, len(prompt[0])
        if self.temperature < 0 or self.top_k < 0:
            raise UserError(
                f"temperature {self.temperature:g}, top_k {self.top_k}: expected at least 0 (top_k 0: all codes)"
            )
        numbers = uniforms((height * columns,), draws).to(self.device)
        conditions = prompt
        if null is not None:  # both in one batch
            conditions = torch.cat([prompt[0], null[0]]), torch.cat([prompt[1], null[1]])
        rows, places = len(conditions[0]), self._places()
        inputs, outputs = self.input_embed(self.codes), self.output_embed(self.codes).T
        past = self.decoder.start(rows, len(places), self.first, conditions)
        before, drawn = self.first.expand(rows, -1), []
        for cell, place in enumerate(places):
            hidden = self.decoder.step(before + place, past)
            if null is not None:
                # classifier-free guidance of the logits, which are linear in this: LlamaGen, section 2.3
                with_prompt, without = hidden.chunk(2)
                hidden = without + guidance * (with_prompt - without)
            logits = (hidden @ outputs).float()
            code = drawn_codes(logits, numbers[:, cell], self.temperature, self.top_k)
            drawn.append(code)
            before = inputs[code].repeat(rows // batch, 1)
        indices = torch.stack(drawn, dim=1).view(batch, height, columns)
        return self.codes[indices].permute(0, 3, 1, 2).contiguous()

    def _places(self) -> Tensor:
        """The embedding of each cell's row and column, (h w, W)."""
        return (self.row_embed[:, None] + self.column_embed[None]).flatten(0, 1)


def _of_codes(channels: int, width: int) -> nn.Sequential:
    """Code vectors (K, C) => their embeddings (K, W)."""
    last = nn.Linear(width, width, bias=False)  # which would add the same to the logits of all codes
    nn.init.normal_(last.weight, std=0.02)
    return nn.Sequential(nn.Linear(channels, width), nn.SiLU(), last)


def drawn_codes(logits: Tensor, numbers: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """Logits (B, K) and U[0, 1) numbers (B,) => codes (B,), by the inverse of the cumulative distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        kept = logits.topk(top_k).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    cumulative = (logits / temperature).softmax(-1).double().cumsum(-1)
    # times the sum, which rounding leaves beside 1; right: a code of probability 0 has no number
    return torch.searchsorted(cumulative, numbers[:, None].double() * cumulative[:, -1:], right=True)[:, 0]
