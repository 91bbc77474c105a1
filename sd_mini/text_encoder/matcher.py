"""Does a text find its picture, and is it told from its twin? What stage 1 is trained and measured by."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from sd_mini import shapes
from sd_mini.data.captioned import CaptionedPictures
from sd_mini.errors import UserError
from sd_mini.text_encoder.adapter import PromptEmbeds, TextAdapter, TextStage
from sd_mini.text_encoder.encoder import Hidden
from sd_mini.texts import shown, word_twins

RANKS = (1, 5, 10)
CELLS = 4  # a side, into which the picture side divides a picture
_PICTURES, _TEXTS = 32, 256  # whose late scores are in memory at a time
MEASURED = 1  # the seed of the twins that are measured with; training draws its own


class ImageEmbeds(NamedTuple):
    """What the matcher makes of B pictures: `vector` (B, dim), and `cells` (B, C, K), each of length 1."""

    vector: Tensor
    cells: Tensor | None


class TextEmbeds(NamedTuple):
    """What it makes of T texts: `vector` (T, dim) and `words` (T, L, K), each of length 1; `mask` (T, L)."""

    vector: Tensor
    words: Tensor | None
    mask: Tensor

    def take(self, numbers: Tensor) -> TextEmbeds:
        """(N,) numbers of texts => those texts."""
        numbers = numbers.to(self.vector.device)
        return TextEmbeds(self.vector[numbers], None if self.words is None else self.words[numbers], self.mask[numbers])


class Matcher(ModelMixin, ConfigMixin):
    """The picture side of stage 1, and beside the adapter a plain projection of the same encoder, to compare it with.

    Pictures come as pixels, through a small convolutional tower, or, with `feature_dim`, as the features that a frozen
    tower made of them. A text and a picture are compared whole by whole, by their vectors' cosine, and, with
    `late_dim`, word by word: each word with the cell of the picture that it fits best (late interaction, Yao et al.
    2021, "FILIP", eq. 3 to 5). It is saved beside the text stage for its report; a pipeline does not need it.
    """

    config: Any  # diffusers' FrozenDict, whose entries, the arguments of __init__, are attributes too

    @register_to_config
    def __init__(
        self,
        dim: int = 128,
        width: int = 64,
        patch: int = 2,
        feature_dim: int | None = None,
        late_dim: int = 64,
        projected_dim: int = 128,
    ):
        super().__init__()
        if feature_dim is None:
            self.tower = PictureTower(width, patch)
            feature_dim = self.tower.dim
            if late_dim:
                self.cell = nn.Linear(2 * width, late_dim)
                self.place = nn.Parameter(torch.randn(CELLS**2, late_dim) / 2)
                self.word = nn.Linear(dim, late_dim)
        else:
            self.tower = nn.LayerNorm(feature_dim)
        self.read = nn.Sequential(nn.Linear(feature_dim, 4 * dim), nn.GELU())
        self.out = nn.Linear(4 * dim, dim)
        self.projection = nn.Sequential(nn.LayerNorm(projected_dim), nn.Linear(projected_dim, dim))

    @property
    def is_late(self) -> bool:
        return self.config.feature_dim is None and self.config.late_dim > 0

    def forward(self, pictures: Tensor) -> ImageEmbeds:
        """pixels (B, 3, R, R), or features (B, feature_dim) => ImageEmbeds."""
        if self.config.feature_dim is not None:
            return ImageEmbeds(normalize(self.out(self.read(self.tower(pictures))), dim=-1), None)
        cells, flat = self.tower(pictures)
        placed = normalize(self.cell(cells) + self.place, dim=-1) if self.is_late else None
        return ImageEmbeds(normalize(self.out(self.read(flat)), dim=-1), placed)

    def texts(self, adapter: TextAdapter, encoded: PromptEmbeds) -> TextEmbeds:
        """What `adapter` made of T texts => TextEmbeds."""
        vector = normalize(encoded.pooled, dim=-1)
        words = normalize(self.word(adapter.raw(encoded.tokens)), dim=-1) if self.is_late else None
        return TextEmbeds(vector, words, encoded.mask)

    def project(self, hidden: Sequence[Hidden]) -> Tensor:
        """Each encoder's Hidden of B texts => (B, dim) of length 1: the mean state and the pooled vector, projected."""
        parts = []
        for one in hidden:
            weight = one.mask[..., None].to(one.states.dtype)
            parts += [(one.states * weight).sum(1) / weight.sum(1).clamp(min=1), one.pooled]
        return normalize(self.projection(torch.cat(parts, dim=-1)), dim=-1)


