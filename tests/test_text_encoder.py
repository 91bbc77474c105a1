import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from sd_mini import shapes
from sd_mini.text_encoder import TextAdapter, TextStage, clip_tokenizer, load_encoder, small_clip

CAPTIONS = [text for scene in shapes.sample_scenes(200) for text in shapes.captions(scene)]


@pytest.fixture(scope="module")
def stage():
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(CAPTIONS, 700, 20)
    encoder = small_clip(tokenizer, 32, layers=2, heads=2, max_length=20)
    return TextStage(tokenizer, encoder.eval(), TextAdapter(32, 32, 48, depth=2, heads=4, max_length=20).eval())


def test_the_tokenizer_takes_any_text_and_gives_it_back(stage):
    for text in ("a small red circle", "naïve café", "日本語 🎈", "zebra!?", "\u200f mixed"):
        ids = stage.tokenizer(text)["input_ids"]
        assert ids.count(stage.tokenizer.eos_token_id) == 1 and ids[-1] == stage.tokenizer.eos_token_id
        if text.isascii():
            assert stage.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_words_of_the_captions_are_single_tokens(stage):
    words = {word for text in CAPTIONS for word in text.split() if word.isalpha()}
    whole = [w for w in words if len(stage.tokenizer(w)["input_ids"]) == 3]
    assert len(whole) / len(words) > 0.9


def test_shapes_scale_and_mask(stage):
    with torch.no_grad():
        out = stage.encode(CAPTIONS[:64])
    assert out.tokens.shape == (64, 20, 48) and out.mask.shape == (64, 20) and out.pooled.shape == (64, 48)
    assert out.tokens[~out.mask].abs().max() == 0
    assert out.tokens[out.mask].square().mean().sqrt().item() == pytest.approx(1.04, abs=0.1)


def test_a_prompt_does_not_depend_on_its_batch(stage):
    with torch.no_grad():
        together, alone = stage.encode(CAPTIONS[:5]), stage.encode(CAPTIONS[3:4])
    torch.testing.assert_close(together.tokens[3:4], alone.tokens, rtol=0, atol=1e-5)


def test_padding_is_never_seen(stage):
    ids, mask = stage.tokenize(CAPTIONS[:4])
    other = torch.where(mask, ids, 7)
    with torch.no_grad():
        a, b = stage.encode_ids(ids, mask), stage.encode_ids(other, mask)
    torch.testing.assert_close(a.tokens, b.tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.pooled, b.pooled, rtol=0, atol=1e-5)


def test_tokens_keep_each_words_identity_and_place(stage):
    """The same word in two captions is nearer to itself than to any other word of the captions."""
    with torch.no_grad():
        a, b = stage.encode(["a small red circle", "one large red cross"]).tokens[:, 1:5]
    nearest = torch.cdist(a, b).argmin(1)
    assert nearest[2] == 2  # red, third word of both


def test_null_is_one_learned_token(stage):
    null = stage.null(3)
    assert null.mask.sum(1).tolist() == [1, 1, 1] and torch.equal(null.tokens[0], null.tokens[2])
    null.pooled.sum().backward()
    assert stage.adapter.null_state.grad is not None
    stage.adapter.zero_grad()


def test_depth_zero_is_a_projection_without_mixing():
    torch.manual_seed(0)
    adapter = TextAdapter(16, 16, 16, depth=0, heads=2, max_length=8)
    states, mask = torch.randn(1, 8, 16), torch.ones(1, 8, dtype=torch.bool)
    changed = states.clone()
    changed[0, 5] += 1
    moved = (adapter(states, states, mask).tokens - adapter(changed, states, mask).tokens).abs().sum(-1)[0]
    assert (moved > 0).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [("", "is empty"), ("  \n", "is empty"), (3, "is a int"), (None, "is a NoneType"), ("red " * 40, "at most 20 fit")],
)
def test_bad_prompts_are_refused(stage, prompt, says):
    with pytest.raises(ValueError, match=says):
        stage.encode([prompt])


def test_clip_and_t5_folders_load_as_the_stock_classes(tmp_path, stage):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(stage.tokenizer)}
    clip = CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, **sizes)
    )
    t5 = T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **sizes))
    for model in (clip.eval(), t5.eval()):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        stage.tokenizer.save_pretrained(folder)
        tokenizer, loaded = load_encoder(folder)
        assert type(loaded) is type(model)
        ids, mask = stage.tokenize(["a small red circle"])
        assert tokenizer("a small red circle")["input_ids"] == ids[mask].tolist()
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            torch.testing.assert_close(loaded(input_ids=ids, attention_mask=mask.long()).last_hidden_state, expected)
            adapter = TextAdapter(16, 16, 24, depth=1, heads=2, max_length=20)
            assert TextStage(tokenizer, loaded, adapter).encode(["a small red circle"]).tokens.shape == (1, 20, 24)


def test_a_missing_encoder_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json, model\.safetensors"):
        load_encoder(tmp_path / "nothing")
