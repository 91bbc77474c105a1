"""The stage as it is launched, and the pipelines that are joined from it."""

import json
import shutil

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from sd_mini import stages
from sd_mini.cli import commands as cli
from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.faults import KillAt
from tests.support.launching import assert_equal_runs, error_line, launch, launch_apart, prepared
from training.few_steps.meanflow import OneEvaluation
from training.storage import export

QUIET = ["--log_with", "none", "--train.preview_every", "100"]


@pytest.fixture(scope="module")
def tuned_run(smoke_run, tmp_path_factory):
    """The smoke run with a few-step stage trained from its stage 3. Copy before writing."""
    run = prepared("few_steps", smoke_run, tmp_path_factory.mktemp("tuned") / "run")
    assert launch("few_steps", run, "--log_with", "none") == 0
    return run


@pytest.fixture
def pipeline(tuned_run):
    joined = Pipeline.from_run(tuned_run, "few_steps")
    joined.set_progress_bar_config(disable=True)
    return joined


def test_it_names_what_it_was_tuned_from_and_made_for(tuned_run):
    contract = stages.read_contract(tuned_run / "few_steps" / "final", "noise_predictor")
    start = stages.read_contract(tuned_run / "noise_predictor" / "final", "noise_predictor")
    assert contract["tuned_from"] == start["hash"] and contract["parameters"] == start["parameters"]
    assert contract["few_steps"] == {"method": "meanflow", "steps": [1, 2], "end_blocks": 1}
    assert contract["baked_guidance"] == {"scale": 2.0, "interval": [0.0, 1.0]}
    assert set(contract["scores"]) == {"error_1", "error_2"}
    assert stages.lineage(tuned_run, contract["hash"]) == ["noise_predictor", "few_steps"]
    assert (tuned_run / "few_steps" / "samples" / "step-00000006.png").is_file()


def test_the_pipeline_saves_and_loads_the_same_pictures(pipeline, tmp_path):
    assert pipeline.config.default_steps == 2 and pipeline.config.default_guidance == 1
    pipeline.save(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["few_steps"]["steps"] == [1, 2]
    loaded = Pipeline.from_pretrained(tmp_path / "pipeline")
    for count in (1, 2):
        left, right = (
            one("a red circle", num_inference_steps=count, generator=torch.Generator().manual_seed(0), output_type="pt")
            for one in (pipeline, loaded)
        )
        assert torch.equal(left.images, right.images)


def test_each_step_goes_by_the_average_velocity_to_the_next_time(pipeline):
    """x_r = x_t - (t - r) u(x_t, t, r) by hand, on the grid 1, 1/2, 0."""
    from sd_mini.diffusion.flow_map import predict_average

    prompt = pipeline.encode_prompt("a red circle", 1)
    noise = torch.randn(1, *pipeline.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    x = noise
    with torch.no_grad():
        for t, r in ((1.0, 0.5), (0.5, 0.0)):
            times, ends = torch.tensor([1000 * t]), torch.tensor([1000 * r])
            x = x - (t - r) * predict_average(pipeline.noise_predictor, x, times, ends, *prompt, 1)
    found = pipeline("a red circle", num_inference_steps=2, latents=noise, output_type="latent").images
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps 3.*was made for 1 or 2 evaluations"),
        ({"guidance_scale": 3.0}, "guidance_scale 3: guidance is part of what"),
        ({"negative_prompt": "blue"}, "negative_prompt: guidance is part of what"),
    ],
)
def test_what_it_was_not_made_for_is_refused_in_one_line(pipeline, options, message):
    with pytest.raises(UserError, match=message) as caught:
        pipeline("a red circle", **options)
    assert "\n" not in str(caught.value)


def test_other_samplers_guides_and_scales_of_a_callback_are_refused(pipeline, tuned_run):
    with pytest.raises(UserError, match="carries its own sampler"):
        pipeline.use_sampler("dpm++")
    with pytest.raises(UserError, match="guide: guidance is part"):
        Pipeline.from_run(tuned_run, "few_steps", guide=tuned_run / "noise_predictor" / "final")

    def guide_from_now_on(pipe, i, t, tensors):
        pipe._guidance_scale = 2.0

    with pytest.raises(UserError, match="guidance_scale 2"):
        pipeline("a red circle", callback_on_step_end=guide_from_now_on)
    pipeline.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(UserError, match=r"UniPCMultistepScheduler.*its own sampler"):
        pipeline("a red circle")


