"""Samplers against closed forms: where the steps are, and what comes out when the network is right."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    SASolverScheduler,
    TCDScheduler,
)
from torch import nn

from sd_mini import diffusion, noise_predictor
from sd_mini.diffusion.objective import Process, TimeConfig
from sd_mini.sampling import loop, samplers
from sd_mini.sampling.loop import Guidance, SamplingRun

PROCESSES = [Process(kind=kind) for kind in ("flow", "flow_x")]
PROCESSES += [
    Process(kind=kind, schedule=schedule, zero_snr=zero)
    for kind, schedule, zero in itertools.product(
        ("epsilon", "v_prediction", "sample"), ("linear", "scaled_linear", "cosine"), (False, True)
    )
    if not (kind == "epsilon" and zero)
]
SPREAD = 0.5  # the standard deviation of the Gaussian data


def says(process):
    return f"{process.kind}-{process.schedule}-{process.zero_snr}"


class Exact(nn.Module):
    """The optimal answer for latents N(0, s^2): of x_t = a x_0 + b eps, E[x_0 | x_t] = a s^2 / (a^2 s^2 + b^2) x_t."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x, t):
        if self.process.is_flow:
            share = t / 1000
            a, b = 1 - share, share
        else:
            alphas = diffusion.alphas_cumprod(self.process.schedule, self.process.zero_snr).double()[t.long()]
            a, b = alphas.sqrt(), (1 - alphas).sqrt()
        a, b = (v.view(-1, 1, 1, 1).double() for v in (a, b))
        x = x.double()
        gain = 1 / (a**2 * SPREAD**2 + b**2)
        clean, noise = a * SPREAD**2 * gain * x, b * gain * x
        said = {"flow": noise - clean, "flow_x": clean, "epsilon": noise, "sample": clean}
        return said.get(self.process.kind, a * noise - b * clean).float()


