"""Samplers by name, each a diffusers scheduler that fits what the network predicts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from sd_mini import diffusion
from sd_mini.diffusion.objective import STEPS, Process
from sd_mini.errors import UserError

FLOW: dict[str, Any] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
DISCRETE: dict[str, Any] = {
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
    way. Raises UserError for an unknown name, and for one that cannot follow the process.
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
    assert process.schedule is not None  # a discrete process has one
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


def name_of(scheduler: SchedulerMixin) -> str | None:
    """A scheduler => the sampler that it is; none for one of another kind."""
    return name_of_class(type(scheduler).__name__)


def name_of_class(name: str) -> str | None:
    """As `name_of`, of the name of a scheduler's class."""
    return next((sampler for sampler, cls in [*FLOW.items(), *DISCRETE.items()] if cls.__name__ == name), None)


def check(scheduler: Any, process: Process) -> None:
    """Raises UserError, one line, for a scheduler that would step by something else than what the network predicts."""
    config, name = scheduler.config, type(scheduler).__name__
    is_flow = name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    steps_by = config.get("prediction_type", "flow_prediction" if is_flow else "epsilon")
    wanted = "flow_prediction" if process.is_flow else process.kind
    mend = "make one that fits: sd_mini.sampling.samplers.build(NAME, process), or Pipeline.use_sampler(NAME)"
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
    assert process.schedule is not None  # a discrete process has one
    expected = diffusion.alphas_cumprod(process.schedule, process.zero_snr)
    # the last value apart: diffusers keeps zero signal a hair above zero where it divides by it
    if not torch.allclose(scheduler.alphas_cumprod.cpu(), expected, rtol=1e-4, atol=1e-6):
        raise UserError(
            f"scheduler {name}: its betas are not those of the {process.schedule} schedule"
            f"{' with zero_snr' if process.zero_snr else ''} that this network was trained on; {mend}"
        )
