"""open_clip models as transformers ones, against open_clip itself on the same weights."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from sd_mini.stages.contract import model_hash
from sd_mini.text_encoder.encoder import Encoder, open_clip_cleaning
from sd_mini.text_encoder.loading import load_open_clip, open_clip_encoder

VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
PROMPTS = ["a small red circle", "Tom &amp;amp; Jerry&#39;s  CAF\u00c3\u00a9", "no punctuation? 12 <3 \U0001f388"]


def save_model(folder, text=(), **model):
    """A tiny random model in the stock format, open_clip_config.json and open_clip_model.safetensors."""
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": {**TEXT, **dict(text)}, **model}
    folder.mkdir(exist_ok=True)
    transform = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": transform}))
    torch.manual_seed(0)
    cls = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    made = cls(**config)
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def assert_golden(name, weights=None):
    stock, _ = load_open_clip(name, weights)
    words = open_clip.get_tokenizer(name)
    encoder = Encoder(*open_clip_encoder(name, weights), words.context_length or 77)
    ids, mask = encoder.tokenize(PROMPTS)
    expected = words(PROMPTS)
    for row, kept, stock_row in zip(ids, mask, expected, strict=True):
        assert row[kept].tolist() == stock_row[: int(kept.sum())].tolist()
    # in float64, where both round alike: in float32 some CPUs' products differ by more than the bound
    stock.double()
    encoder.model.double()
    with torch.no_grad():
        states, hidden = [], encoder(ids, mask)
        getattr(stock, "text", stock).ln_final.register_forward_hook(lambda module, given, made: states.append(made))
        torch.testing.assert_close(hidden.pooled, stock.encode_text(expected), rtol=0, atol=1e-6)
    for row, kept, stock_row in zip(hidden.states, mask, states[0], strict=True):
        torch.testing.assert_close(row[kept], stock_row[: int(kept.sum())], rtol=0, atol=1e-6)
    encoder.model.float()
    return encoder


@pytest.mark.parametrize("model", [{}, {"quick_gelu": True}, {"custom_text": True}])
def test_text_features_are_open_clips_own(tmp_path, model):
    assert_golden(save_model(tmp_path / "model", **model))


def test_an_approximate_activation_is_taken_over(tmp_path):
    text = {"act_kwargs": {"approximate": "tanh"}}
    assert assert_golden(save_model(tmp_path / "model", text, custom_text=True)).model.config.hidden_act == (
        "gelu_pytorch_tanh"
    )


def test_the_same_weights_built_otherwise_are_another_model(tmp_path):
    """Their caches may not be taken for each other."""
    plain, quick = (save_model(tmp_path / str(q), quick_gelu=q) for q in (False, True))
    assert model_hash(open_clip_encoder(plain)[1]) != model_hash(open_clip_encoder(quick)[1])
    assert model_hash(load_open_clip(plain)[0]) != model_hash(load_open_clip(quick)[0])
    assert model_hash(load_open_clip(plain)[0]) == model_hash(load_open_clip(plain)[0])


def test_an_architecture_and_its_weights_file(tmp_path, monkeypatch):
    save_model(tmp_path / "saved")
    configs = tmp_path / "configs"
    configs.mkdir()
    config = json.loads((tmp_path / "saved" / "open_clip_config.json").read_text())["model_cfg"]
    (configs / "ViT-tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(configs)
    assert_golden("ViT-tiny-test", str(tmp_path / "saved" / "open_clip_model.safetensors"))


def test_saved_as_a_transformers_folder_it_keeps_open_clips_cleaning(tmp_path):
    encoder = assert_golden(save_model(tmp_path / "model"))
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder")
    again = Encoder(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), loaded.eval(), 16)
    assert again.clean(PROMPTS[1]) == "tom & jerry's café"
    with torch.no_grad():
        before, after = (e(*e.tokenize(PROMPTS)).pooled for e in (encoder, again))
    assert torch.equal(before, after)


def test_long_texts_keep_the_end_mark_as_open_clip_does(tmp_path):
    name = save_model(tmp_path / "model")
    encoder = Encoder(*open_clip_encoder(name), 16)
    ids, _ = encoder.tokenize(["red circle " * 20], warn=False)
    assert ids[0].tolist() == open_clip.get_tokenizer(name)(["red circle " * 20])[0].tolist()


def test_cleaning_is_open_clips_own():
    for text in (*PROMPTS, "  A\tB\n", "&lt;b&gt;", "\u201cquoted\u201d", "ﬁne"):
        assert open_clip_cleaning(text) == open_clip.tokenizer.get_clean_fn("lower")(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"no_causal_mask": True}, "no causal mask"),
        ({"pool_type": "last"}, "another pooling"),
        ({"proj_bias": True}, "no plain projection"),
        ({"ls_init_value": 0.1}, "blocks of another kind"),
        ({"tokenizer_kwargs": {"clean": "canonicalize"}}, "another tokenizer"),
    ],
)
def test_a_text_half_of_another_kind_is_refused(tmp_path, text, says):
    with pytest.raises(ValueError, match=f"{says}, expected CLIP's own transformer"):
        open_clip_encoder(save_model(tmp_path / "model", text, custom_text=True))


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("ViT-Z-1", "w.pt", "no architecture 'ViT-Z-1'"),
        ("ViT-B-32", "missing.pt", r"no weights file missing\.pt"),
        ("ViT-B-32", None, "no weights file"),
        ("local-dir:/nowhere", None, r"open_clip_config\.json, open_clip_model\.safetensors is missing"),
    ],
)
def test_what_is_not_there_is_named(name, weights, says):
    with pytest.raises(ValueError, match=says):
        load_open_clip(name, weights)
