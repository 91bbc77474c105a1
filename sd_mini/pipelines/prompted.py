"""What a pipeline is asked for, made into tensors: prompts to embeddings, sizes to noise."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from sd_mini.errors import UserError
from sd_mini.sampling.denoising import Condition
from sd_mini.sampling.inputs import (
    Generators,
    as_generators,
    check_counts,
    check_embeds,
    check_latents,
    check_texts,
    draw_noise,
    given_negative,
    is_blank,
    listed,
    number,
    tensor,
)
from sd_mini.text_encoder.adapter import PromptEmbeds, TextStage


class PromptedPipeline(DiffusionPipeline):
    """The half of `Pipeline` that comes before the first step. Its parts are registered there."""

    @property
    def text_stage(self) -> TextStage:
        return TextStage.from_parts(self.components)

    def check_inputs(
        self,
        prompt: Any,
        height: int,
        width: int,
        steps: int,
        prompt_embeds: Tensor | None,
        latents: Tensor | None,
        num_images_per_prompt: int = 1,
        negative_prompt: Any = None,
        prompt_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_mask: Tensor | None = None,
    ) -> None:
        """Raises ValueError, one line, for anything no picture can be made from. Nothing has been computed yet."""
        check_texts(prompt, negative_prompt, prompt_embeds)
        for embeds, mask in ((prompt_embeds, prompt_mask), (negative_prompt_embeds, negative_prompt_mask)):
            check_embeds(embeds, mask, *self._embeds_shape)
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise UserError("expected negative_prompt or negative_prompt_embeds, got both")
        check_counts(num_inference_steps=steps, num_images_per_prompt=num_images_per_prompt)
        self.latent_shape(height, width)
        if latents is not None:
            check_latents(latents, self.latent_shape(height, width))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for a picture size that both the autoencoder's stride and the network's patch divide."""
        patch = getattr(self.noise_predictor.config, "patch_size", 1)
        cell = self.autoencoder.stride * patch
        height, width = number(height), number(width)
        for name, side in (("height", height), ("width", width)):
            if not isinstance(side, int) or isinstance(side, bool):
                raise UserError(f"{name} {side!r}: expected a whole number of pixels, a multiple of {cell}")
            if side <= 0 or side % cell:
                below = max(int(side) // cell, 1) * cell
                raise UserError(
                    f"{name} {side}: expected a multiple of {cell}; the nearest are {below}, {below + cell}"
                )
        return self.autoencoder.latent_shape(height, width)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        strict: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts, or embeddings made before, => prompt_embeds (B, L, D), prompt_mask (B, L); B counts the pictures.

        A prompt that is too long is cut, with a warning that names the words; `strict` raises ValueError instead.
        """
        prompt_embeds, prompt_mask, repeat = tensor(prompt_embeds), tensor(prompt_mask), number(num_images_per_prompt)
        check_texts(prompt, None, prompt_embeds)
        check_embeds(prompt_embeds, prompt_mask, *self._embeds_shape)
        check_counts(num_images_per_prompt=repeat)
        if prompt_embeds is None:
            with torch.no_grad():
                encoded = self.text_stage.encode(listed(prompt), strict)
            prompt_embeds, prompt_mask = encoded.tokens, encoded.mask
        prompt_embeds = prompt_embeds.to(self._execution_device, self._condition_dtype).repeat_interleave(repeat, 0)
        prompt_mask = prompt_mask.to(self._execution_device).repeat_interleave(repeat, 0)
        # plain names: diffusers' tools read off this line which arguments of a call the results are
        return prompt_embeds, prompt_mask

    @property
    def _embeds_shape(self) -> tuple[int | None, int | None]:
        """(L, D) of prompt embeddings; unknown without the adapter that makes them."""
        return (None, None) if self.text_adapter is None else (self.text_adapter.length, self.text_adapter.config.dim)

    @property
    def _condition_dtype(self) -> torch.dtype:
        """The noise predictor's; of a pipeline that is loaded for its text half alone the adapter's."""
        return (self.text_adapter if self.noise_predictor is None else self.noise_predictor).dtype

    def null_condition(self, batch: int) -> Condition:
        """The trained condition of no prompt at all: (batch, L, D), (batch, L)."""
        if self.text_adapter is None:
            raise UserError(
                "guidance leads away from the null condition, which a pipeline without text_adapter lacks; "
                "give negative_prompt_embeds and negative_prompt_mask, as null_condition(B) of the pipeline with it "
                "makes them, or guidance_scale 1"
            )
        null: PromptEmbeds = self.text_adapter.null(batch)
        device = self._execution_device
        return null.tokens.to(device, self._condition_dtype), null.mask.to(device)

    def _encode_negative(
        self,
        negative: str | list[str] | None,
        batch: int,
        per_prompt: int,
        strict: bool = False,
        embeds: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Condition:
        """The condition that guidance leads away from: the trained null one, or a prompt (or its embeddings) given."""
        if embeds is not None and mask is not None:
            if len(embeds) * per_prompt != batch:
                raise UserError(
                    f"{len(embeds)} negative_prompt_embeds for {batch // per_prompt} prompts; give one each"
                )
            return self.encode_prompt(None, per_prompt, embeds, mask)
        negative = given_negative(negative)
        if negative is None:
            return self.null_condition(batch)
        texts = listed(negative)
        if len(texts) == 1:
            texts = texts * (batch // per_prompt)
        if len(texts) * per_prompt != batch:
            raise UserError(f"{len(texts)} negative prompts for {batch // per_prompt} prompts; give one, or one each")
        rows = [row for row, text in enumerate(texts) if not is_blank(text)]
        said, mask = self.encode_prompt([texts[row] for row in rows], per_prompt, strict=strict)
        if len(rows) == len(texts):
            return said, mask
        # a blank one keeps the null condition
        pictures = [row * per_prompt + i for row in rows for i in range(per_prompt)]
        tokens, present = (part.clone() for part in self.null_condition(batch))
        tokens[pictures], present[pictures] = said, mask
        return tokens, present

    def prepare_latents(
        self, batch: int, height: int, width: int, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """Pure noise (B, C, h, w). Picture i takes its own draw from its own generator, whatever the batch it is in."""
        latents, generator = tensor(latents), as_generators(generator)
        if latents is not None:
            if len(latents) != batch:
                raise UserError(f"{len(latents)} latents for {batch} pictures; give one each")
            return latents.to(self._execution_device, self.noise_predictor.dtype)
        drawn = draw_noise(batch, self.latent_shape(height, width), generator)
        return drawn.to(self._execution_device, self.noise_predictor.dtype)
