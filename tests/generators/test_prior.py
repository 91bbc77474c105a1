"""DALL-E 2's two steps by stock parts: diffusers' PriorTransformer and samplers on the same weights, and variations."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch.nn.functional import interpolate, normalize

from sd_mini import ImageVariationPipeline, stages
from sd_mini.cli import commands as cli
from sd_mini.config import read
from sd_mini.errors import UserError
from sd_mini.files import read_json
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.editing import picture, seeded
from tests.support.launching import SMOKE, error_line, launch, prepared
from tests.text_encoder.test_open_clip import save_model
from training.generators.prior.task import PriorConfig, PriorTask

PROMPTS = ["a red circle", "a small blue square above a large green cross"]


@pytest.fixture(scope="module")
def prior_run(smoke_run, tmp_path_factory):
    """The smoke run's first two stages with a prior and its decoder. Copy before writing."""
    run = prepared("prior", smoke_run, tmp_path_factory.mktemp("prior") / "run")
    assert (
        launch("prior", run, "--log_with", "none", "--sampling.prior_guidance", "2", "--sampling.interval", "[0.5, 1]")
        == 0
    )
    return run


@pytest.fixture(scope="module")
def pipeline(prior_run):
    joined = Pipeline.from_run(prior_run, "prior")
    joined.set_progress_bar_config(disable=True)
    return joined


@pytest.fixture(scope="module")
def variations(pipeline):
    return ImageVariationPipeline.from_pipe(pipeline)


def drawn_alone(pipeline, prompt, generator):
    """Two embeddings (2, D) of a prompt and the text's own (1, D), by stock parts, as an UnCLIP prior is run."""
    generator_stage = pipeline.latent_generator
    prior, network = generator_stage.prior, generator_stage.prior.network
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(3)
    (words, mask), (null_words, null_mask) = pipeline.encode_prompt(prompt), pipeline.null_condition(1)
    means = [x[m].mean(0, keepdim=True) for x, m in ((null_words, null_mask), (words, mask))]
    texts = [prior.text(mean) for mean in means]
    x = torch.randn(2, network.config.embedding_dim, generator=generator)
    for t in scheduler.timesteps:
        away, toward = (
            network(x, t, text.expand(2, -1), tokens.expand(2, -1, -1), held.expand(2, -1)).predicted_image_embedding
            for text, tokens, held in zip(texts, (null_words, words), (null_mask, mask), strict=True)
        )
        x = scheduler.step(away + 2 * (toward - away), t, x).prev_sample
    return (normalize(y * network.clip_std + network.clip_mean, dim=1) for y in (x, texts[1]))


@torch.no_grad()
def test_the_prior_by_stock_parts_and_the_nearer_of_two(pipeline):
    prior, found = pipeline.latent_generator, []
    for prompt, seed in zip(PROMPTS, (3, 4), strict=True):
        both, text = drawn_alone(pipeline, prompt, seeded(seed)[0])
        nearer = 0 if float(both[0] @ text[0]) > float(both[1] @ text[0]) else 1
        assert (both[0] - both[1]).abs().max() > 1e-3
        found.append(both[nearer])
    drawn = prior.draw_embeddings(pipeline.encode_prompt(PROMPTS), pipeline.null_condition(2), seeded(3, 4))
    torch.testing.assert_close(drawn, torch.stack(found), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(2))


