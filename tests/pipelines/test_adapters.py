"""LoRA by diffusers' calls: pictures equal those of weights to which the products are added by hand."""

import copy

import accelerate
import numpy as np
import pytest
import torch
from huggingface_hub.file_download import repo_folder_name
from safetensors.torch import save_file

from sd_mini import Pipeline, lora, png
from sd_mini.errors import UserError
from sd_mini.pipelines.generation import generate
from sd_mini.pipelines.image_to_image import ImageToImagePipeline
from tests.pipelines.test_pipeline_use import make

TARGETS = ("img_qkv_proj", "to_out.0")
RANK, ALPHA = 2, 6


def layers(network):
    return {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(TARGETS)}


@pytest.fixture(scope="module")
def files(talking_pipeline, tmp_path_factory):
    """Two LoRA files in diffusers' format, and each layer's change of weights by both."""
    network, draws = talking_pipeline.noise_predictor, torch.Generator().manual_seed(3)
    found, changes = [], []
    for name in ("a", "b"):
        weights, own = {}, {}
        for layer, linear in layers(network).items():
            down = torch.randn(RANK, linear.in_features, generator=draws)
            up = 0.3 * torch.randn(linear.out_features, RANK, generator=draws)
            weights |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
            own[layer] = up @ down  # without metadata alpha is the rank
        assert weights
        folder = tmp_path_factory.mktemp(name)
        save_file(weights, folder / lora.DIFFUSERS_WEIGHTS)
        found.append(folder)
        changes.append(own)
    return found, changes


@pytest.fixture
def pipeline(talking_pipeline):
    """With a network of its own."""
    own = Pipeline.from_pipe(talking_pipeline, noise_predictor=copy.deepcopy(talking_pipeline.noise_predictor))
    own.set_progress_bar_config(disable=True)
    return own


def by_hand(pipeline, changes, *weights):
    network = copy.deepcopy(pipeline.noise_predictor)
    with torch.no_grad():
        for change, weight in zip(changes, weights, strict=True):
            for name, linear in layers(network).items():
                linear.weight += weight * change[name]
    changed = Pipeline.from_pipe(pipeline, noise_predictor=network)
    return make(changed)


def assert_same(a, b):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_two_adapters_by_weight(pipeline, files):
    folders, changes = files
    plain, both = make(pipeline), by_hand(pipeline, changes, 0.5, 2.0)
    first = by_hand(pipeline, changes[:1], 1.0)
    assert np.abs(both - plain).max() > 1e-2 and np.abs(first - plain).max() > 1e-2
    pipeline.load_lora_weights(folders[0], adapter_name="a")
    assert_same(make(pipeline), first)
    pipeline.load_lora_weights(folders[1] / lora.DIFFUSERS_WEIGHTS)
    assert pipeline.get_list_adapters() == {"noise_predictor": ["a", "default_0"]}
    assert pipeline.get_active_adapters() == ["default_0"]
    assert_same(make(pipeline), by_hand_of(pipeline, files, 0.0, 1.0))
    pipeline.set_adapters(["a", "default_0"], [0.5, 2.0])
    assert_same(make(pipeline), both)
    pipeline.disable_lora()
    assert pipeline.get_active_adapters() == []
    assert_same(make(pipeline), plain)
    pipeline.enable_lora()
    pipeline.delete_adapters("default_0")
    pipeline.set_adapters("a")
    assert_same(make(pipeline), first)
    pipeline.unload_lora_weights()
    assert np.array_equal(make(pipeline), plain) and not lora.is_adapted(pipeline.noise_predictor)
    pipeline.load_lora_weights(folders[0])  # once more, after all are gone
    assert_same(make(pipeline), first)


def by_hand_of(pipeline, files, *weights):
    """As `by_hand`, of a pipeline that has adapters already."""
    network = copy.deepcopy(pipeline.noise_predictor)
    bare = Pipeline.from_pipe(pipeline, noise_predictor=network)
    bare.unload_lora_weights()
    return by_hand(bare, files[1], *weights)


