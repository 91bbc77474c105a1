"""Prompts => prompt embeddings: a text encoder, and the TextAdapter trained on top of it.

What the noise predictor attends to is words, not a summary. So a token's embedding is the word itself (the encoder's
own input vector, which no training moves, at unit scale), its place, and a small learned residual that carries what
the sentence adds. Contrastive training alone would let words dissolve into one vector a caption: enough to find the
picture, too little to draw two objects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


@dataclass(frozen=True)
class PromptEmbeds:
    """`tokens` (B, L, D) at unit scale, `mask` (B, L) bool, `pooled` (B, D)."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class RefinerBlock(nn.Module):
    """Pre-norm transformer block over a caption's own tokens; padding is never attended to."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, length, dim = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(attended.transpose(1, 2).reshape(b, length, dim))
        return x + self.mlp(self.norm_mlp(x))


class TextAdapter(ModelMixin, ConfigMixin):
    """Encoder states => prompt embeddings of the width and scale that the noise predictor reads.

    tokens = rms_norm(W word) + place + residual_scale * refiner(states), W a fixed semi-orthogonal map: two words are
    as far apart after it as before. `depth` 0 leaves the refiner a plain projection. The null condition of
    classifier-free guidance (Ho & Salimans 2022) is one learned token that goes through the same path.
    """

    @register_to_config
    def __init__(
        self,
        encoder_dim: int = 128,
        word_dim: int = 128,
        dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        max_length: int = 32,
        residual_scale: float = 0.3,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"adapter: dim {dim} is not a multiple of heads {heads}; choose heads that divide it")
        self.word_in = nn.Linear(word_dim, dim, bias=False)
        nn.init.orthogonal_(self.word_in.weight)
        self.word_in.weight.requires_grad_(False)
        self.register_buffer("places", torch.randn(max_length, dim) / math.sqrt(2))
        self.state_norm = nn.RMSNorm(encoder_dim)
        self.state_in = nn.Linear(encoder_dim, dim)
        self.blocks = nn.ModuleList(RefinerBlock(dim, heads) for _ in range(depth))
        self.norm_out = nn.RMSNorm(dim, elementwise_affine=False)
        self.pool = nn.Linear(dim, dim)
        # like every word's, the null word's identity is drawn once and kept; what it says is learned
        self.register_buffer("null_word", torch.randn(word_dim))
        self.null_state = nn.Parameter(torch.randn(encoder_dim))

    def forward(self, states: Tensor, words: Tensor, mask: Tensor) -> PromptEmbeds:
        """`states` (B, L, encoder_dim), `words` (B, L, word_dim), `mask` (B, L) bool => PromptEmbeds."""
        refined = self.state_in(self.state_norm(states))
        for block in self.blocks:
            refined = block(refined, mask)
        refined = self.norm_out(refined)
        word = nn.functional.rms_norm(self.word_in(words), (self.config.dim,)) / math.sqrt(2)
        tokens = word + self.places[: words.shape[1]] + self.config.residual_scale * refined
        weight = mask[..., None].to(refined.dtype)
        pooled = self.pool((refined * weight).sum(1) / weight.sum(1).clamp(min=1))
        return PromptEmbeds(tokens * weight, mask, pooled)

    def null(self, batch: int, length: int) -> PromptEmbeds:
        """The null condition, `batch` times: one learned token, the rest padding."""
        mask = torch.zeros(batch, length, dtype=torch.bool, device=self.null_word.device)
        mask[:, 0] = True
        states = self.null_state.expand(batch, length, -1)
        return self(states, self.null_word.expand(batch, length, -1), mask)


class TextStage:
    """Tokenizer, encoder and adapter as one: `encode(prompts)`. The three stay separate components when saved."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, adapter: TextAdapter):
        self.tokenizer, self.encoder, self.adapter = tokenizer, encoder, adapter
        self.max_length = adapter.config.max_length

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts => ids (B, L) int64, mask (B, L) bool, L always `max_length`: a prompt never depends on its batch.

        Raises ValueError for a prompt that is not text, is empty, or has more tokens than fit.
        """
        check_prompts(prompts)
        ids = self.tokenizer(list(prompts), truncation=False)["input_ids"]
        for prompt, row in zip(prompts, ids, strict=True):
            if len(row) > self.max_length:
                fits = self.tokenizer.decode(row[: self.max_length - 1], skip_special_tokens=True)
                raise ValueError(
                    f"prompt {_shown(prompt)} has {len(row)} tokens, at most {self.max_length} fit; "
                    f"shorten it, for example to {fits.strip()!r}"
                )
        batch = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        return batch["input_ids"], batch["attention_mask"].bool()

    def encode_ids(self, ids: Tensor, mask: Tensor) -> PromptEmbeds:
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return self.adapter(states, self.encoder.get_input_embeddings()(ids), mask)

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Prompts => PromptEmbeds on the adapter's device; gradients flow where the caller left them on."""
        ids, mask = (x.to(self.adapter.device) for x in self.tokenize(prompts))
        return self.encode_ids(ids, mask)

    def null(self, batch: int) -> PromptEmbeds:
        return self.adapter.null(batch, self.max_length)


