"""Prompts => pictures: the call of the joined pipeline, as a diffusers user expects it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from sd_mini.autoencoder.tiling import check_tile
from sd_mini.config import check_choice
from sd_mini.draws import Draws
from sd_mini.errors import UserError
from sd_mini.pipelines.inputs import (
    CallState,
    Request,
    as_list,
    as_tensor,
    check_counts,
    check_embeds,
    check_texts,
    is_blank,
    one_call,
)
from sd_mini.pipelines.joining import JoinedPipeline
from sd_mini.sampling.loop import Condition, Edit, Generators, SamplingRun, as_generators, draws, number, one_each
from sd_mini.text_encoder.adapter import PromptEmbeds, TextStage

# pipeline, step, timestep, the requested tensors => those that are replaced
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class Pipeline(JoinedPipeline):
    """Text encoder + TextAdapter, noise predictor, autoencoder and a diffusers scheduler: `pipeline(prompt).images`.

    Join one with `from_run(RUN)` or `from_stages(...)`, load a saved one with `from_pretrained(FOLDER)`; see
    `JoinedPipeline` for its components and settings.
    """

    _interrupt, _guidance_scale, _num_timesteps = CallState(False), CallState(None), CallState(0)
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "prompt_mask"]
    _postprocess = staticmethod(VaeImageProcessor().postprocess)

    @property
    def interrupt(self) -> bool:
        """Whether the running call ends after its present step."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        return float(self.config.default_guidance) if self._guidance_scale is None else self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """How often the scheduler steps."""
        return self._num_timesteps

    @property
    def text_stage(self) -> TextStage:
        return TextStage.from_parts(self.components)

    def enable_vae_tiling(self, tile: int = 64) -> None:
        """Decode pictures larger than `tile` x `tile` latent cells in overlapping squares: memory goes by the square.

        See `autoencoder.tiling.in_tiles` for what that changes. Raises UserError for a tile of less than 8.
        """
        check_tile(tile)
        self.tile = tile

    def disable_vae_tiling(self) -> None:
        self.tile = None

    @one_call
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_mask: Tensor | None = None,
        autoguidance: bool = False,
        strict: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Make `num_images_per_prompt` pictures of each prompt.

        Args:
            negative_prompt: what guidance leads away from; without it, the trained null condition.
            height, width: pixels; the training resolution if left out.
            guidance_scale: 1 is no guidance (and half the cost); above 1 leans towards the prompt.
            guidance_rescale: 0 to 1, how far a guided prediction is brought back to the spread it has without guidance.
            guidance_interval: noise levels, 0 to 1 (the noise), between which steps are guided; the rest cost half.
            generator: one for all pictures (they draw from it in order), or one a picture.
            latents: the starting noise, (B, C, h, w), instead of a draw.
            prompt_embeds, prompt_mask: (B, L, D), (B, L) from `encode_prompt`, instead of a prompt.
            negative_prompt_embeds, negative_prompt_mask: the same, instead of a negative prompt.
            autoguidance: lead away from what `guide`, an earlier snapshot, makes of the same prompt.
            strict: refuse a prompt that is too long, instead of cutting it with a warning.
            callback_on_step_end: called after each step with the pipeline, the step, its timestep and the requested
                tensors; what it returns replaces them, and a `_guidance_scale` or `_interrupt` that it sets on the
                pipeline holds from the next step on.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, C, h, w).

        Returns:
            an object with `.images`, or the tuple `(images,)` with `return_dict=False`.

        Raises:
            UserError: a ValueError of one line: what was given, what was expected and how to mend it.
        """
        return self._make(Request.of(self, locals()), callback_on_step_end, return_dict)

    def _make(self, request: Request, callback: Callback | None, return_dict: bool) -> ImagePipelineOutput | tuple:
        """The call itself, of this pipeline and of those that start from a picture."""
        # 1. text: prompts => embeddings
        condition = self.encode_prompt(request.prompt, request.num_images_per_prompt, *request.embeds, request.strict)

        # 2. noise => latents: by the noise predictor, step by step, or by a generator of another family
        if self.latent_generator is None:
            latents = self._denoise(request, condition, callback)
        else:
            latents = self._generate(request, condition, callback)

        # 3. latents => pictures
        is_latent = request.output_type == "latent"
        try:
            draws = one_each(request.generator, len(latents))
            pictures: Any = latents if is_latent else self._decode(latents, request.output_type, draws)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _denoise(self, request: Request, condition: Condition, callback: Callback | None) -> Tensor:
        """Noise => latents (B, C, h, w): one call of the network a step, guided within the interval."""
        batch = len(condition[0])
        if (self.scheduler, dict(self.scheduler.config)) != self._checked_scheduler:  # a user may exchange or edit it
            self.check_scheduler(self.scheduler)
        run = SamplingRun(
            self.noise_predictor,
            self.scheduler,
            self.process,
            request.guidance,
            request.num_inference_steps,
            self._execution_device,
            guide=self.guide if request.autoguidance else None,
            edit=self._prepare_edit(request, batch),
            few_steps=self.few_steps,
        )
        noise = self.prepare_latents(batch, request.height, request.width, request.generator, request.latents)
        latents = run.start(noise)
        self._interrupt, self._guidance_scale, self._num_timesteps = False, request.guidance.scale, len(run.timesteps)
        null: Condition | None = None
        with self.progress_bar(total=len(run.timesteps)) as progress:
            for i, t in enumerate(run.timesteps):
                if self._interrupt:
                    continue
                if null is None and run.needs_null:  # at the first step, or once a callback has set a scale
                    null = self.encode_negative(request, batch)
                latents = run.step(i, latents, condition, null, request.generator)
                if callback is not None:
                    latents, condition = self._called_back(callback, i, t, latents, condition, request)
                    if self._guidance_scale != run.guidance.scale:
                        run.set_scale(self._guidance_scale)
                progress.update()
        return latents

    def _generate(self, request: Request, condition: Condition, callback: Callback | None) -> Tensor:
        """Latents (B, C, h, w) as the generator draws them: to a callback one step, at time 0."""
        generator, batch, scale = self.latent_generator, len(condition[0]), request.guidance.scale
        self._interrupt, self._guidance_scale, self._num_timesteps = False, scale, 1
        null = self.encode_negative(request, batch) if scale != 1 else None
        latents = generator.draw(condition, null, one_each(request.generator, batch), scale)
        if callback is not None:
            latents, _ = self._called_back(callback, 0, torch.zeros(()), latents, condition, request)
        return latents

    def _called_back(
        self, callback: Callback, i: int, t: Tensor, latents: Tensor, condition: Condition, request: Request
    ) -> tuple[Tensor, Condition]:
        """Latents and condition after the user's callback of step `i`, which may replace them."""
        tensors = dict(zip(self._callback_tensor_inputs, (latents, *condition), strict=True))
        wanted = {name: tensors[name] for name in request.callback_on_step_end_tensor_inputs}
        changed = callback(self, i, t, wanted) or {}
        for name in set(changed) - set(tensors):
            check_choice("callback_on_step_end returned", name, self._callback_tensor_inputs)
        latents, tokens, mask = ((tensors | changed)[name] for name in self._callback_tensor_inputs)
        return latents, (tokens, mask)

    def _prepare_edit(self, request: Any, batch: int) -> Edit | None:
        """The picture that the call starts from: none here."""
        return None

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        strict: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts, or embeddings made before, => prompt_embeds (B, L, D), prompt_mask (B, L); B counts the pictures.

        A prompt that is too long is cut, with a warning that names the words; `strict` raises UserError instead.
        """
        prompt_embeds, prompt_mask = as_tensor(prompt_embeds), as_tensor(prompt_mask)
        repeat = number(num_images_per_prompt)
        check_texts(prompt, None, prompt_embeds)
        check_embeds(prompt_embeds, prompt_mask, *self.embeds_shape)
        check_counts(num_images_per_prompt=repeat)
        if prompt_embeds is None:
            assert prompt is not None  # by check_texts
            with torch.no_grad():
                encoded = self.text_stage.encode(as_list(prompt), strict)
            prompt_embeds, prompt_mask = encoded.tokens, encoded.mask
        prompt_embeds = prompt_embeds.to(self._execution_device, self._condition_dtype).repeat_interleave(repeat, 0)
        prompt_mask = prompt_mask.to(self._execution_device).repeat_interleave(repeat, 0)
        # plain names: diffusers' tools read off this line which arguments of a call the results are
        return prompt_embeds, prompt_mask

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

    def encode_negative(self, request: Request, batch: int) -> Condition:
        """The condition that guidance leads away from, one a picture: null, a negative prompt, or its embeddings."""
        per_prompt, negative = request.num_images_per_prompt, request.negative_prompt
        prompts = batch // per_prompt
        if request.negative_prompt_embeds is not None:
            if len(request.negative_prompt_embeds) != prompts:
                raise UserError(
                    f"{len(request.negative_prompt_embeds)} negative_prompt_embeds for {prompts} prompts; give one each"
                )
            return self.encode_prompt(None, per_prompt, *request.negative_embeds)
        if negative is None:
            return self.null_condition(batch)
        texts = as_list(negative)
        texts = texts * prompts if len(texts) == 1 else texts
        if len(texts) != prompts:
            raise UserError(f"{len(texts)} negative prompts for {prompts} prompts; give one, or one each")
        rows = [row for row, text in enumerate(texts) if not is_blank(text)]
        embeds, mask = self.encode_prompt([texts[row] for row in rows], per_prompt, strict=request.strict)
        if len(rows) == prompts:
            return embeds, mask
        # a blank one among them keeps the null condition
        pictures = [row * per_prompt + i for row in rows for i in range(per_prompt)]
        tokens, present = (part.clone() for part in self.null_condition(batch))
        tokens[pictures], present[pictures] = embeds, mask
        return tokens, present

    def prepare_latents(
        self, batch: int, height: int, width: int, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """Pure noise (B, C, h, w). Picture i takes its own draw from its own generator, whatever the batch it is in."""
        latents, generator = as_tensor(latents), as_generators(generator)
        if latents is None:
            latents = draws((batch, *self.latent_shape(height, width)), one_each(generator, batch))
        elif len(latents) != batch:
            raise UserError(f"{len(latents)} latents for {batch} pictures; give one each")
        return latents.to(self._execution_device, self.noise_predictor.dtype)

    @property
    def cell(self) -> int:
        """Pixels that divide the sides of a picture: the autoencoder's stride times the network's patch."""
        return self.autoencoder.stride * getattr(self._drawer.config, "patch_size", 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for a picture size that `cell` divides."""
        cell, height, width = self.cell, number(height), number(width)
        for name, side in (("height", height), ("width", width)):
            if not isinstance(side, int) or isinstance(side, bool):
                raise UserError(f"{name} {side!r}: expected a whole number of pixels, a multiple of {cell}")
            if side <= 0 or side % cell:
                below = max(int(side) // cell, 1) * cell
                raise UserError(
                    f"{name} {side}: expected a multiple of {cell}; the nearest are {below}, {below + cell}"
                )
        return self.autoencoder.latent_shape(height, width)

    @property
    def embeds_shape(self) -> tuple[int | None, int | None]:
        """(L, D) of prompt embeddings; unknown without the adapter that makes them."""
        return (None, None) if self.text_adapter is None else (self.text_adapter.length, self.text_adapter.config.dim)

    @property
    def _condition_dtype(self) -> torch.dtype:
        """The noise predictor's; of a pipeline that is loaded for its text half alone the adapter's."""
        return (self.text_adapter if self._drawer is None else self._drawer).dtype

    @property
    def _drawer(self) -> Any:
        """The network that draws the latents."""
        return self.noise_predictor if self.latent_generator is None else self.latent_generator

    def _decode(self, latents: Tensor, output_type: str, draws: Draws | None = None) -> Any:
        pixels = self.autoencoder.decode(latents.to(self.autoencoder.dtype), self.tile, draws).float()
        if pixels.isnan().any():  # which would pass for a plausible black
            raise UserError("the decoded pictures hold NaN: the model has diverged; load an earlier checkpoint of it")
        return self._postprocess(pixels, output_type)