def sampled(process, scheduler, steps, monkeypatch, count=4096):
    monkeypatch.setattr(noise_predictor, "predict", lambda network, x, t, *text: network(x, t))
    denoising = SamplingRun(Exact(process), scheduler, process, Guidance(1.0), steps)
    latents = denoising.start(torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(1)
    for number in range(len(denoising.timesteps)):
        latents = denoising.step(number, latents, (), None, generator)
    return latents


@pytest.mark.parametrize("process", PROCESSES, ids=says)
def test_every_sampler_reaches_the_data_s_covariance(process, monkeypatch):
    """A right network on Gaussian data: 125 steps end at the data's spread, its values independent."""
    for name in samplers.NAMES:
        try:
            scheduler = samplers.build(name, process)
        except ValueError as error:
            assert (name in ("ddim", "ddpm") and process.is_flow) or (name == "heun" and process.zero_snr), error
            continue
        values = sampled(process, scheduler, 125, monkeypatch).flatten(1).double()
        covariance = torch.cov(values.T)
        # steps of finite size end a little short of the spread, ancestral ones most
        error = 0.08 if name == "ddpm" else 0.03
        assert covariance.diagonal().sqrt().mean().item() == pytest.approx(SPREAD, rel=error)
        assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 0.02


@pytest.mark.parametrize("process", [p for p in PROCESSES if p.schedule != "linear" and not p.zero_snr], ids=says)
def test_every_sampler_reaches_the_data_s_spread_from_the_middle(process, monkeypatch):
    """Data that are noised to the level of a step in the middle come back to their spread, their values independent."""
    monkeypatch.setattr(noise_predictor, "predict", lambda network, x, t, *text: network(x, t))
    data, noise = torch.randn(2, 4096, 1, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    for name in samplers.FLOW if process.is_flow else samplers.DISCRETE:
        for strength in (0.3, 0.7):
            edit = loop.Edit(SPREAD * data, strength)
            denoising = SamplingRun(
                Exact(process), samplers.build(name, process), process, Guidance(1.0), 125, edit=edit
            )
            count = 125 * strength
            assert len(denoising.timesteps) == pytest.approx(2 * count - 1 if name == "heun" else count, abs=1)
            latents, generator = denoising.start(noise), torch.Generator().manual_seed(1)
            for i in range(len(denoising.timesteps)):
                latents = denoising.step(i, latents, (), None, generator)
            covariance = torch.cov(latents.flatten(1).double().T)
            error = 0.08 if name == "ddpm" else 0.03
            assert covariance.diagonal().sqrt().mean().item() == pytest.approx(SPREAD, rel=error), (name, strength)
            assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 0.02


def test_more_steps_and_a_higher_order_come_closer(monkeypatch):
    process = Process()
    wrong = {
        (name, steps): abs(sampled(process, samplers.build(name, process), steps, monkeypatch).std().item() - SPREAD)
        for name in ("euler", "dpm++", "unipc", "heun")
        for steps in (6, 24)
    }
    assert all(wrong[name, 24] < wrong[name, 6] for name in ("euler", "dpm++", "unipc", "heun"))
    assert all(wrong[name, 6] < wrong["euler", 6] / 2 for name in ("dpm++", "unipc", "heun"))


@pytest.mark.parametrize("name", list(samplers.FLOW))
def test_the_steps_on_the_linear_path_are_even(name):
    """No step is spent between sigma 0.001 and 0, as two of the schedulers would by themselves."""
    scheduler = samplers.build(name, Process())
    timesteps = loop.set_timesteps(scheduler, 4)
    np.testing.assert_allclose(scheduler.sigmas.unique().flip(0).numpy(), [1, 0.75, 0.5, 0.25, 0], atol=1e-3)
    np.testing.assert_allclose(timesteps.unique().flip(0).numpy(), [1000, 750, 500, 250], atol=1.01)


@pytest.mark.parametrize("name", list(samplers.DISCRETE))
def test_the_steps_on_a_schedule_begin_where_training_ends(name):
    process = Process(kind="v_prediction", schedule="scaled_linear")
    timesteps = loop.set_timesteps(samplers.build(name, process), 4)
    assert timesteps.unique().flip(0).tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("steps", [4, 8, 20, 50])
@pytest.mark.parametrize("name", list(samplers.DISCRETE))
def test_the_noise_on_the_cosine_schedule_begins_a_step_before_the_last(name, steps):
    timesteps = loop.set_timesteps(samplers.build(name, Process(kind="epsilon", schedule="cosine")), steps)
    # by how whole steps are counted, it may be as much lower again
    assert 999 - 2 * 1000 / steps - 25 <= timesteps[0] < 999 and timesteps[-1] <= 1 + 1000 / steps


@pytest.mark.parametrize(
    ("name", "schedule", "steps"),
    [
        ("ddim", "cosine", 400),
        ("ddim", "cosine", 600),
        ("ddim", "cosine", 1000),
        ("dpm++", "cosine", 500),
        ("unipc", "cosine", 1000),
        ("ddim", "linear", 1001),
    ],
)
def test_steps_that_would_not_begin_at_the_noise_are_refused(name, schedule, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps {steps}: "):
        loop.set_timesteps(samplers.build(name, Process(kind="epsilon", schedule=schedule)), steps)


def test_the_dummy_loops_of_diffusers():
    """Its own tests' network, t / (t + 1) of the sample, on its own deterministic sample, ends at its own numbers."""

    def sample():
        size = 4 * 3 * 8 * 8
        return (torch.arange(size).reshape(3, 8, 8, 4) / size).permute(3, 0, 1, 2)

    for prediction, cls, expected in (
        ("epsilon", DDIMScheduler, 172.0067),
        ("v_prediction", DDIMScheduler, 52.5302),
        ("epsilon", DDPMScheduler, 258.9606),
        ("v_prediction", DDPMScheduler, 202.0296),
    ):
        common = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
        scheduler, latents = cls(**common, prediction_type=prediction, clip_sample=True), sample()
        generator = torch.manual_seed(0)
        if cls is DDIMScheduler:
            scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            answer = latents * t / (t + 1)
            latents = loop.scheduler_step(scheduler, answer, t, latents, generator)
        assert latents.abs().sum().item() == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "epsilon"}, "epsilon: expected a schedule, one of linear, scaled_linear, cosine"),
        ({"kind": "flow", "schedule": "cosine"}, "flow: has no schedule and no zero_snr"),
        ({"kind": "flow_x", "zero_snr": True}, "flow_x: has no schedule and no zero_snr"),
        (
            {"kind": "epsilon", "schedule": "cosine", "zero_snr": True},
            "epsilon: with zero_snr the last step is the noise",
        ),
        ({"kind": "sample", "schedule": "cosine", "weighting": "cosmap"}, "cosmap: is the linear path's, not sample's"),
        ({"kind": "v_prediction", "schedule": "linear", "shift": 3.0}, "shift 3: is the linear path's"),
    ],
)
def test_what_cannot_be_learnt_is_refused_by_name(given, says):
    with pytest.raises(ValueError, match=says):
        TimeConfig(**given)


