"""What a reward may break, measured on held-out prompts: diversity, likeness to real pictures, a second judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sd_mini.data.captioned import CaptionedPictures
from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from training.engine.evaluation import reported_as_evaluation, untouched_training
from training.reward.config import GuardConfig
from training.reward.rewards import Made, Reward, scores

_SCENES = 2000  # the seed of the prompts' scenes, of which neither training nor the report has any
_BATCH = 64  # pictures at a time
_FAR = 1e6  # below any score


class Guards:
    """Opened before the first update, so that what is wrong with them is said then."""

    def __init__(
        self,
        config: GuardConfig,
        valid: CaptionedPictures,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        second: Reward | None,
    ):
        from eval.features.features import open_features
        from eval.makers.repeated import EACH, repeated_captions, repeated_shapes

        self.config, self.rewards, self.weights, self.second = config, rewards, weights, second
        with reported_as_evaluation():
            self.features = open_features(config.features)
        if valid.scenes is not None:
            self.asked = repeated_shapes(_SCENES, valid.sizes[0].width, config.prompts, valid.scenes[0].level)
        else:
            captions = [own[0] for own in valid.captions]
            rows = valid.spread(min(4 * config.prompts, len(valid)))
            asked = repeated_captions(rows, captions, valid.pictures, config.prompts)
            if asked is None:
                raise UserError(
                    f"valid.count {len(valid)}: too few held-out pictures to compare with; give at least {EACH}"
                )
            self.asked = asked
        self.real = self.features(self.asked.real)

    def scores(self, pipeline: Pipeline) -> dict[str, float]:
        """`score`, the weighted sum of the rewards, and each of them; `second`; `vendi` and `layouts`, shares of the
        data's; `fd`; and `kept`, which is highest where the score is, among weights whose diversity is at least
        `guards.diversity`: of others it is far below."""
        from eval.features.reference import FeatureSet
        from eval.judge.judge import read_picture
        from eval.metrics.diversity import layouts, within_prompts

        with untouched_training():
            pictures, asked = self._pictures(pipeline), self.asked
            made = Made(pictures, asked.captions, asked.scenes)
            found: dict[str, Any] = {name: values.mean() for name, values in scores(self.rewards, made).items()}
            found["score"] = sum(weight * found[name] for name, weight in self.weights.items() if name in found)
            if self.second is not None:
                found["second"] = scores({"guards.judge": self.second}, made)["guards.judge"].mean()
            features = self.features(pictures)
            shares = {"vendi": within_prompts(features, self.real, asked.captions)["vendi"]}
            if asked.scenes is not None:
                read = [read_picture(picture, asked.scenes[0].level) for picture in pictures]
                shares["layouts"] = layouts(read, asked.scenes, asked.captions)
            found |= {name: share["share"] for name, share in shares.items() if share is not None}
            found["fd"] = FeatureSet.of(features).distance(FeatureSet.of(self.real))
        # a share that cannot be measured, such as layouts without two right pictures, is none
        least, floor = min(found.get(name, 0.0) for name in shares), self.config.diversity
        found["kept"] = found["score"] if least >= floor else least - floor - _FAR
        return {name: float(value) for name, value in found.items()}

    def _pictures(self, pipeline: Pipeline) -> np.ndarray:
        """(N, 3, R, R) uint8, each from its own seed, by the pipeline's own sampling."""
        from eval.makers.sources import Ours, Sampling

        source = Ours(pipeline)
        sampling, captions = Sampling(source.steps, source.guidance, _BATCH), self.asked.captions
        starts = range(0, len(captions), _BATCH)
        with torch.no_grad():
            return np.concatenate(
                [
                    source.make(captions[i : i + _BATCH], range(i, i + len(captions[i : i + _BATCH])), sampling)
                    for i in starts
                ]
            )
