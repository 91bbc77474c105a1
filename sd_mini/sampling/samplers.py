"""Samplers by name, each a diffusers scheduler that fits the process; and the spacing of steps that each needs."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sd_mini import diffusion
from sd_mini.diffusion.objective import STEPS, Process
from sd_mini.errors import UserError
from sd_mini.sampling.inputs import Generators, draws

FLOW: dict[str, type[SchedulerMixin]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
DISCRETE: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
NAMES = tuple(dict.fromkeys([*FLOW, *DISCRETE]))
_MULTISTEP = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)


def default(process: Process) -> str:
    """The sampler that a pipeline starts with, by measurement; training/LOG.md has the tables.

    On the linear path all do alike in 8 evaluations, and Euler is the plainest; on the schedules DPM-Solver++ comes
    nearest to a Gaussian's spread in 20.
    """
    return "euler" if process.is_flow else "dpm++"


def build(name: str, process: Process) -> SchedulerMixin:
    """A sampler's name => a scheduler for what the network was trained to predict.

    dpm++ is DPM-Solver++(2M), Lu et al. 2022; unipc Zhao et al. 2023; heun Karras et al. 2022, algorithm 1, two
    evaluations a step; ddim Song et al. 2021 with eta 0; ddpm Ho et al. 2020, algorithm 2, which draws noise on its
    way. Raises ValueError for an unknown name, and for one that cannot follow the process.
    """
    known = FLOW if process.is_flow else DISCRETE
    if name not in NAMES:
        raise UserError(f"sampler {name!r}: expected one of {', '.join(known)}")
    if name not in known:
        raise UserError(
            f"sampler {name}: follows a discrete schedule, this network the linear path; use one of {', '.join(known)}"
        )
    cls = known[name]
    if process.is_flow:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if cls in _MULTISTEP else {}
        return cls(num_train_timesteps=STEPS, **flow)
    given: dict[str, Any] = {
        "num_train_timesteps": STEPS,
        "prediction_type": process.kind,
        **_spacing(process),
        **diffusion.BETAS[process.schedule],
    }
    fields = inspect.signature(cls.__init__).parameters
    if "clip_sample" in fields:
        given["clip_sample"] = False  # latents are not held within [-1, 1]
    if process.zero_snr:
        if "rescale_betas_zero_snr" not in fields:
            raise UserError(
                f"sampler {name}: cannot begin at zero signal, and this network was trained with zero_snr; use ddim, "
                "dpm++, unipc, euler or ddpm"
            )
        given["rescale_betas_zero_snr"] = True
    return cls(**given)


def _spacing(process: Process) -> dict[str, Any]:
    """The network is asked from the very last step on, where training ends: Lin et al. 2024, sec. 3.3.

    But for the noise on the cosine schedule, of which nothing but noise is left there: an error in the answer is one of
    the clean latents times 1 / sqrt(alphas_cumprod), 20,000. It begins a step earlier, as Stable Diffusion does.
    """
    if process.kind == "epsilon" and process.schedule == "cosine":
        return {"timestep_spacing": "leading", "steps_offset": 1}
    return {"timestep_spacing": "trailing"}


def check(scheduler: SchedulerMixin, process: Process) -> None:
    """Raises ValueError, one line, for a scheduler that would step by something else than what the network predicts."""
    config, name = scheduler.config, type(scheduler).__name__
    is_flow = is_flow_match(scheduler) or bool(config.get("use_flow_sigmas"))
    steps_by = config.get("prediction_type", "flow_prediction" if is_flow else "epsilon")
    wanted = "flow_prediction" if process.is_flow else process.kind
    mend = "make one that fits: sd_mini.samplers.build(NAME, process), or Pipeline.use_sampler(NAME)"
    if is_flow != process.is_flow or steps_by != wanted:
        path = "the linear path's sigmas" if is_flow else "a discrete schedule"
        raise UserError(
            f"scheduler {name}: steps by {steps_by} on {path}, but this network predicts {process.kind}"
            f"{'' if process.is_flow else f' on the {process.schedule} schedule'}; {mend}"
        )
    if config.get("clip_sample"):
        raise UserError(f"scheduler {name}: clip_sample holds latents within [-1, 1], which they exceed; {mend}")
    if config.get("num_train_timesteps") != STEPS:
        raise UserError(f"scheduler {name}: num_train_timesteps {config.num_train_timesteps}; expected {STEPS}")
    if "noise_sampler_seed" in config:
        raise UserError(
            f"scheduler {name}: draws its noise from a seed of its own, not from a picture's generator; {mend}"
        )
    if process.is_flow:
        return
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise UserError(f"scheduler {name}: has no discrete schedule, as this network was trained on; {mend}")
    expected = diffusion.alphas_cumprod(process.schedule, process.zero_snr)
    # the last value apart: diffusers keeps zero signal a hair above zero where it divides by it
    if not torch.allclose(scheduler.alphas_cumprod.cpu(), expected, rtol=1e-4, atol=1e-6):
        raise UserError(
            f"scheduler {name}: its betas are not those of the {process.schedule} schedule"
            f"{' with zero_snr' if process.zero_snr else ''} that this network was trained on; {mend}"
        )


def set_timesteps(scheduler: SchedulerMixin, steps: int, device: torch.device | str | None = None) -> Tensor:
    """Space `steps` steps evenly down to the picture, and return the timesteps (N,) that the network is asked at.

    The two flow-matching schedulers would by themselves spend the last step between sigma 0.001 and 0.

    Raises ValueError where a discrete schedule would begin elsewhere than at the noise.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
    else:
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            scheduler.sigma_min = 1 / steps
        if hasattr(scheduler, "alphas_cumprod") and steps > STEPS:
            raise UserError(f"num_inference_steps {steps}: the discrete schedule has {STEPS}; use 50, for example")
        scheduler.set_timesteps(steps, device=device)
    _check_start(scheduler, steps)
    return scheduler.timesteps


def _check_start(scheduler: SchedulerMixin, steps: int) -> None:
    """Spacing by whole steps, counted from the picture, may end far below the noise, or beyond the last step."""
    if scheduler.config.get("use_flow_sigmas") or not hasattr(scheduler, "alphas_cumprod"):
        return
    first = float(scheduler.timesteps[0])
    if not STEPS - 2 * STEPS / steps - STEPS / 8 <= first < STEPS:
        raise UserError(
            f"num_inference_steps {steps}: {type(scheduler).__name__} begins at {first:.0f}, and the schedule is noise "
            "at 999; use another number, such as 50"
        )


def is_flow_match(scheduler: SchedulerMixin) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch")


def level_grain(scheduler: SchedulerMixin) -> float:
    """How finely a scheduler's timesteps tell noise levels: whole steps of a schedule are a thousandth apart, and which
    of two neighbours stands for a level (699 or 700 for 0.7) depends on the spacing."""
    return 0.0 if is_flow_match(scheduler) else 1 / STEPS


def step(
    scheduler: SchedulerMixin, answer: Tensor, timestep: Tensor, latents: Tensor, generator: Generators = None
) -> Tensor:
    """One step of `scheduler`: latents (B, C, h, w) => the next. A sampler that draws noise draws from `generator`: in
    order from one, or each picture's from its own."""
    with OwnDraws(generator) if generator is not None else nullcontext():
        return scheduler.step(answer, timestep, latents, return_dict=False)[0]


class OwnDraws(TorchFunctionMode):
    """Within, in this thread, torch.randn and torch.randn_like draw from `generator`, wherever it lies: some schedulers
    take none, or one alone, or ignore the one that they take. With a list row i of a draw is its i-th generator's."""

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
