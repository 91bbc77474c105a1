"""Every kind of autoencoder through all three stages to a picture, and what may change under a noise predictor."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL

from sd_mini import stages
from sd_mini.autoencoder.model import KINDS
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.stages.start import load_autoencoder
from tests.autoencoder.test_autoencoder import KL
from tests.support.faults import KillAt
from tests.support.launching import SMOKE, assert_equal_runs, launch, launch_apart

DECODER = ["--config", str(SMOKE / "decoder.yaml")]


def with_text(smoke_run, run):
    shutil.copytree(smoke_run / "text_encoder", run / "text_encoder")
    return run


def last_metrics(run):
    lines = (run / "autoencoder" / "metrics.jsonl").read_text().splitlines()
    found = {}
    for line in lines:
        found |= json.loads(line)
    return found


@pytest.mark.parametrize("kind", [*KINDS, "super_resolution"])  # the last of kind small_picture too
def test_each_kind_goes_through_all_stages_to_a_picture(kind, smoke_run, tmp_path):
    run = with_text(smoke_run, tmp_path / "run")
    assert launch("autoencoder", run, "--config", str(SMOKE / f"autoencoder_{kind}.yaml")) == 0
    stage = stages.load_stage(run / "autoencoder" / "final", "autoencoder")
    assert stage.parts["autoencoder"].config.kind == (kind if kind in KINDS else "small_picture")
    assert stage.parts["autoencoder"].draws_pixels == (kind not in KINDS)
    assert launch("noise_predictor", run) == 0
    pipeline = Pipeline.from_run(run)
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("a red circle", num_inference_steps=2).images
    assert picture.size == (32, 32)
    latents = pipeline("a red circle", num_inference_steps=2, output_type="latent").images
    assert tuple(latents.shape[1:]) == tuple(stage.contract["latent_shape"])


def test_a_discriminator_begins_late_and_is_logged(smoke_run, tmp_path):
    run = tmp_path / "run"
    assert launch("autoencoder", run, "--config", str(SMOKE / "autoencoder_tiny.yaml"), "--train.log_every", "2") == 0
    logged = [json.loads(line) for line in (run / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in logged if "loss" in line}
    assert "discriminator.loss" not in logged[2] and "adversarial" not in logged[2]
    names = {"adversarial", "adaptive_weight", "discriminator.real_logits", "discriminator.fake_logits"}
    assert names <= logged[4].keys() and logged[4]["adaptive_weight"] > 0
    # of the two updates of that line only the second had a discriminator; its hinge loss begins at about 1
    assert 0.5 < logged[4]["discriminator.loss"] < 2


@pytest.mark.slow
def test_a_run_with_a_discriminator_goes_on_bit_for_bit(tmp_path):
    """Killed before the discriminator begins, at update 3, and after: the straight run's files, log lines included."""
    options = ["--config", str(SMOKE / "autoencoder_tiny.yaml"), "--train.checkpoint_every", "1"]
    assert launch_apart("autoencoder", tmp_path / "straight", *options)[0] == [0]
    run = tmp_path / "run"
    for kill in (KillAt(2), KillAt(5)):
        assert launch_apart("autoencoder", run, *options, fault=kill)[0] == [-9]
    codes, said = launch_apart("autoencoder", run, *options)
    assert codes == [0] and "resumed at step 5" in said
    assert_equal_runs(run / "autoencoder", tmp_path / "straight" / "autoencoder")


def test_a_codebook_is_logged(smoke_run, tmp_path):
    run = tmp_path / "run"
    assert launch("autoencoder", run, "--config", str(SMOKE / "autoencoder_vq.yaml")) == 0
    found = last_metrics(run)
    assert 0 < found["codes_used"] <= 1 and 0 < found["code_perplexity"] <= found["codes_used"]


def test_a_decoder_trained_alone_keeps_latents_caches_and_noise_predictor(smoke_run, tmp_path, capsys):
    """The encoder and the statistics are the same bits, stage 3 finds its cache, and its pipeline joins."""
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run)
    before = stages.load_stage(run / "autoencoder" / "final", "autoencoder")
    again = tmp_path / "again"
    start = ["--model.start", str(run / "autoencoder" / "final")]
    assert launch("autoencoder", again, *DECODER, *start) == 0
    after = stages.load_stage(again / "autoencoder" / "final", "autoencoder")
    old, new = before.parts["autoencoder"], after.parts["autoencoder"]
    changed = {n for n, p in new.state_dict().items() if not torch.equal(p, old.state_dict()[n])}
    assert changed and all(name.startswith("network.decoder") for name in changed)
    assert torch.equal(old.mean, new.mean) and torch.equal(old.std, new.std)
    # into the very same memory, as oneDNN picks its kernels by where the weights lie
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = old.encode(pixels)
        old.load_state_dict(new.state_dict())
        assert torch.equal(old.encode(pixels), latents)

    assert after.hash != before.hash
    assert stages.latents_of(after.contract) == stages.encoder_of(after.contract) == before.hash
    shutil.rmtree(run / "autoencoder")
    shutil.copytree(again / "autoencoder", run / "autoencoder")
    Pipeline.from_run(run)
    shutil.rmtree(run / "noise_predictor")
    cached = {p: p.stat().st_mtime_ns for p in (run / "cache").rglob("*")}
    assert launch("noise_predictor", run) == 0
    assert {p: p.stat().st_mtime_ns for p in (run / "cache").rglob("*")} == cached


def test_another_encoder_is_refused_by_the_noise_predictor(smoke_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run)
    shutil.rmtree(run / "autoencoder")
    assert launch("autoencoder", run, "--train.seed", "1") == 0
    with pytest.raises(ValueError, match="was trained against autoencoder"):
        Pipeline.from_run(run)


