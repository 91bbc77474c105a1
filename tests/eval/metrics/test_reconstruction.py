"""Reconstruction through the autoencoder alone, against the same by hand."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from skimage.metrics import structural_similarity
from torch_fidelity import feature_extractor_inceptionv3
from torchvision.models import alexnet

from eval.metrics import reconstruction
from eval.metrics.reconstruction import reconstruct, reconstruction_scores, spectrum
from sd_mini import images, shapes
from sd_mini.stages.contract import load_stage
from tests.autoencoder.test_autoencoder import KL


@pytest.fixture(scope="module")
def autoencoder(tiny_run):
    return load_stage(tiny_run / "autoencoder" / "final", "autoencoder").parts["autoencoder"]


@pytest.fixture(scope="module")
def drawn():
    return shapes.draw_batch(shapes.sample_scenes(5, "test", seed=3), 32)


def test_reconstruct_is_encode_and_decode(autoencoder, drawn):
    found = reconstruct(autoencoder, drawn, batch=2)  # the last batch is a part of one
    with torch.no_grad():
        pixels = torch.from_numpy(drawn).float() / 127.5 - 1
        expected = (autoencoder.decode(autoencoder.encode(pixels)).clamp(-1, 1) + 1) * 127.5
    assert found.shape == drawn.shape and found.dtype == np.uint8
    # half a step of 8 bits, and what another batch size changes in the last bits
    assert np.abs(found - expected.numpy()).max() <= 0.5 + 1e-2
    assert np.abs(found.astype(int) - drawn).mean() < 25  # a picture, not noise: the fixture's autoencoder is trained


def test_psnr_of_each_picture_and_of_all():
    black = np.zeros((2, 3, 4, 4), dtype=np.uint8)
    other = black.copy()
    other[0] += 255
    other[1] += 51
    # 10 log10(255^2 / 255^2) = 0 dB, 10 log10(255^2 / 51^2) = 20 log10(5) dB; both errors' mean is 255^2 (1 + 1/25) / 2
    expected = {"psnr": 20 * math.log10(5) / 2, "psnr_global": -10 * math.log10((1 + 1 / 25) / 2), "n": 2}
    found = reconstruction_scores(black, other)
    # of two pictures the interval's ends are the two: one in four draws takes either twice
    assert (found.pop("psnr_low"), found.pop("psnr_high")) == pytest.approx((0, 20 * math.log10(5)))
    assert found == pytest.approx(expected)
    assert "psnr_low" not in reconstruction_scores(black, np.stack([black[0], other[1]]))  # one is infinitely good
    one_off = np.ones_like(black)
    assert reconstruction_scores(black, one_off)["psnr"] == pytest.approx(48.1308, abs=1e-4)


def test_ssim_is_scikit_images():
    """Of 200 pictures: drawings, noise over them, and flat ones, whose variances are all rounding."""
    draw = np.random.default_rng(0)
    pictures = shapes.draw_batch(shapes.sample_scenes(200, "test", seed=3), 48)
    strength = draw.uniform(0, 60, (200, 1, 1, 1))
    changed = np.clip(pictures + strength * draw.normal(size=pictures.shape), 0, 255).astype(np.uint8)
    pictures[:5], changed[:5] = 200, 190
    settings = {"channel_axis": 0, "data_range": 255, "gaussian_weights": True, "sigma": 1.5}
    expected = [
        structural_similarity(a, b, use_sample_covariance=False, **settings)
        for a, b in zip(pictures.astype(np.float64), changed.astype(np.float64), strict=True)
    ]
    found = images.ssim(*(torch.from_numpy(p).double() for p in (pictures, changed)), 255.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    # two flat pictures: (2 a b + C1) / (a^2 + b^2 + C1)
    assert found[0].item() == pytest.approx(0.998686, abs=1e-6)
    assert reconstruction_scores(pictures, changed)["ssim"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert reconstruction_scores(pictures, pictures)["ssim"] == pytest.approx(1)


def test_a_spectrum_tells_the_frequency_and_keeps_the_power():
    across = np.cos(2 * np.pi * 3 * np.arange(16) / 16)
    found = spectrum(np.broadcast_to(across, (2, 1, 16, 16)))
    assert np.argmax(found) == 3 and found[0] == pytest.approx(0, abs=1e-12)
    noise = np.random.default_rng(0).normal(size=(200, 2, 16, 16))
    np.testing.assert_allclose(spectrum(noise), 1, atol=0.2)


def run(stage, out, *more):
    return reconstruction.main([str(stage), "--data", "shapes", "--out", str(out), "--count", "6", *more])


def test_the_report_of_an_autoencoder_alone(tiny_run, tmp_path, capsys):
    assert run(tiny_run / "autoencoder" / "final", tmp_path / "out") == 0
    scores = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert scores["n"] == 6 and scores["psnr_global"] <= scores["psnr"] and 0 < scores["ssim"] < 1
    assert len(scores["latents"]["std"]) == 8 and scores["protocol"]["kind"] == "dc"
    assert len(scores["spectrum"]["pictures"]) == 17
    assert "lpips" not in scores and "rfid" not in scores
    assert scores["ceiling"]["test"]["all"]["n"] == 6
    for name in ("first.png", "worst.png", "spectra.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    assert "dB a picture" in capsys.readouterr().out


def test_lpips_and_rfid_where_their_weights_are(tiny_run, tmp_path, monkeypatch):
    """From files with the weights of untrained networks, of the kinds that torchvision and torch-fidelity offer."""
    torch.manual_seed(0)
    alex = alexnet(weights=None).state_dict()
    torch.save({n: v for n, v in alex.items() if n.startswith("features")}, tmp_path / "alex.pth")
    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})

    class Untrained(feature_extractor_inceptionv3.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    network = Untrained("inception", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    weights = ["--lpips", str(tmp_path / "alex.pth"), "--inception", str(tmp_path / "inception.pth")]
    assert run(tiny_run / "autoencoder" / "final", tmp_path / "out", "--resolution", "64", *weights) == 0
    scores = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert 0 < scores["lpips"] < 1

    pictures = shapes.draw_batch(shapes.sample_scenes(6, "test", 1000), 64)
    made = reconstruct(load_stage(tiny_run / "autoencoder" / "final").parts["autoencoder"], pictures, 64)
    with torch.no_grad():
        a, b = (network(torch.from_numpy(part))[0].double().numpy() for part in (pictures, made))
    # of fewer pictures than features the covariances' roots lie in their small span: tr (Ca Cb)^1/2 by singular values
    x, y = ((part - part.mean(0)) / math.sqrt(len(part) - 1) for part in (a, b))
    between = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.square(x).sum() + np.square(y).sum() - 2 * between
    assert scores["rfid"] == pytest.approx(expected, rel=1e-3)


def test_a_stock_autoencoder_is_measured_too(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(**KL).save_pretrained(tmp_path / "vae")
    assert run(tmp_path / "vae", tmp_path / "out", "--resolution", "32") == 0
    assert json.loads((tmp_path / "out" / "reconstruction.json").read_text())["protocol"]["autoencoder"] is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--resolution", "33"], "nearest are 32 or 34"),
        (["--inception", "nowhere.pth"], "inception weights nowhere.pth: no such file"),
        (["--lpips", "nowhere.pth"], "lpips weights nowhere.pth: no such file"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_run, tmp_path, capsys, more, says):
    assert run(tiny_run / "autoencoder" / "final", tmp_path / "out", *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert says in error and not (tmp_path / "out").exists()
