"""Stage 1's loss: contrastive terms between captions and pictures, and the layout predicted from token vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import normalize, pad

from sd_mini.config import Config
from sd_mini.processes import is_distributed
from sd_mini.text_encoder.adapter import TextStage
from sd_mini.text_encoder.encoder import Encoder, Hidden, Tokens
from sd_mini.text_encoder.matcher import Matcher, late_scores
from training.engine.side_by_side import parts_of, side_by_side

# Adam's step does not depend on a loss's weight; one so small leaves the gradient's norm to the other terms
_PROBE_WEIGHT = 1e-3


class TextLossConfig(Config):
    """Weights of the terms; 0 leaves a term out."""

    siglip: float = Field(1.0, ge=0)
    """sigmoid loss of the pooled vectors over all pairs of the batch (SigLIP)"""
    infonce: float = Field(0.0, ge=0)
    """softmax loss of the same, over pictures and over texts (CLIP)"""
    late: float = Field(0.1, ge=0)
    """as siglip, of late interaction: each word with the cell of the picture that matches it best"""
    twin: float = Field(0.2, ge=0)
    """a picture's caption against its twin (hard negative), by the sum of both kinds of logits"""
    layout: float = Field(20.0, ge=0)
    """squared error of 8 x 8 pixels predicted from the token vectors: teaches which word belongs where"""


class LayoutHead(nn.Module):
    """Token vectors (B, L, dim) and mask (B, L) => the picture in 8 x 8 pixels, (B, 3, 8, 8). Not exported.

    A caption does not determine its picture, so it learns the mean of the pictures that fit: blurred, but in place.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(16, dim))  # each predicts 2 x 2 pixels
        self.block = nn.TransformerDecoderLayer(dim, heads, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.out = nn.Linear(dim, 12)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        cells = self.block(self.queries.expand(len(tokens), -1, -1), tokens, memory_key_padding_mask=~mask)
        folded = self.out(cells).view(-1, 4, 4, 12).permute(0, 3, 1, 2)  # (B, 16, 12) => (B, 12, 4, 4)
        return nn.functional.pixel_shuffle(folded, 2)


# the pairwise sigmoid loss, Zhai et al. 2023 (SigLIP), algorithm 1, with any number of positives a row
def siglip_losses(logits: Tensor, positive: Tensor) -> Tensor:
    """logits (B, T), positive (B, T) bool => (B,): the sum over the texts, as the paper's loss is normalised by B."""
    return -nn.functional.logsigmoid(torch.where(positive, logits, -logits)).sum(1)


# InfoNCE, van den Oord et al. 2018, eq. 4, with any number of positives a row: their part of the softmax
def infonce_losses(logits: Tensor, positive: Tensor) -> Tensor:
    """logits (B, T), positive (B, T) bool, at least one a row => (B,)."""
    return logits.logsumexp(1) - logits.masked_fill(~positive, -torch.inf).logsumexp(1)


# which of two texts is the picture's: logistic loss of the difference of their logits, Bradley & Terry 1952
def twin_losses(true: Tensor, false: Tensor) -> Tensor:
    """Logits (B, 1) of each picture's caption and of that one's twin => (B,)."""
    return nn.functional.softplus(false - true)[:, 0]


