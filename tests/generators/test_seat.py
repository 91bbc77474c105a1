"""A pipeline whose latents are drawn by another generator than a noise predictor."""

import json
import shutil

import pytest
import torch

from sd_mini import png
from sd_mini.cli import commands as cli
from sd_mini.cpu.kernels import compiler
from sd_mini.errors import UserError
from sd_mini.pipelines.image_to_image import ImageToImagePipeline
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.editing import picture
from tests.support.launching import error_line, launch, prepared
from tests.support.system import missing


@pytest.fixture(scope="module")
def gan_run(smoke_run, tmp_path_factory):
    """The smoke run's first two stages with a GAN. Copy before writing."""
    run = prepared("gan", smoke_run, tmp_path_factory.mktemp("gan") / "run")
    assert launch("gan", run, "--log_with", "none") == 0
    return run


@pytest.fixture
def pipeline(gan_run):
    joined = Pipeline.from_run(gan_run, "gan")
    joined.set_progress_bar_config(disable=True)
    return joined


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def latents(pipeline, prompts, generator):
    return pipeline(prompts, generator=generator, output_type="latent").images


def test_it_is_joined_saved_and_loaded_with_the_same_pictures(pipeline, tmp_path):
    pipeline.save(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["latent_generator"] == ["sd_mini.generators", "OnePassGenerator"]
    assert set(index["stages"]) == {"text_encoder", "autoencoder", "generator"}
    loaded = Pipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.noise_predictor is None and loaded.scheduler is None
    left, right = (latents(one, "a red circle", seeds(0)) for one in (pipeline, loaded))
    assert torch.equal(left, right)


def test_it_is_the_network_at_each_picture_s_own_draw(pipeline):
    found = latents(pipeline, ["a red circle", "a blue square"], seeds(3, 4))
    prompt = pipeline.encode_prompt(["a red circle", "a blue square"])
    draw = torch.stack([torch.randn(4, 8, 8, generator=one) for one in seeds(3, 4)])
    with torch.no_grad():
        expected = pipeline.latent_generator(draw, *prompt)
    torch.testing.assert_close(found, expected)
    alone = latents(pipeline, "a blue square", seeds(4))
    torch.testing.assert_close(found[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 8}, "num_inference_steps 8: a gan generator takes no such thing"),
        ({"guidance_scale": 3.0}, "guidance_scale 3: a gan generator draws without guidance"),
        ({"negative_prompt": "blue"}, "negative_prompt: a gan generator"),
        ({"guidance_interval": (0.2, 0.8)}, "guidance_interval"),
        ({"guidance_rescale": 0.5}, "guidance_rescale 0.5"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents: a gan"),
        ({"autoguidance": True}, "no guide"),
        ({"height": 64, "width": 64}, r"latents of \(4, 16, 16\): this gan generator draws \(4, 8, 8\) alone"),
    ],
)
def test_what_it_has_no_use_for_is_refused_in_one_line(pipeline, options, message):
    with pytest.raises(UserError, match=message) as caught:
        pipeline("a red circle", **options)
    assert "\n" not in str(caught.value)


def test_samplers_guides_pictures_and_adapters_are_refused(pipeline, gan_run, tmp_path):
    final = [gan_run / stage / "final" for stage in ("text_encoder", "autoencoder", "gan")]
    for call, message in (
        (lambda: pipeline.use_sampler("euler"), "sampler euler: a gan generator takes no denoising steps"),
        (lambda: Pipeline.from_stages(*final, guide=final[2]), "guide: a gan generator"),
        (lambda: ImageToImagePipeline.from_pipe(pipeline)("a circle", image=picture()), "image: a gan generator"),
        (lambda: pipeline.load_lora_weights(tmp_path), "no noise predictor to add it to"),
        (lambda: Pipeline.from_stages(final[0], final[1], final[1]), "expected a noise_predictor stage"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_accelerated_it_draws_the_same(pipeline):
    if compiler() is None:
        missing("no C compiler (cc); apt-get install gcc")
    before = latents(pipeline, "a red circle", seeds(0))
    pipeline.accelerate()
    assert "forward" in vars(pipeline.latent_generator.body)
    torch.testing.assert_close(latents(pipeline, "a red circle", seeds(0)), before, rtol=1e-3, atol=1e-4)


def test_it_is_offloaded_as_a_whole_and_stands_alone(pipeline, tiny_run):
    for call in (pipeline.enable_sequential_cpu_offload, pipeline.enable_group_offload):
        with pytest.raises(UserError, match="a gan generator is on its device as a whole"):
            call()
    other = Pipeline.from_run(tiny_run)
    with pytest.raises(UserError, match=r"noise_predictor beside a latent_generator \(gan\)"):
        Pipeline.from_pipe(other, latent_generator=pipeline.latent_generator)


def test_a_callback_has_one_step(pipeline):
    seen = []

    def record(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    made = pipeline("a red circle", callback_on_step_end=record, output_type="latent").images
    assert seen == [(0, 0.0, (1, 4, 8, 8))] and not made.any()


def test_from_shell_to_picture_and_back(gan_run, tmp_path, capsys):
    run = str(gan_run)
    assert cli.main(["export", run, "--predictor", "gan", "--out", str(tmp_path / "pipeline")]) == 0
    out, again = tmp_path / "a.png", tmp_path / "again.png"
    assert cli.main(["generate", str(tmp_path / "pipeline"), "a red circle", "--seed", "5", "--out", str(out)]) == 0
    assert png.read(out).stages["generator"]
    assert cli.main(["generate", str(tmp_path / "pipeline"), "--like", str(out), "--out", str(again)]) == 0
    assert png.read(out).seed == 5 and out.read_bytes() == again.read_bytes()
    capsys.readouterr()
    assert cli.main(["generate", str(tmp_path / "pipeline"), "a circle", "--guidance", "3", "--out", str(out)]) == 2
    assert "draws without guidance" in error_line(capsys.readouterr().err)
    assert cli.main(["inspect", run]) == 0
    assert "gan" in capsys.readouterr().out


def test_a_run_s_pipeline_is_refused_beside_another_generator_and_outlives_its_own(gan_run, tmp_path, capsys):
    run = shutil.copytree(gan_run, tmp_path / "run")
    generate = ["generate", str(run), "a red circle", "--seed", "1", "--out", str(tmp_path / "a.png")]
    assert cli.main(["export", str(run), "--predictor", "gan"]) == 0 and cli.main(generate) == 0
    contract = run / "gan" / "final" / "stage.json"
    contract.write_text(json.dumps({**json.loads(contract.read_text()), "hash": "0" * 64}))  # as if trained anew
    capsys.readouterr()
    assert cli.main(generate) == 2
    assert "was joined from another generator than lies in" in error_line(capsys.readouterr().err)
    shutil.rmtree(run / "gan")
    assert cli.main(generate) == 0


def test_a_generator_of_other_stages_is_refused(gan_run, tiny_run):
    others = [tiny_run / stage / "final" for stage in ("text_encoder", "autoencoder")]
    with pytest.raises(UserError, match="the generator was trained against text_encoder"):
        Pipeline.from_stages(*others, gan_run / "gan" / "final")


def test_an_index_without_anything_that_draws_is_refused(pipeline, tmp_path):
    pipeline.save(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    fields = json.loads(index.read_text())
    for name in ("latent_generator", "noise_predictor", "scheduler"):
        fields.pop(name, None)
    index.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="names no noise_predictor"):
        Pipeline.from_pretrained(tmp_path / "pipeline")
