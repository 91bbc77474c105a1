"""The generator's seat in a pipeline: text => latents, by whatever way."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from sd_mini.draws import Draws
from sd_mini.errors import UserError

Condition = tuple[Tensor, Tensor]  # prompt_embeds (B, L, D), prompt_mask (B, L)


class LatentGenerator(ModelMixin, ConfigMixin):
    """A network that draws the latents of a prompt by itself, in the place of a noise predictor and its sampler.

    `config.latent_shape` is the (C, h, w) that it was trained at and draws. Subclasses register their fields with
    diffusers' `register_to_config`, and bring `family` and `sample`.
    """

    is_guided: ClassVar[bool] = False
    """whether `sample` has a use for a guidance scale, and for the null condition"""

    use_of_image: ClassVar[str] = "draws from a prompt alone; leave it out, or join the run with a noise predictor"
    """what a call that starts from a picture is told"""

    assignable: ClassVar[tuple[str, ...]] = ()
    """fields that are attributes too, and may be assigned at any time"""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.__module__ = "sd_mini.generators"  # by which a saved pipeline names it, whatever file it is in

    config: Any  # diffusers' FrozenDict, whose entries are attributes too

    @property
    def family(self) -> str:
        """Its name in messages: autoregressive, gan, ..."""
        return self.config.family

    @property
    def noise_predictors(self) -> list[Any]:
        """Its networks that are a noise predictor's, which `Pipeline.accelerate` makes faster on a CPU."""
        return []

    def save_config(self, *args: Any, **kwargs: Any) -> None:
        """diffusers', with what has been assigned since."""
        self.register_to_config(**{name: getattr(self, name) for name in self.assignable})
        super().save_config(*args, **kwargs)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises UserError for latents of another shape than it draws."""
        if tuple(shape) != tuple(self.config.latent_shape):
            raise UserError(
                f"latents of {tuple(shape)}: this {self.family} generator draws {tuple(self.config.latent_shape)} "
                "alone; leave height and width out"
            )

    def check_guidance(self, scale: float) -> None:
        """Raises UserError for a guidance scale other than 1 where there is nothing to guide."""
        if scale != 1 and not self.is_guided:
            raise UserError(
                f"guidance_scale {scale:g}: a {self.family} generator draws without guidance; leave it out (1)"
            )

    @abstractmethod
    def passes(self, guidance: float) -> int:
        """Calls of the network that a picture takes, guided by that scale; a guided one counts twice."""

    @apply_forward_hook  # which moves the network to its device under CPU offload
    @torch.no_grad()
    def draw(self, prompt: Condition, null: Condition | None, draws: Draws, guidance: float = 1.0) -> Tensor:
        """Prompts (B, L, D), (B, L) => standardised latents (B, C, h, w), picture i by `draws[i]` alone.

        `null`: the condition that guidance leads away from, (B, L, D), (B, L); not needed at guidance 1, which is none.
        """
        return self.sample(prompt, null if guidance != 1 else None, draws, guidance)

    @abstractmethod
    def sample(self, prompt: Condition, null: Condition | None, draws: Draws, guidance: float) -> Tensor:
        """As `draw`, for subclasses to bring; `null` is None where there is no guidance."""
