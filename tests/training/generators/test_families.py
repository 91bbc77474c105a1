"""Each family as it is launched: killed and resumed, on two processes, its contract, its pipeline."""

import pytest
import torch

from sd_mini import stages
from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.faults import KillAt
from tests.support.launching import FAMILIES, assert_equal_runs, launch, launch_apart, lines, prepared, weights

QUIET = ["--log_with", "none", "--train.preview_every", "100", "--train.log_every", "1", "--steps", "8"]


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, smoke_run, tmp_path_factory):
    """(family, a run in which it was trained in one go). Copy before writing."""
    family = request.param
    run = prepared(family, smoke_run, tmp_path_factory.mktemp(family) / "run")
    assert launch(family, run, *QUIET) == 0
    return family, run


def test_killed_and_resumed_equals_straight_through(trained, smoke_run, tmp_path):
    family, straight = trained
    run = prepared(family, smoke_run, tmp_path / "run")
    assert launch_apart(family, run, *QUIET, fault=KillAt(5))[0] == [-9]
    codes, said = launch_apart(family, run, *QUIET)
    assert codes == [0] and "resumed at step 3" in said, said
    assert_equal_runs(run / family, straight / family)
    hashes = [stages.read_contract(one / family / "final")["hash"] for one in (run, straight)]
    assert hashes[0] == hashes[1]


def test_two_processes_are_one_at_the_same_global_batch(trained, smoke_run, tmp_path):
    family, one = trained
    two = prepared(family, smoke_run, tmp_path / "run")
    codes, said = launch_apart(family, two, *QUIET, ranks=2)
    assert codes == [0, 0], said
    for left, right in zip(lines(one / family), lines(two / family), strict=True):
        assert left == pytest.approx(right, abs=2e-5, rel=2e-4)
    found, expected = weights(two / family), weights(one / family)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_steps_and_the_stages_of_another_family_are_refused(trained, smoke_run):
    family, run = trained
    pipeline = Pipeline.from_run(run, family)
    with pytest.raises(UserError, match=f"num_inference_steps 8: a {family} generator takes no such thing"):
        pipeline("a red circle", num_inference_steps=8)
    for drawer, other in ((run / family, smoke_run), (smoke_run / "noise_predictor", run)):
        if family == "autoregressive":  # alone over a vq autoencoder
            text, autoencoder = (other / stage / "final" for stage in ("text_encoder", "autoencoder"))
            with pytest.raises(UserError, match="was trained against autoencoder"):
                Pipeline.from_stages(text, autoencoder, drawer / "final")


def test_the_contract_and_the_pipeline(trained):
    family, run = trained
    contract = stages.read_contract(run / family / "final", "generator")
    assert contract["family"] == family and contract["scores"] and contract["steps"] == 8
    assert contract["trained_against"]["text_encoder"] == stages.read_contract(run / "text_encoder" / "final")["hash"]
    pipeline = Pipeline.from_run(run, family)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(["a red circle"] * 2, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)])
    assert len(made.images) == 2
