"""The diffusion super-resolver behind a small picture, against diffusers' own flow matching sampler."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from sd_mini.autoencoder.model import Autoencoder
from sd_mini.autoencoder.small_picture import SmallPicture
from sd_mini.errors import UserError

FIELDS = {"factor": 4, "width": 16, "num_blocks": 1, "enlarger": "diffusion", "steps": 3, "augmentation": 0.2}


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = SmallPicture(**FIELDS)
    nn.init.normal_(made.decoder.network.conv_out.weight, std=0.1)
    return made.eval()


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@torch.no_grad()
def test_it_takes_the_steps_of_diffusers_flow_matching_from_each_picture_s_own_noise(network):
    small, decoder = torch.rand(2, 3, 8, 8) * 2 - 1, network.decoder
    drawn = decoder(small, seeds(5, 6))
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
    for picture, generator, result in zip(small, seeds(5, 6), drawn, strict=True):
        x = torch.randn(3, 32, 32, generator=generator)[None]
        noisy = picture[None] + 0.2 * torch.randn(3, 8, 8, generator=generator)
        for t in scheduler.timesteps:
            folded = torch.cat([nn.functional.pixel_unshuffle(x, 4), noisy], 1)
            velocity = decoder.network(folded, t[None], class_labels=torch.tensor([200.0])).sample
            x = scheduler.step(nn.functional.pixel_shuffle(velocity, 4), t, x).prev_sample
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
        torch.testing.assert_close(result, x[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_it_takes_for_the_pictures_is_exact_where_its_velocity_is(network):
    """x_t - t v gives back x for v = n - x; with the last layer at zero v is 0, and x_t itself comes back."""
    decoder = network.decoder
    pixels, noise = torch.randn(2, 2, 3, 32, 32)
    times, small, levels = torch.tensor([0.25, 1.0]), torch.randn(2, 3, 8, 8), torch.zeros(2)
    found = decoder.denoised(pixels, noise, times, small, levels)
    mixed = torch.stack([0.75 * pixels[0] + 0.25 * noise[0], noise[1]])
    velocity = decoder.velocity(mixed, times, small, levels)
    torch.testing.assert_close(found[0], pixels[0] + 0.25 * (noise[0] - pixels[0] - velocity[0]), rtol=1e-4, atol=1e-5)
    nn.init.zeros_(decoder.network.conv_out.weight)
    nn.init.zeros_(decoder.network.conv_out.bias)
    torch.testing.assert_close(decoder.denoised(pixels, noise, times, small, levels), mixed)


@torch.no_grad()
def test_without_generators_all_begin_at_the_noise_of_seed_0_and_tiles_are_refused():
    torch.manual_seed(0)
    autoencoder = Autoencoder("small_picture", FIELDS).eval()
    nn.init.normal_(autoencoder.network.decoder.network.conv_out.weight, std=0.1)
    latents = torch.randn(1, 3, 8, 8).repeat(2, 1, 1, 1)
    first, second = autoencoder.decode(latents)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, autoencoder.decode(latents[:1], draws=seeds(0))[0])
    one, other = autoencoder.decode(latents, draws=seeds(1, 2))
    assert (one - other).abs().mean() > 0.1
    with pytest.raises(UserError, match="tile 4: this decoder draws pictures from noise, whole"):
        autoencoder.decode(latents, tile=4)


def test_small_pictures_that_cannot_be_halved_are_refused(network):
    with pytest.raises(UserError, match=r"small pictures of \(5, 6\): expected even sides"):
        network.decoder(torch.zeros(1, 3, 5, 6))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enlarger": "gan"}, "enlarger: got 'gan', expected one of"),
        ({"steps": 0}, "steps 0, augmentation 0.2: expected at least 1"),
        ({"augmentation": 2.0}, "augmentation 2"),
        ({"width": 20}, "width 20: expected a multiple of 8"),
    ],
)
def test_fields_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        SmallPicture(**FIELDS | fields)
