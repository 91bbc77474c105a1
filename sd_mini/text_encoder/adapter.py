"""Prompts => prompt embeddings: text encoders, and the TextAdapter trained on top of them.

What the noise predictor attends to is words, not a summary. So a token's embedding is the word itself (the encoder's
own input vector, at unit scale), its place, and a small learned residual that carries what the sentence adds.
Contrastive training alone would let words dissolve into one vector a caption: enough to find the picture, too little to
draw two objects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from sd_mini.errors import UserError
from sd_mini.offload import brings_in, device_of
from sd_mini.text_encoder.encoder import Encoder, Hidden, Tokens, buckets

MAX_ENCODERS = 3
_SUFFIXES = (
    "",
    *(f"_{i}" for i in range(2, MAX_ENCODERS + 1)),
)  # text_encoder, text_encoder_2, ... as diffusers has it
_PART = 1024  # prompts in memory at a time while the tokens are measured


@dataclass(frozen=True)
class PromptEmbeds:
    """`tokens` (B, L, D) at unit scale, `mask` (B, L) bool, `pooled` (B, D)."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class RefinerBlock(nn.Module):
    """Pre-norm transformer block over a caption's own tokens; padding is never attended to."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        wide = round(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, wide), nn.GELU(), nn.Linear(wide, dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, length, dim = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(attended.transpose(1, 2).reshape(b, length, dim))
        return x + self.mlp(self.norm_mlp(x))


class EncoderInput(nn.Module):
    """One encoder's Hidden => the words' own identity and the states, both of the adapter's width.

    The word vectors are standardised by channel (`set_words`), so that what all words of a pretrained encoder share
    does not drown what tells them apart, and mapped by a fixed semi-orthogonal matrix, which keeps their distances.
    """

    word_mean: Tensor
    word_std: Tensor

    def __init__(self, state_dim: int, word_dim: int, dim: int, plain: bool):
        super().__init__()
        self.word_in = nn.Linear(word_dim, dim, bias=False)
        nn.init.orthogonal_(self.word_in.weight)
        self.word_in.weight.requires_grad_(False)
        self.register_buffer("word_mean", torch.zeros(word_dim))
        self.register_buffer("word_std", torch.ones(word_dim))
        self.state_norm = nn.Identity() if plain else nn.RMSNorm(state_dim)
        self.state_in = nn.Linear(state_dim, dim)

    def set_words(self, words: Tensor) -> None:
        """`words` (N, word_dim): the vectors of the words that occur, each once."""
        self.word_mean.copy_(words.mean(0))
        self.word_std.copy_(words.std(0, correction=0).clamp(min=1e-6))

    def forward(self, hidden: Hidden) -> tuple[Tensor, Tensor]:
        word = self.word_in((hidden.words - self.word_mean) / self.word_std)
        return rms_norm(word, word.shape[-1:]), self.state_in(self.state_norm(hidden.states))


class TextAdapter(ModelMixin, ConfigMixin):
    """Encoder states => prompt embeddings of the width and scale that the noise predictor reads.

    tokens = identity_scale * (rms_norm(W word) + place) + residual_scale * refiner(states), standardised by channel
    over the training captions; W is a fixed semi-orthogonal map: two words are as far apart after it as before. `depth`
    0 leaves the refiner a plain projection, `identity_scale` 0 leaves the words' identity out. Several encoders' tokens
    stand one after the other, `lengths` says how many each has, and are refined together; their pooled vectors are
    joined. The null condition of classifier-free guidance (Ho & Salimans 2022) is one learned token on the same path.

    `plain` is Stable Diffusion's conditioning (Rombach et al. 2022): tokens are an affine map of CLIP's last states,
    all `lengths` of them are attended to, padding too, and the null condition is the empty prompt.
    """

    config: Any  # diffusers' FrozenDict, whose entries, the arguments of __init__, are attributes too

    @register_to_config
    def __init__(
        self,
        state_dims: Sequence[int] = (128,),
        word_dims: Sequence[int] = (128,),
        pooled_dims: Sequence[int] = (128,),
        lengths: Sequence[int] = (32,),
        dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        identity_scale: float = 1.0,
        residual_scale: float = 0.3,
        plain: bool = False,
    ):
        super().__init__()
        if dim % heads:
            raise UserError(f"adapter: dim {dim} is not a multiple of heads {heads}; choose heads that divide it")
        if plain and (depth or identity_scale or len(lengths) > 1):
            raise UserError(
                f"adapter: plain is a projection of one encoder's states, but depth is {depth}, identity_scale "
                f"{identity_scale:g} and the encoders are {len(lengths)}; expected depth 0, identity_scale 0, 1 encoder"
            )
        self.inputs = nn.ModuleList(EncoderInput(s, w, dim, plain) for s, w in zip(state_dims, word_dims, strict=True))
        self.register_buffer("places", torch.randn(sum(lengths), dim))
        self.blocks = nn.ModuleList(RefinerBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm_out = nn.Identity() if plain else nn.RMSNorm(dim, elementwise_affine=False)
        self.pool = nn.Linear(dim, dim)
        self.pooled_norm = nn.RMSNorm(sum(pooled_dims))
        self.pooled_in = nn.Linear(sum(pooled_dims), dim, bias=False)
        # like every word's, the null word's identity is drawn once and kept; what it says is learned
        self.register_buffer("null_word", torch.randn(dim))
        self.null_state = nn.Parameter(torch.randn(dim), requires_grad=not plain)
        if plain:
            self.register_buffer("null_tokens", torch.zeros(sum(lengths), dim))  # the empty prompt's
        self.null_pooled = nn.Parameter(torch.zeros(dim))
        self.register_buffer("token_mean", torch.zeros(dim))
        self.register_buffer("token_std", torch.ones(dim))
        self.register_buffer("pooled_rms", torch.ones(1))

    @property
    def length(self) -> int:
        """Tokens of a prompt, all encoders' together."""
        return sum(self.config.lengths)

    @property
    def starts(self) -> list[int]:
        """Where each encoder's tokens begin."""
        return [sum(self.config.lengths[:i]) for i in range(len(self.config.lengths))]

    def set_statistics(self, mean: Tensor, std: Tensor, pooled_rms: Tensor) -> None:
        """Of the tokens as they would come out without: mean and std (dim,) by channel, and the pooled vectors' rms."""
        self.token_mean.copy_(mean)
        self.token_std.copy_(std)
        self.pooled_rms.copy_(pooled_rms)

    def forward(self, hidden: Sequence[Hidden]) -> PromptEmbeds:
        """Each encoder's Hidden, of any lengths l up to its own, => PromptEmbeds of the sum of these lengths."""
        words, states = zip(*(read(h) for read, h in zip(self.inputs, hidden, strict=True)), strict=True)
        places = [self.places[start : start + h.mask.shape[1]] for start, h in zip(self.starts, hidden, strict=True)]
        pooled = self.pooled_in(self.pooled_norm(torch.cat([h.pooled for h in hidden], dim=-1)))
        mask = torch.cat([h.mask for h in hidden], dim=1)
        return self._join(torch.cat(words, 1), torch.cat(places), torch.cat(states, 1), mask, pooled)

    def _join(self, word: Tensor, place: Tensor, states: Tensor, mask: Tensor, pooled: Tensor) -> PromptEmbeds:
        for block in self.blocks:
            states = block(states, mask)
        refined = self.norm_out(states)
        identity = self.config.identity_scale * (word + place) / math.sqrt(2)
        tokens = (identity + self.config.residual_scale * refined - self.token_mean) / self.token_std
        weight = mask[..., None].to(refined.dtype)
        pooled = pooled + self.pool((refined * weight).sum(1) / weight.sum(1).clamp(min=1))
        return PromptEmbeds(tokens * weight, mask, pooled / self.pooled_rms)

    def raw(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, dim) as they were before they were standardised."""
        return tokens * self.token_std + self.token_mean

    @brings_in
    def null(self, batch: int) -> PromptEmbeds:
        """The null condition, `batch` times, at the whole length: one learned token, the rest padding; of a plain
        adapter the empty prompt's tokens."""
        mask = torch.zeros(batch, self.length, dtype=torch.bool, device=self.null_word.device)
        shape = (batch, self.length, -1)
        if self.config.plain:
            return PromptEmbeds(self.null_tokens.expand(shape), ~mask, self.null_pooled.expand(batch, -1))
        mask[:, 0] = True
        word = rms_norm(self.null_word, self.null_word.shape).expand(shape)
        return self._join(word, self.places, self.null_state.expand(shape), mask, self.null_pooled)


