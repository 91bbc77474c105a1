"""Every combination of the objective's fields: the valid ones train and sample, the others are refused by name."""

import itertools
import math

import pytest
import torch
from torch import nn

from sd_mini import noise_predictor
from sd_mini.diffusion.objective import Process
from sd_mini.sampling import samplers
from sd_mini.sampling.loop import Guidance, SamplingRun
from tests.support.launching import launch, prepared
from training.noise_predictor.losses import ObjectiveConfig, PredictorObjective, answer_and_target

KINDS = ("flow", "flow_x", "epsilon", "v_prediction", "sample")
SCHEDULES = (None, "linear", "scaled_linear", "cosine")
DENSITIES, WEIGHTINGS = ("uniform", "logit_normal", "mode"), ("none", "min_snr", "cosmap", "log")
NETWORK = {"patch_size": 2, "hidden_size": 16, "num_heads": 1, "depth": 1, "mlp_ratio": 1.0, "axes_dim": [8, 8]}


def refusal(kind, schedule, zero, weighting):
    """What has to be in the message, by the rules of the papers; none where the combination can be learnt."""
    if kind in ("flow", "flow_x") and (schedule or zero):
        return "has no schedule"
    if kind not in ("flow", "flow_x") and schedule is None:
        return "expected a schedule"
    if kind == "epsilon" and zero:
        return "with zero_snr the last step is the noise itself"
    if weighting == "cosmap" and kind not in ("flow", "flow_x"):
        return "is the linear path's"
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_matrix(kind, schedule):
    torch.manual_seed(0)
    network = noise_predictor.build("prx", NETWORK, (2, 4, 4), 8)
    latents, noise = torch.randn(2, 8, 2, 4, 4)
    tokens, mask = torch.randn(8, 3, 8), torch.ones(8, 3, dtype=torch.bool)
    uniform = torch.rand(8)
    for zero, density, weighting in itertools.product((False, True), DENSITIES, WEIGHTINGS):
        given = {"kind": kind, "schedule": schedule, "zero_snr": zero, "density": density, "weighting": weighting}
        if (says := refusal(kind, schedule, zero, weighting)) is not None:
            with pytest.raises(ValueError, match=says):
                ObjectiveConfig(**given)
            continue
        config = ObjectiveConfig(**given)
        objective = PredictorObjective(network, config)
        timesteps = config.draw(uniform)
        losses, _ = objective(latents, noise, timesteps, tokens, mask)
        losses.mean().backward()
        norms = [p.grad.norm().item() for p in network.parameters() if p.grad is not None]
        assert losses.shape == (8,) and math.isfinite(sum(norms)) and sum(norms) > 0, given
        network.zero_grad()
        scheduler = samplers.build(samplers.default(config.process), config.process)
        denoising = SamplingRun(network, scheduler, config.process, Guidance(1.0), 3)
        with torch.no_grad():
            made = denoising.start(noise)
            for number in range(3):
                made = denoising.step(number, made, (tokens, mask), None)
        assert made.isfinite().all(), given


@pytest.mark.parametrize(
    "more",
    [
        ["--objective.kind", "epsilon", "--objective.schedule", "scaled_linear", "--objective.weighting", "min_snr"],
        ["--objective.kind", "sample", "--objective.schedule", "cosine", "--objective.zero_snr", "true"],
        ["--objective.kind", "flow_x", "--objective.density", "mode", "--sampling.sampler", "unipc"],
    ],
)
def test_a_training_by_another_objective_makes_pictures(smoke_run, tmp_path, more):
    from sd_mini.pipelines.text_to_image import Pipeline

    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    assert launch("noise_predictor", run, *more) == 0
    pipeline = Pipeline.from_run(run)
    pipeline.save(tmp_path / "p")
    again = Pipeline.from_pretrained(tmp_path / "p")
    assert again.process.kind == more[1] and type(again.scheduler) is type(pipeline.scheduler)
    latents = again("a red circle", output_type="latent").images
    assert latents.isfinite().all()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--objective.kind", "epsilon"], "expected a schedule"),
        (["--objective.kind", "epsilon", "--objective.schedule", "cosine", "--objective.zero_snr", "true"], "zero_snr"),
        (
            ["--objective.kind", "sample", "--objective.schedule", "linear", "--objective.direction", "1"],
            "of a velocity",
        ),
        (["--sampling.sampler", "ddim"], "sampler ddim: follows a discrete schedule"),
        (["--objective.kind", "flaw"], "objective.kind"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(tmp_path, capsys, more, says):
    assert launch("noise_predictor", tmp_path / "run", *more) == 2  # where there are no stages to load
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said
    assert not (tmp_path / "run").exists()


class Line(nn.Module):
    """A small network of x and t alone, called as `predict` calls them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, t):
        flat = torch.cat([x.flatten(1), t[:, None] / 1000], dim=1)
        return self.layers(flat).view_as(x)


@pytest.mark.parametrize("kind", ["flow", "flow_x", "epsilon", "v_prediction"])
def test_training_approaches_the_optimum_and_samples_the_gaussian(kind, monkeypatch):
    """Two values with a known mean and covariance. The optimal velocity at (x, t) is E[eps - x_0 | x_t], linear in x:
    with A = (1 - t) S, V = (1 - t)^2 S + t^2 I the regression on x_t is (t I - A) V^-1 (x_t - (1 - t) m) - m."""
    monkeypatch.setattr(noise_predictor, "predict", lambda network, x, t, *text: network(x, t))
    torch.manual_seed(0)
    mean, root = torch.tensor([0.5, -0.3]), torch.tensor([[0.8, 0.0], [0.5, 0.4]])
    covariance = root @ root.T
    network, none = Line(), (torch.zeros(0), torch.zeros(0))
    config = ObjectiveConfig(kind=kind, schedule=None if kind.startswith("flow") else "cosine", density="uniform")
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for _ in range(2000):
        latents = (torch.randn(512, 2) @ root.T + mean).view(512, 1, 1, 2)
        timesteps = config.draw(torch.rand(512))
        losses, _ = PredictorObjective(network, config)(latents, torch.randn(512, 1, 1, 2), timesteps, *none)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        schedule.step()
    if kind == "flow":
        t = torch.linspace(0.1, 0.9, 9)
        for level in t.tolist():
            clean, noise = (torch.randn(2000, 2) @ root.T + mean), torch.randn(2000, 2)
            x = (1 - level) * clean + level * noise
            spread = (1 - level) ** 2 * covariance + level**2 * torch.eye(2)
            gain = (level * torch.eye(2) - (1 - level) * covariance) @ torch.linalg.inv(spread)
            optimal = (x - (1 - level) * mean) @ gain.T - mean
            shaped = (clean.view(-1, 1, 1, 2), noise.view(-1, 1, 1, 2), torch.full((2000,), level))
            answer, _ = answer_and_target(network, config, *shaped, *none)
            assert (answer.view(-1, 2) - optimal).square().mean() < 0.02 * optimal.square().mean() + 0.005
    process = Process(kind=kind, schedule=config.schedule)
    denoising = SamplingRun(network, samplers.build("dpm++", process), process, Guidance(1.0), 30)
    made = denoising.start(torch.randn(8192, 1, 1, 2))
    with torch.no_grad():
        for number in range(len(denoising.timesteps)):
            made = denoising.step(number, made, none, None)
    torch.testing.assert_close(torch.cov(made.view(-1, 2).T), covariance, rtol=0, atol=0.07)
    torch.testing.assert_close(made.view(-1, 2).mean(0), mean, rtol=0, atol=0.07)