def decoded_by_hand(pipeline, embeddings, draw, scale):
    """Euler on the linear path, guided in the first two of three steps, without a prompt."""
    body, prior = pipeline.latent_generator.body, pipeline.latent_generator.prior.network
    words, mask = pipeline.null_condition(len(draw))
    dim, txt_in = words.shape[2], body.txt_in
    of_words, of_embedding, of_presence = txt_in.weight.split([dim, dim, 1], dim=1)
    tokens = words @ of_words.T + txt_in.bias
    standardised = (embeddings - prior.clip_mean) / prior.clip_std
    present = (standardised @ of_embedding.T + of_presence[:, 0] + txt_in.bias)[:, None]
    absent = txt_in.bias.expand_as(present)
    mask = torch.cat([torch.ones(len(draw), 1, dtype=torch.bool), mask], dim=1)

    scheduler, x = FlowMatchEulerDiscreteScheduler(), draw
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 3, 3))
    body.txt_in = torch.nn.Identity()
    try:
        for t in scheduler.timesteps:
            at = (t / 1000).expand(len(x))
            toward, away = (
                body(x, at, torch.cat([first, tokens], dim=1), attention_mask=mask).sample
                for first in (present, absent)
            )
            guided = away + scale * (toward - away) if t >= 500 else toward
            x = scheduler.step(guided, t, x).prev_sample
    finally:
        body.txt_in = txt_in
    return x


@torch.no_grad()
def test_variations_are_the_decoder_on_the_embedding_alone(prior_run, pipeline, variations):
    given, draws = [picture(0), picture(1)], [torch.randn(4, 8, 8, generator=one) for one in seeded(5, 6, 7, 8)]
    made = variations(
        given, num_images_per_prompt=2, guidance_scale=3.0, generator=seeded(5, 6, 7, 8), output_type="latent"
    )
    pixels = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 127.5 - 1 for one in given])
    matcher = stages.load_stage(prior_run / "text_encoder" / "final").parts["matcher"]
    embeddings = matcher(pixels).vector.repeat_interleave(2, 0)
    expected = decoded_by_hand(pipeline, embeddings, torch.stack(draws), 3.0)
    torch.testing.assert_close(made.images, expected, rtol=1e-3, atol=1e-4)

    own = variations(
        image_embeddings=embeddings[:1], generator=seeded(5), guidance_scale=3.0, output_type="latent"
    ).images
    torch.testing.assert_close(own, expected[:1], rtol=1e-3, atol=1e-4)
    assert (made.images[0] - made.images[1]).abs().max() > 1e-3  # another draw
    assert (made.images[1] - made.images[3]).abs().max() > 1e-3 and variations(given[0]).images[0].size == (32, 32)


def test_a_picture_depends_on_its_own_draw_and_is_loaded_again(pipeline, tmp_path):
    both = pipeline(PROMPTS, generator=seeded(1, 2), output_type="latent").images
    alone = pipeline(PROMPTS[1], generator=seeded(2), output_type="latent").images
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4)
    unguided = pipeline(PROMPTS[1], generator=seeded(2), guidance_scale=1.0, output_type="latent").images
    assert (unguided - alone).abs().max() > 1e-4
    pipeline.save(tmp_path / "pipeline")
    index = read_json(tmp_path / "pipeline" / "model_index.json")
    assert index["latent_generator"] == ["sd_mini.generators", "PriorGenerator"]
    loaded = ImageVariationPipeline.from_pretrained(tmp_path / "pipeline")
    again = Pipeline.from_pipe(loaded)(PROMPTS[1], generator=seeded(2), output_type="latent").images
    assert torch.equal(again, alone)
    assert torch.equal(loaded.latent_generator.tower.out.weight, pipeline.latent_generator.tower.out.weight)


@torch.no_grad()
def test_without_the_embedding_the_decoder_reads_zeros(pipeline):
    generator, prompt = pipeline.latent_generator, pipeline.encode_prompt(PROMPTS)
    embeddings = normalize(torch.randn(2, 32), dim=1)
    mixed = generator.condition(prompt, embeddings, torch.tensor([1.0, 0.0]))
    kept, left_out = generator.condition(prompt, embeddings), generator.condition(prompt, None)
    for found, first, second in zip(mixed, kept, left_out, strict=True):
        assert torch.equal(found[0], first[0]) and torch.equal(found[1], second[1])
    assert not left_out[0][:, 0].any() and kept[1][:, 0].all() and torch.equal(kept[1][:, 1:], prompt[1])