TextAdapter.__module__ = "sd_mini.text_encoder"  # the name in `model_index.json`, whichever file holds the class


class TextStage:
    """Encoders and adapter as one: `encode(prompts)`. All stay separate components when saved."""

    def __init__(self, encoders: Sequence[Encoder], adapter: TextAdapter):
        self.encoders, self.adapter = list(encoders), adapter

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any]) -> TextStage:
        """From tokenizer, text_encoder, tokenizer_2, ... and text_adapter; what is None is left out."""
        adapter: TextAdapter = parts["text_adapter"]
        pairs = [(parts.get(f"tokenizer{s}"), parts.get(f"text_encoder{s}")) for s in _SUFFIXES]
        pairs = [(words, model) for words, model in pairs if words is not None and model is not None]
        if len(pairs) != len(adapter.config.lengths):
            raise UserError(
                f"{len(pairs)} text encoders with their tokenizers, and a text_adapter of "
                f"{len(adapter.config.lengths)}; give all, or prompt_embeds and prompt_mask instead of prompts"
            )
        lengths, plain = adapter.config.lengths, adapter.config.plain
        return cls([Encoder(*pair, n, plain) for pair, n in zip(pairs, lengths, strict=True)], adapter)

    @property
    def parts(self) -> dict[str, Any]:
        """Its components by the names under which they are saved."""
        named = {}
        for suffix, encoder in zip(_SUFFIXES, self.encoders, strict=False):
            named |= {f"tokenizer{suffix}": encoder.tokenizer, f"text_encoder{suffix}": encoder.model}
        return {**named, "text_adapter": self.adapter}

    @property
    def models(self) -> list[nn.Module]:
        """All its networks."""
        return [*(encoder.model for encoder in self.encoders), self.adapter]

    def tokenize(self, prompts: Sequence[str], strict: bool = False, warn: bool = True) -> list[Tokens]:
        """Prompts => each encoder's Tokens; see `Encoder.tokenize`."""
        return [encoder.tokenize(prompts, strict, warn) for encoder in self.encoders]

    def hidden(self, tokens: Sequence[Tokens]) -> list[Hidden]:
        """Each encoder's Hidden, where the adapter is and in its dtype; the encoder may be elsewhere, in bfloat16."""
        device, dtype, found = device_of(self.adapter), self.adapter.dtype, []
        for encoder, (ids, mask) in zip(self.encoders, tokens, strict=True):
            own = device_of(encoder.model)
            states, words, mask, pooled = encoder(ids.to(own), mask.to(own))
            states, words, pooled = (x.to(device, dtype) for x in (states, words, pooled))
            found.append(Hidden(states, words, mask.to(device), pooled))
        return found

    def encode(self, prompts: Sequence[str], strict: bool = False, warn: bool = True) -> PromptEmbeds:
        """B prompts => PromptEmbeds of the whole length, on the adapter's device.

        Prompts of like length are encoded together, so short ones cost little; a prompt's embeddings depend on those
        beside it by rounding alone. One that is too long is cut with a warning, or refused if `strict`.
        """
        tokens, adapter = self.tokenize(prompts, strict, warn), self.adapter
        count, dim, device = len(prompts), adapter.config.dim, device_of(adapter)
        made = torch.zeros(count, adapter.length, dim, device=device, dtype=adapter.dtype)
        masks = torch.zeros(count, adapter.length, device=device, dtype=torch.bool)
        pooled = torch.zeros(count, dim, device=device, dtype=adapter.dtype)
        lengths = [mask.sum(1) for _, mask in tokens]
        for rows in buckets(torch.stack(lengths).sum(0)):
            longest = [int(length[rows].max()) for length in lengths]
            own = [Tokens(t.ids[rows, :n], t.mask[rows, :n]) for t, n in zip(tokens, longest, strict=True)]
            part = adapter(self.hidden(own))
            slots = torch.cat([torch.arange(s, s + n) for s, n in zip(adapter.starts, longest, strict=True)])
            made[rows[:, None], slots] = part.tokens
            masks[rows[:, None], slots] = part.mask
            pooled[rows] = part.pooled
        return PromptEmbeds(made, masks, pooled)

    def null(self, batch: int) -> PromptEmbeds:
        return self.adapter.null(batch)

    @torch.no_grad()
    def standardise(self, prompts: Sequence[str]) -> None:
        """Measure the tokens of `prompts` by channel and store it in the adapter: they come out with mean 0, std 1."""
        adapter, dim = self.adapter, self.adapter.config.dim
        adapter.set_statistics(torch.zeros(dim), torch.ones(dim), torch.ones(1))
        total, squares, pooled, count = (torch.zeros(n, dtype=torch.float64) for n in (dim, dim, 1, 1))
        for start in range(0, len(prompts), _PART):
            part = self.encode(prompts[start : start + _PART], warn=False)
            tokens = part.tokens[part.mask].double().cpu()
            total += tokens.sum(0)
            squares += tokens.square().sum(0)
            pooled += part.pooled.double().square().mean(1).sum().cpu()
            count += len(tokens)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
        adapter.set_statistics(mean, std, (pooled / len(prompts)).clamp(min=1e-12).sqrt())
        if adapter.config.plain:
            (encoder,) = self.encoders
            empty = encoder.padded(encoder.tokenizer([""])["input_ids"])
            adapter.null_tokens.copy_(adapter(self.hidden([empty])).tokens[0])
