"""Pictures from a picture: what is kept of it, what may be given, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd_mini import ImageToImagePipeline, Pipeline, images
from sd_mini.diffusion.objective import Process
from sd_mini.pipelines.pictures import as_pictures
from sd_mini.sampling.loop import first_step
from tests.support.editing import latents_of, picture, seeded

PROMPT, PROMPTS = "a small red circle", ["a small red circle", "two large blue squares"]


@pytest.fixture(scope="module")
def pipeline(talking_pipeline):
    made = ImageToImagePipeline.from_pipe(talking_pipeline)
    made.set_progress_bar_config(disable=True)
    return made


def make(pipeline, prompt=PROMPT, image=None, **more):
    given = {"num_inference_steps": 5, "generator": seeded(1), "output_type": "pt", "strength": 0.6} | more
    return pipeline(prompt, picture() if image is None else image, **given).images


def test_it_shares_the_parts(pipeline, talking_pipeline, tiny_run):
    assert all(pipeline.components[name] is part for name, part in talking_pipeline.components.items())
    loaded = ImageToImagePipeline.from_pretrained(tiny_run / "pipeline")
    assert type(loaded) is ImageToImagePipeline and type(Pipeline.from_pipe(loaded)) is Pipeline


def test_a_pipeline_of_other_parts_is_refused(pipeline):
    from diffusers import DDPMPipeline

    with pytest.raises(ValueError, match="from_pipe: DDPMPipeline has no autoencoder; give a pipeline of sd_mini's"):
        ImageToImagePipeline.from_pipe(DDPMPipeline(None, pipeline.scheduler))


def test_it_keeps_the_dtype_and_the_tiles(tiny_run):
    first = Pipeline.from_pretrained(tiny_run / "pipeline").to(torch.bfloat16)
    first.enable_vae_tiling(9)
    second = ImageToImagePipeline.from_pipe(first)
    assert first.noise_predictor.dtype == second.noise_predictor.dtype == torch.bfloat16 and second.tile == 9
    second.set_progress_bar_config(disable=True)
    assert make(second).isfinite().all()
    assert ImageToImagePipeline.from_pipe(first, dtype=torch.float32).noise_predictor.dtype == torch.float32


def test_the_whole_of_the_linear_path_is_text_to_image(pipeline, talking_pipeline):
    """Strength 1 begins with the noise alone, as a picture without one."""
    more = {"num_inference_steps": 5, "output_type": "pt", "generator": seeded(1)}
    assert torch.equal(make(pipeline, strength=1.0), talking_pipeline(PROMPT, height=32, width=32, **more).images)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_the_steps_by_hand(pipeline, strength):
    """Euler on the linear path: x = (1 - t) picture + t noise at the first step's t, then downwards."""
    noise = torch.randn(1, *pipeline.latent_shape(32, 32), generator=seeded(3)[0])
    made = make(pipeline, strength=strength, latents=noise, guidance_scale=1.0, output_type="latent")
    count = -int(-5 * strength // 1)
    x = (1 - count / 5) * latents_of(pipeline, picture()) + count / 5 * noise
    condition = pipeline.encode_prompt(PROMPT)
    for step in range(count, 0, -1):
        with torch.no_grad():
            velocity = pipeline.noise_predictor(x, torch.tensor([step / 5]), *condition, return_dict=False)[0]
        x = x - velocity / 5
    torch.testing.assert_close(made, x, rtol=0, atol=1e-5)


def test_less_strength_keeps_more_of_the_picture(pipeline):
    source = latents_of(pipeline, picture())
    change = [(make(pipeline, strength=s, output_type="latent") - source).square().mean() for s in (0.2, 0.6, 1.0)]
    assert change[0] < change[1] < change[2]


@pytest.mark.parametrize(
    ("steps", "strength", "discrete", "flow"),
    [
        (10, 0.0, 10, 10),
        (10, 0.05, 10, 9),
        (10, 0.5, 5, 5),
        (10, 0.99, 1, 0),
        (7, 0.8, 2, 1),
        (1, 1.0, 0, 0),
        (3, 1, 0, 0),
    ],
)
def test_the_first_step(steps, strength, discrete, flow):
    assert first_step(Process(kind="epsilon", schedule="linear"), steps, strength) == discrete
    assert first_step(Process(), steps, strength) == flow


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
def test_every_sampler_and_option(talking_pipeline, sampler):
    pipeline = ImageToImagePipeline.from_pipe(talking_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.use_sampler(sampler)
    assert talking_pipeline.scheduler is not pipeline.scheduler
    steps = []

    def callback(pipe, i, t, tensors):
        steps.append((i, pipe.num_timesteps))
        return {}

    more = {"guidance_interval": (0.2, 0.5), "guidance_rescale": 0.5, "negative_prompt": "a blue cross"}
    plain = make(pipeline, PROMPTS, generator=seeded(1, 2))
    made = make(pipeline, PROMPTS, generator=seeded(1, 2), callback_on_step_end=callback, **more)
    assert made.shape == (2, 3, 32, 32) and (made - plain).abs().max() > 1e-4
    count = 5 if sampler == "heun" else 3  # two evaluations a step but for the last
    assert steps == [(i, count) for i in range(count)]


def test_a_picture_depends_on_its_own_seed_and_source_only(pipeline):
    together = make(pipeline, PROMPTS, [picture(1), picture(2)], generator=seeded(5, 6, 7, 8), num_images_per_prompt=2)
    for i in range(4):
        alone = make(pipeline, PROMPTS[i // 2], picture(1 + i // 2), generator=seeded(5 + i))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3
    torch.testing.assert_close(
        make(pipeline, PROMPTS, picture(1), generator=seeded(5, 6))[0], together[0], rtol=0, atol=1e-5
    )


def test_autoguidance(talking_pipeline, tiny_run):
    pipeline = ImageToImagePipeline.from_pipe(talking_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_modules(guide=Pipeline.from_pretrained(tiny_run / "pipeline").noise_predictor)
    assert (make(pipeline, autoguidance=True, guidance_scale=3.0) - make(pipeline)).abs().max() > 1e-4


def test_pil_images_arrays_and_tensors_are_one_picture(pipeline):
    source = picture()
    values = np.asarray(source)
    unit = values.astype(np.float32) / 255
    tensor = torch.from_numpy(unit).permute(2, 0, 1)
    expected = make(pipeline, image=source)
    forms = [
        [source],
        values,
        unit,
        unit[None],
        [unit],
        unit.astype(">f4"),
        unit[::-1][::-1],
        tensor,
        tensor[None],
        [tensor],
        (tensor[None],),
        tensor.double(),
    ]
    assert all(torch.equal(make(pipeline, image=form), expected) for form in forms)
    latents = latents_of(pipeline, source)
    torch.testing.assert_close(make(pipeline, image=latents), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_pil_images_of_any_mode(mode):
    grey = Image.linear_gradient("L").resize((32, 32))
    if mode.startswith("I"):
        source = Image.fromarray(
            (np.asarray(grey).astype(np.uint16) * 257).astype(np.int32 if mode == "I" else np.uint16)
        )
        assert source.mode == mode
    else:
        source = grey.convert("RGB").convert(mode)
    (read,) = as_pictures(source)
    expected = np.asarray(source.convert("RGB") if not mode.startswith("I") else grey.convert("RGB")) / 255
    np.testing.assert_allclose(read.permute(1, 2, 0), expected, atol=1e-6)


def test_a_picture_is_turned_as_exif_says(pipeline, tmp_path):
    source = picture(size=(48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right, back to the source
    source.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    turned = Image.open(tmp_path / "a.png")
    assert torch.equal(make(pipeline, image=turned), make(pipeline, image=source))
    assert make(pipeline, image=source).shape == (1, 3, 32, 48)


def test_a_picture_is_scaled_and_cropped_only_if_asked(pipeline):
    wide = picture(size=(66, 33))
    for form in (wide, np.asarray(wide), np.asarray(wide) / 255):
        with pytest.raises(ValueError, match=r"66 x 33 px: expected multiples of 4; the nearest size is 64 x 32; give"):
            make(pipeline, image=form)
        made = make(pipeline, image=form, height=32, width=32)
        expected = make(pipeline, image=Image.fromarray(images.fit(wide, 32).transpose(1, 2, 0)))
        assert torch.equal(made, expected)
    assert make(pipeline, image=picture(size=(36, 40)), width=32).shape == (1, 3, 40, 32)


def test_a_sibling_can_be_saved_and_offloaded(pipeline, tmp_path):
    pipeline.save(tmp_path / "saved")
    expected = make(pipeline)
    again = Pipeline.from_pretrained(tmp_path / "saved")
    again.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        offloaded = ImageToImagePipeline.from_pipe(again)
        offloaded.set_progress_bar_config(disable=True)
        torch.testing.assert_close(make(offloaded), expected, rtol=0, atol=1e-5)
        offloaded.enable_model_cpu_offload(device="cpu")
        torch.testing.assert_close(make(offloaded), expected, rtol=0, atol=1e-5)


NAN = torch.full((3, 32, 32), torch.nan)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"strength": 0}, "strength 0 leaves none of 5 steps to run, and the picture as it is; give at least 0.2"),
        ({"strength": 1.01}, "strength 1.01: expected a number above 0"),
        ({"strength": -0.1}, "strength -0.1: expected"),
        ({"strength": float("nan")}, "strength nan: expected"),
        ({"strength": "much"}, "strength 'much': expected"),
        ({"strength": True}, "strength True: expected"),
        ({"image": "a.png"}, "image is a str; expected PIL images, or arrays or tensors"),
        ({"image": []}, "image is an empty list"),
        ({"image": [picture()] * 2}, "2 images for 1 prompts; give one, or one each"),
        (
            {"image": [picture(), picture(size=(36, 32))]},
            "image 1 is 36 x 32 px, image 0 32 x 32; give height and width",
        ),
        ({"image": NAN}, "image 0 holds NaN or infinity"),
        ({"image": NAN.numpy().transpose(1, 2, 0)}, "image 0 holds NaN or infinity"),
        ({"image": 2 * torch.rand(1, 3, 32, 32) - 1}, "expected floats in [0, 1], or uint8"),
        ({"image": torch.full((3, 32, 32), 255.0)}, "image 0 has values from 255 to 255; expected floats in [0, 1]"),
        ({"image": torch.zeros(3, 32, 32, dtype=torch.int64)}, "image 0 holds torch.int64"),
        ({"image": torch.zeros(32, 32, 3)}, "image 0 has shape (32, 32, 3); a tensor is (3, H, W)"),
        ({"image": np.zeros((3, 32, 32))}, "image 0 has shape (3, 32, 32); an array is (H, W, 3)"),
        ({"image": np.zeros((32, 32))}, "image 0 has shape (32, 32); an array is (H, W, 3)"),
        ({"image": np.array(["a"])}, "image is an array of <U1"),
        ({"image": torch.zeros(3, 0, 0)}, "holds no pixel"),
        ({"image": picture().convert("F")}, "float pixels (mode F)"),
        ({"image": torch.full((1, 8, 16, 16), torch.inf)}, "image: latents of torch.float32; expected finite floats"),
        ({"image": torch.zeros(1, 8, 16, 16), "width": 48}, "latents of 32 x 32 px cannot be scaled to 48 x 32"),
        ({"image": torch.zeros(1, 8, 15, 16)}, "image of 32 x 30 px: expected multiples of 4"),
        ({"height": 33}, "height 33: expected a multiple of 4"),
        ({"height": "tall"}, "height 'tall': expected a whole number"),
        ({"prompt": ""}, "prompt 0 is empty"),
        ({"generator": seeded(1, 2)}, "2 generators for 1 pictures"),
        ({"latents": torch.zeros(1, 8, 2, 2)}, "expected (B, 8, 16, 16)"),
    ],
)
def test_mistakes_are_one_line(pipeline, given, says):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        make(pipeline, **given)
    assert says in str(error.value)


def test_a_call_without_a_picture_is_one_line(pipeline):
    with pytest.raises(ValueError, match="image is missing; expected PIL images"):
        pipeline(PROMPT)
