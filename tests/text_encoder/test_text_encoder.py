import logging

import pytest
import torch

from sd_mini import shapes
from sd_mini.text_encoder.adapter import TextAdapter, TextStage
from sd_mini.text_encoder.encoder import Encoder
from sd_mini.text_encoder.loading import clip_tokenizer, small_clip

CAPTIONS = [text for scene in shapes.sample_scenes(200) for text in shapes.captions(scene)]


def make_stage(lengths=(20,), depth=2, dim=48, **kwargs):
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(CAPTIONS, 700, max(lengths))
    widths = [32, 16][: len(lengths)]
    encoders = [
        Encoder(tokenizer, small_clip(tokenizer, w, 2, 2, n).eval(), n) for w, n in zip(widths, lengths, strict=True)
    ]
    adapter = TextAdapter(widths, widths, widths, lengths, dim, depth=depth, heads=4, **kwargs)
    return TextStage(encoders, adapter.eval())


@pytest.fixture(scope="module")
def stage():
    return make_stage()


def test_shapes_scale_and_mask(stage):
    with torch.no_grad():
        out = stage.encode(CAPTIONS[:64])
    assert out.tokens.shape == (64, 20, 48) and out.mask.shape == (64, 20) and out.pooled.shape == (64, 48)
    assert out.tokens[~out.mask].abs().max() == 0
    assert out.tokens[out.mask].square().mean().sqrt().item() == pytest.approx(1.04, abs=0.1)