class PictureTower(nn.Module):
    """pixels (B, 3, R, R) => cells (B, CELLS^2, 2 width), and them flat beside the picture in 8 x 8 pixels, (B, dim).

    The small picture tells the colours plainly, and a fourth channel the edges, whatever their colour: so a shape is
    known in colours that it was never seen in.
    """

    def __init__(self, width: int, patch: int):
        super().__init__()
        widths = (4 * patch**2, width // 2, width, 2 * width, 2 * width)
        strides = (1, 2, 2, 1)
        self.dim = 2 * width * CELLS**2 + 3 * 64
        self.fold = nn.PixelUnshuffle(patch)
        steps = zip(widths, widths[1:], strides, strict=False)
        self.layers = nn.ModuleList(nn.Conv2d(narrow, wide, 3, stride, 1) for narrow, wide, stride in steps)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        cells = nn.functional.adaptive_avg_pool2d(self.map(pixels), CELLS).flatten(2)
        small = nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1)
        return cells.mT, torch.cat([cells.flatten(1), small], dim=1)

    def map(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, R, R) => the last layer's features (B, 2 width, rows, columns)."""
        x = self.fold(torch.cat([pixels, edges(pixels)], dim=1))
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return x


def edges(pixels: Tensor) -> Tensor:
    """(B, 3, R, R) => (B, 1, R, R): the longest of the three channels' gradients, 0 along the lower and right edge."""
    corner = pixels[:, :, :-1, :-1]
    down, right = pixels[:, :, 1:, :-1] - corner, pixels[:, :, :-1, 1:] - corner
    return pad((down.square() + right.square()).amax(1, keepdim=True).sqrt(), (0, 1, 0, 1))