class Gathered(torch.autograd.Function):
    """(n, D) of this process => (world * n, D) of all, by rank. Backward sums each row's gradient over the processes
    and returns it to the row's own process."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # ty: ignore[incompatible-method-override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(local: Tensor, places: Tensor) -> Tensor:
    """This process's rows (n, D) => the rows of all processes in the order of the global batch, (N, D).

    `places` (N,): the index of each in the concatenation over processes, whose rows are padded to the same n.
    """
    if not is_distributed():
        return local[places]
    if isinstance(local, FakeTensor):  # FLOPs are counted on one process, without collectives
        return local[:1].expand(len(places), -1)
    return Gathered.apply(local)[places]


class TextObjective(nn.Module):
    """Captions, their twins and pictures => the weighted sum of the terms, one a picture.

    It holds the encoders that are trained; the states of frozen ones are inputs.
    """

    def __init__(self, stage: TextStage, trained: list[int], matcher: Matcher, weights: TextLossConfig):
        super().__init__()
        self.encoders = nn.ModuleDict({str(i): stage.encoders[i].model for i in trained})
        encoders = [(str(i), stage.encoders[i]) for i in trained]
        self.tokenizers = {name: (e.tokenizer, e.max_length, e.attends_to_padding) for name, e in encoders}
        self.adapter, self.matcher, self.weights = stage.adapter, matcher, weights
        dim, heads = stage.adapter.config.dim, stage.adapter.config.heads
        self.layout = LayoutHead(dim, heads) if weights.layout else None
        # initial values of SigLIP, for vectors and for words: logits begin near the log odds of a positive pair
        self.log_scale = nn.Parameter(torch.tensor([10.0, 10.0]).log())
        self.bias = nn.Parameter(torch.tensor([-10.0, -10.0]))

    def encoder(self, number: int) -> Encoder | None:
        """Encoder `number` with the model of this module; None if it is frozen."""
        if str(number) not in self.encoders:
            return None
        tokenizer, length, attends_to_padding = self.tokenizers[str(number)]
        model: Any = self.encoders[str(number)]
        return Encoder(tokenizer, model, length, attends_to_padding)

    def hidden(self, texts: Mapping[str, Tensor]) -> list[Hidden]:
        """ids_0, mask_0 and, of a frozen encoder, states_0, words_0, pooled_0; then those of encoder 1, ..."""
        hidden = []
        for i in range(len(self.adapter.inputs)):
            encoder = self.encoder(i)
            names = Hidden._fields if encoder is None else Tokens._fields
            inputs = (texts[f"{name}_{i}"] for name in names)
            hidden.append(Hidden(*inputs) if encoder is None else encoder(*inputs))
        return hidden

    def forward(
        self,
        pictures: Tensor,
        thumbnails: Tensor,
        caption: Tensor,
        twin: Tensor,
        local_texts: Tensor,
        text_places: Tensor,
        positive: Tensor,
        sent_texts: Tensor,
        picture_places: Tensor | None = None,
        sent_pictures: Tensor | None = None,
        true_of: Tensor | None = None,
        **texts: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (b,) and means to log.

        pictures (b, ...): as the matcher takes them; thumbnails (b, 3, 8, 8). Of the T texts of the global batch:
        caption, twin (b,): the numbers of each picture's caption and its twin; positive (b, T) bool: which texts are
        true of each picture. texts: those this process encodes; local_texts (T,): the row of each among these, -1 if
        another process encodes it; sent_texts (n,): the rows that are gathered, and text_places (T,) their places then,
        see `gather_rows`. For InfoNCE also picture_places (B,) and sent_pictures (m,), the same for pictures, and
        true_of (b, B) bool: the pictures that each one's caption is true of."""
        # Encode the local texts and pictures, gather the texts of all processes.
        encoded = self._encoded(texts, pictures)
        common = {name: gather_rows(encoded[name][sent_texts], text_places) for name in ("vector", "projected")}
        rows = {"picture": encoded["picture"], "caption": caption, "twin": twin, "positive": positive}
        if self.matcher.is_late:
            common |= self._gather_words(encoded, sent_texts, text_places)
            rows["cells"] = encoded["cells"]
        if self.layout is not None:
            common |= {"tokens": encoded["tokens"], "mask": encoded["mask"]}
            rows |= {"thumbnails": thumbnails, "text": local_texts[caption]}
        if true_of is not None:
            assert sent_pictures is not None and picture_places is not None  # given with `true_of`
            common["all_pictures"] = gather_rows(encoded["picture"][sent_pictures], picture_places)
            rows |= {"caption_vector": encoded["vector"][local_texts[caption]], "true_of": true_of}

        # The terms of each part of the pictures against all texts.
        count = parts_of(self, len(pictures))
        parts = zip(*(value.tensor_split(count) for value in rows.values()), strict=True)
        terms_of_parts = side_by_side(
            self._terms, [dict(zip(rows, part, strict=True)) for part in parts], common, self._trained()
        )
        terms = {name: torch.cat([part[name] for part in terms_of_parts]) for name in terms_of_parts[0]}
        return terms.pop("losses"), {name: values.mean() for name, values in terms.items()}

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def _encoded(self, texts: dict[str, Tensor], pictures: Tensor) -> dict[str, Tensor]:
        """Vectors and words of the texts, vectors and cells of the pictures. Each core encodes a part of both; its
        texts are of similar lengths, so that they need little padding."""
        masks = [texts[f"mask_{i}"] for i in range(len(self.adapter.inputs))]
        lengths = torch.stack([mask.sum(1) for mask in masks]).sum(0)
        count = parts_of(self, min(len(lengths), len(pictures)))
        if count == 1:
            return self._of_texts(texts) | self._of_pictures(pictures)
        groups = split_by_length(lengths, count)
        parts = [
            {"pictures": part, **_cut({name: value[group] for name, value in texts.items()}, len(masks))}
            for group, part in zip(groups, pictures.tensor_split(count), strict=True)
        ]
        encoded = side_by_side(
            lambda pictures, **texts: self._of_texts(texts) | self._of_pictures(pictures), parts, {}, self._trained()
        )
        full_lengths = [mask.shape[1] for mask in masks]
        for encoded_part, part in zip(encoded, parts, strict=True):
            lengths_of_part = [part[f"mask_{i}"].shape[1] for i in range(len(masks))]
            for name in {"tokens", "mask", "words"} & encoded_part.keys():
                encoded_part[name] = _padded(encoded_part[name], lengths_of_part, full_lengths)
        order = torch.cat(groups).argsort()  # restores the order of the texts
        joined = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
        return {name: x if name in ("picture", "cells") else x[order] for name, x in joined.items()}

    def _of_texts(self, texts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.hidden(texts)
        encoded = self.adapter(hidden)
        vector, words, mask = self.matcher.texts(self.adapter, encoded)
        # the plain projection gives the encoder no gradient
        detached = [Hidden(h.states.detach(), h.words.detach(), h.mask, h.pooled.detach()) for h in hidden]
        outputs = {
            "tokens": encoded.tokens,
            "mask": mask,
            "vector": vector,
            "projected": self.matcher.project(detached),
        }
        return outputs if words is None else outputs | {"words": words}

    def _of_pictures(self, pictures: Tensor) -> dict[str, Tensor]:
        vector, cells = self.matcher(pictures)
        return {"picture": vector} if cells is None else {"picture": vector, "cells": cells}

    def _terms(
        self,
        vector: Tensor,
        projected: Tensor,
        picture: Tensor,
        caption: Tensor,
        twin: Tensor,
        positive: Tensor,
        **more: Tensor,
    ) -> dict[str, Tensor]:
        """The losses (b,) of some pictures against all texts, and the terms they are the sum of."""
        scale = self.log_scale[0].exp()
        # in float32, whatever the passes' precision: the losses are sums over all texts
        logits = (picture @ vector.T).float() * scale + self.bias[0]
        # the null condition counts as a caption that is true of every picture, by which it is trained
        null_logits = (picture @ normalize(self.adapter.null(1).pooled, dim=-1).T).float() * scale + self.bias[0]
        all_positive = torch.cat([positive, positive.new_ones(len(positive), 1)], dim=1)
        terms = {"siglip": siglip_losses(torch.cat([logits, null_logits], dim=1), all_positive)}
        losses = self.weights.siglip * terms["siglip"] + self._probe(picture, projected, positive)
        both = logits
        if "cells" in more:
            late = late_scores(more["cells"], more["words"], more["word_mask"]).float()
            by_words = late * self.log_scale[1].exp() + self.bias[1]
            both, terms["late"] = logits + by_words, siglip_losses(by_words, positive)
        if self.weights.twin:
            terms["twin"] = twin_losses(both.gather(1, caption[:, None]), both.gather(1, twin[:, None]))
        if "true_of" in more:
            back = (more["caption_vector"] @ more["all_pictures"].T).float() * scale
            terms["infonce"] = (infonce_losses(logits, positive) + infonce_losses(back, more["true_of"])) / 2
        if "text" in more:
            assert self.layout is not None
            predicted = self.layout(more["tokens"][more["text"]], more["mask"][more["text"]])
            terms["layout"] = (predicted.float() - more["thumbnails"]).square().mean((1, 2, 3))
        for name in ("late", "twin", "infonce", "layout"):
            if name in terms:
                losses = losses + getattr(self.weights, name) * terms[name]
        best = logits.argmax(1, keepdim=True)
        terms["in_batch_accuracy"] = positive.gather(1, best)[:, 0].float()
        return {"losses": losses, **terms}

    def _probe(self, picture: Tensor, projected: Tensor, positive: Tensor) -> Tensor:
        """The loss (b,) of the plain projection, without a gradient to anything else."""
        logits = (picture.detach() @ projected.T).float() * self.log_scale[0].detach().exp() + self.bias[0].detach()
        return _PROBE_WEIGHT * siglip_losses(logits, positive)

    def _gather_words(
        self, encoded: Mapping[str, Tensor], sent_texts: Tensor, text_places: Tensor
    ) -> dict[str, Tensor]:
        """The words of all processes' texts, padded to the adapter's length so that all have one shape."""
        words, mask = encoded["words"], encoded["mask"]
        missing = self.adapter.length - mask.shape[1] if is_distributed() else 0
        words = pad(words[sent_texts], (0, 0, 0, missing))
        mask = pad(mask[sent_texts], (0, missing)).to(words.dtype)
        flat = gather_rows(torch.cat([words.flatten(1), mask], dim=1), text_places)
        width = words[0].numel()
        return {"words": flat[:, :width].unflatten(1, words.shape[1:]), "word_mask": flat[:, width:]}


def split_by_length(lengths: Tensor, count: int) -> list[Tensor]:
    """(T,) tokens of each text => the texts' numbers in `count` groups of about as many tokens, by length."""
    order = lengths.argsort(stable=True)
    reached = lengths[order].cumsum(0)
    edges = [int(torch.searchsorted(reached, reached[-1] * i / count)) for i in range(1, count)]
    most = len(lengths) - count  # each group has at least one text
    return list(order.tensor_split([min(max(edge, i), most + i) for i, edge in enumerate(edges, 1)]))


def _cut(texts: dict[str, Tensor], encoders: int) -> dict[str, Tensor]:
    """Without the padding that none of these texts needs; pooled vectors have no length."""
    longest = {str(i): int(texts[f"mask_{i}"].sum(1).max()) for i in range(encoders)}
    lengths = {name: longest[name.rsplit("_", 1)[1]] for name in texts if not name.startswith("pooled_")}
    return {name: value[:, : lengths[name]] if name in lengths else value for name, value in texts.items()}


def _padded(values: Tensor, lengths: list[int], full_lengths: list[int]) -> Tensor:
    """(T, sum of the encoders' `lengths`, ...) => (T, sum of `full_lengths`, ...): each encoder's part, zero-padded."""
    parts = zip(values.split(lengths, dim=1), lengths, full_lengths, strict=True)
    return torch.cat([pad(x, (0, 0) * (x.ndim - 2) + (0, full - n)) for x, n, full in parts], dim=1)
