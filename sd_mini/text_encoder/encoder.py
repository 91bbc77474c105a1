"""Prompts => hidden states: one pretrained or small text encoder with its own tokenizer, and that tokenizer's rules."""

from __future__ import annotations

import html
import logging
import threading
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sd_mini.errors import UserError
from sd_mini.offload import device_of, onloaded
from sd_mini.texts import check_text, shown

logger = logging.getLogger("sd_mini")

_WARNINGS = 3  # prompts of one call that are named one by one
_TOKENIZED = 4096  # texts at a time: a tokenizer's own results take a kilobyte or two each
_tokenizing = threading.Lock()  # a tokenizer keeps in itself how the call at hand cuts
_CAUSAL: dict[tuple, bool] = {}
OPEN_CLIP_CLEANING = "open_clip_cleaning"  # a tokenizer's init argument, so that it is saved and loaded with it


class Tokens(NamedTuple):
    """`ids` (B, L) int64 and `mask` (B, L) bool, padded on the right to the longest of the B."""

    ids: Tensor
    mask: Tensor


class Hidden(NamedTuple):
    """What an encoder makes of B prompts: `states` (B, L, D), `words` (B, L, W) its own input vectors, `mask` (B, L)
    bool, `pooled` (B, P) by the encoder's own rule."""

    states: Tensor
    words: Tensor
    mask: Tensor
    pooled: Tensor


