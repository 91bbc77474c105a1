"""What diffusers' and Python's users do with any pipeline: offload it, compile it, pickle it, call it from threads."""

import inspect
import io
import pickle
import threading

import accelerate
import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor

from sd_mini.autoencoder.model import Autoencoder
from sd_mini.cpu.kernels import compiler
from sd_mini.noise_predictor.network import predict
from sd_mini.offload import device_of
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.system import missing

PROMPTS = ["a small red circle", "two large blue squares"]


def seeded(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def make(pipeline, prompts=PROMPTS, **more):
    given = {"num_inference_steps": 3, "generator": seeded(1, 2), "output_type": "np", **more}
    return pipeline(prompts, **given).images


@pytest.fixture
def pipeline(talking_pipeline):
    return talking_pipeline


@pytest.fixture(scope="module")
def saved(talking_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("talking") / "pipeline"
    talking_pipeline.save(folder)
    return folder


def loaded(folder):
    again = Pipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    return again


@pytest.mark.parametrize("blank", ["", "  ", ["", ""], [None, ""]])
def test_an_empty_negative_prompt_is_none_at_all(pipeline, blank):
    assert np.array_equal(make(pipeline, negative_prompt=blank), make(pipeline))


def test_an_empty_one_of_several_negative_prompts_is_its_picture_s_null_condition(pipeline):
    mixed = make(pipeline, negative_prompt=["", "a blue cross"])
    np.testing.assert_allclose(mixed[0], make(pipeline)[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], make(pipeline, negative_prompt="a blue cross")[1], atol=1e-5)
    assert np.abs(mixed[1] - make(pipeline)[1]).max() > 1e-3


def test_threads_share_a_pipeline(pipeline):
    long = "red " * 60  # which is cut: a state that a tokenizer keeps in itself
    asked = [([PROMPTS[0], long], 3), (PROMPTS, 4), (PROMPTS, 5)]
    alone = [make(pipeline, prompts, num_inference_steps=steps) for prompts, steps in asked]
    found = [None] * 6

    def work(number):
        prompts, steps = asked[number % 3]
        found[number] = make(pipeline, prompts, num_inference_steps=steps)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, pictures in enumerate(found):
        np.testing.assert_allclose(pictures, alone[number % 3], atol=1e-5)


def test_a_compiled_network_makes_the_same_pictures(pipeline, saved):
    compiled = loaded(saved)
    compiled.noise_predictor = torch.compile(compiled.noise_predictor, backend="eager")
    np.testing.assert_allclose(make(compiled), make(pipeline), atol=1e-5)
    compiled.to(torch.bfloat16)
    assert compiled.noise_predictor.dtype == torch.bfloat16 and np.isfinite(make(compiled)).all()


def test_a_pipeline_can_be_pickled(pipeline):
    file = io.BytesIO()
    torch.save(pipeline, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(pipeline))):
        assert np.array_equal(make(again), make(pipeline))


def test_models_are_offloaded_one_at_a_time(pipeline, saved):
    offloaded = loaded(saved)
    offloaded.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        np.testing.assert_allclose(make(offloaded), make(pipeline), atol=1e-5)
    named = offloaded.model_cpu_offload_seq.split("->")
    assert {n for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)} <= set(named)


def test_layers_are_offloaded_one_at_a_time(pipeline, saved):
    offloaded = loaded(saved)
    for part in offloaded.components.values():  # as enable_sequential_cpu_offload does it
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    assert offloaded.noise_predictor.device.type == offloaded.text_encoder.device.type == "meta"
    for _ in range(2):
        np.testing.assert_allclose(make(offloaded), make(pipeline), atol=1e-5)
    offloaded.enable_vae_tiling(8)
    assert np.isfinite(make(offloaded, height=48, width=48)).all()


