"""Prompts => pictures: the three stages joined, with the calls and the folders a diffusers user expects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sd_mini import images, noise_predictor
from sd_mini.autoencoder import Autoencoder
from sd_mini.config import check_choice
from sd_mini.fused import speed_up
from sd_mini.guidance import Guidance, interval
from sd_mini.pipeline_inputs import Generators, check_counts, check_embeds, check_texts, draw_noise, listed
from sd_mini.stages import Stage, atomic_folder, check_belonging, load_stage
from sd_mini.text_encoder import PromptEmbeds, TextAdapter, TextStage
from sd_mini.tiles import check_tile


class Pipeline(DiffusionPipeline):
    """Text encoder + TextAdapter, noise predictor, autoencoder and a diffusers scheduler.

    `resolution` is the training size in pixels and the default height and width; `default_steps`, `default_guidance`
    and `default_interval` are the recipe's own; `stages` holds the hashes of the stages this was joined from.
    """

    _callback_tensor_inputs = ("latents",)
    _optional_components: ClassVar[list[str]] = ["tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        text_adapter: TextAdapter,
        noise_predictor: ModelMixin,
        autoencoder: Autoencoder,
        scheduler: SchedulerMixin,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        resolution: int = 64,
        default_steps: int = 20,
        default_guidance: float = 3.0,
        default_interval: tuple[float, float] = (0.0, 1.0),
        stages: dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            text_adapter=text_adapter,
            noise_predictor=speed_up(noise_predictor),
            autoencoder=autoencoder,
            scheduler=scheduler,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            tokenizer_3=tokenizer_3,
            text_encoder_3=text_encoder_3,
        )
        self.register_to_config(
            resolution=resolution,
            default_steps=default_steps,
            default_guidance=default_guidance,
            default_interval=tuple(default_interval),
            stages=dict(stages or {}),
        )
        self.tile: int | None = None

    @classmethod
    def from_stages(
        cls,
        text_encoder: str | Path | Stage,
        autoencoder: str | Path | Stage,
        noise_predictor: str | Path | Stage,
        scheduler: SchedulerMixin | None = None,
    ) -> Pipeline:
        """Join three exported stages (folders, or loaded). Raises ValueError, both hashes named, if they do not fit."""
        given = {"text_encoder": text_encoder, "autoencoder": autoencoder, "noise_predictor": noise_predictor}
        stages = {kind: s if isinstance(s, Stage) else load_stage(s, kind) for kind, s in given.items()}
        text, vae, predictor = stages.values()
        check_belonging(predictor.contract, text_encoder=text.contract, autoencoder=vae.contract)
        return cls(
            **{name: part for name, part in text.parts.items() if name != "matcher"},  # which only stage 1 needs
            **vae.parts,
            **predictor.parts,
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
            **predictor.contract["sampling"],
            stages={kind: stage.hash for kind, stage in stages.items()},
        )

    @classmethod
    def from_run(cls, run: str | Path, **kwargs: Any) -> Pipeline:
        """Join the three exported stages of a run folder, `RUN/STAGE/final`."""
        return cls.from_stages(*(Path(run) / kind / "final" for kind in _STAGE_ORDER), **kwargs)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> Pipeline:
        """Load what `save_pretrained` wrote. Weights come from safetensors only."""
        index = Path(folder) / "model_index.json"
        if not index.is_file():
            raise ValueError(f"{folder}: no pipeline here (model_index.json is missing); join one: sd-mini export RUN")
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(folder, **kwargs)

    def save(self, folder: str | Path) -> None:
        """`save_pretrained`, but all or nothing: a folder that is there is only replaced by a complete one."""
        with atomic_folder(Path(folder)) as partial:
            self.save_pretrained(partial)

    def enable_vae_tiling(self, tile: int = 64) -> None:
        """Decode pictures larger than `tile` x `tile` latent cells in overlapping squares: memory goes by the square.

        See `tiles.in_tiles` for what that changes. Raises ValueError for a tile of less than 8.
        """
        check_tile(tile)
        self.tile = tile

    def disable_vae_tiling(self) -> None:
        self.tile = None

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
    ) -> None:
        """Raises ValueError, one line, for anything no picture can be made from. Nothing has been computed yet."""
        check_texts(prompt, negative_prompt, prompt_embeds)
        check_embeds(prompt_embeds, prompt_mask, self.text_adapter.length, self.text_adapter.config.dim)
        check_counts(num_inference_steps=steps, num_images_per_prompt=num_images_per_prompt)
        self.latent_shape(height, width)
        if latents is not None and tuple(latents.shape[1:]) != self.latent_shape(height, width):
            raise ValueError(
                f"latents are {tuple(latents.shape)}; expected (B, {str(self.latent_shape(height, width))[1:]}"
            )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for a picture size that both the autoencoder's stride and the network's patch divide."""
        patch = getattr(self.noise_predictor.config, "patch_size", 1)
        cell = self.autoencoder.stride * patch
        for name, side in (("height", height), ("width", width)):
            if not isinstance(side, int) or side <= 0 or side % cell:
                below = max(int(side) // cell, 1) * cell
                raise ValueError(
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
        check_texts(prompt, None, prompt_embeds)
        check_embeds(prompt_embeds, prompt_mask, self.text_adapter.length, self.text_adapter.config.dim)
        if prompt_embeds is None:
            encoded = self.text_stage.encode(listed(prompt), strict)
            prompt_embeds, prompt_mask = encoded.tokens, encoded.mask
        prompt_embeds = prompt_embeds.to(self._execution_device, self.noise_predictor.dtype)
        prompt_mask = prompt_mask.to(self._execution_device)
        repeat = num_images_per_prompt
        return prompt_embeds.repeat_interleave(repeat, 0), prompt_mask.repeat_interleave(repeat, 0)

    def _encode_negative(
        self, negative: str | list[str] | None, batch: int, per_prompt: int, strict: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The condition that guidance leads away from: the trained null one, or a prompt of the user's."""
        if negative is None:
            null: PromptEmbeds = self.text_adapter.null(batch)
            device = self._execution_device
            return null.tokens.to(device, self.noise_predictor.dtype), null.mask.to(device)
        texts = listed(negative)
        if len(texts) == 1:
            texts = texts * (batch // per_prompt)
        if len(texts) * per_prompt != batch:
            raise ValueError(f"{len(texts)} negative prompts for {batch // per_prompt} prompts; give one, or one each")
        return self.encode_prompt(texts, per_prompt, strict=strict)

    def prepare_latents(
        self, batch: int, height: int, width: int, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """Pure noise (B, C, h, w). Picture i takes its own draw from its own generator, whatever the batch it is in."""
        if latents is not None:
            if len(latents) != batch:
                raise ValueError(f"{len(latents)} latents for {batch} pictures; give one each")
            return latents.to(self._execution_device, self.noise_predictor.dtype)
        drawn = draw_noise(batch, self.latent_shape(height, width), generator)
        return drawn.to(self._execution_device, self.noise_predictor.dtype)

    def _set_timesteps(self, steps: int) -> Tensor:
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # its own spacing ends one step early: the last would go from sigma 0.001 to 0
            self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=self._execution_device)
        else:
            self.scheduler.set_timesteps(steps, device=self._execution_device)
        return self.scheduler.timesteps

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
        strict: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Pipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
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
            strict: refuse a prompt that is too long, instead of cutting it with a warning.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, C, h, w).

        Returns:
            an object with `.images`, or the tuple `(images,)` with `return_dict=False`.

        Raises:
            ValueError: one line that says what was given, what was expected and how to mend it.
        """
        height = self.config.resolution if height is None else height
        width = self.config.resolution if width is None else width
        steps = self.config.default_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.default_guidance if guidance_scale is None else guidance_scale
        guided = self.config.default_interval if guidance_interval is None else guidance_interval
        guidance = Guidance(scale, guidance_rescale, *interval(guided))
        self.check_inputs(
            prompt,
            height,
            width,
            steps,
            prompt_embeds,
            latents,
            num_images_per_prompt,
            negative_prompt,
            prompt_mask,
        )
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        for name in callback_on_step_end_tensor_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)

        embeds, mask = self.encode_prompt(prompt, num_images_per_prompt, prompt_embeds, prompt_mask, strict)
        batch = len(embeds)
        latents = self.prepare_latents(batch, height, width, generator, latents)
        self._interrupt = False
        timesteps = self._set_timesteps(steps)
        levels = (timesteps / self.scheduler.config.num_train_timesteps).clamp(max=1).tolist()
        null = None
        if any(map(guidance.is_active, levels)):
            null = self._encode_negative(negative_prompt, batch, num_images_per_prompt, strict)
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    continue
                conditions = ((embeds, mask), null if guidance.is_active(levels[i]) else None)
                latents = self._denoise(latents, t, levels[i], *conditions, guidance)
                if callback_on_step_end is not None:
                    given = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    latents = (callback_on_step_end(self, i, t, given) or {}).get("latents", latents)
                progress.update()
        pictures = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _denoise(
        self,
        latents: Tensor,
        t: Tensor,
        level: float,
        prompt: tuple[Tensor, Tensor],
        null: tuple[Tensor, Tensor] | None,
        guidance: Guidance,
    ) -> Tensor:
        """One step of the scheduler from timestep `t`, noise level `level`; with `null` guided, both predictions in one
        pass."""
        given, doubled = prompt, latents
        if null is not None:
            given = tuple(torch.cat(pair) for pair in zip(null, prompt, strict=True))
            doubled = torch.cat([latents, latents])
        timesteps = torch.full((len(doubled),), level, device=latents.device, dtype=latents.dtype)
        velocity = noise_predictor.predict(self.noise_predictor, doubled, timesteps, *given)
        if null is not None:
            unconditional, conditional = velocity.chunk(2)
            velocity = guidance.join(conditional, unconditional)
        return self.scheduler.step(velocity, t, latents, return_dict=False)[0]

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        pixels = self.autoencoder.decode(latents.to(self.autoencoder.dtype), self.tile).float().clamp(-1, 1)
        if output_type == "pil":
            return images.to_pil(images.to_uint8(pixels))
        unit = (pixels + 1) / 2
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


_STAGE_ORDER = ("text_encoder", "autoencoder", "noise_predictor")
