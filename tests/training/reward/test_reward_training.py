"""The stage as a program: what it exports, rounds that a resume draws again, two processes, what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sd_mini import lora, stages
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.faults import KillAt
from tests.support.launching import assert_equal_runs, error_line, launch, launch_apart, lines, prepared, trace, weights

TRACED = ["--train.trace", "true"]


@pytest.fixture(scope="module")
def straight(smoke_run, tmp_path_factory):
    """Three rounds of two updates, in one go."""
    run = prepared("reward", smoke_run, tmp_path_factory.mktemp("straight") / "run")
    codes, said = launch_apart("reward", run, *TRACED)
    assert codes == [0], said
    return run


def test_what_is_exported_joins_and_says_what_it_was_tuned_by(straight):
    start, tuned = (
        stages.read_contract(straight / s / "final", "noise_predictor") for s in ("noise_predictor", "reward")
    )
    assert tuned["tuned_from"] == start["hash"] != tuned["hash"]
    assert tuned["reward"] == {"method": "nft", "rewards": {"matcher": 1.0, "novelty": 0.5}}
    assert tuned["objective"] == start["objective"]
    assert tuned["sampling"] == {**start["sampling"], "default_guidance": 1.5}
    assert tuned["parameters"] == start["parameters"]
    pipeline = Pipeline.from_run(straight, "reward")
    assert pipeline.config.stages["noise_predictor"] == tuned["hash"]
    before, after = (Pipeline.from_run(straight, name) for name in ("noise_predictor", "reward"))
    noise = torch.randn(1, *before.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    latents = [p("a red circle", latents=noise, output_type="latent").images for p in (before, after)]
    assert not torch.equal(*latents)


def test_rewards_and_guards_are_logged_apart(straight):
    logged = {name for line in lines(straight / "reward") for name in line}
    assert {"reward/matcher", "reward/novelty", "anchor", "real"} <= logged
    assert {"eval/score", "eval/matcher", "eval/second", "eval/vendi", "eval/fd", "eval/kept"} <= logged


def test_weights_that_lost_their_diversity_are_not_kept(straight, smoke_run, tmp_path):
    """The smoke run's pictures mean nothing: no count prompt has two right ones, so layouts are none."""
    values = [line["eval/kept"] for line in lines(straight / "reward") if "eval/kept" in line]
    assert values and max(values) < -1e5
    run = prepared("reward", smoke_run, tmp_path / "run")
    assert launch("reward", run, "--guards.diversity", "0", "--steps", "4") == 0
    (look,) = (line for line in lines(run / "reward") if "eval/kept" in line)
    assert look["eval/kept"] == look["eval/score"]


def test_the_old_policy_is_the_trained_one_of_the_round_before(smoke_run, tmp_path):
    """Of rejection, which does not average: two updates a round, so at step 4 the pictures are of step 2's weights."""
    run = prepared("reward", smoke_run, tmp_path / "run")
    options = ["--method", "rejection", "--steps", "4", "--train.checkpoint_every", "2"]
    assert launch("reward", run, *options) == 0
    at = {step: load_file(run / "reward" / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step in (2, 4)}
    names = [name.removeprefix("network.") for name in at[2] if name.startswith("network.")]
    assert all(torch.equal(at[4][f"old.{name}"], at[2][f"network.{name}"]) for name in names)
    assert any(not torch.equal(at[4][f"old.{name}"], at[2][f"old.{name}"]) for name in names)


@pytest.mark.parametrize("kill", [KillAt(3), KillAt(4), KillAt(5)], ids=["in a round", "at its end", "in the next"])
def test_a_killed_round_is_drawn_again_the_same(straight, smoke_run, tmp_path, kill):
    run = prepared("reward", smoke_run, tmp_path / "run")
    codes, said = launch_apart("reward", run, *TRACED, fault=kill)
    assert codes == [-9], said
    codes, said = launch_apart("reward", run, *TRACED)
    assert codes == [0], said
    assert_equal_runs(run / "reward", straight / "reward")
    assert trace(run / "reward") == trace(straight / "reward")


def test_two_processes_draw_the_rounds_of_one(straight, smoke_run, tmp_path):
    run = prepared("reward", smoke_run, tmp_path / "run")
    codes, said = launch_apart("reward", run, *TRACED, ranks=2)
    assert codes == [0, 0], said
    rows, of_one = trace(run / "reward"), trace(straight / "reward")
    # of the first round all is alike; later policies differ by how sums are rounded
    first = {key for key in of_one if key[0] < 2}
    assert {key: rows[key] for key in first} == {key: of_one[key] for key in first} and rows.keys() == of_one.keys()
    two, one = weights(run / "reward"), weights(straight / "reward")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-3)


