"""Features of a set of pictures, made once: kept under the hash of the pictures, the network and its preprocessing."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from eval.features.features import Extractor
from eval.features.moments import statistics
from eval.metrics.fid import frechet_distance
from sd_mini.data.arrays import Pictures, pieces, shapes_of
from sd_mini.errors import UserError
from sd_mini.files import combined_hash, sync, usual_modes, written_to


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """A set of pictures as a network sees it: features (N, D) float32, their mean (D,) and covariance (D, D)."""

    features: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> FeatureSet:
        return cls(features, *statistics(features))

    def distance(self, other: FeatureSet) -> float:
        """The Frechet distance."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def pictures_hash(pictures: Pictures) -> str:
    """SHA-256 of (N, 3, H, W) uint8 and its shape."""
    digest = hashlib.sha256(str((len(pictures), *shapes_of(pictures)[0])).encode())
    for piece in pieces(pictures):
        digest.update(np.ascontiguousarray(piece).data)
    return digest.hexdigest()


def reference(extractor: Extractor, pictures: Pictures, cache: Path) -> FeatureSet:
    """What `extractor` sees in `pictures`, from `cache` where it has seen them before and its hash says all of it.

    Raises ValueError, the file named, where what lies there is damaged.
    """
    if not extractor.is_pinned:
        return FeatureSet.of(extractor(pictures))
    parts = {"data": pictures_hash(pictures), "extractor": extractor.hash, "preprocessing": extractor.preprocessing}
    path = cache / f"{combined_hash(parts)}.safetensors"
    if path.is_file():
        try:
            return FeatureSet(**load_file(path))
        except (SafetensorError, TypeError) as error:
            raise UserError(f"{path}: not readable ({error}); delete it, and it is made again") from None
    seen = FeatureSet.of(extractor(pictures))
    with written_to(path):
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({"features": seen.features, "mean": seen.mean, "covariance": seen.covariance}, partial)
        usual_modes(partial)
        sync(partial)
        os.replace(partial, path)
    return seen
