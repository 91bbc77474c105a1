"""What stage 1 minimises: which caption goes with which picture, and where in the picture each word belongs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import normalize, pad

from sd_mini.config import Config
from sd_mini.text_encoder.adapter import TextStage
from sd_mini.text_encoder.encoder import Encoder, Hidden, Tokens
from sd_mini.text_encoder.matcher import Matcher, late_scores
from training.distributed.processes import is_shared
from training.engine.side_by_side import parts_of, side_by_side

# Adam takes steps of the same length for any weight; so small, it does not count in the gradient's norm
_PROBE_WEIGHT = 1e-3


class LossConfig(Config):
    """Weights of the terms; 0 leaves a term out."""

    siglip: float = Field(1.0, ge=0)
    """which caption goes with which picture, from the pooled vectors, each pair judged alone"""
    infonce: float = Field(0.0, ge=0)
    """the same, each picture's captions against all others and the reverse (CLIP's loss)"""
    late: float = Field(0.1, ge=0)
    """the same as siglip, word by word: each word with the part of the picture that it fits best"""
    twin: float = Field(0.2, ge=0)
    """its own caption against that one's twin, by all that the two are measured by together"""
    layout: float = Field(20.0, ge=0)
    """the picture in 8 x 8 pixels, from the token vectors: what makes them say which word belongs where"""


class LayoutHead(nn.Module):
    """Token vectors (B, L, dim) and mask (B, L) => a guess at the picture in 8 x 8 pixels, (B, 3, 8, 8). Not kept.

    A caption does not determine its picture, so the guess is the mean of those it fits: blurred, but in place.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(16, dim))  # each answers for 2 x 2 pixels
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


# InfoNCE, van den Oord et al. 2018, eq. 4, with any number of positives a row: their share of all
def infonce_losses(logits: Tensor, positive: Tensor) -> Tensor:
    """logits (B, T), positive (B, T) bool, at least one a row => (B,)."""
    return logits.logsumexp(1) - logits.masked_fill(~positive, -torch.inf).logsumexp(1)


# of two texts which is the picture's: logistic regression on the difference of their logits, Bradley & Terry 1952
def twin_losses(true: Tensor, false: Tensor) -> Tensor:
    """Logits (B, 1) of each picture's caption and of that one's twin => (B,)."""
    return nn.functional.softplus(false - true)[:, 0]


class Gathered(torch.autograd.Function):
    """(n, D) of this process => (world * n, D) of all, in the order of the processes. What each process's loss says of
    a row goes back to the process that made it."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def of_all(own: Tensor, places: Tensor) -> Tensor:
    """This process's rows (n, D) => those of all processes in the order of the global batch, (N, D).

    `places` (N,): where each stands when every process's rows, filled up to the most that one has, are joined.
    """
    if not is_shared():
        return own[places]
    if isinstance(own, FakeTensor):  # counted, not computed: nobody else is asked
        return own[:1].expand(len(places), -1)
    return Gathered.apply(own)[places]


