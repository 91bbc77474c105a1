"""What stage 3 reads: latents and prompts from the caches, and when they are made anew."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState

from sd_mini.autoencoder.model import Autoencoder
from sd_mini.config import read
from sd_mini.data.batches import Batch
from sd_mini.data.captioned import CaptionedPictures, DataConfig, load
from sd_mini.stages.contract import Stage
from sd_mini.text_encoder.adapter import TextAdapter
from sd_mini.text_encoder.loading import clip_tokenizer, small_clip
from tests.support.launching import SMOKE, prepared
from training.noise_predictor.config import PredictorConfig
from training.noise_predictor.task import Encoded, PredictorTask


def small_stages(pictures: CaptionedPictures) -> tuple[Stage, Stage]:
    """A text encoder and an autoencoder as initialised, in memory."""
    tokenizer = clip_tokenizer([text for several in pictures.captions for text in several], 400, 20)
    text = {
        "tokenizer": tokenizer,
        "text_encoder": small_clip(tokenizer, 16, layers=1, heads=2, max_length=20).eval(),
        "text_adapter": TextAdapter([16], [16], [16], [20], 16, depth=1, heads=2).eval(),
    }
    fields = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4}
    vae = Autoencoder("kl", {"latent_channels": 4, "up_block_types": ("UpDecoderBlock2D",) * 2, **fields}).eval()
    return Stage(Path(), {"hash": "text"}, text), Stage(Path(), {"hash": "vae"}, {"autoencoder": vae})


def caches(folder: Path) -> list[int]:
    return [len(list((folder / name).iterdir())) for name in ("latents", "prompts")]


def test_stage_3_reads_what_the_stages_made(tmp_path):
    pictures = load(DataConfig(count=6, resolution=32))
    text, vae = small_stages(pictures)
    half, full = (Encoded(pictures, text, vae, 1, tmp_path, dtype) for dtype in ("float16", "float32"))
    ids, draw = np.array([5, 0, 3]), [0.0] * 3
    exact, rounded = full.take(ids, draw), half.take(ids, draw)
    latents = vae.parts["autoencoder"].encode(pictures.pixels(range(6)).to(PartialState().device)).detach().cpu()
    assert np.array_equal(exact["latents"], latents[ids])
    for name, rows in (("latents", half.latents), ("prompt_embeds", half.tokens)):
        assert exact[name].dtype == rounded[name].dtype
        assert 0 < (exact[name] - rounded[name]).abs().max() <= rows.rounding.largest
    assert exact["prompt_mask"].equal(rounded["prompt_mask"])
    assert caches(tmp_path) == [2, 2]


def test_captions_are_drawn_by_their_weights(tmp_path):
    """Weights of the second caption alone: what a set of second captions gives, at every draw."""
    pictures = load(DataConfig(count=6, resolution=32))
    stages_ = small_stages(pictures)
    weighted = Encoded(pictures, *stages_, 3, tmp_path / "a", "float32", weights=(0, 1))
    second = replace(pictures, captions=[several[1:2] for several in pictures.captions])
    alone = Encoded(second, *stages_, 1, tmp_path / "b", "float32")
    ids = np.array([5, 0, 3])
    for draw in ([0.0] * 3, [0.5] * 3, [0.999] * 3):
        torch.testing.assert_close(weighted.take(ids, draw), alone.take(ids, draw))


def test_an_edited_picture_or_another_stage_is_another_cache(tmp_path):
    pictures = load(DataConfig(count=6, resolution=32))
    text, vae = small_stages(pictures)
    for _ in range(2):
        Encoded(pictures, text, vae, 1, tmp_path, "float16")
        assert caches(tmp_path) == [1, 1]
    edited = pictures.pictures.copy()
    edited[2, 0, 0, 0] ^= 1
    Encoded(replace(pictures, pictures=edited), text, vae, 1, tmp_path, "float16")
    assert caches(tmp_path) == [2, 1]
    Encoded(pictures, replace(text, contract={"hash": "other"}), vae, 1, tmp_path, "float16")
    assert caches(tmp_path) == [2, 2]
    Encoded(pictures, text, replace(vae, contract={"hash": "other"}), 1, tmp_path, "float16")
    assert caches(tmp_path) == [3, 2]


def test_the_latents_scale_is_verified(tmp_path, capsys):
    """Statistics that are said to be of these pictures and are not are refused; of other pictures, told."""
    pictures = load(DataConfig(count=6, resolution=32))
    text, vae = small_stages(pictures)
    data = {"fingerprint": pictures.fingerprint}
    with pytest.raises(
        ValueError, match=r"latents of shapes:train: std a channel from 0\.\d+ to .* expected 0.97 to 1.03"
    ):
        Encoded(pictures, text, replace(vae, contract={"hash": "vae", "data": data}), 1, tmp_path, "float16")
    Encoded(pictures, text, vae, 1, tmp_path, "float16")
    assert "expected 0.97 to 1.03: the autoencoder was measured on other pictures" in capsys.readouterr().err
    Encoded(pictures, text, vae, 1, tmp_path, "float16", is_held_out=True)
    assert "measured on other pictures" not in capsys.readouterr().err  # as held-out pictures always are
    alone = {"fingerprint": pictures.pictures_fingerprint}  # as an autoencoder has it, which reads no captions
    with pytest.raises(ValueError, match=r"expected 0.97 to 1.03; train the autoencoder again"):
        Encoded(pictures, text, replace(vae, contract={"hash": "vae", "data": alone}), 1, tmp_path, "float16")
    autoencoder = vae.parts["autoencoder"]
    raw = autoencoder.raw_latents(pictures.pixels(range(6)))[0].detach()
    autoencoder.set_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
    Encoded(pictures, text, replace(vae, contract={"hash": "measured", "data": data}), 1, tmp_path, "float16")
    assert "0.97" not in capsys.readouterr().err


def test_another_number_format_is_refused():
    with pytest.raises(ValueError, match=r"cache_dtype: got 'bfloat16'.*'float16' or 'float32'"):
        read(PredictorConfig, None, ["--cache_dtype", "bfloat16"])


def test_what_is_resident_is_the_same(smoke_run, tmp_path):
    """On the CPU as the device: the same rows, captions, noise and null condition as from the caches on disk."""
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    config = str(SMOKE / "noise_predictor.yaml")
    options = ["--captions_per_picture", "3", "--objective.caption_dropout", "0.5"]
    plain, resident = (
        PredictorTask(read(PredictorConfig, config, [*options, "--resident", given]), run)
        for given in ("false", "true")
    )
    assert resident.train.resident is not None and resident.train.resident[0].dtype == torch.float16
    expected, found, batch = (Batch(0, 3, np.array([5, 9, 0, 63, 7, 8]), slice(1, 6)) for _ in range(3))
    expected, found = plain.inputs(expected), resident.inputs(found)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    dropped = batch.uniform("dropout") < 0.5
    assert dropped.any() and not dropped.all()
    is_null = (expected["prompt_embeds"] == plain.null_tokens).flatten(1).all(1)
    assert torch.equal(is_null, dropped)
    with pytest.raises(ValueError, match=r"train\.workers 2: other processes cannot gather"):
        read(PredictorConfig, config, ["--resident", "true", "--train.workers", "2"])
