import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from sd_mini import noise_predictor
from sd_mini.pipelines.text_to_image import Pipeline
from training.benchmarks.pipeline import stock_latents, stock_pipeline

PROMPTS = ["a small red circle at the top left", "two large blue squares", "a large green cross"]


@pytest.fixture
def pipeline(talking_pipeline):
    return talking_pipeline


def seeded(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_conventions(pipeline):
    out = pipeline(PROMPTS[0], num_inference_steps=2, generator=seeded(0)[0])
    assert isinstance(out.images[0], Image.Image) and out.images[0].size == (32, 32)
    many = pipeline(PROMPTS, num_images_per_prompt=2, num_inference_steps=1, output_type="np", return_dict=False)[0]
    assert many.shape == (6, 32, 32, 3) and 0 <= many.min() <= many.max() <= 1
    wide = pipeline(PROMPTS[0], height=32, width=64, num_inference_steps=1, output_type="pt").images
    assert wide.shape == (1, 3, 32, 64)


def test_a_picture_depends_on_its_own_seed_only(pipeline):
    def make(prompts, seeds):
        return pipeline(prompts, num_inference_steps=3, generator=seeded(*seeds), output_type="np").images

    together = make(PROMPTS, (5, 6, 7))
    for i in range(3):
        np.testing.assert_allclose(make([PROMPTS[i]], [5 + i])[0], together[i], atol=1e-4)
    assert np.abs(make([PROMPTS[0]], [6])[0] - together[0]).max() > 0.01
    a = pipeline.prepare_latents(3, 32, 32, torch.Generator().manual_seed(1), None)
    assert torch.equal(a[:2], pipeline.prepare_latents(2, 32, 32, torch.Generator().manual_seed(1), None))


def test_save_load_keeps_every_bit(pipeline, tmp_path):
    pipeline.save(tmp_path / "p")
    again = Pipeline.from_pretrained(tmp_path / "p")
    again.set_progress_bar_config(disable=True)
    a, b = (
        p(PROMPTS, num_inference_steps=2, generator=seeded(1, 2, 3), output_type="np").images for p in (pipeline, again)
    )
    assert np.array_equal(a, b)
    assert again.config.stages == pipeline.config.stages and not again.noise_predictor.training


def test_latents_and_embeddings_in_and_out(pipeline):
    tokens, mask = pipeline.encode_prompt(PROMPTS)
    latents = torch.randn(3, *pipeline.latent_shape(32, 32), generator=seeded(0)[0])
    kwargs = {"latents": latents, "num_inference_steps": 2, "output_type": "latent"}
    by_text = pipeline(PROMPTS, **kwargs).images
    assert torch.equal(by_text, pipeline(prompt_embeds=tokens, prompt_mask=mask, **kwargs).images)
    decoded = pipeline.autoencoder.decode(by_text).detach().clamp(-1, 1)
    pictures = pipeline(PROMPTS, **(kwargs | {"output_type": "pt"})).images
    torch.testing.assert_close(pictures, (decoded + 1) / 2)


def test_large_pictures_can_be_decoded_in_tiles(pipeline):
    def make():
        latents = torch.randn(1, *pipeline.latent_shape(80, 144), generator=seeded(0)[0])
        with torch.no_grad():
            return pipeline._decode(latents, "np")

    whole = make()  # 40 x 72 cells
    pipeline.enable_vae_tiling(32)
    try:
        np.testing.assert_allclose(make(), whole, atol=1e-5)
    finally:
        pipeline.disable_vae_tiling()
    with pytest.raises(ValueError, match="tile 7: expected at least 8"):
        pipeline.enable_vae_tiling(7)


def test_guidance_and_its_negative(pipeline):
    def make(**kwargs):
        return pipeline(PROMPTS[0], num_inference_steps=2, generator=seeded(0), output_type="np", **kwargs).images

    free, strong = make(guidance_scale=1.0), make(guidance_scale=4.0)
    assert np.abs(free - strong).max() > 1e-3
    assert np.abs(make(guidance_scale=4.0, negative_prompt="a large red square") - strong).max() > 1e-3
    # leading away from the prompt itself is no guidance at all
    np.testing.assert_allclose(make(guidance_scale=4.0, negative_prompt=PROMPTS[0]), free, atol=1e-4)


def test_callback_sees_each_step_and_may_change_it(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        if step == 1:
            pipe._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    wanted = ["latents"]
    out = pipeline(
        PROMPTS[0],
        num_inference_steps=4,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=wanted,
    )
    assert seen == [(0, wanted), (1, wanted)] and not out.images.any()


def test_same_latents_as_stock_prx(pipeline, tiny_run):
    """The stock PRX loop (whose guidance takes one picture at a time) on the same weights, embeddings and noise."""
    tokens, mask = pipeline.encode_prompt(PROMPTS[:1])
    latents = torch.randn(1, *pipeline.latent_shape(32, 32), generator=seeded(0)[0])
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    stock = stock_pipeline(pipeline, scheduler)
    assert type(stock.transformer.blocks[0].attention.processor).__module__.startswith("diffusers")  # no part replaced
    expected = stock_latents(stock, (tokens, mask), pipeline.null_condition(1), latents, 5, 3.0)
    ours = Pipeline(
        **pipeline.components | {"scheduler": UniPCMultistepScheduler.from_config(scheduler.config)}, resolution=32
    )
    ours.set_progress_bar_config(disable=True)
    made = ours(
        prompt_embeds=tokens,
        prompt_mask=mask,
        latents=latents,
        num_inference_steps=5,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
)
def test_samplers_reach_the_data_of_a_known_velocity(pipeline, scheduler, monkeypatch):
    """All data at one point c: the velocity at (x, t) is (x - c) / t exactly, and every sampler has to end in c."""
    centre = 0.7

    def velocity(network, x, t, *text):
        return 1000 * (x - centre) / t.view(-1, 1, 1, 1)

    monkeypatch.setattr(noise_predictor, "predict", velocity)
    exact = Pipeline(**pipeline.components | {"scheduler": scheduler}, resolution=32)
    exact.set_progress_bar_config(disable=True)
    made = exact(PROMPTS, num_inference_steps=6, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(made, torch.full_like(made, centre), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"prompt": ""}, "prompt 0 is empty"),
        ({"prompt": ["a", 3]}, "prompt 1 is a int"),
        ({"prompt": 3}, "prompt is a int"),
        ({"prompt": []}, "empty list"),
        ({}, "neither"),
        ({"prompt": "red " * 60, "strict": True}, "more than 24 tokens, all that are read; shorten it by"),
        ({"prompt": "a", "height": 0}, "height 0: expected a multiple of 4"),
        ({"prompt": "a", "negative_prompt": 3}, "negative_prompt is a int"),
        ({"prompt": "a", "guidance_scale": "x"}, "guidance_scale 'x'"),
        ({"prompt_embeds": torch.zeros(1, 24, 32)}, "expected both"),
        ({"prompt_embeds": torch.zeros(1, 9, 32), "prompt_mask": torch.ones(1, 9) > 0}, "expected (B, 24, 32)"),
        ({"prompt": "a", "height": 33}, "height 33: expected a multiple of 4; the nearest are 32, 36"),
        ({"prompt": "a", "num_inference_steps": -1}, "num_inference_steps -1"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps 0"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale nan"),
        (
            {"prompt": "a", "output_type": "jpg"},
            "output_type: got 'jpg', expected one of ('pil', 'np', 'pt', 'latent')",
        ),
        ({"prompt": "a", "generator": seeded(1, 2)}, "2 generators for 1 pictures"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c", "d", "e"]}, "3 negative prompts for 2"),
        ({"prompt": "a", "latents": torch.zeros(1, 3, 2, 2)}, "expected (B, 8"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt 0"),
        ({"prompt": "a", "callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["x"]}, "'x'"),
    ],
)
def test_mistakes_are_one_line(pipeline, kwargs, says):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        pipeline(**kwargs)
    assert says in str(error.value)
