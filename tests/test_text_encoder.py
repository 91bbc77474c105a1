import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

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


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
FAMILIES = {
    "clip": lambda n: CLIPTextModel(CLIPTextConfig(vocab_size=n, **SIZES)),
    "clip_projection": lambda n: CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=n, projection_dim=8, **SIZES)),
    "t5": lambda n: T5EncoderModel(T5Config(vocab_size=n, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
    "bert": lambda n: BertModel(BertConfig(vocab_size=n, **SIZES)),
    "gpt2": lambda n: GPT2Model(GPT2Config(vocab_size=n, n_embd=16, n_layer=2, n_head=2)),
}


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_what_the_stock_class_gives(tmp_path, stage, family, padding_side):
    """The reference is each prompt alone and unpadded through the stock model: padding and its side may not show."""
    torch.manual_seed(0)
    model = FAMILIES[family](len(stage.tokenizer)).eval()
    model.save_pretrained(tmp_path)
    words = PreTrainedTokenizerFast(
        tokenizer_object=stage.tokenizer.backend_tokenizer, eos_token="<|endoftext|>", padding_side=padding_side
    )
    assert words.pad_token is None
    words.save_pretrained(tmp_path)
    tokenizer, loaded = load_encoder(tmp_path)
    assert type(loaded) is type(model) and tokenizer.padding_side == "right"
    made = TextStage(tokenizer, loaded, TextAdapter(16, 16, 24, depth=1, heads=2, max_length=20))
    prompts = ["a small red circle", "one large blue square above two green stars", "cross"]
    ids, mask = made.tokenize(prompts)
    assert mask[:, 0].all() and len(set(mask.sum(1).tolist())) == 3
    with torch.no_grad():
        states = loaded(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        for prompt, row, kept in zip(prompts, states, mask, strict=True):
            alone = torch.tensor([words(prompt)["input_ids"]])
            expected = model(input_ids=alone, attention_mask=torch.ones_like(alone)).last_hidden_state[0]
            torch.testing.assert_close(row[kept], expected, rtol=0, atol=1e-6)
        assert made.encode(prompts).tokens.shape == (3, 20, 24)


def test_clips_own_folder_keeps_its_tokenizer_and_pooling(tmp_path, stage):
    """The end token is the one that CLIP pools, whatever follows it."""
    torch.manual_seed(0)
    small_clip(stage.tokenizer, 16, layers=1, heads=2, max_length=20).save_pretrained(tmp_path)
    stage.tokenizer.save_pretrained(tmp_path)
    tokenizer, loaded = load_encoder(tmp_path)
    ids, mask = TextStage(tokenizer, loaded, TextAdapter(16, 16, 24, max_length=20)).tokenize(["a red circle", "cross"])
    assert torch.equal(ids[0], stage.tokenize(["a red circle"])[0][0])
    with torch.no_grad():
        out = loaded(input_ids=ids, attention_mask=mask.long())
    last = mask.sum(1) - 1
    assert (ids[torch.arange(2), last] == tokenizer.eos_token_id).all()
    torch.testing.assert_close(out.pooler_output, out.last_hidden_state[torch.arange(2), last])


def test_an_encoder_and_decoder_in_one_is_refused(tmp_path):
    config = BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=32)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bart': an encoder and a decoder in one"):
        load_encoder(tmp_path)


def test_a_missing_encoder_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json, model\.safetensors"):
        load_encoder(tmp_path / "nothing")