class Objective(nn.Module):
    """Captions, their twins and pictures => the weighted sum of the terms, one a picture.

    Of the encoders only those that are trained are its own; what the frozen ones made is given to it.
    """

    def __init__(self, stage: TextStage, trained: list[int], matcher: Matcher, weights: LossConfig):
        super().__init__()
        self.encoders = nn.ModuleDict({str(i): stage.encoders[i].model for i in trained})
        self.rest = {str(i): (stage.encoders[i].tokenizer, stage.encoders[i].max_length) for i in trained}
        self.adapter, self.matcher, self.weights = stage.adapter, matcher, weights
        dim, heads = stage.adapter.config.dim, stage.adapter.config.heads
        self.layout = LayoutHead(dim, heads) if weights.layout else None
        # SigLIP's start, of the vectors and of the words: logits begin near the log odds of a positive pair
        self.log_scale = nn.Parameter(torch.tensor([10.0, 10.0]).log())
        self.bias = nn.Parameter(torch.tensor([-10.0, -10.0]))

    def encoder(self, number: int) -> Encoder | None:
        """Encoder `number` as it is now in this module; none if it is not one of those that are trained."""
        if str(number) not in self.encoders:
            return None
        tokenizer, length = self.rest[str(number)]
        return Encoder(tokenizer, self.encoders[str(number)], length)

    def hidden(self, texts: Mapping[str, Tensor]) -> list[Hidden]:
        """ids_0, mask_0 and, of a frozen encoder, states_0, words_0, pooled_0; then those of encoder 1, ..."""
        found = []
        for i in range(len(self.adapter.inputs)):
            encoder = self.encoder(i)
            names = Hidden._fields if encoder is None else Tokens._fields
            given = (texts[f"{name}_{i}"] for name in names)
            found.append(Hidden(*given) if encoder is None else encoder(*given))
        return found

    def forward(
        self,
        pictures: Tensor,
        thumbnails: Tensor,
        own: Tensor,
        twin: Tensor,
        here: Tensor,
        text_places: Tensor,
        positive: Tensor,
        shared: Tensor,
        picture_places: Tensor | None = None,
        shared_pictures: Tensor | None = None,
        true_of: Tensor | None = None,
        **texts: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pictures (b, ...) as the matcher takes them; thumbnails (b, 3, 8, 8); own (b,): the number of each picture's
        caption among the T texts of the global batch, twin (b,) that of its twin; positive (b, T) bool: which of these
        are true of it; texts: those that this process encodes, where text t is number here[t], -1 if another process
        has it; shared (n,): those of them that go to all processes, and text_places (T,) where they then stand, see
        `of_all`. For InfoNCE also picture_places (B,) and shared_pictures, the same for pictures, and true_of (b, B)
        bool: of which pictures each one's caption is true."""
        encoded = self._encoded(texts, pictures)
        common = {name: of_all(encoded[name][shared], text_places) for name in ("vector", "projected")}
        rows = {"seen": encoded["seen"], "own": own, "twin": twin, "positive": positive}
        if self.matcher.is_late:
            common |= self._words_of_all(encoded, shared, text_places)
            rows["cells"] = encoded["cells"]
        if self.layout is not None:
            common |= {"tokens": encoded["tokens"], "mask": encoded["mask"]}
            rows |= {"thumbnails": thumbnails, "text": here[own]}
        if true_of is not None:
            common["all_seen"] = of_all(encoded["seen"][shared_pictures], picture_places)
            rows |= {"said": encoded["vector"][here[own]], "true_of": true_of}
        count = parts_of(self, len(pictures))
        parts = zip(*(value.tensor_split(count) for value in rows.values()), strict=True)
        found = side_by_side(
            self._terms, [dict(zip(rows, part, strict=True)) for part in parts], common, self._trained()
        )
        terms = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        return terms.pop("losses"), {name: values.mean() for name, values in terms.items()}

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def _encoded(self, texts: dict[str, Tensor], pictures: Tensor) -> dict[str, Tensor]:
        """What the texts and the pictures are to each other. Each core takes a share of both, of the texts those of
        like lengths, as far as these go."""
        masks = [texts[f"mask_{i}"] for i in range(len(self.adapter.inputs))]
        lengths = torch.stack([mask.sum(1) for mask in masks]).sum(0)
        count = parts_of(self, min(len(lengths), len(pictures)))
        if count == 1:
            return self._of_texts(texts) | self._of_pictures(pictures)
        shares = even_shares(lengths, count)
        parts = [
            {"pictures": part, **_cut({name: value[share] for name, value in texts.items()}, len(masks))}
            for share, part in zip(shares, pictures.tensor_split(count), strict=True)
        ]
        found = side_by_side(
            lambda pictures, **texts: self._of_texts(texts) | self._of_pictures(pictures), parts, {}, self._trained()
        )
        whole = [mask.shape[1] for mask in masks]
        for made, part in zip(found, parts, strict=True):
            own = [part[f"mask_{i}"].shape[1] for i in range(len(masks))]
            made |= {name: _filled_up(made[name], own, whole) for name in ("tokens", "mask", "words") if name in made}
        order = torch.cat(shares).argsort()  # back to the one in which the texts came
        joined = {name: torch.cat([made[name] for made in found]) for name in found[0]}
        return {name: x if name in ("seen", "cells") else x[order] for name, x in joined.items()}

    def _of_texts(self, texts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.hidden(texts)
        encoded = self.adapter(hidden)
        vector, words, mask = self.matcher.texts(self.adapter, encoded)
        # the plain projection reads what the encoder says, and teaches it nothing
        still = [Hidden(h.states.detach(), h.words.detach(), h.mask, h.pooled.detach()) for h in hidden]
        found = {"tokens": encoded.tokens, "mask": mask, "vector": vector, "projected": self.matcher.project(still)}
        return found if words is None else found | {"words": words}

    def _of_pictures(self, pictures: Tensor) -> dict[str, Tensor]:
        vector, cells = self.matcher(pictures)
        return {"seen": vector} if cells is None else {"seen": vector, "cells": cells}

    def _terms(
        self,
        vector: Tensor,
        projected: Tensor,
        seen: Tensor,
        own: Tensor,
        twin: Tensor,
        positive: Tensor,
        **more: Tensor,
    ) -> dict[str, Tensor]:
        """The losses (b,) of some pictures against all texts, and what they are the sum of."""
        scale = self.log_scale[0].exp()
        # in float32, whatever the passes' precision: the losses are sums over all texts
        logits = (seen @ vector.T).float() * scale + self.bias[0]
        # saying nothing is true of every picture: that is what trains the null condition
        nothing = (seen @ normalize(self.adapter.null(1).pooled, dim=-1).T).float() * scale + self.bias[0]
        all_positive = torch.cat([positive, positive.new_ones(len(positive), 1)], dim=1)
        terms = {"siglip": siglip_losses(torch.cat([logits, nothing], dim=1), all_positive)}
        losses = self.weights.siglip * terms["siglip"] + self._probe(seen, projected, positive)
        both = logits
        if "cells" in more:
            late = late_scores(more["cells"], more["words"], more["word_mask"]).float()
            by_words = late * self.log_scale[1].exp() + self.bias[1]
            both, terms["late"] = logits + by_words, siglip_losses(by_words, positive)
        if self.weights.twin:
            terms["twin"] = twin_losses(both.gather(1, own[:, None]), both.gather(1, twin[:, None]))
        if "true_of" in more:
            back = (more["said"] @ more["all_seen"].T).float() * scale
            terms["infonce"] = (infonce_losses(logits, positive) + infonce_losses(back, more["true_of"])) / 2
        if "text" in more:
            guess = self.layout(more["tokens"][more["text"]], more["mask"][more["text"]])
            terms["layout"] = (guess.float() - more["thumbnails"]).square().mean((1, 2, 3))
        for name in ("late", "twin", "infonce", "layout"):
            if name in terms:
                losses = losses + getattr(self.weights, name) * terms[name]
        best = logits.argmax(1, keepdim=True)
        terms["in_batch_accuracy"] = positive.gather(1, best)[:, 0].float()
        return {"losses": losses, **terms}

    def _probe(self, seen: Tensor, projected: Tensor, positive: Tensor) -> Tensor:
        """What the plain projection learns by, beside the rest: (b,)."""
        logits = (seen.detach() @ projected.T).float() * self.log_scale[0].detach().exp() + self.bias[0].detach()
        return _PROBE_WEIGHT * siglip_losses(logits, positive)

    def _words_of_all(self, encoded: Mapping[str, Tensor], shared: Tensor, text_places: Tensor) -> dict[str, Tensor]:
        """The words of all processes' texts, which are filled up to the whole length on the way."""
        words, mask = encoded["words"], encoded["mask"]
        missing = self.adapter.length - mask.shape[1] if is_shared() else 0
        words = pad(words[shared], (0, 0, 0, missing))
        mask = pad(mask[shared], (0, missing)).to(words.dtype)
        flat = of_all(torch.cat([words.flatten(1), mask], dim=1), text_places)
        width = words[0].numel()
        return {"words": flat[:, :width].unflatten(1, words.shape[1:]), "word_mask": flat[:, width:]}


def even_shares(lengths: Tensor, count: int) -> list[Tensor]:
    """(T,) tokens of each text => their numbers in `count` shares of about as many tokens, like lengths together."""
    order = lengths.argsort(stable=True)
    reached = lengths[order].cumsum(0)
    edges = [int(torch.searchsorted(reached, reached[-1] * i / count)) for i in range(1, count)]
    most = len(lengths) - count  # so that each has at least one
    return list(order.tensor_split([min(max(edge, i), most + i) for i, edge in enumerate(edges, 1)]))


def _cut(texts: dict[str, Tensor], encoders: int) -> dict[str, Tensor]:
    """Without the padding that none of these texts needs. What an encoder pools has no length."""
    longest = {str(i): int(texts[f"mask_{i}"].sum(1).max()) for i in range(encoders)}
    lengths = {name: longest[name.rsplit("_", 1)[1]] for name in texts if not name.startswith("pooled_")}
    return {name: value[:, : lengths[name]] if name in lengths else value for name, value in texts.items()}


def _filled_up(values: Tensor, lengths: list[int], whole: list[int]) -> Tensor:
    """(T, sum of the encoders' `lengths`, ...) => (T, sum of `whole`, ...), each encoder's part filled up by zeros."""
    parts = zip(values.split(lengths, dim=1), lengths, whole, strict=True)
    return torch.cat([pad(x, (0, 0) * (x.ndim - 2) + (0, full - own)) for x, own, full in parts], dim=1)
