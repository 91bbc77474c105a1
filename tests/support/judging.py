"""What the judge's tests of both levels do: pictures degraded, and verdicts counted."""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from eval.judge.judge import judge
from sd_mini.shapes import draw, swapped


def exact_share(pictures, scenes):
    return np.mean([judge(picture, scene).exact for picture, scene in zip(pictures, scenes, strict=True)])


def degrade(pictures, blur, noise):
    """Gaussian blur of `blur` px, then Gaussian noise of `noise` / 255."""
    blurred = ndimage.gaussian_filter(pictures.astype(float), (0, 0, blur, blur))
    noisy = blurred + np.random.default_rng(0).normal(0, noise, pictures.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def changes_caught(scenes, categories: Callable[..., tuple[set[str], set[str]]]) -> tuple[float, float]:
    """One change of each scene, judged as if nothing had been changed: the shares that are not exact, and that are
    wrong where they have to be and nowhere else. `categories`: scene, change => those that have to be wrong, and those
    that have to stand."""
    flipped = right = 0
    for i, scene in enumerate(scenes):
        changed, name = swapped(scene, i)
        verdict = judge(draw(changed), scene)
        flipped += not verdict.exact
        wrong = {category for category, value in verdict.categories.items() if not value.exact}
        expected, unharmed = categories(scene, name)
        right += expected <= wrong and not unharmed & wrong
    return flipped / len(scenes), right / len(scenes)
