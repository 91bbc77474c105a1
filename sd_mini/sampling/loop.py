"""One sampling run, from noise or a noised picture to clean latents: guidance, timesteps, the update at each."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sd_mini import noise_predictor
from sd_mini.diffusion.flow_map import predict_average
from sd_mini.diffusion.objective import STEPS, Process
from sd_mini.errors import UserError
from sd_mini.sampling.few_steps import FewSteps

Condition = tuple[Tensor, Tensor]  # prompt_embeds (B, L, D), prompt_mask (B, L)
Generators = torch.Generator | list[torch.Generator] | None

_SLACK = 1e-6  # at an interval's ends: a scheduler's levels are float32, in which 0.7 is 0.69999999


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: how a prediction with the prompt and one without it become one.

    scale: 1 is no guidance, more leans towards the prompt. rescale: 0 to 1, how far the result is brought back to the
    standard deviation of the conditional prediction. low, high: noise levels in [0, 1] (0 is the picture) between which
    guidance is active; outside them the unconditional prediction is not made, which halves the cost of a step.

    Raises UserError for values outside these ranges.
    """

    scale: float
    rescale: float = 0.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        for name in ("scale", "rescale", "low", "high"):
            object.__setattr__(self, name, number(getattr(self, name)))
        if not _is_number(self.scale) or self.scale < 0:
            raise UserError(f"guidance_scale {self.scale!r}: expected a finite number of at least 0 (1 is no guidance)")
        if not _is_number(self.rescale) or not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale {self.rescale!r}: expected a number from 0 (off) to 1")
        if not _is_number(self.low) or not _is_number(self.high) or not 0 <= self.low <= self.high <= 1:
            raise UserError(
                f"guidance_interval ({self.low!r}, {self.high!r}): expected two noise levels from 0 to 1, the lower "
                "first"
            )

    def is_active(self, level: float, tolerance: float = 0.0) -> bool:
        """Whether a step that starts at noise level `level`, known to within `tolerance`, is guided: Kynkaanniemi et
        al. 2024, eq. 3, both ends included."""
        slack = tolerance + _SLACK
        return self.scale != 1 and self.low - slack <= level <= self.high + slack

    def combine(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Two predictions (B, C, h, w) => one."""
        return rescaled(guided(conditional, unconditional, self.scale), conditional, self.rescale)


# Ho & Salimans 2022, eq. 6, in the form in which scale 1 is no guidance
def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    return unconditional + scale * (conditional - unconditional)


# Lin et al. 2024 ("Common Diffusion Noise Schedules ..."), eq. 15 and 16; diffusers' rescale_noise_cfg
def rescaled(prediction: Tensor, conditional: Tensor, weight: float) -> Tensor:
    """`weight` of the way to the standard deviation that each picture's conditional prediction has."""
    if weight == 0:
        return prediction
    axes = tuple(range(1, prediction.ndim))
    factor = conditional.std(axes, keepdim=True) / prediction.std(axes, keepdim=True)
    return prediction * (weight * factor + 1 - weight)


@dataclasses.dataclass(frozen=True)
class Edit:
    """A picture that a run begins with instead of pure noise.

    latents: (B, C, h, w), of the picture. strength: in (0, 1], the part of the schedule that is run (`first_step`).
    mask: (B, 1, h, w), 1 where the picture is repainted and 0 where it is kept; without one all of it changes.
    """

    latents: Tensor
    strength: float
    mask: Tensor | None = None


def first_step(process: Process, steps: int, strength: float) -> int:
    """The step with which an edit begins: of N steps the last N * strength are run, as diffusers counts them.

    On a discrete schedule their number is rounded down (StableDiffusionImg2ImgPipeline), on the linear path up
    (StableDiffusion3Img2ImgPipeline, FluxImg2ImgPipeline).
    """
    count = min(steps * strength, steps)
    return int(steps - count) if process.is_flow else steps - int(count)


class SamplingRun:
    """One sampling run: its timesteps and the update at each.

    `guide`: an earlier snapshot of `network`, whose prediction with the prompt replaces the unconditional one
    (autoguidance, Karras et al. 2024 "Guiding a Diffusion Model with a Bad Version of Itself", eq. 3). `scheduler` is
    one that `samplers.check` has accepted; it is copied, as it keeps its place and its last predictions. `edit`: the
    picture that is begun with; `timesteps` are then the last ones of the schedule alone. `few_steps`: of a network that
    was made for a few evaluations without guidance.
    """

    def __init__(
        self,
        network: ModelMixin,
        scheduler: SchedulerMixin,
        process: Process,
        guidance: Guidance,
        steps: int,
        device: torch.device | str | None = None,
        guide: ModelMixin | None = None,
        edit: Edit | None = None,
        few_steps: FewSteps | None = None,
    ):
        self.few_steps = few_steps
        self.network, self.guide, self.guidance = network, guide, guidance
        self.process, self.edit = process, edit
        self.scheduler: Any = copy.deepcopy(scheduler)
        self.timesteps = set_timesteps(self.scheduler, steps, device)
        if edit is not None:
            # a second-order scheduler lists two timesteps a step, and all but DDIM and DDPM count their steps
            begin = first_step(process, steps, edit.strength) * self.scheduler.order
            self.timesteps = self.timesteps[begin:]
            if hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(begin)
        self._levels = (self.timesteps / STEPS).clamp(0, 1).tolist()  # noise levels in [0, 1]
        # whole steps of a schedule are a thousandth apart: which of two stands for 0.7 depends on the spacing
        self._tolerance = 0.0 if _is_flow_match(scheduler) else 1 / STEPS

    @property
    def is_guided(self) -> list[bool]:
        """Which steps are guided."""
        return [self.guidance.is_active(level, self._tolerance) for level in self._levels]

    @property
    def needs_null(self) -> bool:
        """Whether any step needs a prediction without the prompt."""
        return self.guide is None and any(self.is_guided)

    def set_scale(self, scale: float) -> None:
        """Guide by another scale from the next step on. Raises UserError for one that is none, or that a few-step
        network refuses."""
        if self.few_steps is not None:
            self.few_steps.check_guidance(scale)
        self.guidance = dataclasses.replace(self.guidance, scale=scale)

    def start(self, noise: Tensor) -> Tensor:
        """Noise N(0, I) => the latents that the scheduler begins with."""
        self._noise = noise
        # inpainting at strength 1 begins with pure noise on every schedule: StableDiffusionInpaintPipeline
        if self.edit is not None and (self.edit.mask is None or self.edit.strength < 1):
            return self._noised(self.edit.latents, 0)
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def step(
        self, i: int, latents: Tensor, prompt: Condition, null: Condition | None, generator: Generators = None
    ) -> Tensor:
        """Latents (B, C, h, w) before step `i` => after it."""
        t = self.timesteps[i]
        # Karras-style schedulers scale their latents to unit variance for the network
        scale = getattr(self.scheduler, "scale_model_input", None)
        inputs = latents if scale is None else scale(latents, t)

        # one prediction, or two and guidance between them
        if not self.guidance.is_active(self._levels[i], self._tolerance):
            prediction = self._predict(self.network, i, inputs, prompt)
        elif self.guide is not None:
            prediction, weak = (self._predict(one, i, inputs, prompt) for one in (self.network, self.guide))
            prediction = self.guidance.combine(prediction, weak)
        else:
            assert null is not None
            both = torch.cat([null[0], prompt[0]]), torch.cat([null[1], prompt[1]])
            unconditional, conditional = self._predict(self.network, i, torch.cat([inputs] * 2), both).chunk(2)
            prediction = self.guidance.combine(conditional, unconditional)

        latents = scheduler_step(self.scheduler, prediction, t, latents, generator)
        if self.edit is None or (mask := self.edit.mask) is None:
            return latents
        # where the mask is 0: the picture at the next noise level, of the run's own noise
        return (1 - mask) * self._noised(self.edit.latents, i + 1) + mask * latents

    def _noised(self, latents: Tensor, i: int) -> Tensor:
        """Clean latents (B, C, h, w) => at the noise level with which step `i` begins; after the last they are clean.

        `i` is the step that the scheduler takes next: most of them go by their own count, not by the timestep.
        """
        if i == len(self.timesteps):
            return latents
        t = self.timesteps[i : i + 1]
        if hasattr(self.scheduler, "scale_noise"):  # the flow-matching schedulers'
            return self.scheduler.scale_noise(latents, t, self._noise)
        return self.scheduler.add_noise(latents, self._noise, t)

    def _predict(self, network: ModelMixin, i: int, latents: Tensor, condition: Condition) -> Tensor:
        """What the scheduler steps by at step `i`, (B, C, h, w), in the latents' dtype."""
        # in float32 whatever the network's dtype: bfloat16 does not tell 999 from 1000
        timesteps = self.timesteps[i].float().expand(len(latents))
        if self.few_steps is not None and self.few_steps.end_blocks:  # the average velocity down to the next timestep
            ends = [*self.timesteps[1:], torch.zeros_like(self.timesteps[0])][i].float().expand(len(latents))
            average = predict_average(network, latents, timesteps, ends, *condition, self.few_steps.end_blocks)
            return average.to(latents.dtype)
        prediction = noise_predictor.predict(network, latents, timesteps, *condition)
        if self.process.kind == "flow_x":  # clean latents => velocity, down to the very last step
            prediction = self.process.answer(prediction, latents, timesteps / STEPS, floor=1e-4)
        return prediction.to(latents.dtype)


def scheduler_step(
    scheduler: Any, prediction: Tensor, t: Tensor, latents: Tensor, generator: Generators = None
) -> Tensor:
    """The scheduler's update of latents (B, C, h, w). A sampler that draws noise draws it from `generator`: in order
    from one, or each picture's from its own."""
    with OwnDraws(generator) if generator is not None else nullcontext():
        return scheduler.step(prediction, t, latents, return_dict=False)[0]


def set_timesteps(scheduler: Any, steps: int, device: torch.device | str | None = None) -> Tensor:
    """Space `steps` steps evenly down to the picture, and return the timesteps (N,) at which the network is called.

    The two flow-matching schedulers would by themselves spend the last step between sigma 0.001 and 0.
    Raises UserError where a discrete schedule would begin elsewhere than at the noise.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
        return scheduler.timesteps
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        scheduler.sigma_min = 1 / steps
    is_discrete = hasattr(scheduler, "alphas_cumprod")
    if is_discrete and steps > STEPS:
        raise UserError(f"num_inference_steps {steps}: the discrete schedule has {STEPS}; use 50, for example")
    scheduler.set_timesteps(steps, device=device)
    # spacing by whole steps, counted from the picture, may end far below the noise, or beyond the last step
    first = float(scheduler.timesteps[0])
    starts_at_noise = STEPS - 2 * STEPS / steps - STEPS / 8 <= first < STEPS
    if is_discrete and not scheduler.config.get("use_flow_sigmas") and not starts_at_noise:
        raise UserError(
            f"num_inference_steps {steps}: {type(scheduler).__name__} begins at {first:.0f}, and the schedule is noise "
            "at 999; use another number, such as 50"
        )
    return scheduler.timesteps


def _is_flow_match(scheduler: SchedulerMixin) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch")


class OwnDraws(TorchFunctionMode):
    """In this thread, torch.randn and torch.randn_like draw from `generator`, wherever it lies: some schedulers take no
    generator, or one alone, or ignore the one that they take. With a list, row i of a draw is its i-th generator's."""

    def __init__(self, generator: torch.Generator | list[torch.Generator]):
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (torch.randn, torch.randn_like) or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        like = args[0] if func is torch.randn_like else None
        sizes = args[0] if len(args) == 1 else args
        shape = tuple(like.shape if like is not None else kwargs.get("size", sizes))
        device = kwargs.get("device") or (None if like is None else like.device)
        dtype = kwargs.get("dtype") or (None if like is None else like.dtype)
        return draws(shape, self.generator, dtype).to(device)


def draws(
    shape: tuple[int, ...], generator: Generators | Sequence[torch.Generator | None], dtype: torch.dtype | None = None
) -> Tensor:
    """N(0, I) on the CPU from one generator, or with a list row i from the i-th; each draws on its own device."""
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).cpu()
    return torch.stack([draws(shape[1:], one, dtype) for one in generator])


def one_each(generator: Generators, batch: int) -> list[torch.Generator | None]:
    """One generator for all pictures, or a list of them => a picture's own, `batch` of them."""
    if not isinstance(generator, list):
        return [generator] * batch
    if len(generator) != batch:
        raise UserError(f"{len(generator)} generators for {batch} pictures; give one, or one each")
    return list(generator)


def as_generators(generator: Any) -> Generators:
    """One generator, or a list of them (any sequence), or none. Raises UserError for anything else."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, Sequence) or not all(isinstance(one, torch.Generator) for one in generator):
        raise UserError(
            f"generator is {generator!r:.80}; expected a torch.Generator, or a list of them, one a picture: "
            "torch.Generator().manual_seed(0)"
        )
    return list(generator)


def number(value: Any) -> Any:
    """A numpy number as Python's own; anything else as it is."""
    is_numpy = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if is_numpy else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