@pytest.mark.parametrize(
    ("scheduler", "process", "says"),
    [
        (DDIMScheduler(), Process(), "steps by epsilon on a discrete schedule, but this network predicts flow"),
        (
            FlowMatchEulerDiscreteScheduler(),
            Process(kind="epsilon", schedule="linear"),
            "steps by flow_prediction on the linear path's sigmas, but this network predicts epsilon on the linear",
        ),
        (DPMSolverMultistepScheduler(), Process(kind="v_prediction", schedule="linear"), "predicts v_prediction"),
        (
            DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
            Process(kind="epsilon", schedule="scaled_linear"),
            "betas are not those of the scaled_linear schedule",
        ),
        (
            DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
            Process(kind="epsilon", schedule="scaled_linear"),
            "clip_sample holds latents within",
        ),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=100), Process(), "num_train_timesteps 100; expected 1000"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_refused(scheduler, process, says):
    with pytest.raises(ValueError, match=says):
        samplers.check(scheduler, process)


def test_a_sampler_that_is_none_is_refused():
    with pytest.raises(ValueError, match="sampler 'eular': expected one of euler, heun, dpm"):
        samplers.build("eular", Process())
    with pytest.raises(ValueError, match="sampler heun: cannot begin at zero signal"):
        samplers.build("heun", Process(kind="sample", schedule="cosine", zero_snr=True))


def test_the_noise_that_ddpm_draws_is_the_generator_s(monkeypatch):
    process = Process(kind="epsilon", schedule="cosine")
    first, again = (sampled(process, samplers.build("ddpm", process), 5, monkeypatch, count=8) for _ in range(2))
    assert torch.equal(first, again) and math.isfinite(first.sum().item())


def test_a_recorded_objective_that_is_damaged_is_one_line():
    assert Process.of({"objective": {"kind": "flow", "caption_dropout": 0.1}}) == Process()
    with pytest.raises(ValueError, match=r"^recorded objective: [^\n]*$"):
        Process.of({"objective": {"kind": "flaw"}})


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
EPSILON = Process(kind="epsilon", schedule="scaled_linear")
NOISY = [
    (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), Process()),
    (FlowMatchLCMScheduler(), Process()),
    (FlowMatchHeunDiscreteScheduler(), Process()),
    (
        DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
        Process(),
    ),
    (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **SD), EPSILON),
    (
        DPMSolverSinglestepScheduler(
            algorithm_type="sde-dpmsolver++", lower_order_final=True, final_sigmas_type="zero", **SD
        ),
        EPSILON,
    ),
    (EulerAncestralDiscreteScheduler(**SD), EPSILON),
    (KDPM2AncestralDiscreteScheduler(**SD), EPSILON),
    (LCMScheduler(**SD), EPSILON),
    (TCDScheduler(**SD), EPSILON),
    (SASolverScheduler(**SD), EPSILON),
    (DDPMScheduler(clip_sample=False, **SD), EPSILON),
]


