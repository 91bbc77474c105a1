"""Networks by preset, by class name and from folders; LoRA on them."""

import json

import pytest
import torch
from diffusers import PixArtTransformer2DModel, PRXTransformer2DModel, SanaTransformer2DModel, UNet2DConditionModel

from sd_mini import noise_predictor
from sd_mini.noise_predictor.loading import load_network
from sd_mini.noise_predictor.presets import SIZES, preset
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.stages.contract import load_stage
from tests.support.launching import launch, prepared
from tests.support.networks import DIM, SHAPE, UNET, inputs, tiny
from training.engine.task import TrainConfig
from training.noise_predictor.losses import ObjectiveConfig, PredictorObjective
from training.noise_predictor.network import NetworkConfig, description

SANA = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "patch_size": 2,
}


@pytest.mark.parametrize("kind", ["prx", "pixart", "unet"])
@pytest.mark.parametrize("size", SIZES)
def test_a_preset_is_of_its_size(kind, size):
    with torch.device("meta"):
        network = noise_predictor.build(kind, preset(kind, size), (8, 8, 8), 128)
    count = sum(p.numel() for p in network.parameters())
    assert count == pytest.approx(float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]], rel=0.2)


def test_another_denoiser_by_its_class_name():
    network = noise_predictor.build("SanaTransformer2DModel", SANA, SHAPE, DIM)
    assert isinstance(network, SanaTransformer2DModel)
    latents, t, tokens, mask = inputs()
    made = noise_predictor.predict(network, latents, t, tokens, mask)
    expected = network(latents, tokens, t, encoder_attention_mask=mask).sample
    assert made.shape == latents.shape and torch.equal(made, expected)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("FluxTransformer2DModel", "FluxTransformer2DModel has no encoder_attention_mask"),
        ("AutoencoderKL", "AutoencoderKL has no encoder_attention_mask"),
        ("SD3Transformer2DModel", "has no encoder_attention_mask"),
        ("NoSuchModel", "kind 'NoSuchModel' is unknown"),
        ("LatteTransformer3DModel", "LatteTransformer3DModel.* cannot be built"),
    ],
)
def test_what_is_called_otherwise_is_refused(kind, says):
    with pytest.raises(ValueError, match=says):
        noise_predictor.build(kind, {}, SHAPE, DIM)


@pytest.mark.parametrize("subfolder", ["", "transformer"])
def test_from_a_diffusers_folder(tmp_path, subfolder):
    network = tiny()
    network.save_pretrained(tmp_path / subfolder)
    again = load_network(str(tmp_path), SHAPE, DIM)
    with torch.no_grad():
        outputs = [noise_predictor.predict(one, *inputs()) for one in (network, again)]
    assert torch.equal(*outputs)


def test_from_a_stock_unet_s_folder(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=DIM, **UNET)
    unet.half().save_pretrained(tmp_path / "unet")
    again = load_network(str(tmp_path), SHAPE, DIM)
    assert again.dtype == torch.float32
    for kept, loaded in zip(unet.parameters(), again.parameters(), strict=True):
        assert torch.equal(kept.float(), loaded)
    with pytest.raises(ValueError, match=r"in_channels is 4, but the latents have 8"):
        load_network(str(tmp_path), (8, 8, 8), DIM)
    with pytest.raises(ValueError, match=r"cross_attention_dim is 24, but the prompt embeddings have 32"):
        load_network(str(tmp_path), SHAPE, 32)


def test_folders_that_hold_no_network(tmp_path):
    with pytest.raises(ValueError, match=r"no diffusers network here \(config.json is missing\)"):
        load_network(str(tmp_path), SHAPE, DIM)
    network = tiny()
    network.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_network(str(tmp_path), SHAPE, DIM)
    assert "\n" not in str(error.value)
    tiny(depth=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"depth": 2}))
    with pytest.raises(ValueError, match=r"its weights file lacks blocks\.1"):
        load_network(str(tmp_path), SHAPE, DIM)