@pytest.fixture
def unset_is_nan():
    """Memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_groups_of_layers_are_offloaded(pipeline, saved, tmp_path, kind, unset_is_nan):
    """To disk, as there is one device alone here: the weights in memory are unset meanwhile."""
    offloaded, device = loaded(saved), torch.device("cpu", 0)
    options = {"offload_type": kind, "num_blocks_per_group": 1}
    for name, part in offloaded.components.items():
        if isinstance(part, torch.nn.Module):
            apply_group_offloading(part, device, offload_to_disk_path=str(tmp_path / name), **options)
            assert device_of(part) == device  # and not where the weights lie
    assert offloaded.autoencoder.std.isnan().all() and offloaded.text_adapter.null_word.isnan().all()
    for _ in range(2):
        np.testing.assert_allclose(make(offloaded), make(pipeline), atol=1e-5)
    offloaded.enable_vae_tiling(8)
    assert np.isfinite(make(offloaded, height=48, width=48)).all()
    pixels = torch.zeros(1, 3, 32, 32)
    assert torch.allclose(offloaded.autoencoder.encode(pixels), pipeline.autoencoder.encode(pixels), atol=1e-5)
    assert offloaded.autoencoder.std.isnan().all()  # back again


def test_a_codebook_is_not_offloaded_by_groups():
    autoencoder = Autoencoder("vq", {"block_out_channels": (32,), "norm_num_groups": 8, "num_vq_embeddings": 8})
    with pytest.raises(ValueError, match="group offloading"):
        autoencoder.enable_group_offload(torch.device("cpu"))


def test_numpys_numbers_and_arrays_are_taken(pipeline):
    latents = torch.randn(2, *pipeline.latent_shape(32, 32), generator=seeded(0)[0])
    tokens, mask = pipeline.encode_prompt(PROMPTS)
    plain = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 2.5, "guidance_rescale": 0.5}
    plain |= {"guidance_interval": (0.25, 1.0), "latents": latents, "prompt_embeds": tokens, "prompt_mask": mask}
    numpys = {"height": np.int64(32), "width": np.int32(32), "num_inference_steps": np.int64(3)}
    numpys |= {"guidance_scale": np.float32(2.5), "guidance_rescale": np.float64(0.5), "latents": latents.numpy()}
    numpys |= {"guidance_interval": np.array([0.25, 1.0]), "prompt_embeds": tokens.numpy(), "prompt_mask": mask.numpy()}
    ones = {"num_images_per_prompt": np.int64(1), "generator": tuple(seeded(1, 2))}
    assert np.array_equal(make(pipeline, None, **plain), make(pipeline, None, **numpys, **ones))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"height": True}, "height True: expected a whole number"),
        ({"height": 32.0}, r"height 32\.0: expected a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps True"),
        ({"num_images_per_prompt": np.bool_(True)}, "num_images_per_prompt True"),
        ({"guidance_scale": True}, "guidance_scale True"),
        ({"guidance_rescale": True}, "guidance_rescale True"),
        ({"guidance_interval": (False, 1)}, "guidance_interval"),
        ({"generator": 3}, r"generator is 3; expected a torch\.Generator"),
        ({"generator": [3, 4]}, r"expected a torch\.Generator"),
        ({"latents": [[0.0]]}, "latents is a list"),
        ({"latents": np.zeros((2, 8, 16, 16), np.int64)}, "int64"),
    ],
)
def test_what_is_no_number_is_refused(pipeline, given, says):
    with pytest.raises(ValueError, match=says):
        make(pipeline, **given)


def test_a_callback_reads_the_call_and_may_change_its_condition(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.interrupt))
        if step == 1:
            pipe._interrupt = True
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    inputs = pipeline._callback_tensor_inputs
    more = {"callback_on_step_end_tensor_inputs": inputs, "num_inference_steps": 4, "guidance_scale": 2.0}
    changed = make(pipeline, callback_on_step_end=callback, **more)
    assert seen == [(4, 2.0, True, False)] * 2 and pipeline.interrupt
    stop = make(pipeline, callback_on_step_end=lambda pipe, i, t, x: setattr(pipe, "_interrupt", i == 1), **more)
    assert np.abs(changed - stop).max() > 1e-4


@pytest.mark.parametrize(("first", "then"), [(2.0, 1.0), (1.0, 4.0), (2.0, 4.0)])
def test_a_callback_may_change_the_guidance_scale(pipeline, first, then):
    def denoise(change=None):
        def callback(pipe, step, timestep, tensors):
            kept.append(tensors["latents"])
            if step == 1 and change is not None:
                pipe._guidance_scale = change

        kept = []
        more = {"num_inference_steps": 4, "guidance_scale": first, "output_type": "latent"}
        return make(pipeline, callback_on_step_end=callback, **more), kept

    changed, kept = denoise(then)
    assert pipeline.guidance_scale == then
    unchanged, same = denoise()
    assert torch.equal(kept[1], same[1]) and (changed - unchanged).abs().max() > 1e-4
    condition, null = pipeline.encode_prompt(PROMPTS), pipeline.null_condition(2)
    x = kept[1]
    with torch.no_grad():
        for time in (0.5, 0.25):  # Euler's steps on the linear path, by hand
            t = torch.full((2,), 1000 * time)
            said, unsaid = (predict(pipeline.noise_predictor, x, t, *given) for given in (condition, null))
            x = x - 0.25 * (unsaid + then * (said - unsaid))
    assert torch.allclose(changed, x, atol=1e-4)


def test_a_tensor_that_no_step_reads_is_refused_of_a_callback(pipeline):
    with pytest.raises(ValueError, match="callback_on_step_end returned: got 'latent', expected one of"):
        make(pipeline, callback_on_step_end=lambda pipe, i, t, x: {"latent": x["latents"]})


def test_a_scheduler_that_is_edited_in_place_is_checked_again(pipeline):
    make(pipeline, num_inference_steps=1)
    kept = pipeline.scheduler
    try:
        pipeline.scheduler.register_to_config(num_train_timesteps=100)
        with pytest.raises(ValueError, match="num_train_timesteps 100; expected 1000"):
            make(pipeline, num_inference_steps=1)
    finally:
        kept.register_to_config(num_train_timesteps=1000)


def test_a_guidance_scale_that_is_none_is_refused_of_a_callback_too(pipeline):
    with pytest.raises(ValueError, match="guidance_scale -1: expected"):
        make(pipeline, callback_on_step_end=lambda pipe, i, t, x: setattr(pipe, "_guidance_scale", -1))


def test_what_encode_prompt_returns_is_named_as_the_call_s_arguments(pipeline, monkeypatch):
    monkeypatch.setattr("diffusers.pipelines.Pipeline", Pipeline, raising=False)  # where diffusers looks for its own
    visitor = ReturnNameVisitor()
    visitor.visit(visitor.get_ast_tree(Pipeline))
    assert visitor.return_names == ["prompt_embeds", "prompt_mask"]
    assert set(visitor.return_names) <= set(inspect.signature(Pipeline.__call__).parameters)


def test_the_text_half_and_the_rest_work_apart(pipeline):
    def is_text(name):
        return "text" in name or "token" in name

    parts = pipeline.components
    text = Pipeline(**{name: part if is_text(name) else None for name, part in parts.items()})
    rest = Pipeline(**{name: None if is_text(name) else part for name, part in parts.items()}, resolution=32)
    rest.set_progress_bar_config(disable=True)
    (tokens, mask), (null_tokens, null_mask) = text.encode_prompt(PROMPTS), text.null_condition(2)
    embeds = {"prompt_embeds": tokens, "prompt_mask": mask, "guidance_scale": 2.0}
    negative = {"negative_prompt_embeds": null_tokens, "negative_prompt_mask": null_mask}
    assert np.array_equal(make(rest, None, **embeds, **negative), make(pipeline, guidance_scale=2.0))
    with pytest.raises(ValueError, match="without text_adapter lacks; give negative_prompt_embeds"):
        make(rest, None, **embeds)


def test_another_pipeline_of_the_same_parts(pipeline):
    class Other(Pipeline):
        pass

    other = Other.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(make(other), make(pipeline)) and other.noise_predictor is pipeline.noise_predictor
    same = ("resolution", "default_steps", "default_guidance", "objective", "stages")
    assert all(other.config[name] == pipeline.config[name] for name in same)


def test_an_interrupt_and_a_scale_are_the_call_s_own(pipeline):
    """Two calls step in turn; one is stopped and changes its scale, the other is not and keeps its own."""
    alone = make(pipeline, num_inference_steps=4, guidance_scale=2.0)
    turn, seen, made = threading.Barrier(2, timeout=60), {}, {}

    def stop(pipe, i, t, tensors):
        turn.wait()
        pipe._guidance_scale, pipe._interrupt = 5.0, True
        turn.wait()
        return {}

    def watch(pipe, i, t, tensors):
        if i == 0:
            turn.wait()
            turn.wait()
        seen[i] = (pipe.interrupt, pipe.guidance_scale, pipe.num_timesteps)
        return {}

    def call(name, steps, callback):
        more = {"num_inference_steps": steps, "guidance_scale": 2.0, "callback_on_step_end": callback}
        made[name] = make(pipeline, **more)

    calls = [threading.Thread(target=call, args=a) for a in (("stopped", 7, stop), ("watched", 4, watch))]
    for thread in calls:
        thread.start()
    for thread in calls:
        thread.join()
    assert seen == dict.fromkeys(range(4), (False, 2.0, 4))
    np.testing.assert_array_equal(made["watched"], alone)


def test_a_call_can_be_stopped_from_another_thread(pipeline):
    steps, begun, told = [], threading.Event(), threading.Event()

    def count(pipe, i, t, tensors):
        steps.append(i)
        begun.set()
        assert told.wait(60)
        return {}

    more = {"num_inference_steps": 5, "callback_on_step_end": count}
    thread = threading.Thread(target=make, args=(pipeline,), kwargs=more)
    thread.start()
    assert begun.wait(60)
    pipeline._interrupt = True
    told.set()
    thread.join()
    assert steps == [0]


def test_accelerate_is_asked_for_and_keeps_the_pictures(saved, capfd, monkeypatch):
    pipeline = loaded(saved)
    assert "forward" not in vars(pipeline.noise_predictor)  # nothing is compiled by loading
    before = make(pipeline)
    monkeypatch.setenv("CC", "no-such-compiler")
    pipeline.accelerate()
    assert "note: noise_predictor: not accelerated, there is no C compiler" in capfd.readouterr().err
    assert np.array_equal(make(pipeline), before)
    monkeypatch.delenv("CC")
    if compiler() is None:
        missing("no C compiler (cc); apt-get install gcc")
    pipeline.accelerate()
    assert "forward" in vars(pipeline.noise_predictor) and not capfd.readouterr().err
    np.testing.assert_allclose(make(pipeline), before, atol=1e-4)
