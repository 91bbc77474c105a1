"""Every place that loads weights finds all tensors or refuses the file; and folders as others write them."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import timm
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessor, CLIPTextModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from eval.features.features import open_features
from eval.features.inception import load_inception
from eval.makers.sources import Stock
from sd_mini.diffusion.objective import Process
from sd_mini.noise_predictor.loading import check_process, load_network
from sd_mini.stages.start import load_autoencoder
from sd_mini.text_encoder.loading import clip_tokenizer, load_encoder, load_open_clip, open_clip_training, small_clip
from sd_mini.vision.lpips import load_lpips
from sd_mini.vision.towers import load_tower, open_timm
from tests.support.networks import UNET

DINO = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
KL = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A tiny pipeline in the usual layout: unet/, vae/, text_encoder/, tokenizer/, scheduler/."""
    torch.manual_seed(0)
    words = clip_tokenizer(["a small red circle", "a blue square"], vocab_size=800, max_length=20)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**KL, sample_size=32),
        unet=UNet2DConditionModel(sample_size=16, cross_attention_dim=16, **UNET),
        text_encoder=small_clip(words, 16, layers=1, heads=2, max_length=20),
        tokenizer=words,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("stable") / "diffusion"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def fp16(stable_diffusion, tmp_path):
    """The same, of which only the fp16 variant was fetched."""
    folder = shutil.copytree(stable_diffusion, tmp_path / "fp16")
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    return folder


def other_files(folder, tiny_run):
    torch.save({"x": 0}, folder / "x.pth")
    torch.save([1, 2], folder / "list.pth")
    vae = tiny_run / "autoencoder" / "final" / "autoencoder" / "diffusion_pytorch_model.safetensors"
    return [folder / "x.pth", folder / "list.pth", vae]


def test_weights_of_something_else_are_refused_everywhere(tiny_run, tmp_path):
    loads = {
        "timm": lambda file: open_features(f"timm:test_vit={file}"),
        "teacher": lambda file: load_tower(f"timm:test_vit={file}"),
        "open_clip": lambda file: open_features(f"open_clip:ViT-S-32-alt={file}"),
        "lpips": lambda file: load_lpips("alex", file),
        "inception": lambda file: load_inception(file),
    }
    for file in other_files(tmp_path, tiny_run):
        for load in loads.values():
            with pytest.raises(ValueError, match=r"^[^\n]*$"):
                load(file)


def test_a_timm_file_holds_every_tensor_but_the_heads(tmp_path):
    torch.manual_seed(0)
    stock = timm.create_model("test_vit", num_classes=7).state_dict()
    without_head = {name: tensor for name, tensor in stock.items() if not name.startswith("head.")}
    for name, tensors in (("whole", stock), ("headless", without_head)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        network = open_timm("test_vit", str(tmp_path / f"{name}.safetensors"))
        assert all(torch.equal(tensor, stock[key]) for key, tensor in network.state_dict().items())
    partly = {name: tensor for name, tensor in stock.items() if not name.startswith("blocks.0.")}
    save_file(partly, tmp_path / "partly.safetensors")
    with pytest.raises(ValueError, match=r"its weights lack blocks\.0\.attn\.proj\.bias, .*, .* and 9 more"):
        open_timm("test_vit", str(tmp_path / "partly.safetensors"))


@pytest.mark.parametrize("model", ["test_convnext", "test_resnet", "test_nfnet"])
def test_timm_models_whose_names_are_converted_are_complete(tmp_path, model):
    torch.manual_seed(0)
    stock = timm.create_model(model)
    save_file({name: t.contiguous() for name, t in stock.state_dict().items()}, tmp_path / "w.safetensors")
    found = open_timm(model, str(tmp_path / "w.safetensors")).state_dict()
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in found.items() if "head" not in name)


def test_a_transformers_tower_s_missing_tensor_is_named(tmp_path):
    Dinov2Model(Dinov2Config(**DINO)).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.0.norm1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (lambda name: load_tower(name), lambda name: open_features(name)):
        with pytest.raises(ValueError, match=r"its weights lack encoder\.layer\.0\.norm1\.weight"):
            load(f"transformers:{tmp_path}")


