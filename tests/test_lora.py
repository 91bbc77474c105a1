"""LoRA against peft and against diffusers."""

import copy
import json

import pytest
import torch
from diffusers import PRXTransformer2DModel
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from sd_mini import lora, noise_predictor
from sd_mini.errors import UserError
from sd_mini.lora import LoraConfig
from tests.support.networks import DIM, SHAPE, UNET, inputs, tiny


def test_lora_is_peft_s(tmp_path):
    """Same start, same adapters, same output as peft's own model; and our file is one that peft would write."""
    network = tiny()
    reference = get_peft_model(copy.deepcopy(network), PeftConfig(r=4, lora_alpha=8, target_modules=["img_qkv_proj"]))
    plain = noise_predictor.predict(network, *inputs())
    lora.add(network, LoraConfig(rank=4, alpha=8, targets=("img_qkv_proj",)))
    # nothing has changed yet
    torch.testing.assert_close(noise_predictor.predict(network, *inputs()), plain, rtol=0, atol=1e-5)
    assert {n for n, p in network.named_parameters() if p.requires_grad} == set(lora.state(network))
    with torch.no_grad():
        draws = torch.Generator().manual_seed(2)
        theirs = dict(reference.base_model.model.named_parameters())
        for name, tensor in lora.state(network).items():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=draws))
            theirs[name].copy_(tensor)
    adapted = noise_predictor.predict(network, *inputs())
    assert (adapted - plain).abs().max() > 1e-4
    expected = noise_predictor.predict(reference.base_model.model, *inputs())
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-6)
    lora.save(network, tmp_path / "ours", {})
    reference.save_pretrained(tmp_path / "theirs")
    again = tiny()
    lora.load(again, tmp_path / "ours")
    assert torch.equal(noise_predictor.predict(again, *inputs()), adapted)
    merged = copy.deepcopy(again)
    lora.merge(merged)
    assert not lora.is_adapted(merged) and set(merged.state_dict()) == set(tiny().state_dict())
    torch.testing.assert_close(noise_predictor.predict(merged, *inputs()), adapted, rtol=0, atol=1e-5)
    peft_s = tiny()
    lora.load(peft_s, tmp_path / "theirs")
    assert torch.equal(noise_predictor.predict(peft_s, *inputs()), adapted)
    config = json.loads((tmp_path / "theirs" / lora.CONFIG).read_text())
    (tmp_path / "theirs" / lora.CONFIG).write_text(json.dumps(config | {"use_rslora": True}))
    with pytest.raises(ValueError, match="use_rslora is True; expected plain"):
        lora.load(tiny(), tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / lora.WEIGHTS) for who in ("ours", "theirs"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_refused_lora_leaves_the_network_as_it_was(tmp_path):
    """Whatever is wrong with it; and the right one is taken afterwards."""
    right, network = tiny(), tiny()
    lora.add(right, LoraConfig(rank=2))
    lora.save(right, tmp_path / "right", {})
    wide = tiny(hidden_size=64, num_heads=2)
    lora.add(wide, LoraConfig(rank=2))
    lora.save(wide, tmp_path / "wide", {})
    config, weights = (tmp_path / "right" / name for name in (lora.CONFIG, lora.WEIGHTS))
    tensors, said = load_file(weights), json.loads(config.read_text())
    first = sorted(tensors)[0]
    broken = {
        "rank": ({**said, "r": 3}, tensors),
        "words": ({**said, "r": "2"}, tensors),
        "alpha": ({**said, "lora_alpha": 0}, tensors),
        "short": (said, {name: t for name, t in tensors.items() if name != first}),
        "more": (said, {**tensors, "base_model.model.extra.lora_A.weight": tensors[first].clone()}),
        "not finite": (said, {**tensors, first: torch.full_like(tensors[first], torch.nan)}),
    }
    for name, (fields, values) in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / lora.CONFIG).write_text(json.dumps(fields))
        save_file(values, tmp_path / name / lora.WEIGHTS)
    before, modules = copy.deepcopy(network.state_dict()), [type(module) for module in network.modules()]
    for name in ("wide", *broken):
        with pytest.raises(ValueError, match=r"^LoRA [^\n]*$"):
            lora.load(network, tmp_path / name)
        assert [type(module) for module in network.modules()] == modules
        assert all(p.requires_grad for p in network.parameters())
        assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    lora.load(network, tmp_path / "right")
    assert lora.is_adapted(network)


def test_a_lora_that_learned_another_objective_is_refused(tmp_path):
    flow, cosine = {"kind": "flow"}, {"kind": "v_prediction", "schedule": "cosine"}
    network = tiny()
    lora.add(network, LoraConfig(rank=2))
    lora.save(network, tmp_path, {"objective": flow})
    other = tiny()
    with pytest.raises(UserError, match=r"learned for \{'kind': 'flow'\}, but this network predicts"):
        lora.load(other, tmp_path, cosine)
    assert not lora.is_adapted(other)
    lora.load(other, tmp_path, flow)
    lora.load(tiny(), tmp_path)  # whoever does not say what the network predicts


