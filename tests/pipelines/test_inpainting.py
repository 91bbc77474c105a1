"""Repainting a part of a picture: what is kept, what a mask may be, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd_mini import InpaintingPipeline
from sd_mini.pipelines.pictures import as_masks
from tests.support.editing import HALF, latents_of, picture, seeded

NAN = torch.full((32, 32), torch.nan)
PROMPT, PROMPTS = "a small red circle", ["a small red circle", "two large blue squares"]


@pytest.fixture(scope="module")
def pipeline(talking_pipeline):
    made = InpaintingPipeline.from_pipe(talking_pipeline)
    made.set_progress_bar_config(disable=True)
    return made


def make(pipeline, mask=HALF, prompt=PROMPT, image=None, **more):
    given = {"num_inference_steps": 5, "generator": seeded(1), "output_type": "latent"} | more
    return pipeline(prompt, picture() if image is None else image, mask, **given).images


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_black_is_kept_and_white_is_repainted(talking_pipeline, sampler, strength):
    pipeline = InpaintingPipeline.from_pipe(talking_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.use_sampler(sampler)
    made, source = make(pipeline, strength=strength), latents_of(pipeline, picture())
    assert torch.equal(made[..., :8], source[..., :8])
    assert ((made - source)[..., 8:].abs().amax((0, 1)) > 1e-3).all()


def test_the_kept_part_is_at_the_noise_of_each_step(pipeline):
    """On the linear path, after step i of 5: (1 - t) picture + t noise with t = (4 - i) / 5."""
    noise = torch.randn(1, *pipeline.latent_shape(32, 32), generator=seeded(3)[0])
    source, kept = latents_of(pipeline, picture()), []
    make(pipeline, latents=noise, callback_on_step_end=lambda pipe, i, t, x: kept.append(x["latents"][..., :8]))
    for i, latents in enumerate(kept):
        t = (4 - i) / 5
        torch.testing.assert_close(latents, ((1 - t) * source + t * noise)[..., :8], rtol=0, atol=1e-5)


def test_an_all_white_mask_is_text_to_image(pipeline, talking_pipeline):
    more = {"num_inference_steps": 5, "output_type": "latent", "generator": seeded(1)}
    white = Image.new("L", (32, 32), 255)
    assert torch.equal(make(pipeline, white), talking_pipeline(PROMPT, height=32, width=32, **more).images)


def test_a_blank_mask_repaints_nothing_and_is_remarked(pipeline, capsys):
    made = make(pipeline, Image.new("L", (32, 32)))
    assert "note: mask_image 0: white in no cell of 2 x 2 px; nothing of the picture" in capsys.readouterr().err
    assert torch.equal(made, latents_of(pipeline, picture()))
    make(pipeline)
    assert not capsys.readouterr().err


def test_images_masks_arrays_and_tensors_are_one_mask(pipeline):
    values = np.asarray(HALF)
    unit = (values / 255).astype(np.float32)
    clear = Image.merge("LA", (Image.new("L", (32, 32), 255), HALF))  # white, and transparent where it is kept
    forms = [[HALF], HALF.convert("1"), HALF.convert("RGB"), HALF.convert("P"), clear, values, values[..., None]]
    forms += [values > 0, unit, unit[None], unit[None, ..., None], 0.6 * unit, torch.from_numpy(unit)]
    forms += [torch.from_numpy(unit)[None], torch.from_numpy(unit)[None, None], [torch.from_numpy(unit)[None]]]
    expected = make(pipeline)
    assert all(torch.equal(make(pipeline, form), expected) for form in forms)
    assert len(as_masks(torch.zeros(3, 32, 32))) == len(as_masks(np.zeros((3, 32, 32)))) == 3


def test_the_latents_of_a_picture_take_its_mask(pipeline):
    made = make(pipeline, image=latents_of(pipeline, picture()))
    torch.testing.assert_close(made, make(pipeline), rtol=0, atol=1e-4)


def test_several_pictures_and_masks(pipeline):
    other = Image.fromarray(np.asarray(HALF).T.copy())
    sources = [picture(1), picture(2)]

    def make_four(mask):
        more = {"image": sources, "generator": seeded(5, 6, 7, 8), "num_images_per_prompt": 2}
        return make(pipeline, mask, PROMPTS, **more)

    together = make_four([HALF, other])
    for i in range(4):
        alone = make(pipeline, (HALF, other)[i // 2], PROMPTS[i // 2], sources[i // 2], generator=seeded(5 + i))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)
    torch.testing.assert_close(make_four(HALF)[:2], together[:2], rtol=0, atol=1e-5)


def test_picture_and_mask_are_cropped_alike(pipeline):
    """Of 64 x 32 px the middle 32 are taken: there the mask's left half is black."""
    wide = Image.fromarray(np.repeat([[0, 255]], 32, 1).repeat(32, 0).astype(np.uint8))
    source = picture(size=(64, 32))
    cropped = source.crop((16, 0, 48, 32))
    assert torch.equal(make(pipeline, wide, image=source, height=32, width=32), make(pipeline, HALF, image=cropped))
    assert make(pipeline, wide, image=source).shape == (1, 8, 16, 32)


@pytest.mark.parametrize(
    ("mask", "more", "says"),
    [
        (HALF.resize((16, 16)), {}, "mask_image 0 is 16 x 16 px, its image 32 x 32; give a mask of that size"),
        (
            HALF,
            {"image": picture(size=(64, 32)), "height": 32, "width": 32},
            "mask_image 0 is 32 x 32 px, its image 64 x",
        ),
        ([HALF, HALF], {}, "2 masks for 1 prompts; give one, or one each"),
        (None, {}, "mask_image is missing; expected PIL images"),
        ("m.png", {}, "mask_image is a str"),
        (NAN, {}, "mask_image 0 holds NaN or infinity"),
        (torch.full((32, 32), 255.0), {}, "mask_image 0 has values from 255 to 255; expected floats in [0, 1]"),
        (np.ones((32, 32), np.uint8), {}, "mask_image 0 is uint8 of 0 and 1; expected 0 to 255"),
        (np.ones((32, 32), np.int64), {}, "mask_image 0 holds torch.int64"),
        (np.zeros((1, 32, 32, 3)), {}, "mask_image 0 has shape (32, 32, 3); expected (H, W), with one channel"),
        (np.zeros(32), {}, "expected (H, W), with one channel"),
        (HALF, {"strength": 0}, "strength 0 leaves none of 5 steps"),
    ],
)
def test_mistakes_are_one_line(pipeline, mask, more, says):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        make(pipeline, mask, **more)
    assert says in str(error.value)
