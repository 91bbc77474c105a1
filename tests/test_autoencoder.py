import pytest
import torch
from diffusers import AutoencoderKL

from sd_mini.autoencoder import Autoencoder
from training.autoencoder import LossConfig, Objective, kl_term, reconstruction_terms

DC = {
    f"{half}_{field}": value
    for half in ("encoder", "decoder")
    for field, value in {"block_out_channels": [8, 16], "layers_per_block": [1, 1], "qkv_multiscales": [[], []]}.items()
}
KL = {
    "block_out_channels": [8, 16],
    "latent_channels": 4,
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


@pytest.mark.parametrize(
    ("kind", "fields", "patch", "stride"),
    [
        ("dc", {"latent_channels": 4, **DC}, 1, 2),
        ("dc", {"latent_channels": 4, **DC}, 4, 8),
        ("kl", KL, 1, 2),
        ("kl", KL, 2, 4),
    ],
)
def test_every_kind_has_the_same_interface(tmp_path, kind, fields, patch, stride):
    torch.manual_seed(0)
    autoencoder = Autoencoder(kind, fields, patch)
    autoencoder.set_statistics(torch.tensor([1.0, -1.0, 0.5, 0.0]), torch.tensor([2.0, 1.0, 0.5, 3.0]))
    pixels = torch.rand(2, 3, 32, 16) * 2 - 1
    assert autoencoder.stride == stride and autoencoder.latent_shape(32, 16) == (4, 32 // stride, 16 // stride)
    with torch.no_grad():
        latents = autoencoder.encode(pixels)
        assert latents.shape == (2, *autoencoder.latent_shape(32, 16))
        assert autoencoder.decode(latents).shape == pixels.shape
        autoencoder.save_pretrained(tmp_path)
        again = Autoencoder.from_pretrained(tmp_path, use_safetensors=True)
        # not bit for bit: oneDNN picks its kernels by where the weights lie in memory
        torch.testing.assert_close(again.encode(pixels), latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(again.decode(latents), autoencoder.decode(latents), rtol=0, atol=1e-5)


def test_latents_are_the_stock_autoencoders_standardised():
    torch.manual_seed(0)
    autoencoder = Autoencoder("kl", KL)
    stock = AutoencoderKL(**KL)
    stock.load_state_dict(autoencoder.network.state_dict())
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 3.0, 4.0, 5.0])
    autoencoder.set_statistics(mean, std)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = stock.encode(pixels).latent_dist.mode()
        expected = (raw - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(autoencoder.encode(pixels), expected)
        torch.testing.assert_close(autoencoder.decode(expected), stock.decode(raw).sample)


def test_sizes_that_do_not_fit_name_the_nearest():
    autoencoder = Autoencoder("dc", {"latent_channels": 4, **DC}, 4)
    with pytest.raises(ValueError, match=r"height 30: expected a multiple of 8; the nearest are 24 or 32"):
        autoencoder.encode(torch.zeros(1, 3, 30, 32))


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("vae", {}, "kind 'vae' is unknown"),
        ("dc", {"channels": 3}, "'channels' is unknown to AutoencoderDC"),
        ("dc", {"latent_channels": -4}, "cannot be built"),
    ],
)
def test_bad_configs(kind, fields, says):
    with pytest.raises(ValueError, match=says):
        Autoencoder(kind, fields)


def test_a_dead_channel_is_refused():
    with pytest.raises(ValueError, match="dead channel"):
        Autoencoder("kl", KL).set_statistics(torch.zeros(4), torch.tensor([1.0, 0.0, 1.0, 1.0]))


def test_loss_terms_against_closed_forms():
    pixels = torch.zeros(2, 3, 4, 4)
    decoded = pixels + torch.tensor([0.5, -1.0]).view(2, 1, 1, 1)
    terms = reconstruction_terms(decoded, pixels)
    assert terms["l1"].tolist() == [0.5, 1.0] and terms["l2"].tolist() == [0.25, 1.0]
    assert terms["gradient"].tolist() == [0.0, 0.0]
    ramp = pixels + torch.arange(4.0)
    assert reconstruction_terms(ramp, pixels)["gradient"].tolist() == [1.0, 1.0]
    normal = torch.distributions.Normal(torch.full((1, 1, 2, 2), 0.3), torch.full((1, 1, 2, 2), 2.0))
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    assert kl_term(normal.mean, normal.variance.log()).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("term", ["l1", "l2", "gradient", "kl"])
def test_each_weight_turns_its_own_term(term):
    torch.manual_seed(0)
    autoencoder = Autoencoder("kl", KL)
    weights = dict.fromkeys(("l1", "l2", "gradient", "kl"), 0.0) | {term: 2.0}
    objective = Objective(autoencoder, LossConfig(**weights))
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    noise = torch.zeros(3, *autoencoder.latent_shape(16, 16))
    losses, metrics = objective(pixels, noise, noise)
    assert losses.mean().item() == pytest.approx(2 * metrics[term].item(), rel=1e-5)
