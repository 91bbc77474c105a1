"""Does a picture fit its prompt, by a CLIP model? CLIP score (Hessel et al. 2021), R-precision (Park et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from eval.judge.judge import wilson
from eval.metrics.bootstrap import prompt_interval
from eval.metrics.cmmd import cmmd
from eval.metrics.registry import Metric, Row, Sample, percent_row
from sd_mini import images
from sd_mini.data.arrays import Pictures
from sd_mini.stages.contract import model_hash
from sd_mini.text_encoder.loading import load_open_clip

CANDIDATES = 100  # captions among which a picture looks for its own
_BATCH = 16


class Clip:
    """An open_clip model: "ARCHITECTURE=FILE", "local-dir:FOLDER" or "hf-hub:NAME".

    Raises ValueError, one line, for an unknown architecture, and for weights that are missing or do not fit.
    """

    def __init__(self, name: str, device: str = "cpu"):
        import open_clip

        self.name, self.device = name, device
        architecture, _, weights = name.partition("=")
        self.model, self.transform = load_open_clip(architecture, weights or None)
        self.model.to(device)
        # a text that is too long is cut so that its end mark stays: that is the token the model pools
        self.tokenizer = open_clip.get_tokenizer(architecture)
        self.hash = model_hash(self.model)
        self.preprocessing = " ".join(str(self.transform).split())

    @property
    def label(self) -> str:
        return Path(self.name.partition("=")[0]).name

    @torch.inference_mode()
    def pictures(self, pictures: Pictures) -> np.ndarray:
        """(N, 3, H, W) uint8 => (N, D) float32 of length 1."""
        parts = []
        for start in range(0, len(pictures), _BATCH):
            part = torch.stack([self.transform(one) for one in images.to_pil(pictures[start : start + _BATCH])])
            parts.append(self.model.encode_image(part.to(self.device), normalize=True).float().cpu())
        return torch.cat(parts).numpy()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """N texts => (N, D) float32 of length 1."""
        parts = []
        for start in range(0, len(texts), _BATCH):
            tokens = self.tokenizer(list(texts[start : start + _BATCH])).to(self.device)
            parts.append(self.model.encode_text(tokens, normalize=True).float().cpu())
        return torch.cat(parts).numpy()

    def is_among(self, encoders: Sequence[Any]) -> bool:
        """Whether one of the text encoders that the pictures were conditioned by is this model's own: pictures that
        please it are then what was trained for."""
        own = getattr(getattr(self.model, "text", self.model), "token_embedding", None)
        if own is None:
            return False
        tables = [encoder.get_input_embeddings().weight.detach().cpu().float() for encoder in encoders]
        return any(its.shape == own.weight.shape and torch.equal(its, own.weight.detach().cpu()) for its in tables)


def cosines(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Two (N, D), row i of each belonging together, => (N,) in [-1, 1]. Raises ValueError for other shapes."""
    pictures, texts = np.asarray(pictures, dtype=np.float64), np.asarray(texts, dtype=np.float64)
    if pictures.shape != texts.shape or pictures.ndim != 2:
        raise ValueError(
            f"CLIP score: got {pictures.shape} of pictures and {texts.shape} of texts, expected one text a picture"
        )
    lengths = np.linalg.norm(pictures, axis=1) * np.linalg.norm(texts, axis=1)
    return (pictures * texts).sum(1) / lengths


# Hessel et al. 2021, eq. 1: 2.5 max(cos, 0); each picture's own is cut off at 0, not the mean
def clip_scores(cosine: np.ndarray) -> dict[str, np.ndarray]:
    """(N,) cosines => (N,) each: `cosine` as it is, `x100` = 100 max(cos, 0), `hessel` = 2.5 max(cos, 0)."""
    clipped = np.maximum(cosine, 0)
    return {"cosine": np.asarray(cosine), "x100": 100 * clipped, "hessel": 2.5 * clipped}


def r_precision(pictures: np.ndarray, texts: np.ndarray, prompts: Sequence[str], seed: int = 0) -> np.ndarray:
    """(N, D) each, of length 1, and the N prompts => (N,) 0 or 1: whether each picture's prompt is its nearest.

    Among CANDIDATES captions: its own and others of the same N drawn by `seed`, all different texts; fewer where there
    are not so many. A tie is a miss.
    """
    different, first, number = np.unique(np.asarray(prompts), return_index=True, return_inverse=True)
    draw, hits = np.random.default_rng(seed), []
    for row, own in enumerate(number):
        others = np.delete(np.arange(len(different)), own)
        chosen = draw.permutation(others)[: CANDIDATES - 1]
        scores = texts[first[chosen]] @ pictures[row]
        hits.append(float(texts[row] @ pictures[row] > scores.max(initial=-np.inf)))
    return np.array(hits)


def clip_part(
    clip: Clip, made: np.ndarray, prompts: Sequence[str], real: Pictures, encoders: Sequence[nn.Module]
) -> dict[str, Any]:
    """Everything by one CLIP model, for report.json: each mean with its 95 % interval over prompts, R-precision with
    Wilson's, CMMD against the `real` pictures. `encoders`: what the pictures were conditioned by."""
    seen, said = clip.pictures(made), clip.texts(prompts)
    part: dict[str, Any] = {"model": clip.name, "hash": clip.hash, "preprocessing": clip.preprocessing}
    for name, values in clip_scores(cosines(seen, said)).items():
        low, high = prompt_interval(values, prompts)
        part[name] = {"mean": float(values.mean()), "low": low, "high": high}
    hits = r_precision(seen, said, prompts)
    low, high = wilson(int(hits.sum()), len(hits))
    candidates = min(CANDIDATES, len(set(prompts)))
    part["r_precision"] = {"mean": float(hits.mean()), "low": low, "high": high, "candidates": candidates}
    part["cmmd"] = cmmd(seen, clip.pictures(real))
    return {**part, "conditioned": clip.is_among(encoders), "n": len(made), "n_reference": len(real)}


def _measure(sample: Sample) -> dict[str, Any] | None:
    clip = sample.tools.clip
    if clip is None:
        return None
    encoders = sample.maker.text_encoders if sample.maker is not None else []
    part = clip_part(clip, sample.pictures, sample.prompts, sample.question.reference, encoders)
    if part["conditioned"]:
        sample.remarks.append(
            f"CLIP score: {clip.name} also conditioned the pictures, which flatters them; score with another"
        )
    return part


def _rows(found: Mapping[str, Any]) -> list[Row]:
    label = "; the model that conditioned the pictures" if found["conditioned"] else ""
    names = {"cosine": "cosine", "x100": "100 max(cos, 0)", "hessel": "2.5 max(cos, 0)"}
    rows = []
    for key, what in names.items():
        one = found[key]
        ends = f"{one['low']:.4g}–{one['high']:.4g}"
        rows.append(Row(f"CLIP score, {what}{label}", f"{one['mean']:.4g}", ends, str(found["n"])))
    one = found["r_precision"]
    rows.append(percent_row(f"CLIP R-precision of {one['candidates']}", one, "mean", found["n"]))
    n = f"{found['n']} : {found['n_reference']}"
    return [*rows, Row("CMMD, 1000 MMD², biased", f"{found['cmmd']:.4g}", "", n)]


def _lines(part: Mapping[str, Any]) -> list[str]:
    return [f"CLIP score {part['x100']['mean']:.2f}, CMMD {part['cmmd']:.4g} by {part['model']}"]


CLIP = Metric("clip", _measure, _rows, _lines)