class Encoder:
    """A transformers text model and its tokenizer. `max_length`: tokens a prompt, the tokenizer's marks included.

    `attends_to_padding`: every prompt is padded to `max_length`, and its padding is read as other tokens are.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        max_length: int,
        attends_to_padding: bool = False,
    ):
        self.tokenizer, self.model, self.max_length = tokenizer, model, max_length
        self.attends_to_padding = attends_to_padding
        limit = _most_tokens(model)
        if limit is not None and max_length > limit:
            raise UserError(
                f"encoder: max_length {max_length}, but {type(model).__name__} reads at most {limit} tokens; "
                "give that or less"
            )

    @property
    def widths(self) -> tuple[int, int, int]:
        """Widths of the states, the word vectors and the pooled vector, as two tokens come out.

        Raises ValueError for a model that does not make a state of each token of a text.
        """
        ids = torch.full((1, 2), self.tokenizer.pad_token_id, device=device_of(self.model))
        try:
            with torch.no_grad():
                hidden = self(ids, torch.ones_like(ids, dtype=torch.bool))
        except Exception as error:  # of its own kind for each model that wants pictures, sounds or a decoder's input
            raise UserError(
                f"encoder: {type(self.model).__name__} does not read a text alone: expected a text model, such as a "
                f"two-tower model's text half ({' '.join(str(error).split())[:200]})"
            ) from error
        return hidden.states.shape[-1], hidden.words.shape[-1], hidden.pooled.shape[-1]

    def tokenize(self, prompts: Sequence[str], strict: bool = False, warn: bool = True) -> Tokens:
        """N prompts => Tokens. One that is too long is cut, its end mark kept, and a warning names the words that go;
        with `strict` it is refused.

        Raises ValueError for a prompt that is not text, is empty, cannot be encoded as UTF-8, or has no tokens.
        """
        rows, cuts = self.token_rows(prompts)
        if cuts and (strict or warn):
            self._report(prompts, cuts, strict)
        return self.padded(rows)

    def token_rows(
        self, prompts: Sequence[str], where: Callable[[int], str] = "prompt {}".format
    ) -> tuple[list[array[int]], dict[int, str]]:
        """N prompts => each one's token numbers, at most `max_length`, and of those that were cut, what was cut off.

        Raises ValueError as `tokenize` does; `where` names a prompt by its number.
        """
        for number, prompt in enumerate(prompts):
            check_text(prompt, where(number))
        rows: list[array[int]] = []
        cuts: dict[int, str] = {}
        for start in range(0, len(prompts), _TOKENIZED):
            texts = [self.clean(prompt) for prompt in prompts[start : start + _TOKENIZED]]
            with _tokenizing:
                found = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
            for number, (text, row) in enumerate(zip(texts, found, strict=True), start):
                if not row:
                    raise UserError(f"{where(number)}, {shown(prompts[number])}, has no tokens; expected words to read")
                if len(row) > self.max_length:
                    row, cuts[number] = self._shortened(text, row)
                rows.append(array("i", row))
        return rows, cuts

    def padded(self, rows: Sequence[Sequence[int]]) -> Tokens:
        """Token numbers => Tokens, as long as the longest; where padding is attended to, all of the whole length."""
        lengths = np.array(list(map(len, rows)))
        mask = np.arange(self.max_length if self.attends_to_padding else lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, self.tokenizer.pad_token_id, np.int64)
        ids[mask] = np.fromiter(chain.from_iterable(rows), np.int64, count=lengths.sum())
        return Tokens(torch.from_numpy(ids), torch.from_numpy(mask | self.attends_to_padding))

    def _report(self, prompts: Sequence[str], cuts: dict[int, str], strict: bool) -> None:
        for number, cut in list(cuts.items())[:_WARNINGS]:
            said = f"prompt {shown(prompts[number])}: more than {self.max_length} tokens, all that are read"
            if strict:
                raise UserError(f"{said}; shorten it by {shown(cut)}")
            logger.warning("%s; cut off: %s", said, shown(cut))
        if len(cuts) > _WARNINGS:
            logger.warning("%d of %d prompts were cut so, the first %d are named", len(cuts), len(prompts), _WARNINGS)

    def clean(self, text: str) -> str:
        """What the tokenizer's own library does to a text before it is split."""
        return open_clip_cleaning(text) if self.tokenizer.init_kwargs.get(OPEN_CLIP_CLEANING) else text

    def _shortened(self, text: str, row: list[int]) -> tuple[list[int], str]:
        """A text and its tokens => the tokens that fit, marks kept as the tokenizer sets them, and the words cut."""
        with _tokenizing:
            kept = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        same = next((i for i, (a, b) in enumerate(zip(kept, row, strict=False)) if a != b), len(kept))
        return kept, str(self.tokenizer.decode(row[same:], skip_special_tokens=True)).strip()

    def words(self, ids: Tensor) -> Tensor:
        with onloaded(self.model):  # at a call of one layer of it alone
            return self.model.get_input_embeddings()(ids)

    def __call__(self, ids: Tensor, mask: Tensor) -> Hidden:
        out = self.model(input_ids=ids, attention_mask=mask.long())
        return Hidden(out.last_hidden_state, self.words(ids), mask, self._pooled(out, mask))

    def _pooled(self, out: Any, mask: Tensor) -> Tensor:
        """CLIP's own vector at its end token; a causal model's last token, which alone has seen all; else the mean."""
        states = out.last_hidden_state
        name = type(self.model).__name__
        if name == "CLIPTextModelWithProjection":
            return out.text_embeds
        if name == "CLIPTextModel":
            return out.pooler_output
        if _is_causal(self.model):
            return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
        weight = mask[..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1)


def _most_tokens(model: PreTrainedModel) -> int | None:
    """How many tokens a model has places for; RoBERTa's kin keep the first ones for padding."""
    limit = getattr(model.config, "max_position_embeddings", None)
    words = model.get_input_embeddings()
    for module in model.modules():
        is_places = isinstance(module, torch.nn.Embedding) and module is not words and module.num_embeddings == limit
        if is_places and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether a token's state knows nothing of those after it; tried once a class, by changing the last of two."""
    kind = (type(model), getattr(model.config, "is_decoder", None))
    if kind not in _CAUSAL:
        ids = torch.tensor([[0, 1], [0, 2]], device=device_of(model))
        was_training = model.training
        with torch.no_grad():
            first = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
        model.train(was_training)
        _CAUSAL[kind] = torch.allclose(first[0], first[1], rtol=1e-4, atol=1e-6)
    return _CAUSAL[kind]


def buckets(lengths: Tensor, size: int = 256) -> tuple[Tensor, ...]:
    """(N,) lengths => the N row numbers in groups of `size`, like lengths together: short ones cost little."""
    return lengths.argsort(stable=True).split(size)


def open_clip_cleaning(text: str) -> str:
    """open_clip's `clean="lower"`: mojibake mended, HTML entities read twice, white space joined, lower case."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()