def test_rejection_learns_from_what_scores_and_reward_s_adapters_are_saved_alone(smoke_run, tmp_path):
    run = prepared("reward", smoke_run, tmp_path / "run")
    shutil.copytree(smoke_run / "cache", run / "cache")
    options = ["--method", "rejection", "--anchor", "0", "--real", "0", "--lora.rank", "2", "--steps", "2"]
    assert launch("reward", run, *options) == 0
    final = run / "reward" / "final"
    assert (final / "noise_predictor" / "lora").is_dir()
    start, tuned = (
        stages.load_stage(run / name / "final", "noise_predictor").parts["noise_predictor"].state_dict()
        for name in ("noise_predictor", "reward")
    )
    changed = {name for name in start if not torch.equal(start[name], tuned[name])}
    assert start.keys() == tuned.keys() and changed and all(".attention." in name for name in changed)
    # the adapters are of that very network
    network = stages.load_stage(run / "noise_predictor" / "final", "noise_predictor").parts["noise_predictor"]
    lora.load(network, final / "noise_predictor" / "lora")
    for name, value in lora.merged(network).state_dict().items():
        torch.testing.assert_close(value, tuned[name])


def test_a_discrete_objective_is_trained_alike(smoke_run, tmp_path):
    run = tmp_path / "run"
    for name in ("autoencoder", "text_encoder"):
        shutil.copytree(smoke_run / name, run / name)
    assert launch("noise_predictor", run, "--objective.kind", "v_prediction", "--objective.schedule", "cosine") == 0
    assert launch("reward", run, "--steps", "2") == 0
    tuned = json.loads((run / "reward" / "final" / "stage.json").read_text())
    assert tuned["objective"]["kind"] == "v_prediction"


@pytest.fixture
def ready(smoke_run, tmp_path):
    return prepared("reward", smoke_run, tmp_path / "run")


def test_a_constant_reward_stops_with_the_numbers(ready, tmp_path, monkeypatch, capsys):
    (tmp_path / "constant.py").write_text("import numpy as np\ndef half(p, q): return np.full(len(q), 0.5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert launch("reward", ready, "--rewards", "{module:constant:half: 2}") == 2
    assert "of 4 prompts score alike (module:constant:half 0.5), so there is nothing to learn" in error_line(
        capsys.readouterr().err
    )
    assert not (ready / "reward" / "final").exists()


def test_a_run_without_stage_3_is_refused(ready, capsys):
    shutil.rmtree(ready / "noise_predictor")
    assert launch("reward", ready) == 2
    assert "noise_predictor" in error_line(capsys.readouterr().err)


def test_the_judge_without_scenes_is_refused(ready, tmp_path, capsys):
    from sd_mini import images, shapes

    (folder := tmp_path / "data").mkdir()
    scenes = shapes.sample_scenes(24, "train", 0)
    for number, picture in enumerate(images.to_pil(shapes.draw_batch(scenes, 32))):
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(shapes.caption(scenes[number], 0))
    data = ["--data.source", str(folder), "--valid.source", str(folder), "--valid.split", "train", "--valid.count", "9"]
    assert (
        launch("reward", ready, *data, "--data.count", "12", "--rewards", "{judge: 1}", "--guards.judge", "null") == 2
    )
    assert "reward judge: reads scene graphs, which shapes alone have" in error_line(capsys.readouterr().err)
    # what needs none is trained on pictures of one's own
    assert launch("reward", ready, *data, "--data.count", "12", "--guards.judge", "null", "--steps", "2") == 0
    assert any("eval/vendi" in line and "eval/layouts" not in line for line in lines(ready / "reward"))