def test_pictures_are_scaled_to_the_tower(pipeline):
    generator, large = pipeline.latent_generator, 2 * torch.rand(2, 3, 64, 64) - 1
    small = interpolate(large, (32, 32), mode="bicubic", antialias=True)
    assert torch.equal(generator.embed(large), generator.embed(small))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": picture(size=(64, 32))}, "image 0 is 64 x 32 px; expected 32 x 32, the size that was trained on"),
        ({}, "expected either image or image_embeddings, got neither"),
        ({"image": picture(), "image_embeddings": torch.zeros(1, 32)}, "got both"),
        ({"image_embeddings": torch.zeros(1, 16)}, r"image_embeddings: \(1, 16\); expected floats \(N, 32\)"),
        ({"image_embeddings": torch.ones(1, 32)}, "of length 1"),
        ({"image_embeddings": [1.0]}, "image_embeddings: a list"),
        ({"image": picture(), "num_images_per_prompt": 0}, "num_images_per_prompt 0"),
        ({"image": picture(), "guidance_scale": -1}, "guidance_scale -1"),
        ({"image": picture(), "generator": seeded(1, 2)}, "2 generators for 1 pictures"),
        ({"image": picture(), "output_type": "jpeg"}, "output_type"),
    ],
)
def test_what_cannot_be_varied_is_refused_in_one_line(variations, options, message):
    with pytest.raises(UserError, match=message) as caught:
        variations(**options)
    assert "\n" not in str(caught.value)


def test_another_family_is_refused_and_a_prompt_with_a_picture_is_shown_the_way(
    talking_pipeline, pipeline, tmp_path, capsys
):
    with pytest.raises(UserError, match="variations need a prior generator, and this pipeline has a noise predictor"):
        ImageVariationPipeline.from_pipe(talking_pipeline)(picture())
    pipeline.save(tmp_path / "pipeline")
    picture().save(tmp_path / "a.png")
    words = [
        str(tmp_path / "pipeline"),
        "a circle",
        "--image",
        str(tmp_path / "a.png"),
        "--out",
        str(tmp_path / "b.png"),
    ]
    assert cli.main(["generate", *words]) == 2
    assert "varies a picture without a prompt: ImageVariationPipeline" in error_line(capsys.readouterr().err)


def test_over_a_frozen_tower_embeddings_are_varied_and_no_pictures(smoke_run, tmp_path, capsys):
    name, run = save_model(tmp_path / "model"), tmp_path / "run"
    shutil.copytree(smoke_run / "autoencoder", run / "autoencoder")
    assert launch("text_encoder", run, "--tower.name", name, "--train.steps", "2", "--log_with", "none") == 0
    few = ["--train.steps", "2", "--log_with", "none"]
    assert launch("prior", run, *few) == 2
    assert "tower.name None: stage 1 was trained with the features of a frozen tower" in error_line(
        capsys.readouterr().err
    )
    assert launch("prior", run, *few, "--tower.name", name) == 0
    variations = ImageVariationPipeline.from_run(run, "prior")
    with pytest.raises(UserError, match="give image_embeddings instead"):
        variations(picture())
    assert len(variations(image_embeddings=normalize(torch.randn(2, 32), dim=1)).images) == 2


def test_stage_1_has_to_bring_the_tower_that_is_named(prior_run, tmp_path):
    config = read(PriorConfig, SMOKE / "prior.yaml", ["--tower.name", "ViT-B-32"])
    with pytest.raises(UserError, match=r"stage 1 was trained with a picture tower of its own; leave tower\.name out"):
        PriorTask(config, prior_run)


def test_passes_of_a_picture(pipeline):
    """Two candidates of three steps and the decoder's three, of which two are guided, as all of the prior's are."""
    assert [pipeline.latent_generator.passes(scale) for scale in (1.0, 3.0)] == [2 * 3 + 3, 2 * 6 + 3 + 2]