def test_a_pooler_that_is_not_in_the_file_is_not_drawn(tmp_path):
    """A classifier's file has none: its features are the first token's then, the same at every load."""
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    BitImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False).save_pretrained(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 255, (2, 3, 28, 28), dtype=np.uint8)
    first, again = (open_features(f"transformers:{tmp_path}") for _ in range(2))
    assert first.hash == again.hash and np.array_equal(first(pictures), again(pictures))


def test_an_autoencoder_s_missing_tensor_is_named(stable_diffusion, tmp_path):
    folder = shutil.copytree(stable_diffusion / "vae", tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack decoder\.conv_in\.weight"):
        load_autoencoder(folder)


def test_a_stock_pipeline_s_missing_tensor_is_named(stable_diffusion, tmp_path):
    folder = shutil.copytree(stable_diffusion, tmp_path / "p")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unet: its weights lack conv_in\.weight"):
        Stock(folder, 32, "cpu")


def test_folders_of_the_fp16_variant_alone(stable_diffusion, fp16):
    pairs = [(load_autoencoder(folder / "vae")[0].network for folder in (stable_diffusion, fp16))]
    pairs += [(load_network(str(folder), (4, 16, 16), 16) for folder in (stable_diffusion, fp16))]
    pairs += [(load_encoder(folder)[1] for folder in (stable_diffusion, fp16))]
    pairs += [(Stock(folder, 32, "cpu").pipeline.unet for folder in (stable_diffusion, fp16))]
    for plain, variant in pairs:
        for a, b in zip(plain.parameters(), variant.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("inner", ["", "text_encoder"])
def test_a_stable_diffusion_folder_is_a_text_encoder(stable_diffusion, inner):
    tokenizer, model = load_encoder(stable_diffusion / inner)
    expected = CLIPTextModel.from_pretrained(stable_diffusion / "text_encoder")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert tokenizer("a small red circle")["input_ids"][-1] == tokenizer.eos_token_id


def test_a_stable_diffusion_folder_is_an_autoencoder_to_start_from(stable_diffusion):
    autoencoder, contract = load_autoencoder(stable_diffusion)
    stock = AutoencoderKL.from_pretrained(stable_diffusion / "vae")
    assert contract is None and autoencoder.config.kind == "kl"
    assert torch.equal(autoencoder.network.encoder.conv_in.weight, stock.encoder.conv_in.weight)


def test_our_own_pipeline_is_an_autoencoder_to_start_from(tiny_run):
    autoencoder, _ = load_autoencoder(tiny_run / "pipeline")
    assert autoencoder.config.kind == "dc" and autoencoder.config.latents_std is not None


@pytest.mark.parametrize("inner", ["", "unet"])
def test_a_scheduler_beside_a_network_has_to_agree_with_the_objective(stable_diffusion, inner):
    name = str(stable_diffusion / inner)
    check_process(name, Process(kind="v_prediction", schedule="scaled_linear"))
    said = "v_prediction on the scaled_linear schedule, but the objective is"
    mend = "--objective.kind v_prediction --objective.schedule scaled_linear"
    for process, other in (
        (Process(), "flow;"),
        (Process(kind="epsilon", schedule="scaled_linear"), "epsilon on the scaled_linear schedule;"),
        (Process(kind="v_prediction", schedule="linear"), "v_prediction on the linear schedule;"),
        (Process(kind="v_prediction", schedule="scaled_linear", zero_snr=True), "schedule with zero_snr;"),
    ):
        with pytest.raises(ValueError, match=rf"scheduler_config\.json it was trained for {said} .*{other} .*{mend}"):
            check_process(name, process)


def test_a_schedule_that_is_none_of_ours_is_refused(stable_diffusion, tmp_path):
    folder = shutil.copytree(stable_diffusion, tmp_path / "p")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.5}))
    with pytest.raises(ValueError, match="which no objective of ours is"):
        check_process(str(folder), Process(kind="v_prediction", schedule="scaled_linear"))


