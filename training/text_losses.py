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
from sd_mini.encoders import Encoder, Hidden, Tokens
from sd_mini.retrieval import Matcher, Said, Seen, late_scores
from sd_mini.text_encoder import TextStage
from training.process import is_shared

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
        **texts: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pictures (b, ...) as the matcher takes them; thumbnails (b, 3, 8, 8); own (b,): the number of each picture's
        caption among the T texts of the global batch, twin (b,) that of its twin; positive (b, T) bool: which of these
        are true of it; texts: those that this process encodes, where text t is number here[t], -1 if another process
        has it; shared (n,): those of them that go to all processes, and text_places (T,) where they then stand, see
        `of_all`. For InfoNCE also picture_places (B,) and shared_pictures, the same for pictures, and true_of (b, B)
        bool: of which pictures each one's caption is true."""
        hidden = self.hidden(texts)
        encoded, null = self.adapter(hidden), self.adapter.null(1)
        seen, said = self.matcher(pictures), self.matcher.texts(self.adapter, encoded)
        vectors = of_all(said.vector[shared], text_places)
        scale, metrics = self.log_scale[0].exp(), {}
        logits = seen.vector @ vectors.T * scale + self.bias[0]
        # saying nothing is true of every picture: that is what trains the null condition
        nothing = seen.vector @ normalize(null.pooled, dim=-1).T * scale + self.bias[0]
        all_positive = torch.cat([positive, positive.new_ones(len(positive), 1)], dim=1)
        siglip = siglip_losses(torch.cat([logits, nothing], dim=1), all_positive)
        losses = self.weights.siglip * siglip + self._probe(seen.vector, hidden, shared, text_places, positive)
        metrics["siglip"] = siglip.mean()
        if self.matcher.is_late:
            by_words = self._late(seen, said, shared, text_places)
            late = siglip_losses(by_words, positive)
            losses, metrics["late"] = losses + self.weights.late * late, late.mean()
        if self.weights.twin:
            both = logits + by_words if self.matcher.is_late else logits
            against = twin_losses(both.gather(1, own[:, None]), both.gather(1, twin[:, None]))
            losses, metrics["twin"] = losses + self.weights.twin * against, against.mean()
        if self.weights.infonce:
            pictures = of_all(seen.vector[texts["shared_pictures"]], texts["picture_places"])
            back = said.vector[here[own]] @ pictures.T * scale
            infonce = (infonce_losses(logits, positive) + infonce_losses(back, texts["true_of"])) / 2
            losses, metrics["infonce"] = losses + self.weights.infonce * infonce, infonce.mean()
        if self.layout is not None:
            guess = self.layout(encoded.tokens[here[own]], encoded.mask[here[own]])
            layout = (guess - thumbnails).square().mean((1, 2, 3))
            losses, metrics["layout"] = losses + self.weights.layout * layout, layout.mean()
        best = logits.argmax(1, keepdim=True)
        metrics["in_batch_accuracy"] = positive.gather(1, best).float().mean()
        return losses, metrics

    def _late(self, seen: Seen, said: Said, shared: Tensor, text_places: Tensor) -> Tensor:
        """Logits (b, T) from the words of all processes' texts, which are filled up to the whole length on the way."""
        missing = self.adapter.length - said.mask.shape[1] if is_shared() else 0
        words = pad(said.words[shared], (0, 0, 0, missing))
        mask = pad(said.mask[shared], (0, missing)).to(words.dtype)
        flat = of_all(torch.cat([words.flatten(1), mask], dim=1), text_places)
        width = words[0].numel()
        scores = late_scores(seen.cells, flat[:, :width].unflatten(1, words.shape[1:]), flat[:, width:])
        return scores * self.log_scale[1].exp() + self.bias[1]

    def _probe(
        self, seen: Tensor, hidden: list[Hidden], shared: Tensor, text_places: Tensor, positive: Tensor
    ) -> Tensor:
        """The plain projection learns beside the rest, from what the encoder says, and teaches nobody: (b,)."""
        still = [Hidden(h.states.detach(), h.words.detach(), h.mask, h.pooled.detach()) for h in hidden]
        vectors = of_all(self.matcher.project(still)[shared], text_places)
        logits = seen.detach() @ vectors.T * self.log_scale[0].detach().exp() + self.bias[0].detach()
        return _PROBE_WEIGHT * siglip_losses(logits, positive)
