"""A whole run, small enough to be made anew for every round of tests."""

import multiprocessing
import os
import shutil
from pathlib import Path

# whoever starts the one fork server of this process first: it has imported what the launches of the stages need
if "forkserver" in multiprocessing.get_all_start_methods():
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.support.launching"])
os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: a test that asks a hub has to fail at once

import pytest
import torch

from sd_mini import images, noise_predictor, shapes, stages
from sd_mini.autoencoder.model import Autoencoder
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.text_encoder.adapter import TextAdapter, TextStage
from sd_mini.text_encoder.loading import clip_tokenizer, small_clip
from sd_mini.text_encoder.matcher import Matcher, projected_dim

SIDE = 32  # px, the least that the judge of the shapes world reads
LENGTH, DIM = 24, 32  # tokens, width of the prompt embeddings
AUTOENCODER_STEPS = 150  # enough for some facts of a scene to outlive the autoencoder, and for some to be lost


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A run folder: the three exported stages, `STAGE/final`, and `pipeline/`. Pictures are 32 px; copy before writing.

    The autoencoder is trained for seconds; text encoder and noise predictor are as initialised.
    """
    run = tmp_path_factory.mktemp("tiny") / "run"
    scenes = shapes.sample_scenes(256, "train", seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = _export_text_encoder(run, [shapes.caption(scene, 0) for scene in scenes])
        vae, latent_shape = _export_autoencoder(run, images.to_pixels(shapes.draw_batch(scenes, SIDE)))
        _export_noise_predictor(run, latent_shape, {"text_encoder": text, "autoencoder": vae})
        Pipeline.from_run(run).save(run / "pipeline")
    return run


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> Path:
    """The three stages trained by the smoke recipes, with checkpoints, logs and caches. Copy before writing."""
    from tests.support.launching import MAINS, launch

    run = tmp_path_factory.mktemp("smoke")
    assert [launch(stage, run) for stage in MAINS] == [0, 0, 0]
    return run


@pytest.fixture(scope="module")
def talking_pipeline(tiny_run):
    """The tiny run's pipeline, whose noise predictor says something: PRX starts with a zero last layer's modulation."""
    import torch

    from sd_mini.pipelines.text_to_image import Pipeline

    joined = Pipeline.from_pretrained(tiny_run / "pipeline")
    joined.set_progress_bar_config(disable=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in joined.noise_predictor.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return joined


@pytest.fixture(scope="session")
def shapes_report(tiny_run, tmp_path_factory) -> Path:
    """The report folder of the tiny run on the shapes world; the run's copy, with the model card, lies beside it."""
    from tests.support import reporting

    folder = tmp_path_factory.mktemp("shapes")
    shutil.copytree(tiny_run, folder / "run")
    reporting.make(folder / "run" / "pipeline", folder / "report")
    return folder / "report"


@pytest.fixture
def halfway(smoke_run, tmp_path) -> Path:
    """A noise predictor's folder with one checkpoint, of step 3 of 6, in a run of its own."""
    shutil.copytree(smoke_run, tmp_path / "run")
    folder = tmp_path / "run" / "noise_predictor"
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    return folder


def _record(seconds: float, **scores: float) -> dict:
    data = {"name": "shapes:train", "count": 256, "fingerprint": "0" * 64}
    return {"data": data, "seconds": seconds, "steps": 1, "parameters": 1234, "scores": scores}


def _export_text_encoder(run: Path, captions: list[str]) -> str:
    tokenizer = clip_tokenizer(captions, vocab_size=1024, max_length=LENGTH)
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": small_clip(tokenizer, DIM, layers=1, heads=2, max_length=LENGTH),
        "text_adapter": TextAdapter([DIM], [DIM], [DIM], [LENGTH], DIM, depth=1, heads=2),
    }
    parts["matcher"] = Matcher(DIM, width=16, projected_dim=projected_dim(TextStage.from_parts(parts)))
    contract = {"conditioning": [LENGTH, DIM], "resolution": SIDE, **_record(1.5, binding=0.5)}
    return stages.export(run / "text_encoder" / "final", "text_encoder", parts, contract)


def _export_autoencoder(run: Path, pixels: torch.Tensor) -> tuple[str, tuple[int, int, int]]:
    sides = {f"{half}_block_out_channels": (8, 16) for half in ("encoder", "decoder")}
    depths = {f"{half}_layers_per_block": (0, 1) for half in ("encoder", "decoder")}
    attention = {f"{half}_qkv_multiscales": ((), ()) for half in ("encoder", "decoder")}
    autoencoder = Autoencoder("dc", {"latent_channels": 8, **sides, **depths, **attention})
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=5e-3)
    for _ in range(AUTOENCODER_STEPS):
        batch = pixels[torch.randint(len(pixels), (16,))]
        loss = (autoencoder.decode(autoencoder.encode(batch)) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        raw = autoencoder.raw_latents(pixels)[0]
    autoencoder.set_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
    shape = autoencoder.latent_shape(SIDE, SIDE)
    contract = {"latent_shape": list(shape), "resolution": SIDE, **_record(2.25, psnr=20.0)}
    return stages.export(run / "autoencoder" / "final", "autoencoder", {"autoencoder": autoencoder}, contract), shape


def _export_noise_predictor(run: Path, latent_shape: tuple[int, int, int], against: dict[str, str]) -> None:
    fields = {"patch_size": 2, "hidden_size": 32, "num_heads": 2, "depth": 1, "mlp_ratio": 2.0}
    network = noise_predictor.build("prx", fields, latent_shape, DIM)
    contract = {
        "latent_shape": list(latent_shape),
        "conditioning": [LENGTH, DIM],
        "sampling": {"resolution": SIDE, "default_steps": 2, "default_guidance": 2.0},
        "trained_against": against,
        **_record(3.0, loss=1.0),
    }
    stages.export(run / "noise_predictor" / "final", "noise_predictor", {"noise_predictor": network}, contract)
