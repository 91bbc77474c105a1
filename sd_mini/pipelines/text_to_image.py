"""Prompts => pictures: the three stages joined, with the calls and the folders a diffusers user expects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sd_mini import images, lora
from sd_mini.autoencoder.model import Autoencoder
from sd_mini.autoencoder.tiling import check_tile
from sd_mini.config import check_choice
from sd_mini.cpu import accelerate
from sd_mini.diffusion.process import Process
from sd_mini.errors import UserError
from sd_mini.files import (
    MANIFEST,
    PIPELINE_MARK,
    atomic_folder,
    atomic_text,
    combined_hash,
    file_hash,
    usual_modes,
    written,
    written_to,
)
from sd_mini.noise_predictor.network import unwrapped
from sd_mini.pipelines.call_state import OfTheCall, one_call
from sd_mini.pipelines.prompted import PromptedPipeline
from sd_mini.remarks import remark
from sd_mini.sampling import samplers
from sd_mini.sampling.denoising import Denoising
from sd_mini.sampling.guidance import Guidance, interval
from sd_mini.sampling.inputs import Generators, as_generators, given_negative, number, tensor
from sd_mini.stages.contract import Stage, check_belonging, check_files, load_stage
from sd_mini.text_encoder.adapter import TextAdapter
from sd_mini.weights import load_components, pipeline_variant


class Pipeline(PromptedPipeline):
    """Text encoder + TextAdapter, noise predictor, autoencoder and a diffusers scheduler.

    `resolution` is the training size in pixels and the default height and width; `default_steps`, `default_guidance`
    and `default_interval` are the recipe's own; `objective` says what the network predicts, which the scheduler has to
    step by; `guide` is an earlier snapshot of the network, for autoguidance; `stages` holds the hashes of the stages
    this was joined from. Any part may be None for a pipeline of which the rest is used: its text half to encode
    prompts, or all but that to make pictures of embeddings.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->text_adapter->noise_predictor->autoencoder"
    _interrupt, _guidance_scale, _num_timesteps = OfTheCall(False), OfTheCall(None), OfTheCall(0)
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "prompt_mask"]
    _optional_components: ClassVar[list[str]] = [
        "tokenizer_2",
        "text_encoder_2",
        "tokenizer_3",
        "text_encoder_3",
        "guide",
    ]

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
        guide: ModelMixin | None = None,
        resolution: int = 64,
        default_steps: int = 20,
        default_guidance: float = 3.0,
        default_interval: list[float] | tuple[float, float] = (0.0, 1.0),
        objective: dict[str, Any] | None = None,
        stages: dict[str, str] | None = None,
    ):
        super().__init__()
        process = Process.of({"objective": objective})
        if scheduler is not None:
            samplers.check(scheduler, process)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            text_adapter=text_adapter,
            noise_predictor=noise_predictor,
            autoencoder=autoencoder,
            scheduler=scheduler,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            tokenizer_3=tokenizer_3,
            text_encoder_3=text_encoder_3,
            guide=guide,
        )
        self.register_to_config(
            resolution=resolution,
            default_steps=default_steps,
            default_guidance=default_guidance,
            default_interval=tuple(default_interval),
            objective=process.model_dump(),
            stages=dict(stages or {}),
        )
        self.tile: int | None = None

    @property
    def interrupt(self) -> bool:
        """Whether the call at work is to end after its present step."""
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

    @classmethod
    def from_stages(
        cls,
        text_encoder: str | Path | Stage,
        autoencoder: str | Path | Stage,
        noise_predictor: str | Path | Stage,
        scheduler: SchedulerMixin | None = None,
        guide: str | Path | Stage | None = None,
    ) -> Pipeline:
        """Join three exported stages (folders, or loaded), and an earlier noise predictor to guide away from.

        Raises ValueError, both hashes named, if they do not fit.
        """
        given = {"text_encoder": text_encoder, "autoencoder": autoencoder, "noise_predictor": noise_predictor}
        stages = {kind: s if isinstance(s, Stage) else load_stage(s, kind) for kind, s in given.items()}
        text, vae, predictor = stages.values()
        check_belonging(predictor.contract, text_encoder=text.contract, autoencoder=vae.contract)
        sampling, process = dict(predictor.contract["sampling"]), Process.of(predictor.contract)
        sampler = sampling.pop("sampler", None) or samplers.default(process)
        joined = cls(
            **{name: part for name, part in text.parts.items() if name != "matcher"},  # which only stage 1 needs
            **vae.parts,
            **predictor.parts,
            scheduler=scheduler or samplers.build(sampler, process),
            **sampling,
            objective=process.model_dump(),
            stages={kind: stage.hash for kind, stage in stages.items()},
        )
        if guide is not None:
            joined.add_guide(guide, {"text_encoder": text.contract, "autoencoder": vae.contract})
        return joined

    def add_guide(self, guide: str | Path | Stage, joined_to: dict[str, dict[str, Any]]) -> None:
        """Take an earlier, or smaller, noise predictor of the same two other stages to guide away from (autoguidance).

        `joined_to`: their contracts. Raises ValueError if it was trained against others, or predicts something else.
        """
        stage = guide if isinstance(guide, Stage) else load_stage(guide, "noise_predictor")
        check_belonging(stage.contract, **joined_to)
        if Process.of(stage.contract) != self.process:
            raise UserError(
                f"guide {stage.folder}: predicts {Process.of(stage.contract).kind}, but the noise predictor "
                f"{self.process.kind}; give a snapshot of the same training"
            )
        self.register_modules(guide=stage.parts["noise_predictor"])

    @property
    def process(self) -> Process:
        """What the noise predictor was trained to predict."""
        return Process.of(self.config)

    def use_sampler(self, name: str) -> None:
        """Step by another sampler: euler, heun, dpm++, unipc, and on a discrete schedule ddim, ddpm too.

        Raises ValueError for one that does not fit what the network predicts.
        """
        self.register_modules(scheduler=samplers.build(name, self.process))

    def accelerate(self) -> None:
        """Make the noise predictor and the guide faster on a CPU, by C kernels for PRX, compiled here (seconds).
        Where one stays as it is, a remark says why."""
        for name in ("noise_predictor", "guide"):
            if (network := getattr(self, name)) is not None and (reason := accelerate(network)) is not None:
                remark(f"{name}: not accelerated, {reason}")

    def load_lora(self, folder: str | Path) -> None:
        """Merge the LoRA in `folder` (peft's or diffusers' files) into the noise predictor. Raises ValueError if it
        does not fit."""
        network = unwrapped(self.noise_predictor)
        lora.load(network, folder, self.process.model_dump())
        lora.merge(network)
        stages = dict(self.config.stages)
        merged = {"into": stages.get("noise_predictor"), "adapters": file_hash(lora.weights_file(folder))}
        self.register_to_config(stages={**stages, "noise_predictor": combined_hash(merged)})  # no stage's own any more

    @classmethod
    def from_run(cls, run: str | Path, **kwargs: Any) -> Pipeline:
        """Join the three exported stages of a run folder, `RUN/STAGE/final`."""
        return cls.from_stages(*(Path(run) / kind / "final" for kind in _STAGE_ORDER), **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Pipeline:
        """diffusers': another pipeline of the same parts. By itself it would leave out a network whose class is not the
        very one of the annotation."""
        networks = {name: getattr(pipeline, name, None) for name in ("noise_predictor", "guide")}
        return super().from_pipe(pipeline, **networks | kwargs)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> Pipeline:
        """Load what `save_pretrained` wrote. Weights come from safetensors only.

        Raises ValueError, one line, where a file is not the one that was saved (its manifest says so; an older folder
        has none), and for a tensor that a component's weights lack.
        """
        folder = Path(folder)
        if not (folder / PIPELINE_MARK).is_file():
            raise UserError(f"{folder}: no pipeline here ({PIPELINE_MARK} is missing); join one: sd-mini export RUN")
        # the index holds settings (steps, guidance, ...), which a user may edit
        manifest = {name: digest for name, digest in written(folder).items() if digest and name != PIPELINE_MARK}
        mend = f"the pipeline cannot be loaded: save it again, or delete {MANIFEST} if you changed it yourself"
        check_files(folder, manifest, mend)
        kwargs.setdefault("use_safetensors", True)
        kwargs.setdefault("variant", pipeline_variant(folder))
        return super().from_pretrained(folder, **kwargs | load_components(folder, kwargs))

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """diffusers', and a manifest of the files that were written, by which `from_pretrained` checks them."""
        folder = Path(save_directory)
        before, listed = _states(folder), written(folder)
        super().save_pretrained(save_directory, *args, **kwargs)
        after = _states(folder)
        files = {}
        for name in sorted(after):
            if after[name] != before.get(name):
                usual_modes(folder / name)
                files[name] = file_hash(folder / name)
            elif listed.get(name):  # as of another variant
                files[name] = listed[name]
        atomic_text(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")

    def save(self, folder: str | Path) -> None:
        """`save_pretrained`, but all or nothing: a folder that is there is only replaced by a complete one.

        Files in it that are not a pipeline's stay (a user's notes). Raises ValueError, one line, if it cannot be
        written.
        """
        with written_to(Path(folder)), atomic_folder(Path(folder), keep=True) as partial:
            self.save_pretrained(partial)

    def enable_vae_tiling(self, tile: int = 64) -> None:
        """Decode pictures larger than `tile` x `tile` latent cells in overlapping squares: memory goes by the square.

        See `tiles.in_tiles` for what that changes. Raises ValueError for a tile of less than 8.
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
            negative_prompt_embeds, negative_prompt_mask: the same, instead of a negative prompt.
            autoguidance: lead away from what `guide`, an earlier snapshot, makes of the same prompt.
            strict: refuse a prompt that is too long, instead of cutting it with a warning.
            callback_on_step_end: called after each step with the pipeline, the step, its timestep and the tensors asked
                for; what it returns replaces them, and a `_guidance_scale` or `_interrupt` that it sets on the pipeline
                holds from the next step on.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, C, h, w).

        Returns:
            an object with `.images`, or the tuple `(images,)` with `return_dict=False`.

        Raises:
            ValueError: one line that says what was given, what was expected and how to mend it.
        """
        height = self.config.resolution if height is None else number(height)
        width = self.config.resolution if width is None else number(width)
        steps = self.config.default_steps if num_inference_steps is None else number(num_inference_steps)
        scale = self.config.default_guidance if guidance_scale is None else guidance_scale
        guided = self.config.default_interval if guidance_interval is None else guidance_interval
        guidance = Guidance(scale, guidance_rescale, *interval(guided))
        num_images_per_prompt, generator = number(num_images_per_prompt), as_generators(generator)
        latents, prompt_embeds, prompt_mask = tensor(latents), tensor(prompt_embeds), tensor(prompt_mask)
        negative_prompt_embeds, negative_prompt_mask = tensor(negative_prompt_embeds), tensor(negative_prompt_mask)
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
            negative_prompt_embeds,
            negative_prompt_mask,
        )
        negative_prompt = given_negative(negative_prompt)
        if autoguidance and (negative_prompt is not None or negative_prompt_embeds is not None):
            raise UserError("autoguidance leads away from the guide, not from a negative prompt; leave one of them out")
        if autoguidance and self.guide is None:
            raise UserError(
                "autoguidance: this pipeline has no guide; join one: Pipeline.from_run(RUN, guide=FOLDER), or "
                "sd-mini export RUN --guide FOLDER"
            )
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        for name in callback_on_step_end_tensor_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)

        condition = self.encode_prompt(prompt, num_images_per_prompt, prompt_embeds, prompt_mask, strict)
        batch = len(condition[0])
        noise = self.prepare_latents(batch, height, width, generator, latents)
        guide = self.guide if autoguidance else None
        parts = (self.noise_predictor, self.scheduler, self.process, guidance, steps, self._execution_device, guide)
        denoising, null = Denoising(*parts), None
        negative_embeds = (negative_prompt_embeds, negative_prompt_mask)
        self._interrupt, self._guidance_scale = False, guidance.scale
        self._num_timesteps, latents = len(denoising.timesteps), denoising.start(noise)
        with self.progress_bar(total=len(denoising.timesteps)) as progress:
            for i, t in enumerate(denoising.timesteps):
                if self._interrupt:
                    continue
                if null is None and denoising.needs_null:  # at the first step, or once a callback has set a scale
                    null = self._encode_negative(
                        negative_prompt, batch, num_images_per_prompt, strict, *negative_embeds
                    )
                latents = denoising.step(i, latents, condition, null, generator)
                if callback_on_step_end is not None:
                    known = dict(zip(self._callback_tensor_inputs, (latents, *condition), strict=True))
                    wanted = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    scale = self._guidance_scale
                    latents, *changed = (known | (callback_on_step_end(self, i, t, wanted) or {})).values()
                    condition = tuple(changed)
                    if self._guidance_scale != scale:
                        denoising.set_scale(self._guidance_scale)
                progress.update()
        pictures = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        pixels = self.autoencoder.decode(latents.to(self.autoencoder.dtype), self.tile).float().clamp(-1, 1)
        if output_type == "pil":
            return images.to_pil(images.to_uint8(pixels))
        unit = (pixels + 1) / 2
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


_STAGE_ORDER = ("text_encoder", "autoencoder", "noise_predictor")


def _states(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells whether a file was written anew, by relative path."""
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