def test_latents_can_be_learned_from_a_teacher(smoke_run, tmp_path):
    """Its own statistics are 0 and 1, as it has learned standardised latents, and it decodes for the teacher's."""
    run = tmp_path / "run"
    teacher = smoke_run / "autoencoder" / "final"
    config = ["--config", str(SMOKE / "autoencoder_tiny.yaml"), "--loss.adversarial.weight", "0"]
    assert launch("autoencoder", run, *config, "--model.teacher", str(teacher)) == 0
    stage = stages.load_stage(run / "autoencoder" / "final", "autoencoder")
    assert stage.contract["latents_std"] == [1.0] * 4 and last_metrics(run)["distillation"] > 0
    text, predictor = smoke_run / "text_encoder" / "final", smoke_run / "noise_predictor" / "final"
    Pipeline.from_stages(text, stage, predictor)
    assert 0.1 < stage.contract["latents_error"] < 3  # after six updates, of latents of std 1
    # its encoder only comes near the teacher's: latents in a cache are made anew, as are those of its own decoders
    assert stages.encoder_of(stage.contract) == stage.hash
    again = tmp_path / "again"
    assert launch("autoencoder", again, *DECODER, "--model.start", str(run / "autoencoder" / "final")) == 0
    contract = stages.read_contract(again / "autoencoder" / "final")
    teachers = stages.read_contract(teacher)["hash"]
    assert (stages.latents_of(contract), stages.encoder_of(contract)) == (teachers, stage.hash)


def test_a_stock_folder_can_be_the_start(tmp_path):
    torch.manual_seed(0)
    stock = AutoencoderKL(**KL, scaling_factor=0.5)
    stock.save_pretrained(tmp_path / "vae")
    loaded, contract = load_autoencoder(tmp_path / "vae")
    assert contract is None and loaded.config.kind == "kl" and loaded.config.latents_std is None
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = stock.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(loaded.raw_latents(pixels)[0], expected, rtol=0, atol=1e-5)
    run = tmp_path / "run"
    assert launch("autoencoder", run, *DECODER, "--model.start", str(tmp_path / "vae")) == 0
    contract = stages.read_contract(run / "autoencoder" / "final")
    assert "latents_of" not in contract and contract["latents_std"] != [1.0] * 4  # measured on these pictures
    trained, _ = load_autoencoder(run / "autoencoder" / "final")
    assert torch.equal(trained.network.encoder.conv_in.weight, stock.encoder.conv_in.weight)
    assert not torch.equal(trained.network.decoder.conv_in.weight, stock.decoder.conv_in.weight)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([*DECODER, "--model.start", "nowhere"], "nowhere: no such folder"),
        (["--model.train", "decoder"], "give its folder as start"),
        (["--model.start", "x", "--model.kind", "kl"], "start brings its own network"),
        (["--model.teacher", "HERE/text_encoder/final"], "expected a autoencoder stage"),
        (["--config", "SMOKE/autoencoder_vq.yaml", "--loss.commitment", "0"], "loss.commitment: kind vq needs it"),
        (
            ["--config", "SMOKE/autoencoder_small_picture.yaml", "--model.patch_size", "2"],
            "small_picture keeps a picture",
        ),
        (
            ["--config", "SMOKE/autoencoder_super_resolution.yaml", "--loss.equivariance", "0.5"],
            "loss.equivariance: the decoder draws its pictures by diffusion",
        ),
        (
            ["--config", "SMOKE/autoencoder_super_resolution.yaml", "--loss.latent_noise", "0.05"],
            "model.network.augmentation 0.1: expected at most loss.latent_noise, which is 0.05",
        ),
        (["--config", "SMOKE/autoencoder_tiny.yaml", "--train.accumulation", "2"], "expected accumulation 1"),
        (["--config", "SMOKE/autoencoder_tiny.yaml", "--model.network.num_decoder_blocks", "[1]"], "cannot be built"),
        (["--loss", "{l1: 0, l2: {weight: 1, start: 2}}"], "expected a term of the picture"),
        (["--loss.lpips", "1", "--loss.lpips_weights", "nowhere.pth"], "lpips weights nowhere.pth: no such file"),
        (["--loss.lpisp", "1"], "did you mean 'lpips'"),
        (["--loss.ssim", "{weight: 1, start: 6}"], "loss.ssim starts at update 6 of 6, so never"),
        (["--loss.adversarial", "1", "--adversary.layers", "5"], "adversary.layers are too many for 32 px"),
        (["--loss.adversarial", "1", "--adversary.width", "9"], "multiple of 4"),
        (["--model.teacher", "HERE/autoencoder/final", "--loss.distillation", "0"], "expected it from update 0"),
        (
            ["--model.teacher", "HERE/autoencoder/final", "--model.patch_size", "4"],
            "a stride of 4 px, and here 4 and 8",
        ),
        (
            ["--config", "SMOKE/autoencoder_small_picture.yaml", "--model.teacher", "HERE/autoencoder/final"],
            "the encoder of kind small_picture learns nothing",
        ),
        (
            ["--config", "SMOKE/autoencoder_tiny.yaml", "--train.gradient_checkpointing", "true"],
            "AutoencoderTiny learns something else",
        ),
        (["--data.resolution", "30", "--valid.resolution", "30"], "the nearest are 28 or 32"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(more, says, smoke_run, tmp_path, capsys):
    more = [word.replace("HERE", str(smoke_run)).replace("SMOKE", str(SMOKE)) for word in more]
    assert launch("autoencoder", tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
