"""Does a text find its picture, and is it told from its twin? What stage 1 is trained and measured by."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import normalize

from sd_mini import shapes
from sd_mini.data import CaptionedPictures
from sd_mini.encoders import Hidden
from sd_mini.text_encoder import TextStage
from sd_mini.texts import word_twins

RANKS = (1, 5, 10)
MEASURED = 1  # the seed of the twins that are measured with; training draws its own


class Matcher(ModelMixin, ConfigMixin):
    """The picture side of stage 1, and beside the adapter a plain projection of the same encoder, to compare it with.

    Pictures come as pixels, through a small convolutional tower, or, with `feature_dim`, as the features that a frozen
    tower made of them. It is saved beside the text stage for its report; a pipeline does not need it.
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 128,
        width: int = 64,
        patch: int = 4,
        feature_dim: int | None = None,
        projected_dim: int = 128,
    ):
        super().__init__()
        if feature_dim is None:
            self.features = nn.Sequential(
                nn.PixelUnshuffle(patch),
                nn.Conv2d(3 * patch**2, width, 3, padding=1),
                nn.GELU(),
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.GELU(),
                nn.Conv2d(2 * width, 2 * width, 3, padding=1),
                nn.GELU(),
                nn.AdaptiveAvgPool2d(4),  # keeps where things are, in 4 x 4 cells
                nn.Flatten(),
            )
        else:
            self.features = nn.LayerNorm(feature_dim)
        self.out = nn.Sequential(nn.Linear(feature_dim or 32 * width, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.projection = nn.Sequential(nn.LayerNorm(projected_dim), nn.Linear(projected_dim, dim))

    def forward(self, pictures: Tensor) -> Tensor:
        """pixels (B, 3, R, R), or features (B, feature_dim) => (B, dim) of length 1."""
        return normalize(self.out(self.features(pictures)), dim=-1)

    def project(self, hidden: Sequence[Hidden]) -> Tensor:
        """Each encoder's Hidden of B texts => (B, dim) of length 1: the mean state and the pooled vector, projected."""
        parts = []
        for one in hidden:
            weight = one.mask[..., None].to(one.states.dtype)
            parts += [(one.states * weight).sum(1) / weight.sum(1).clamp(min=1), one.pooled]
        return normalize(self.projection(torch.cat(parts, dim=-1)), dim=-1)


def projected_dim(stage: TextStage) -> int:
    return sum(states + pooled for states, _, pooled in (encoder.widths for encoder in stage.encoders))


def twin(pictures: CaptionedPictures, number: int, seed: int) -> str:
    """A caption that is nearly true of picture `number`; another `seed` gives another.

    Of a scene graph its caption with one attribute, place, count or relation changed, in phrasing `number` modulo their
    count; of any other data the first caption with its words changed (`word_twins`). Without either, the next one's.
    """
    if pictures.scenes is not None:
        phrasings = shapes.captions(shapes.swapped(pictures.scenes[number], number + seed)[0])
        return phrasings[number % len(phrasings)]
    found = [text for text in word_twins(pictures.captions[number][0]) if text not in pictures.captions[number]]
    if not found:
        return pictures.captions[(number + 1) % len(pictures)][0]
    return found[random.Random(f"{seed}/{number}").randrange(len(found))]


def phrased_alike(pictures: CaptionedPictures, number: int) -> str:
    """The caption of picture `number` that differs from its twin by nothing but what was changed."""
    own = pictures.captions[number]
    return own[number % len(own)] if pictures.scenes is not None else own[0]


@torch.no_grad()
def text_vectors(stage: TextStage, matcher: Matcher, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """N texts => (N, dim) by the adapter and (N, dim) by the plain projection, all of length 1."""
    adapted, projected = [], []
    for start in range(0, len(texts), 256):
        hidden = stage.hidden(stage.tokenize(texts[start : start + 256]))
        adapted.append(normalize(stage.adapter(hidden).pooled, dim=-1))
        projected.append(matcher.project(hidden))
    return torch.cat(adapted), torch.cat(projected)


def recalls(pictures: Tensor, texts: Tensor, captions: Sequence[str], rows: slice) -> dict[str, np.ndarray]:
    """Unit vectors of N pictures and of their N captions => for each of `rows`, 0 or 1, whether the caption finds its
    picture among the first 1, 5, 10 of all N, and the picture its caption.

    Equal captions are one: a picture of the same caption counts as found.
    """
    same = torch.tensor([[a == b for b in captions] for a in captions[rows]], device=texts.device)
    own = torch.arange(rows.start, rows.stop, device=texts.device)[:, None]
    found = {}
    ways = {"recall": texts[rows] @ pictures.T, "recall_of_captions": pictures[rows] @ texts.T}
    for name, scores in ways.items():
        best = torch.where(same, scores, -torch.inf).amax(1) if name == "recall" else scores.gather(1, own)[:, 0]
        beaten_by = ((scores > best[:, None]) & ~same).sum(1)
        found |= {f"{name}_at_{k}": (beaten_by < k).float().cpu().numpy() for k in RANKS}
    return found


def text_scores(
    stage: TextStage, matcher: Matcher, data: CaptionedPictures, pictures: Tensor, rows: slice
) -> dict[str, np.ndarray]:
    """What is said of a text stage, for each of `rows`, 0 or 1: `recalls`, and whether the picture is nearer to its
    caption than to its twin, by the adapter (`binding`) and by the plain projection (`binding_projection`).

    `pictures`: all N of `data`, as the matcher takes them.
    """
    captions = [phrased_alike(data, i) for i in range(len(data))]
    wrong = [twin(data, i, seed=MEASURED) for i in range(rows.start, rows.stop)]
    with torch.no_grad():
        seen = torch.cat([matcher(part.to(matcher.device)) for part in pictures.split(256)])
    adapted, projected = text_vectors(stage, matcher, captions)
    scores = recalls(seen, adapted, captions, rows)
    before = recalls(seen, projected, captions, rows)
    scores |= {f"{name}_projection": values for name, values in before.items()}
    for name, right, other in zip(
        ("binding", "binding_projection"), (adapted, projected), text_vectors(stage, matcher, wrong), strict=True
    ):
        margin = (seen[rows] * (right[rows] - other)).sum(1)
        scores[name] = (margin > 0).float().cpu().numpy()
    return scores