def walked(process, scheduler, seeds, monkeypatch, shared=False):
    """Latents of `seeds`, from noise that is each one's, and with one generator a picture, or one for all."""
    monkeypatch.setattr(noise_predictor, "predict", lambda network, x, t, *text: network(x, t))
    denoising = SamplingRun(Exact(process), scheduler, process, Guidance(1.0), 4)
    noise = [torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(100 + seed)) for seed in seeds]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = denoising.start(torch.stack(noise))
    for number in range(len(denoising.timesteps)):
        latents = denoising.step(number, latents, (), None, generators[0] if shared else generators)
    return latents


@pytest.mark.parametrize(("scheduler", "process"), NOISY, ids=lambda x: type(x).__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_picture_s_own_generator_reaches_every_sampler(scheduler, process, monkeypatch):
    together = walked(process, scheduler, (1, 2, 3), monkeypatch)
    torch.manual_seed(3)  # which has no say
    assert torch.equal(walked(process, scheduler, (1, 2, 3), monkeypatch), together)
    torch.testing.assert_close(walked(process, scheduler, (2,), monkeypatch)[0], together[1], rtol=0, atol=1e-5)
    assert torch.equal(*(walked(process, scheduler, (1, 2), monkeypatch, shared=True) for _ in range(2)))


def test_the_noise_of_a_step_is_the_generators_as_diffusers_draws_it():
    scheduler = EulerAncestralDiscreteScheduler(**SD)
    latents, answer = torch.randn(2, 2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    latents, answer = latents[:, :, 0], answer[:, :, 0]
    for generators in (
        lambda: torch.Generator().manual_seed(1),
        lambda: [torch.Generator().manual_seed(s) for s in (1, 2)],
    ):
        made = []
        for stepped in (
            lambda t, g: scheduler.step(answer, t, latents, generator=g, return_dict=False)[0],
            lambda t, g: loop.scheduler_step(scheduler, answer, t, latents, g),
        ):
            scheduler.set_timesteps(4)
            made.append(stepped(scheduler.timesteps[0], generators()))
        assert torch.equal(*made)


class OwnSeed(EulerDiscreteScheduler):
    """As DPMSolverSDEScheduler, whose Brownian tree has a seed of its own."""

    def __init__(self):
        super().__init__(**SD)
        self.register_to_config(noise_sampler_seed=None)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (OwnSeed(), "scheduler OwnSeed: draws its noise from a seed of its own, not from a picture's generator"),
        (EDMEulerScheduler(), "scheduler EDMEulerScheduler: has no discrete schedule"),
    ],
)
def test_a_sampler_that_takes_no_generator_or_schedule_is_refused_by_name(scheduler, says):
    with pytest.raises(ValueError, match=says):
        samplers.check(scheduler, EPSILON)


@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize("process", [Process(), Process(kind="v_prediction", schedule="scaled_linear")], ids=says)
def test_every_tenth_is_an_end_of_a_guidance_interval(steps, process):
    """A step that begins at an end of the interval is guided, whatever the sampler."""
    names = samplers.FLOW if process.is_flow else [name for name in samplers.DISCRETE if name != "heun"]
    for name, low, high in itertools.product(names, range(11), range(11)):
        if low > high or name == "heun":  # whose second evaluations lie between
            continue
        guidance = Guidance(2.0, 0.0, low / 10, high / 10)
        denoising = SamplingRun(nn.Identity(), samplers.build(name, process), process, guidance, steps)
        expected = [low * steps <= 10 * (steps - i) <= high * steps for i in range(steps)]
        assert denoising.is_guided == expected, (name, low, high)