@pytest.mark.parametrize("place", ["pipeline", "pipeline/noise_predictor"])
def test_a_network_of_ours_has_to_agree_with_the_objective(tiny_run, place):
    check_process(str(tiny_run / place), Process())
    with pytest.raises(ValueError, match=r"it was trained for flow, but the objective is flow_x"):
        check_process(str(tiny_run / place), Process(kind="flow_x"))


def test_a_network_that_stands_alone_says_nothing(stable_diffusion, tmp_path):
    shutil.copytree(stable_diffusion / "unet", tmp_path / "unet")
    check_process(str(tmp_path / "unet"), Process())
    check_process("somebody/some-network", Process())


def test_an_open_clip_architecture_has_its_published_mean_std_and_activation():
    siglip = open_clip_training("ViT-B-16-SigLIP")
    assert siglip["image_mean"] == siglip["image_std"] == (0.5, 0.5, 0.5) and not siglip["force_quick_gelu"]
    assert siglip["image_resize_mode"] == "squash"
    assert open_clip_training("RN50")["force_quick_gelu"]  # whose config alone would say otherwise
    assert open_clip_training("ViT-B-32-quickgelu")["image_mean"] == open_clip.OPENAI_DATASET_MEAN
    with pytest.raises(
        ValueError, match=r"'ViT-B-32': .* quick_gelu, .* some have False and some True; give local-dir:"
    ):
        open_clip_training("ViT-B-32")
    with pytest.raises(ValueError, match=r"'ViT-L-14': .* does not say its mean, .* give local-dir:"):
        open_clip_training("ViT-L-14")
    assert open_clip_training("ViT-S-32-alt") == {"force_quick_gelu": False}  # nobody has published any


def test_an_open_clip_weights_file_is_read_as_its_architecture_was_trained(tmp_path, monkeypatch):
    """A small architecture under a name of which there are published weights."""
    small = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "ViT-tiny-published.json").write_text(
        json.dumps({"embed_dim": 8, "vision_cfg": small, "text_cfg": text})
    )
    open_clip.add_model_config(tmp_path)
    cfg = {"url": "", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny-published", {"some": cfg})
    save_file(open_clip.create_model("ViT-tiny-published").state_dict(), tmp_path / "w.safetensors")
    model, transform = load_open_clip("ViT-tiny-published", str(tmp_path / "w.safetensors"))
    assert type(model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert transform.transforms[-1].mean == cfg["mean"] and transform.transforms[-1].std == cfg["std"]
    tower = load_tower(f"open_clip:ViT-tiny-published={tmp_path / 'w.safetensors'}")
    assert (tower.mean, tower.std) == (cfg["mean"], cfg["std"])


def test_a_hub_name_as_a_teacher_has_its_processor_s_mean_std_and_size(tmp_path):
    """In a process of its own, whose hub cache is a folder here."""
    snapshot = tmp_path / "models--some--dino" / "snapshots" / "abc"
    Dinov2Model(Dinov2Config(**DINO)).save_pretrained(snapshot)
    look = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=14, **look).save_pretrained(snapshot)
    (tmp_path / "models--some--dino" / "refs").mkdir()
    (tmp_path / "models--some--dino" / "refs" / "main").write_text("abc")
    code = """if True:
        import torch
        from sd_mini.vision.towers import load_tower
        tower = load_tower("transformers:some/dino")
        print(list(tower.mean), list(tower.std), tower.side, tuple(tower.grid(torch.zeros(1, 3, 32, 32)).shape))
    """
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "[0.1, 0.2, 0.3] [0.4, 0.5, 0.6] 14 (1, 16, 2, 2)\n", done.stderr


def test_a_teacher_without_an_image_processor_is_refused(tmp_path):
    Dinov2Model(Dinov2Config(**DINO)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its image processor \(preprocessor_config\.json\), .* cannot be had"):
        load_tower(f"transformers:{tmp_path}")