def check_prompts(prompts: Sequence[str]) -> None:
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {row} is a {type(prompt).__name__} ({_shown(prompt)}); expected text")
        if not prompt.strip():
            raise ValueError(f"prompt {row} is empty; describe the picture, or leave the prompt out for the null one")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def clip_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A byte-complete CLIP BPE trained on `captions`; `vocab_size` is an approximate ceiling.

    All 256 bytes stay in the vocabulary, alone and as a word's end, so no text maps to `<|endoftext|>` mid-sentence.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    like, alphabet = CLIPTokenizer().backend_tokenizer, sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.normalizer, raw.pre_tokenizer = like.normalizer, like.pre_tokenizer
    budget = max(vocab_size - 2 * len(alphabet) - 2, 0) + len(alphabet) + 256
    trainer = trainers.BpeTrainer(
        vocab_size=budget, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    raw.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=max_length
    )


def small_clip(tokenizer: CLIPTokenizer, dim: int, layers: int, heads: int, max_length: int) -> CLIPTextModel:
    """An untrained CLIP text model that fits `tokenizer`. Its word vectors stay as drawn: they are the words' identity.

    bos, eos and pad are set because `eos_token_id == 2`, the default, makes transformers pool the wrong token.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def load_encoder(name: str | Path, tokenizer: bool = True) -> tuple[PreTrainedTokenizerBase | None, PreTrainedModel]:
    """A hub name or a local folder => (tokenizer, text encoder), in float32 and evaluation mode.

    CLIP's text model, with its projection or without; T5's encoder half; whatever else AutoModelForTextEncoding or
    AutoModel makes of the folder's config: BERT-like, and GPT-like with their causal mask. The tokenizer pads on the
    right, where a causal mask never looks, and with the end token if it has none for padding. `tokenizer=False` leaves
    it out (None), for a folder that holds the model alone.

    Raises ValueError that names what is missing, and for a model that is an encoder and a decoder in one.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        family = _encoder_class(AutoConfig.from_pretrained(name))
        encoder = family.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        words = AutoTokenizer.from_pretrained(name, padding_side="right") if tokenizer else None
    except (OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"text encoder {str(name)!r}: expected a hub name or a folder with config.json, model.safetensors and the "
            f"tokenizer's files; {reason[:300]}"
        ) from None
    if words is not None and words.pad_token is None:
        if words.eos_token is None:
            raise ValueError(
                f"text encoder {str(name)!r}: its tokenizer has neither a padding nor an end token; set one"
            )
        words.pad_token = words.eos_token
    return words, encoder.eval()


def _encoder_class(config: PretrainedConfig) -> Any:
    """The class that reads a config's weights as a text encoder."""
    from transformers import AutoModel, AutoModelForTextEncoding, CLIPTextModelWithProjection, T5EncoderModel

    declared = {cls.__name__: cls for cls in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)}
    for name in config.architectures or []:
        if name in declared:
            return declared[name]
    if config.model_type in ("clip", "clip_text_model"):
        return CLIPTextModel
    if type(config) in AutoModelForTextEncoding._model_mapping:
        return AutoModelForTextEncoding
    if config.is_encoder_decoder:
        raise ValueError(
            f"text encoder of type {config.model_type!r}: an encoder and a decoder in one; give one whose encoder "
            "transformers loads alone, such as T5"
        )
    return AutoModel