def test_fused_into_the_weights_and_out_again(pipeline, files):
    folders, changes = files
    plain, half = make(pipeline), by_hand(pipeline, changes[:1], 0.5)
    pipeline.load_lora_weights(folders[0], "a")
    pipeline.fuse_lora(lora_scale=0.5, safe_fusing=True)
    assert pipeline.num_fused_loras == 1
    assert_same(make(pipeline), half)
    pipeline.unfuse_lora()
    assert pipeline.num_fused_loras == 0
    pipeline.disable_lora()
    assert_same(make(pipeline), plain)
    pipeline.enable_lora()
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert_same(make(pipeline), half)  # the scale of `fuse_lora` stays, as diffusers' does


def test_an_adapter_is_written_as_it_was_read(pipeline, files, tmp_path):
    folders, _ = files
    pipeline.load_lora_weights(folders[0], "a")
    expected = make(pipeline)
    pipeline.save_lora_weights(tmp_path)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path)
    assert np.array_equal(make(pipeline), expected)


def test_pictures_name_the_adapters_they_were_made_with(pipeline, files):
    settings = png.Settings(prompt="a red circle", num_inference_steps=2)
    plain = generate(pipeline, settings)[1]
    pipeline.load_lora_weights(files[0][0], "a")
    adapted = generate(pipeline, settings)[1]
    pipeline.set_adapters("a", 0.5)
    halved = generate(pipeline, settings)[1]
    assert len({one.stages.get("noise_predictor") for one in (plain, adapted, halved)}) == 3
    pipeline.unload_lora_weights()
    assert generate(pipeline, settings)[1] == plain


def test_pipelines_of_one_network_record_what_is_merged_into_it(pipeline, files):
    sibling = ImageToImagePipeline.from_pipe(pipeline)
    third = Pipeline.from_pipe(sibling)
    apart = Pipeline.from_pipe(pipeline, noise_predictor=copy.deepcopy(pipeline.noise_predictor))
    before = dict(pipeline.config.stages)
    sibling.load_lora(files[0][0])
    merged = dict(sibling.config.stages)
    assert merged != before and {**merged, "noise_predictor": before.get("noise_predictor")} == before
    assert pipeline.config.stages == third.config.stages == merged and apart.config.stages == before
    pipeline.load_lora_weights(files[0][1])
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert pipeline.config.stages == third.config.stages == sibling.config.stages != merged
    assert apart.config.stages == before


def test_adapters_of_different_layers(pipeline, talking_pipeline, tmp_path):
    """Each has layers that the other has not; and names that are parts of layers' names."""
    network, draws, changes = talking_pipeline.noise_predictor, torch.Generator().manual_seed(4), []
    for target, name in (("img_qkv_proj", "0"), ("to_out.0", "attention")):
        own, weights = {}, {}
        for layer, linear in layers(network).items():
            if layer.endswith(target):
                weights[f"{layer}.lora_A.weight"] = torch.randn(RANK, linear.in_features, generator=draws)
                weights[f"{layer}.lora_B.weight"] = 0.3 * torch.randn(linear.out_features, RANK, generator=draws)
                own[layer] = weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]
            else:
                own[layer] = torch.zeros_like(linear.weight)
        changes.append(own)
        expected = by_hand(talking_pipeline, changes[-1:], 1.0)
        both = by_hand(talking_pipeline, changes, *[0.5] * len(changes))
        pipeline.load_lora_weights(weights, name)
        assert_same(make(pipeline), expected)
    pipeline.set_adapters(["0", "attention"], [0.5, 0.5])
    assert pipeline.get_active_adapters() == ["0", "attention"]
    assert_same(make(pipeline), both)
    assert generate(pipeline, png.Settings(prompt="a red circle", num_inference_steps=2))[1].stages
    for name in ("0", "attention"):
        pipeline.save_lora_weights(tmp_path / name, name)
    again = Pipeline.from_pipe(talking_pipeline, noise_predictor=copy.deepcopy(talking_pipeline.noise_predictor))
    again.set_progress_bar_config(disable=True)
    again.load_lora_weights(tmp_path / "attention", "b")
    again.load_lora_weights(tmp_path / "0", "a")
    again.set_adapters(["b", "a"], 0.5)
    assert_same(make(again), both)


