"""The transformer of the families that draw token after token: the prompt's tokens, then the sequence.

transformers' Llama decoder; its rotary positions count along the prompt and the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, StaticCache

from sd_mini.errors import UserError
from sd_mini.generators.base import Condition


@dataclass
class Past:
    """Keys and values of the first `filled` of all positions; `present` (B, P + N): those that may be attended to."""

    cache: StaticCache
    present: Tensor
    filled: int


class CausalDecoder(nn.Module):
    """Each token attends to the prompt's tokens that its mask has, and to the sequence up to itself.

    `dim`: width of the prompt embeddings; 0: there is no prompt. Raises UserError for widths that do not fit together.
    """

    def __init__(self, dim: int, width: int, layers: int, heads: int, mlp_width: int):
        super().__init__()
        if width % (2 * heads):  # rotary positions turn pairs of values
            raise UserError(f"network: width {width} for {heads} heads; expected a multiple of {2 * heads}")
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=width,
            intermediate_size=mlp_width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            # at some hundred tokens a CPU's update takes 0.6 of the time that it takes with torch's fused attention
            attn_implementation="eager",  # ty: ignore[unknown-argument]
        )
        self.decoder = LlamaModel(config)
        self.decoder.embed_tokens = cast(Any, None)  # tokens come as vectors, and what is unused gets no gradient
        self.prompt_embed = nn.Linear(dim, width) if dim else None

    def forward(self, tokens: Tensor, prompt: Condition | None = None) -> Tensor:
        """(B, N, W) => (B, N, W), all at once; row i depends on the prompt and on the tokens 0 to i."""
        before, present = self._prompt(prompt, *tokens.shape[:2], tokens)
        embeds = torch.cat([before, tokens], dim=1)
        hidden = self.decoder(inputs_embeds=embeds, attention_mask=_mask(present, 0, embeds.shape[1]), use_cache=False)
        return hidden.last_hidden_state[:, before.shape[1] :]

    def start(self, batch: int, length: int, like: Tensor, prompt: Condition | None = None) -> Past:
        """An empty sequence of `length` tokens behind the prompt; device and dtype of `like`."""
        before, present = self._prompt(prompt, batch, length, like)
        past = Past(StaticCache(self.decoder.config, max_cache_len=present.shape[1]), present, 0)
        if prompt is not None:
            self._extend(before, past)
        return past

    def step(self, token: Tensor, past: Past) -> Tensor:
        """The next token of the sequence, (B, W) => (B, W): the row that `forward` has for it."""
        return self._extend(token[:, None], past)[:, 0]

    def _extend(self, embeds: Tensor, past: Past) -> Tensor:
        stop = past.filled + embeds.shape[1]
        hidden = self.decoder(
            inputs_embeds=embeds,
            attention_mask=_mask(past.present, past.filled, stop),
            position_ids=torch.arange(past.filled, stop, device=embeds.device)[None],
            past_key_values=past.cache,
            use_cache=True,
        )
        past.filled = stop
        return hidden.last_hidden_state

    def _prompt(self, prompt: Condition | None, batch: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt's tokens (B, P, W), and which of all P + length positions are present."""
        sequence = torch.ones(batch, length, dtype=torch.bool, device=like.device)
        if prompt is None or self.prompt_embed is None:
            return like.new_zeros(batch, 0, self.decoder.config.hidden_size), sequence
        return self.prompt_embed(prompt[0]), torch.cat([prompt[1].bool(), sequence], dim=1)


def _mask(present: Tensor, start: int, stop: int) -> Tensor:
    """0 where the positions start to stop attend, -inf elsewhere: (B, 1, stop - start, P + N), added to the logits."""
    keys = torch.arange(present.shape[1], device=present.device)
    queries = keys[start:stop, None]
    # one that is not present attends to itself, for a softmax over nothing is NaN
    attended = (keys <= queries) & present[:, None] | (keys == queries)
    return torch.zeros(attended.shape, device=keys.device).masked_fill_(~attended, -torch.inf)[:, None]