def test_a_lora_of_another_network_is_refused(tmp_path):
    network = tiny(hidden_size=64, num_heads=2)
    lora.add(network, LoraConfig(rank=2))
    lora.save(network, tmp_path, {})
    with pytest.raises(ValueError, match=r"is \(2, 64\), but this network's layer takes \(2, 32\)"):
        lora.load(tiny(), tmp_path)
    deep = tiny(depth=3)
    lora.add(deep, LoraConfig(rank=2))
    lora.save(deep, tmp_path / "deep", {})
    with pytest.raises(ValueError, match=r"adapts blocks\.2.*, which this PRXTransformer2DModel does not have"):
        lora.load(tiny(), tmp_path / "deep")
    weights = tmp_path / lora.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        lora.load(tiny(), tmp_path)
    with pytest.raises(ValueError, match="has no such linear layers; it has"):
        lora.add(tiny(), LoraConfig(rank=2, targets=("to_x",)))


def with_random_adapters(network, targets=("img_qkv_proj",)):
    lora.add(network, LoraConfig(rank=4, alpha=8, targets=targets))
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in lora.state(network).values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=draws))
    return network


class DiffusersPRX(PRXTransformer2DModel, PeftAdapterMixin):
    """PRX with diffusers' own LoRA methods, which its class does not inherit yet."""


def test_lora_is_diffusers_s(tmp_path):
    """A file that diffusers writes is loaded here with the same output, and the other way round."""
    theirs = tiny()
    theirs.__class__ = DiffusersPRX
    theirs.add_adapter(PeftConfig(r=4, lora_alpha=8, target_modules=["img_qkv_proj"]))
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in lora.state(theirs).values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=draws))
    theirs.save_lora_adapter(tmp_path / "theirs")
    expected = noise_predictor.predict(theirs, *inputs())
    ours = tiny()
    assert not torch.allclose(noise_predictor.predict(ours, *inputs()), expected, atol=1e-4)
    lora.load(ours, tmp_path / "theirs")
    assert torch.equal(noise_predictor.predict(ours, *inputs()), expected)
    lora.save(ours, tmp_path / "ours", {"objective": {"kind": "flow"}})
    again = tiny()
    again.__class__ = DiffusersPRX
    again.load_lora_adapter(tmp_path / "ours", weight_name=lora.DIFFUSERS_WEIGHTS)  # diffusers' default prefix
    assert torch.equal(noise_predictor.predict(again, *inputs()), expected)
    # the single file, with the objective recorded in it
    file = tmp_path / "ours" / lora.DIFFUSERS_WEIGHTS
    with pytest.raises(UserError, match="learned for"):
        lora.load(tiny(), file, {"kind": "flow_x"})
    lora.load(tiny(), file, {"kind": "flow"})


def test_lora_files_of_older_diffusers_are_loaded(tmp_path):
    """unet.X.lora.down.weight, without metadata: rank and alpha are the matrices'."""
    adapted = noise_predictor.build("unet", UNET, SHAPE, DIM)
    plain = copy.deepcopy(adapted)
    lora.add(adapted, LoraConfig(rank=2, targets=("to_q",)))
    with torch.no_grad():
        for tensor in lora.state(adapted).values():
            tensor.normal_()
    old = {"lora_A.default": "lora.down", "lora_B.default": "lora.up"}
    weights = {
        "unet." + name.replace(new, old[new]): tensor
        for name, tensor in lora.state(adapted).items()
        for new in old
        if new in name
    }
    save_file(weights, tmp_path / lora.DIFFUSERS_WEIGHTS)
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    lora.load(ours, tmp_path)
    theirs.load_lora_adapter({n: t.clone() for n, t in weights.items()}, prefix="unet")
    outputs = [noise_predictor.predict(network, *inputs()) for network in (ours, theirs, adapted)]
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)
    lora.save(ours, tmp_path / "ours", {})
    again = copy.deepcopy(plain)
    again.load_lora_adapter(tmp_path / "ours", weight_name=lora.DIFFUSERS_WEIGHTS, prefix="unet")
    torch.testing.assert_close(noise_predictor.predict(again, *inputs()), outputs[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "transformer.blocks.0.attention.img_qkv_proj.alpha",
            r"no place for blocks.0.attention.img_qkv_proj.alpha",
        ),
        ("text_encoder.layers.0.q_proj.lora_A.weight", "adapts text_encoder.layers.0.q_proj, which this PRX"),
    ],
)
def test_a_diffusers_file_of_more_than_adapters_of_this_network_is_refused(tmp_path, name, says):
    lora.save(with_random_adapters(tiny()), tmp_path, {})
    save_file(load_file(tmp_path / lora.DIFFUSERS_WEIGHTS) | {name: torch.ones(4, 4)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=says):
        lora.load(tiny(), tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="neither adapter_model"):
        lora.load(tiny(), tmp_path / "nothing")