def late_scores(cells: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """cells (B, C, K), words (T, L, K), mask (T, L) => (B, T): the mean over a text's words of each one's best cell."""
    count, length = mask.shape
    each = words.flatten(0, 1) @ cells.flatten(0, 1).T  # one product, and the maximum over what lies side by side
    best = each.view(count, length, *cells.shape[:2]).max(-1).values  # (T, L, B)
    weight = mask.to(best.dtype)
    return ((best * weight[..., None]).sum(1) / weight.sum(1).clamp(min=1)[:, None]).T


def pair_scores(cells: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """As `late_scores`, of picture i and text i alone: (B, C, K), (B, L, K), (B, L) => (B,)."""
    best = torch.einsum("blk,bck->blc", words, cells).amax(-1)
    weight = mask.to(best.dtype)
    return (best * weight).sum(-1) / weight.sum(-1).clamp(min=1)


def projected_dim(stage: TextStage) -> int:
    return sum(states + pooled for states, _, pooled in (encoder.widths for encoder in stage.encoders))


def twins(pictures: CaptionedPictures, number: int, seed: int) -> list[str]:
    """Texts that are nearly true of picture `number`, one for each of its captions; another `seed` gives others.

    Of a scene graph the captions with one attribute, place, count or relation changed, each in its own phrasing; of any
    other data each caption with its words changed (`word_twins`) or, where they give none, the next other caption.
    Raises ValueError where all captions are the same.
    """
    own = pictures.captions[number]
    if pictures.scenes is not None:
        return shapes.captions(shapes.swapped(pictures.scenes[number], number + seed)[0])
    draw, found = random.Random(f"{seed}/{number}"), []
    for caption in own:
        changed = [text for text in word_twins(caption) if text not in own]
        found.append(draw.choice(changed) if changed else _next_other(pictures, number))
    return found


def _next_other(pictures: CaptionedPictures, number: int) -> str:
    own = pictures.captions[number]
    following = (pictures.captions[(number + i) % len(pictures)][0] for i in range(1, len(pictures)))
    other = next((text for text in following if text not in own), None)
    if other is None:
        raise UserError(f"{pictures.name}: every caption is {shown(own[0])}; expected at least two different ones")
    return other


def measured_caption(pictures: CaptionedPictures, number: int) -> int:
    """Which of its captions picture `number` is measured by: in scenes each phrasing in turn, else the main one."""
    return number % len(pictures.captions[number]) if pictures.scenes is not None else 0


def similarity(seen: ImageEmbeds, said: TextEmbeds) -> Tensor:
    """B pictures, T texts => (B, T): the cosine of their vectors, and with cells the late score too, added."""
    cosine = seen.vector @ said.vector.T
    if seen.cells is None or said.words is None:
        return cosine
    texts = list(zip(said.words.split(_TEXTS), said.mask.split(_TEXTS), strict=True))
    for rows, cells in zip(cosine.split(_PICTURES), seen.cells.split(_PICTURES), strict=True):
        rows += torch.cat([late_scores(cells, words, mask) for words, mask in texts], dim=1)
    return cosine


def own_similarity(seen: ImageEmbeds, said: TextEmbeds) -> Tensor:
    """`similarity` of picture i and text i: (B,)."""
    cosine = (seen.vector * said.vector).sum(1)
    if seen.cells is None or said.words is None:
        return cosine
    return cosine + pair_scores(seen.cells, said.words, said.mask)


@torch.no_grad()
def embed_images(matcher: Matcher, pictures: Iterable[Tensor]) -> ImageEmbeds:
    """N pictures, in parts as the matcher takes them, => ImageEmbeds."""
    parts = [matcher(part.to(matcher.device)) for part in pictures]
    cells = None if parts[0].cells is None else torch.cat([part.cells for part in parts])
    return ImageEmbeds(torch.cat([part.vector for part in parts]), cells)


@torch.no_grad()
def embed_texts(stage: TextStage, matcher: Matcher, texts: Sequence[str]) -> tuple[TextEmbeds, TextEmbeds]:
    """N texts => what the adapter says of them, and what the plain projection does."""
    said, projected = [], []
    for start in range(0, len(texts), 256):
        hidden = stage.hidden(stage.tokenize(texts[start : start + 256], warn=False))
        said.append(matcher.texts(stage.adapter, stage.adapter(hidden)))
        projected.append(matcher.project(hidden))
    longest = max(part.mask.shape[1] for part in said)
    missing = [longest - part.mask.shape[1] for part in said]
    mask = torch.cat([pad(part.mask, (0, n)) for part, n in zip(said, missing, strict=True)])
    words = None
    if matcher.is_late:
        words = torch.cat([pad(part.words, (0, 0, 0, n)) for part, n in zip(said, missing, strict=True)])
    return TextEmbeds(torch.cat([p.vector for p in said]), words, mask), TextEmbeds(torch.cat(projected), None, mask)


def different(texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """N texts => the U different ones, in the order first seen, and each text's number among them, (N,)."""
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(number), torch.tensor([number[text] for text in texts])


def recalls(scores: Tensor, captions: Sequence[str], rows: slice) -> dict[str, np.ndarray]:
    """`similarity` (N, U) of N pictures and their U different captions => for each of `rows`, 0 or 1, whether the
    caption finds its picture among the first 1, 5, 10 of all N, and the picture its caption.

    Equal captions are one: a picture of the same caption counts as found.
    """
    numbers = different(captions)[1].to(scores.device)
    own = numbers[rows]
    better = torch.zeros(scores.shape[1], dtype=torch.int64, device=scores.device)  # pictures before a caption's own
    for asked in own.unique().split(_TEXTS):
        of_pictures, same = scores[:, asked].T, asked[:, None] == numbers
        reached = torch.where(same, of_pictures, -torch.inf).amax(1)
        better[asked] = ((of_pictures > reached[:, None]) & ~same).sum(1)
    of_captions = zip(scores[rows].split(_TEXTS), own.split(_TEXTS), strict=True)
    beaten_by = {
        "recall": better[own],
        "recall_of_captions": torch.cat([(part > part.gather(1, at[:, None])).sum(1) for part, at in of_captions]),
    }
    return {f"{name}_at_{k}": (rank < k).float().cpu().numpy() for name, rank in beaten_by.items() for k in RANKS}


def text_scores(
    stage: TextStage, matcher: Matcher, data: CaptionedPictures, pictures: Iterable[Tensor], rows: slice
) -> dict[str, np.ndarray]:
    """What is said of a text stage, for each of `rows`, 0 or 1: `recalls`, and whether the picture is nearer to its
    caption than to its twin, by the adapter (`binding`), by its pooled vector alone (`binding_pooled`), which is all
    that the plain projection has, and by that (`binding_projection`).

    `pictures`: all N of `data`, in parts as the matcher takes them.
    """
    which = [measured_caption(data, i) for i in range(len(data))]
    captions = [own[i] for own, i in zip(data.captions, which, strict=True)]
    twisted = [twins(data, i, MEASURED)[which[i]] for i in range(rows.start, rows.stop)]
    seen = embed_images(matcher, pictures)
    own = ImageEmbeds(seen.vector[rows], None if seen.cells is None else seen.cells[rows])
    (unique, number), (unique_twins, number_of_twin) = different(captions), different(twisted)
    ways = zip(
        ("", "_projection"),
        embed_texts(stage, matcher, unique),
        embed_texts(stage, matcher, unique_twins),
        strict=True,
    )
    found = {}
    for name, right, wrong in ways:
        found |= {f"{key}{name}": hits for key, hits in recalls(similarity(seen, right), captions, rows).items()}
        true, false = right.take(number[rows]), wrong.take(number_of_twin)
        found[f"binding{name}"] = (own_similarity(own, true) > own_similarity(own, false)).float().cpu().numpy()
        if not name:
            margin = (own.vector * (true.vector - false.vector)).sum(1)
            found["binding_pooled"] = (margin > 0).float().cpu().numpy()
    return found