def test_a_pixart_with_learned_variance_is_refused(tmp_path):
    fields = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    network = PixArtTransformer2DModel(**fields, norm_num_groups=4, caption_channels=DIM, sample_size=8)
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="out_channels is 8, but the latents have 4"):
        load_network(str(tmp_path), SHAPE, DIM)


def test_a_training_for_something_else_than_its_start_is_refused(smoke_run, tmp_path, capsys):
    from sd_mini.stages.contract import read_contract

    start = smoke_run / "noise_predictor" / "final"
    assert read_contract(start)["objective"]["kind"] == "flow"
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    more = ["--network", f"{{pretrained: {start}}}", "--objective.kind", "flow_x"]
    assert launch("noise_predictor", run, *more) == 2
    assert "it was trained for flow, but the objective is flow_x" in capsys.readouterr().err
    assert not (run / "noise_predictor" / "final").exists()


def test_a_lora_is_trained_exported_and_loaded_again(smoke_run, tmp_path):
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    base = smoke_run / "noise_predictor" / "final" / "noise_predictor"
    more = ["--network.pretrained", str(base), "--network.lora.rank", "2", "--train.muon_lr", "null"]
    more += ["--network.kind", "prx", "--network.network", "{}", "--train.lr", "0.05"]
    assert launch("noise_predictor", run, *more) == 0
    final = load_stage(run / "noise_predictor" / "final", "noise_predictor")
    trained, before = final.parts["noise_predictor"], PRXTransformer2DModel.from_pretrained(base)
    assert set(trained.state_dict()) == set(before.state_dict())
    pipeline = Pipeline.from_run(smoke_run)
    pipeline.load_lora(run / "noise_predictor" / "final" / "noise_predictor" / "lora")
    assert pipeline.config.stages["noise_predictor"] != Pipeline.from_run(smoke_run).config.stages["noise_predictor"]
    assert final.contract["parameters"] == sum(p.numel() for p in before.parameters())  # the adapters are merged
    changed = 0
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(pipeline.noise_predictor.state_dict()[name], tensor, rtol=0, atol=1e-6)
        changed += not torch.equal(tensor, before.state_dict()[name])
    assert 0 < changed < len(trained.state_dict())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"preset": "2m"}, "network.preset '2m': expected one of 1m, 4m"),
        ({"kind": "SanaTransformer2DModel", "preset": "1m"}, "has no presets"),
        ({"pretrained": "x", "preset": "1m"}, "brings its own class and fields; leave out network.preset"),
        ({"lora": {"rank": 4}}, "adapts a network that is there already; give network.pretrained"),
    ],
)
def test_sources_that_do_not_go_together(given, says):
    with pytest.raises(ValueError, match=says):
        NetworkConfig(**given)


def test_the_description_counts():
    """Parameters and memory counted by hand; the FLOPs against 6 N T + 12 L d T^2."""
    depth, width = 4, 64
    network = tiny(depth=depth, hidden_size=width, num_heads=2)
    config = TrainConfig(ema_width=0.1)
    said = description(PredictorObjective(network, ObjectiveConfig()), SHAPE, (6, DIM), config)
    count = sum(p.numel() for p in network.parameters())
    assert f"{count / 1e3:.3g} k parameters, 16 picture tokens and 6 of the prompt" in said
    assert f"{4 * 6 * count / 1e6:.3g} MB of memory" in said  # weights, gradients, two moments, two averages
    expected = 12 * depth * width * 16 * 22  # each picture token attends to 16 + 6, 12 L d T^2 with T^2 as that product
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear):  # 6 N T, with as many rows as a layer sees: prompt, time or picture
            rows = 6 if "txt" in name else 1 if "modulation" in name or "time" in name or "adaLN" in name else 16
            expected += 6 * layer.weight.numel() * rows
    counted = float(said.split(" MFLOPs")[0].rsplit(" ", 1)[-1]) * 1e6
    assert counted == pytest.approx(expected, rel=0.1)