def test_what_is_fused_and_forgotten_is_recorded(pipeline, files, tmp_path):
    before = dict(pipeline.config.stages)
    pipeline.load_lora_weights(files[0][0], "a")
    with pytest.raises(UserError, match="unload_lora_weights"):
        pipeline.save(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()
    pipeline.fuse_lora(adapter_names="a")
    with pytest.raises(UserError, match="another LoRA is fused"):
        pipeline.load_lora_weights(files[0][1], "b")
    expected = make(pipeline)
    pipeline.unload_lora_weights()
    assert pipeline.config.stages["noise_predictor"] != before.get("noise_predictor")
    pipeline.save(tmp_path / "pipeline")
    again = Pipeline.from_pretrained(tmp_path / "pipeline")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(make(again), expected) and again.config.stages == pipeline.config.stages


def test_a_network_that_is_offloaded_by_layers_takes_none(pipeline, files):
    accelerate.cpu_offload(pipeline.noise_predictor, torch.device("cpu"))
    with pytest.raises(UserError, match="offloaded by layers"):
        pipeline.load_lora_weights(files[0][0])
    assert not lora.is_adapted(pipeline.noise_predictor)


def test_a_refused_adapter_changes_nothing(pipeline, tmp_path):
    pipeline.noise_predictor.requires_grad_(True)
    with pytest.raises(UserError):
        pipeline.load_lora_weights(tmp_path)
    assert all(p.requires_grad for p in pipeline.noise_predictor.parameters())


def test_what_is_refused(pipeline, files, tmp_path):
    with pytest.raises(UserError, match="no adapter is loaded"):
        pipeline.save_lora_weights(tmp_path)
    pipeline.load_lora_weights(files[0][0], "a")
    for call, part in (
        (lambda: pipeline.load_lora_weights(files[0][1], "a"), "loaded already"),
        (lambda: pipeline.load_lora_weights(files[0][1], "a.b"), "dot"),
        (lambda: pipeline.load_lora_weights(tmp_path), "neither"),
        (lambda: pipeline.load_lora_weights(files[0][1], low_cpu_mem_usage=True), "unknown option low_cpu_mem_usage"),
        (lambda: pipeline.load_lora_weights(files[0][1], weight_name="other.safetensors"), "other.safetensors"),
        (lambda: pipeline.set_adapters("b"), "adapter_names: got 'b'"),
        (lambda: pipeline.set_adapters(["a"], [1.0, 2.0]), "2 adapter_weights for 1"),
        (lambda: pipeline.fuse_lora(adapter_names=["b"]), "adapter_names: got 'b'"),
        (lambda: pipeline.delete_adapters("b"), "adapter_names: got 'b'"),
    ):
        with pytest.raises(UserError, match=part):
            call()
    assert pipeline.get_list_adapters() == {"noise_predictor": ["a"]}


def on_the_hub(cache, name, folder):
    """A folder as the hub's cache holds a repository that was downloaded."""
    commit = "0" * 40
    repository = cache / repo_folder_name(repo_id=name, repo_type="model")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(folder)


def test_by_hub_name(talking_pipeline, files, tmp_path):
    talking_pipeline.save(tmp_path / "pipeline")
    on_the_hub(tmp_path / "hub", "user/pictures", tmp_path / "pipeline")
    on_the_hub(tmp_path / "hub", "user/style", files[0][0])
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    pipeline = Pipeline.from_pretrained("user/pictures", **options)
    pipeline.set_progress_bar_config(disable=True)
    assert np.array_equal(make(pipeline), make(talking_pipeline))
    expected = by_hand(pipeline, files[1][:1], 1.0)
    pipeline.load_lora_weights("user/style", **options)
    assert_same(make(pipeline), expected)
    with pytest.raises(UserError, match="user/other: no such folder here, and as a hub name it cannot be loaded"):
        Pipeline.from_pretrained("user/other", **options)
    with pytest.raises(UserError, match="revision"):
        pipeline.load_lora_weights(files[0][1], revision="main")


def test_in_half_precision(talking_pipeline, tmp_path):
    """As everybody has it on a GPU; here the CPU's own half precision."""
    talking_pipeline.save(tmp_path / "pipeline")
    half = Pipeline.from_pretrained(tmp_path / "pipeline").to(torch.float16)
    half.set_progress_bar_config(disable=True)
    pictures = make(half)
    assert half.noise_predictor.dtype == torch.float16 and np.isfinite(pictures).all()
    assert np.abs(pictures - make(talking_pipeline)).mean() < 0.02
