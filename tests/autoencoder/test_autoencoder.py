import pytest
import torch
from diffusers import AutoencoderKL

from sd_mini.autoencoder.model import Autoencoder
from sd_mini.autoencoder.tiling import reach_of

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
VQ = KL | {"num_vq_embeddings": 8}
TINY = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
    "latent_channels": 4,
}
SMALL_PICTURE = {"factor": 2, "width": 8, "num_blocks": 1}


@pytest.mark.parametrize(
    ("kind", "fields", "patch", "stride"),
    [
        ("dc", {"latent_channels": 4, **DC}, 1, 2),
        ("dc", {"latent_channels": 4, **DC}, 4, 8),
        ("kl", KL, 1, 2),
        ("kl", KL, 2, 4),
        ("vq", VQ, 1, 2),
        ("vq", VQ, 2, 4),
        ("tiny", TINY, 1, 2),
        ("tiny", TINY, 2, 4),
        ("small_picture", SMALL_PICTURE, 1, 2),
    ],
)
def test_every_kind_has_the_same_interface(tmp_path, kind, fields, patch, stride):
    torch.manual_seed(0)
    autoencoder = Autoencoder(kind, fields, patch)
    channels = 3 if kind == "small_picture" else 4
    autoencoder.set_statistics(torch.tensor([1.0, -1.0, 0.5, 0.0])[:channels], torch.rand(channels) + 0.5)
    pixels = torch.rand(2, 3, 32, 16) * 2 - 1
    assert autoencoder.stride == stride and autoencoder.latent_shape(32, 16) == (channels, 32 // stride, 16 // stride)
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
        ("tiny", {"num_encoder_blocks": [1]}, "should have the same length"),
        ("small_picture", {"in_channels": 1}, "expected the same"),
        ("small_picture", {"factor": 0}, "factor 0: expected at least 1"),
    ],
)
def test_bad_configs(kind, fields, says):
    with pytest.raises(ValueError, match=says):
        Autoencoder(kind, fields)


def test_a_dead_channel_is_refused():
    with pytest.raises(ValueError, match="dead channel"):
        Autoencoder("kl", KL).set_statistics(torch.zeros(4), torch.tensor([1.0, 0.0, 1.0, 1.0]))


def test_a_small_picture_is_the_picture_by_area():
    autoencoder = Autoencoder("small_picture", {"factor": 4, "width": 8, "num_blocks": 1})
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = pixels.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5))
    torch.testing.assert_close(autoencoder.raw_latents(pixels)[0], expected)


def test_codes_are_the_nearest_and_decoded_as_the_stock_model_does():
    torch.manual_seed(0)
    autoencoder = Autoencoder("vq", VQ)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw, _ = autoencoder.raw_latents(pixels)
        autoencoder.start_codebook(raw, torch.Generator().manual_seed(0))
        book = autoencoder.network.quantize.embedding.weight
        codes = autoencoder.codes(raw)
        distance = (raw[:, None] - book[None, :, :, None, None]).square().sum(2)  # (B, codes, h, w)
        assert torch.equal(codes.indices, distance.argmin(1))
        torch.testing.assert_close(codes.vectors, book[codes.indices].permute(0, 3, 1, 2))
        torch.testing.assert_close(autoencoder.decode_raw(raw), autoencoder.network(pixels).sample)
        # begun as latents that occur, most of the codes are used at once
        assert len(codes.indices.unique()) >= 6


DEEP = {
    "dc": {"latent_channels": 4, **DC, "decoder_layers_per_block": [2, 3]},
    "tiny": TINY | {"num_encoder_blocks": [1, 3], "num_decoder_blocks": [3, 1]},
    "small_picture": {"factor": 2, "width": 8, "num_blocks": 4},
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("over", [(20, 0), (0, 45), (30, 9)])
def test_tiles_of_convolutions_are_the_whole(kind, over):
    """Of 4 reach + 4 cells, on pictures so many cells larger; and the reach is what a changed cell does change."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(kind, DEEP[kind]).eval()
    reach = reach_of(autoencoder.decode_raw, autoencoder.network.decoder, autoencoder.latent_channels)
    tile = 4 * reach + 4
    latents = torch.randn(1, autoencoder.latent_channels, tile + over[0], tile + over[1])
    changed = latents.clone()
    changed[..., tile // 2, tile // 2] += 1
    with torch.no_grad():
        whole, tiled = autoencoder.decode(latents), autoencoder.decode(latents, tile=tile)
        rows = (autoencoder.decode(changed) - whole).abs().amax((0, 1, 3)).nonzero().flatten()
    assert tiled.shape == whole.shape and (tiled - whole).abs().max() < 1e-5
    touched = rows[[0, -1]] / autoencoder.stride - (tile // 2 + 0.5)
    assert reach / 2 < touched.abs().max() <= reach + 0.5


@pytest.mark.parametrize(("kind", "fields"), [("kl", KL), ("vq", VQ)])
def test_tiles_of_networks_that_see_all_of_a_tile_show_no_seam(kind, fields):
    """Group norm and attention make tiles differ from the whole; from one pixel to the next nothing jumps."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(kind, fields).eval()
    smooth = torch.nn.functional.interpolate(torch.randn(1, 4, 8, 8), size=(50, 50), mode="bicubic")
    with torch.no_grad():
        jumps, of_whole = (
            pixels.diff(dim=-1).abs().mean((0, 1, 2))
            for pixels in (autoencoder.decode(smooth, tile=32), autoencoder.decode(smooth))
        )
    assert jumps.max() < 1.2 * of_whole.max()


def test_memory_goes_by_the_tile():
    autoencoder = Autoencoder("dc", {"latent_channels": 4, **DC}, 4).eval()
    largest = []
    for layer in autoencoder.network.decoder.modules():
        layer.register_forward_hook(lambda *call: largest.append(call[2].numel()))
    sizes = {}
    with torch.no_grad():
        for side in (40, 64):
            largest.clear()
            autoencoder.decode(torch.randn(1, 4, side, side), tile=32)
            sizes[side] = max(largest)
    assert sizes[64] == sizes[40]


def test_a_tile_of_next_to_nothing_is_refused():
    autoencoder = Autoencoder("dc", {"latent_channels": 4, **DC}, 4)
    with pytest.raises(ValueError, match="tile 7: expected at least 8 latent cells"):
        autoencoder.decode(torch.zeros(1, 4, 32, 32), tile=7)