def test_the_commands_join_generate_and_inspect(tuned_run, tmp_path, capsys):
    run = shutil.copytree(tuned_run, tmp_path / "run")
    assert cli.main(["export", str(run), "--predictor", "few_steps"]) == 0
    assert cli.main(["generate", str(run), "a red circle", "--out", str(tmp_path / "a.png"), "--steps", "1"]) == 0
    assert cli.main(["generate", str(run), "a red circle", "--out", str(tmp_path / "a.png"), "--guidance", "2"]) == 2
    assert "guidance_scale 2" in error_line(capsys.readouterr().err)
    assert cli.main(["inspect", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "few_steps " in shown and "belong together" in shown
    assert "joined from these stages, the noise predictor of few_steps" in shown
    with pytest.raises(UserError, match="predictor"):
        Pipeline.from_run(run, "few")
    assert cli.main(["export", str(tmp_path / "run"), "--predictor", "reward"]) == 2
    assert "no noise_predictor stage here" in error_line(capsys.readouterr().err)


def test_a_checkpoint_exports_the_stage_again(tuned_run, tmp_path):
    digest = export.export(tuned_run / "few_steps", tmp_path / "again")
    assert digest == stages.read_contract(tuned_run / "few_steps" / "final")["hash"]


@pytest.mark.parametrize("method", [["--meanflow.target", "solver"], ["--method", "reflow"]], ids=["solver", "reflow"])
def test_killed_and_started_again_equals_straight_through(smoke_run, tmp_path, method):
    straight, killed = (prepared("few_steps", smoke_run, tmp_path / name) for name in ("straight", "killed"))
    options = [*QUIET, *method, "--train.checkpoint_every", "2"]
    codes, said = launch_apart("few_steps", straight, *options)
    assert codes == [0], said
    assert launch_apart("few_steps", killed, *options, fault=KillAt(5))[0] == [-9]
    assert launch_apart("few_steps", killed, *options)[0] == [0]
    assert_equal_runs(straight / "few_steps", killed / "few_steps")
    record = stages.read_contract(killed / "few_steps" / "final")["few_steps"]
    assert record["method"] == ("meanflow" if "solver" in method else "reflow")


def test_starts_that_cannot_be_used_are_refused(smoke_run, tuned_run, tmp_path, capsys):
    run = prepared("few_steps", smoke_run, tmp_path / "run")
    again = str(tuned_run / "few_steps" / "final")
    assert launch("few_steps", run, "--noise_predictor", again) == 2
    assert "is made for few steps already" in error_line(capsys.readouterr().err)
    contract = run / "noise_predictor" / "final" / "stage.json"
    fields = json.loads(contract.read_text())
    fields["objective"] |= {"kind": "v_prediction", "schedule": "cosine"}
    contract.write_text(json.dumps(fields))
    assert launch("few_steps", run) == 2
    assert "predicts v_prediction; expected one of objective flow" in error_line(capsys.readouterr().err)
    shutil.rmtree(run / "noise_predictor")
    assert launch("few_steps", run) == 2
    assert "no noise_predictor stage here" in error_line(capsys.readouterr().err)
    assert not (run / "few_steps").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluations", "[1, 1]"], "evaluations [1, 1]: expected different"),
        (["--default_evaluations", "8"], "default_evaluations 8: expected one of evaluations, [1, 2]"),
        (["--guidance.interval", "[0.9, 0.5]"], "expected two noise levels"),
        (["--meanflow.end_blocks", "2"], "expected 1 to 1"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tuned_run, tmp_path, capsys, options, message):
    run = tmp_path / "run"
    folders = [f"--{name}={tuned_run / name / 'final'}" for name in ("text_encoder", "autoencoder", "noise_predictor")]
    assert launch("few_steps", run, *folders, *options) == 2
    assert message in error_line(capsys.readouterr().err)


def test_an_adversary_sees_what_one_evaluation_draws(pipeline):
    prompt, noise = pipeline.encode_prompt("a red circle"), torch.randn(1, 4, 8, 8)
    drawn = pipeline("a red circle", latents=noise, num_inference_steps=1, output_type="latent").images
    with torch.no_grad():
        found = OneEvaluation(pipeline.noise_predictor, pipeline.few_steps.end_blocks)(noise, *prompt)
    torch.testing.assert_close(found, drawn, rtol=1e-4, atol=1e-5)


def test_with_an_adversary_killed_and_resumed_equals_straight_through(smoke_run, tmp_path):
    given = [*QUIET, "--adversary.weight", "0.5", "--adversary.start", "2", "--adversary.mismatched", "0.5"]
    given += ["--adversary.network", "{hidden_size: 32, num_heads: 2, depth: 1}", "--train.log_every", "1"]
    straight, run = (prepared("few_steps", smoke_run, tmp_path / name) for name in ("straight", "run"))
    assert launch("few_steps", straight, *given) == 0
    rows = [json.loads(line) for line in (straight / "few_steps" / "metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row for row in rows if "loss" in row}
    assert "adversarial" not in logged[2] and "adversarial" in logged[3] and logged[3]["discriminator.r1"] >= 0
    assert launch_apart("few_steps", run, *given, fault=KillAt(5))[0] == [-9]
    codes, said = launch_apart("few_steps", run, *given)
    assert codes == [0] and "resumed at step 3" in said, said
    assert_equal_runs(run / "few_steps", straight / "few_steps")
    assert launch("few_steps", tmp_path / "run", *given, "--method", "reflow") == 2