def test_a_prompt_does_not_depend_on_those_beside_it(stage):
    """However long they are: prompts are encoded in buckets of like length, and put back in their order."""
    prompts = [f"{'a ' * (i % 7)}red circle" for i in range(300)] + CAPTIONS[:300]
    with torch.no_grad():
        together = stage.encode(prompts)
        for number in (0, 3, 299, 300, 599):
            alone = stage.encode([prompts[number]])
            torch.testing.assert_close(together.tokens[number], alone.tokens[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(together.pooled[number], alone.pooled[0], rtol=0, atol=1e-5)
            assert torch.equal(together.mask[number], alone.mask[0])


def test_padding_is_never_seen(stage):
    (ids, mask) = stage.tokenize([*CAPTIONS[:4], "cross"])[0]
    other = torch.where(mask, ids, 7)
    with torch.no_grad():
        a, b = (stage.adapter(stage.hidden([(x, mask)])) for x in (ids, other))
    torch.testing.assert_close(a.tokens, b.tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.pooled, b.pooled, rtol=0, atol=1e-5)


def test_tokens_keep_each_words_identity_and_place(stage):
    """The same word in two captions is nearer to itself than to any other word of the captions."""
    with torch.no_grad():
        a, b = stage.encode(["a small red circle", "a large red cross"]).tokens[:, 1:5]
    nearest = torch.cdist(a, b).argmin(1)
    assert nearest[2] == 2  # red, third word of both


def test_null_is_one_learned_token(stage):
    null = stage.null(3)
    assert null.tokens.shape == (3, 20, 48) and null.mask.sum(1).tolist() == [1, 1, 1]
    assert torch.equal(null.tokens[0], null.tokens[2])
    null.pooled.sum().backward()
    assert stage.adapter.null_state.grad.abs().sum() > 0
    stage.adapter.zero_grad()


def test_depth_zero_is_a_projection_without_mixing():
    stage = make_stage(depth=0)
    with torch.no_grad():
        hidden = stage.hidden(stage.tokenize(["a small red circle"]))[0]
        changed = hidden.states.clone()
        changed[0, 3] += 1
        before, after = (stage.adapter([hidden._replace(states=s)]).tokens[0] for s in (hidden.states, changed))
    assert ((before - after).abs().sum(-1) > 0).nonzero().flatten().tolist() == [3]


def test_without_identity_a_token_is_its_state_alone():
    stage = make_stage(identity_scale=0.0, residual_scale=1.0)
    with torch.no_grad():
        hidden = stage.hidden(stage.tokenize(["a small red circle"]))[0]
        plain = stage.adapter([hidden]).tokens
        other = stage.adapter([hidden._replace(words=torch.randn_like(hidden.words))]).tokens
    assert torch.equal(plain, other)
    assert plain.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)


def test_words_of_a_shifted_and_stretched_encoder_come_out_the_same():
    """What all word vectors share, and the scale of each channel, says nothing about a word."""
    stage = make_stage()
    read, encoder = stage.adapter.inputs[0], stage.encoders[0]
    (ids, mask), vectors = stage.tokenize(CAPTIONS[:4])[0], encoder.model.get_input_embeddings().weight.detach()
    hidden = encoder(ids, mask)
    read.set_words(vectors)
    expected = read(hidden)[0]
    stretch, shift = torch.rand(32) + 0.5, torch.randn(32)
    read.set_words(vectors * stretch + shift)
    torch.testing.assert_close(read(hidden._replace(words=hidden.words * stretch + shift))[0], expected)


def test_standardised_tokens_have_mean_zero_and_unit_scale():
    """Whatever scale the encoder and the adapter leave them on: over those they were measured on, exactly."""
    stage = make_stage(residual_scale=7.0)
    stage.standardise(CAPTIONS)
    with torch.no_grad():
        out = stage.encode(CAPTIONS)
    tokens = out.tokens[out.mask].double()
    torch.testing.assert_close(tokens.mean(0), torch.zeros(48, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens.std(0, correction=0), torch.ones(48, dtype=torch.float64), rtol=0, atol=1e-4)
    assert out.pooled.square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)
    assert out.tokens[~out.mask].abs().max() == 0


def test_statistics_are_saved_with_the_adapter(tmp_path):
    stage = make_stage()
    stage.standardise(CAPTIONS[:50])
    stage.adapter.save_pretrained(tmp_path)
    loaded = TextStage(stage.encoders, TextAdapter.from_pretrained(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded.encode(CAPTIONS[:3]).tokens, stage.encode(CAPTIONS[:3]).tokens)


def test_two_encoders_stand_one_after_the_other_in_fixed_places():
    stage = make_stage(lengths=(12, 20))
    prompts = ["a small red circle", CAPTIONS[0], "cross"]
    with torch.no_grad():
        out = stage.encode(prompts, warn=False)
        alone = stage.encode([prompts[2]])
    assert out.tokens.shape == (3, 32, 48) and out.pooled.shape == (3, 48)
    lengths = [mask.sum(1) for _, mask in stage.tokenize(prompts, warn=False)]
    for row, (a, b) in enumerate(zip(*lengths, strict=True)):
        expected = torch.zeros(32, dtype=torch.bool)
        expected[:a], expected[12 : 12 + b] = True, True
        assert torch.equal(out.mask[row], expected)
    torch.testing.assert_close(out.tokens[2], alone.tokens[0], rtol=0, atol=1e-5)


def test_both_encoders_words_and_pooled_vectors_count():
    stage = make_stage(lengths=(20, 20))
    with torch.no_grad():
        hidden = stage.hidden(stage.tokenize(["a small red circle"]))
        plain = stage.adapter(hidden)
        for number in (0, 1):
            for field in ("states", "words", "pooled"):
                changed = list(hidden)
                changed[number] = hidden[number]._replace(**{field: torch.randn_like(getattr(hidden[number], field))})
                out = stage.adapter(changed)
                assert not torch.allclose(out.tokens if field == "words" else out.pooled,
                                          plain.tokens if field == "words" else plain.pooled)  # fmt: skip


def test_parts_make_the_same_stage_again():
    stage = make_stage(lengths=(12, 20))
    names = ["text_adapter", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
    assert sorted(stage.parts) == names
    again = TextStage.from_parts({**stage.parts, "tokenizer_3": None, "text_encoder_3": None, "scheduler": object()})
    assert [e.max_length for e in again.encoders] == [12, 20] and again.encoders[1].model is stage.encoders[1].model


def test_an_encoder_of_its_own_precision_is_read_in_the_adapters():
    stage, half = make_stage(), make_stage()
    half.encoders[0].model.to(torch.bfloat16)
    with torch.no_grad():
        expected, out = (s.encode(["a small red circle"]) for s in (stage, half))
    assert out.tokens.dtype == torch.float32
    torch.testing.assert_close(out.tokens, expected.tokens, rtol=0, atol=0.1)


def test_parts_of_which_one_is_missing_are_refused():
    parts = make_stage(lengths=(12, 20)).parts
    with pytest.raises(ValueError, match="1 text encoders with their tokenizers, and a text_adapter of 2"):
        TextStage.from_parts({**parts, "text_encoder_2": None})


def test_a_long_prompt_is_cut_with_a_warning_that_names_the_words(stage, caplog):
    long = "a small red circle in the top left " + "and more " * 10 + "zebra"
    with caplog.at_level(logging.WARNING, logger="sd_mini"), torch.no_grad():
        out = stage.encode(["cross", long])
    (ids, _), end = stage.tokenize(["cross", long], warn=False)[0], stage.encoders[0].tokenizer.eos_token_id
    assert out.mask[1].all() and ids[1, -1] == end and (ids[1] == end).sum() == 1
    assert "zebra" in caplog.text and "more than 20 tokens" in caplog.text and "top left" not in caplog.messages[0][90:]


def test_strict_refuses_a_long_prompt(stage):
    with pytest.raises(ValueError, match=r"more than 20 tokens.*shorten it by"):
        stage.encode(["red " * 40], strict=True)


def test_many_cut_prompts_are_told_in_a_few_lines(stage, caplog):
    with caplog.at_level(logging.WARNING, logger="sd_mini"):
        stage.tokenize(["red " * 40] * 50)
    assert len(caplog.messages) == 4 and "50 of 50" in caplog.messages[-1]
