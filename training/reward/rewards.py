"""Rewards by name: pictures and what was asked => a number each. To add one, write a function here and name it in
`open_reward` and in `config.check_reward`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sd_mini import images
from sd_mini.errors import UserError
from sd_mini.shapes import AnyScene
from sd_mini.stages.contract import Stage
from sd_mini.text_encoder.adapter import TextStage
from sd_mini.text_encoder.matcher import different, embed_images, embed_texts, own_similarity
from training.reward.config import JUDGE, MATCHER


@dataclass(frozen=True, eq=False)
class Made:
    """N pictures (N, 3, R, R) uint8, the prompts (N,) that they were made of, and scenes of shapes."""

    pictures: np.ndarray
    prompts: Sequence[str]
    scenes: Sequence[AnyScene] | None = None


Reward = Callable[[Made], np.ndarray]


def open_reward(name: str, text: Stage, device: str, is_judged: bool) -> Reward:
    """`text`: stage 1, whose picture side `matcher` is. Raises UserError where the reward cannot be opened."""
    kind, _, rest = name.partition(":")
    if kind == JUDGE:
        if not is_judged:
            raise UserError("reward judge: reads scene graphs, which shapes alone have; give clip:... or module:...")
        return _judge
    if kind == MATCHER:
        return _matcher(text)
    return _clip(rest, device) if kind == "clip" else _module(name, rest)


def _judge(made: Made) -> np.ndarray:
    from eval.judge.judge import judge

    assert made.scenes is not None  # by `open_reward`
    return np.array([judge(picture, scene).exact for picture, scene in zip(made.pictures, made.scenes, strict=True)])


def _clip(name: str, device: str) -> Reward:
    from eval.metrics.clip_score import Clip, cosines

    clip = Clip(name, device)
    return lambda made: cosines(clip.pictures(made.pictures), clip.texts(made.prompts))


def _matcher(text: Stage) -> Reward:
    """The cosine of a picture and its prompt, by the picture tower that stage 1 was trained with."""
    stage, matcher = TextStage.from_parts(text.parts), text.parts["matcher"]
    if matcher.config.feature_dim is not None:
        raise UserError("reward matcher: stage 1 was trained on another tower's features; give that tower as clip:...")
    side = text.contract["resolution"]

    @torch.no_grad()
    def score(made: Made) -> np.ndarray:
        captions, number = different(list(made.prompts))
        pixels = images.to_pixels(made.pictures)
        if pixels.shape[-1] != side:
            pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="area")
        seen = embed_images(matcher, pixels.to(next(matcher.parameters()).device).split(256))
        return own_similarity(seen, embed_texts(stage, matcher, captions)[0].take(number)).cpu().numpy()

    return score


def _module(name: str, rest: str) -> Reward:
    place, _, function = rest.partition(":")
    try:
        found = getattr(importlib.import_module(place), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"reward {name}: cannot be imported ({error}); expected module:PACKAGE.MODULE:FUNCTION"
        ) from None
    return lambda made: found(made.pictures, list(made.prompts))


def scores(rewards: Mapping[str, Reward], made: Made) -> dict[str, np.ndarray]:
    """(N,) float64 of each. Raises UserError, the reward named, for another shape, NaN or infinity."""
    found = {}
    for name, reward in rewards.items():
        try:
            values = np.asarray(reward(made), dtype=np.float64)
        except Exception as error:  # of code that is not ours
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"reward {name}: fails on (N, 3, R, R) uint8 pictures and their prompts: {reason}"
            ) from error
        if values.shape != (len(made.pictures),):
            raise UserError(f"reward {name}: got shape {values.shape}, expected ({len(made.pictures)},), one a picture")
        if not np.isfinite(values).all():
            raise UserError(
                f"reward {name}: {int((~np.isfinite(values)).sum())} of {values.size} values are not finite"
            )
        found[name] = values
    return found


def rarity(latents: torch.Tensor, is_good: np.ndarray, each: int) -> np.ndarray:
    """Latents (N, C, h, w), `each` of one prompt side by side => (N,) in [0, 1]: of a prompt's good pictures how rare
    each is among them; of all others 0.

    One over the sum of exp(-d^2 / s^2) over the good ones, itself included: 1 of a picture unlike the others, 1 / k of
    k alike. d^2 is the squared distance of the latents' 4 x 4 cells, which tell where things are; s^2 is its mean over
    all pairs of that prompt's pictures, each with itself among them, times 0.6. One s^2 for all prompts would tell the
    layouts of large dark objects apart and those of small light ones not at all.
    """
    cells = torch.nn.functional.adaptive_avg_pool2d(latents.double(), 4).flatten(1)
    prompts = cells.unflatten(0, (-1, each))
    squares = (prompts[:, :, None] - prompts[:, None]).square().sum(-1).numpy()  # (prompts, each, each)
    good = is_good.reshape(-1, each)
    scale = 0.6 * squares.mean((1, 2), keepdims=True)
    alike = (np.exp(-squares / np.maximum(scale, 1e-12)) * good[:, None]).sum(2)
    return np.where(good, 1 / np.maximum(alike, 1e-9), 0).reshape(-1)
