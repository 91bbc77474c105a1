"""Pictures => features of a pretrained network, to compare sets of pictures by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Extractor = Callable[[np.ndarray], Tensor]


def inception(weights: str | Path | None = None) -> Extractor:
    """Inception's 2048 features as torch-fidelity computes them: (N, 3, H, W) uint8 => (N, 2048) float32.

    `weights`: `weights-inception-2015-12-05-6726825d.pth`; without it, downloaded. Raises ValueError, one line, where
    that fails or the file is another network's.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = Path(weights) if weights is not None else _download(URL_INCEPTION_V3)
    if not path.is_file():
        raise ValueError(f"inception weights {path}: no such file; fetch {URL_INCEPTION_V3}")
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity itself would run code in a file
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # of a file that is cut or holds code, parsers raise whatever they do
        raise ValueError(f"inception weights {path}: not readable ({' '.join(str(error).split())[:160]})") from None

    @torch.inference_mode()
    def extract(pictures: np.ndarray) -> Tensor:
        return torch.cat(
            [network(torch.from_numpy(part))[0] for part in np.array_split(pictures, -(-len(pictures) // 64))]
        )

    return extract


def _download(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix="6726825d")
    except (OSError, RuntimeError) as error:  # no network, or a file that is not the one it should be
        raise ValueError(
            f"inception: {url} cannot be downloaded ({error}); fetch it where there is a network and give its path"
        ) from None
    return path
