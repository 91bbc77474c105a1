import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from sd_mini import lora
from sd_mini.config import read
from sd_mini.data.batches import Batch, Order
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.stages.contract import load_stage
from sd_mini.text_encoder.adapter import TextStage
from tests.support.launching import error_line, launch
from tests.text_encoder.test_open_clip import save_model
from training.engine import side_by_side
from training.text_encoder.config import TextConfig
from training.text_encoder.partial import freeze_rest
from training.text_encoder.task import TextTask

SMOKE = Path(__file__).parents[3] / "training" / "configs" / "smoke" / "text_encoder.yaml"


def make_task(folder, *overrides):
    return TextTask(read(TextConfig, SMOKE, [str(o) for o in overrides]), folder)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, task):
    """Folders of tiny pretrained encoders, BERT and T5, with a tokenizer that reads the captions."""
    found = {}
    words = task.stage.encoders[0].tokenizer
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    t5 = T5Config(vocab_size=len(words), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    models = {"bert": BertModel(BertConfig(vocab_size=len(words), **sizes)), "t5": T5EncoderModel(t5)}
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp("pretrained") / name
        model.save_pretrained(found[name])
        PreTrainedTokenizerFast(
            tokenizer_object=words.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
        ).save_pretrained(found[name])
    return found


def make_batch(task, rows=slice(0, 8)):
    return Batch(0, 0, Order(0, task.count, 8).ids(0), rows)


def test_each_picture_comes_with_a_caption_of_its_own(task):
    inputs = task.inputs(make_batch(task))
    rows = torch.arange(8)
    assert inputs["positive"][rows, inputs["caption"]].all() and not inputs["positive"][rows, inputs["twin"]].any()
    tokenizer = task.stage.encoders[0].tokenizer
    for number, ids in zip(
        make_batch(task).own_ids, inputs["ids_0"][inputs["local_texts"]][inputs["caption"]], strict=True
    ):
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() in task.train.captions[number]


def test_captions_are_drawn_by_their_weights(tmp_path):
    task = make_task(tmp_path, "--data.caption_weights", "[0, 1]")
    inputs = task.inputs(make_batch(task))
    tokenizer = task.stage.encoders[0].tokenizer
    drawn = inputs["ids_0"][inputs["local_texts"]][inputs["caption"]]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in drawn]
    assert texts == [task.train.captions[number][1] for number in make_batch(task).own_ids]


def test_a_part_of_the_batch_sees_all_texts_and_its_own_pictures(task):
    whole, part = task.inputs(make_batch(task)), task.inputs(make_batch(task, slice(4, 8)))
    assert torch.equal(whole["ids_0"], part["ids_0"])
    for name in ("pictures", "thumbnails", "caption", "twin", "positive"):
        assert torch.equal(whole[name][4:], part[name])


def test_the_losses_of_the_parts_are_those_of_the_whole(task):
    objective = task.players["text_encoder"].objective.eval()
    with torch.no_grad():
        whole = objective(**task.inputs(make_batch(task)))[0]
        parts = [objective(**task.inputs(make_batch(task, rows)))[0] for rows in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_plain_projection_learns_and_teaches_nobody(task):
    """Its loss reaches its own weights alone, and without it the others' gradients are the same."""
    objective = task.players["text_encoder"].objective.eval()
    inputs = task.inputs(make_batch(task))
    encoded = objective._encoded({k: v for k, v in inputs.items() if k.endswith("_0")}, inputs["pictures"])
    objective._probe(encoded["picture"], encoded["projected"], inputs["positive"]).sum().backward()
    reached = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached and all(name.startswith("matcher.projection.") for name in reached)
    objective.zero_grad()


PLAIN = ["--loss.late", "0", "--loss.layout", "0", "--loss.twin", "0"]
FROZEN = ["--encoder.name", "{bert}", "--cache_dtype", "float32"]


@pytest.mark.parametrize("words", [[], PLAIN, FROZEN, [*FROZEN, "--encoder_2.max_length", "20"]])
def test_a_pass_in_parts_is_the_whole_pass(tmp_path, pretrained, monkeypatch, words):
    """Each core's share of the texts without the padding that these do not need, and the losses of each core's
    pictures, are the numbers of one pass; of an encoder that is trained, of a frozen one, of both together."""
    more = ["--loss.infonce", "0.5", *(word.format(**pretrained) for word in words)]
    objective = (task := make_task(tmp_path, *more)).players["text_encoder"].objective
    inputs, found = task.inputs(make_batch(task)), []
    for cores in (1, 3):
        monkeypatch.setattr(side_by_side, "cores", lambda cores=cores: cores)
        assert side_by_side.parts_of(objective, 3) == cores
        losses, metrics = objective(**inputs)
        losses.mean().backward()
        found.append((losses.detach(), metrics, {n: p.grad for n, p in objective.named_parameters()}))
        objective.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_word_vectors_stay_the_words_identity(task):
    assert not task.stage.encoders[0].model.get_input_embeddings().weight.requires_grad
    assert not task.stage.adapter.inputs[0].word_in.weight.requires_grad


def test_a_frozen_encoders_states_are_read_from_the_cache_as_they_were(tmp_path, pretrained):
    task = make_task(tmp_path, "--encoder.name", pretrained["bert"], "--cache_dtype", "float32")
    objective = task.players["text_encoder"].objective
    assert not objective.encoders and not any("bert" in name.lower() for name, _ in objective.named_parameters())
    inputs = task.inputs(make_batch(task))
    texts = list(task.texts.numbers)
    chosen = [task.captions[i] for i in make_batch(task).own_ids]
    encoder = task.stage.encoders[0]
    for row, own in enumerate(inputs["local_texts"][inputs["caption"]].tolist()):
        kept = inputs["mask_0"][own]
        with torch.no_grad():
            ways = [encoder(*encoder.tokenize([texts[number]])) for number in chosen[row]]
        close = [
            w.states.shape[1] == kept.sum() and torch.allclose(w.states[0], inputs["states_0"][own][kept], atol=1e-6)
            for w in ways
        ]
        best = ways[close.index(True)]
        torch.testing.assert_close(best.pooled[0], inputs["pooled_0"][own], rtol=0, atol=1e-6)
        assert torch.equal(best.words[0], inputs["words_0"][own][kept])


def test_the_last_layers_alone_are_trained(tmp_path, pretrained):
    task = make_task(tmp_path, "--encoder.name", pretrained["bert"], "--encoder.train_layers", 2)
    model = task.players["text_encoder"].objective.encoders["0"]
    trained = {name.split(".layer.")[1][0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"1", "2"} and not any(p.requires_grad for p in model.embeddings.parameters())
    with pytest.raises(ValueError, match="train_layers 4: BertModel has 3"):
        make_task(tmp_path, "--encoder.name", pretrained["bert"], "--encoder.train_layers", 4)


def test_lora_starts_as_the_encoder_and_merges_into_it(pretrained):
    from sd_mini.text_encoder.loading import load_encoder

    for name in ("bert", "t5"):
        _, model = load_encoder(pretrained[name])
        ids = torch.tensor([[5, 6, 7]])
        before = model(input_ids=ids).last_hidden_state
        freeze_rest(model, 0, lora_rank=2)
        assert all("lora" in n for n, p in model.named_parameters() if p.requires_grad)
        torch.testing.assert_close(model(input_ids=ids).last_hidden_state, before)
        for n, p in model.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p)
        changed, plain = model(input_ids=ids).last_hidden_state, lora.merged(model)
        assert not torch.allclose(changed, before)
        torch.testing.assert_close(plain(input_ids=ids).last_hidden_state, changed, rtol=1e-4, atol=1e-5)
        assert not any("lora" in n for n in plain.state_dict())
        assert any("lora" in n for n in model.state_dict())


ENCODERS = {
    "frozen": lambda p: ["--encoder.name", p["bert"]],
    "lora": lambda p: ["--encoder.name", p["bert"], "--encoder.lora_rank", 2],
    "last layers and a frozen second": lambda p: [
        "--encoder.name", p["t5"], "--encoder.train_layers", 1, "--encoder_2", f"{{name: {p['bert']}, max_length: 20}}"
    ],
    "from scratch beside a frozen one, infonce": lambda p: [
        "--encoder_2", f"{{name: {p['t5']}, max_length: 16}}", "--loss.infonce", 1, "--twins", 2
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
def test_through_all_three_stages_to_a_picture(tmp_path, smoke_run, pretrained, kind):
    """Whatever the encoders: trained, exported, read back by stage 3, joined, saved and loaded as a pipeline."""
    overrides = [str(o) for o in ENCODERS[kind](pretrained)]
    assert launch("text_encoder", tmp_path, *overrides) == 0
    (tmp_path / "autoencoder").symlink_to(smoke_run / "autoencoder")
    assert launch("noise_predictor", tmp_path) == 0
    pipeline = Pipeline.from_run(tmp_path)
    pipeline.save(tmp_path / "pipeline")
    loaded = Pipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    made = [
        p("a red circle", generator=torch.Generator().manual_seed(0), output_type="np").images
        for p in (pipeline, loaded)
    ]
    assert np.isfinite(made[0]).all()
    np.testing.assert_allclose(*made, rtol=0, atol=1e-6)
    embeds, mask = loaded.encode_prompt("a red circle")
    again = loaded(
        prompt_embeds=embeds, prompt_mask=mask, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    np.testing.assert_allclose(again, made[0], rtol=0, atol=1e-6)
    stage = TextStage.from_parts(load_stage(tmp_path / "text_encoder" / "final").parts)
    with torch.no_grad():
        out = stage.encode(["a red circle", "two small blue squares"])
    assert out.tokens[out.mask].std().item() == pytest.approx(1, abs=0.25)


def test_a_frozen_open_clip_tower_and_its_text_half(tmp_path):
    name = save_model(tmp_path / "model")
    assert launch("text_encoder", tmp_path / "run", "--tower.name", name, "--encoder.name", name,
                  "--encoder.max_length", "16", "--train.steps", "3") == 0  # fmt: skip
    stage = load_stage(tmp_path / "run" / "text_encoder" / "final")
    assert type(stage.parts["text_encoder"]).__name__ == "CLIPTextModelWithProjection"
    assert stage.parts["matcher"].config.feature_dim == 8


def test_features_made_elsewhere(tmp_path, capsys):
    np.save(tmp_path / "train.npy", np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32))
    np.save(tmp_path / "valid.npy", np.zeros((15, 12), np.float32))
    arguments = ("--tower.features", str(tmp_path), "--train.steps", "3")
    assert launch("text_encoder", tmp_path / "run", *arguments) == 2
    assert "(15, 12); expected floats, (16, F)" in error_line(capsys.readouterr().err)
    np.save(tmp_path / "valid.npy", np.zeros((16, 12), np.float32))
    assert launch("text_encoder", tmp_path / "run", *arguments) == 0
    assert load_stage(tmp_path / "run" / "text_encoder" / "final").parts["matcher"].config.feature_dim == 12


@pytest.mark.parametrize(
    ("train", "valid", "says"),
    [
        (np.zeros((64, 12)), np.zeros((16, 13)), "12, 13] wide; not alike"),
        (np.zeros((64, 12)), np.full((16, 12), 1e300), "row 0 is not finite in float32"),
        (np.zeros(64), np.zeros((16, 12)), "of shape (64,); expected floats"),
        (np.zeros((64, 12), int), np.zeros((16, 12)), "is int64"),
        (None, np.zeros((16, 12)), "cannot be read"),
    ],
)
def test_features_that_do_not_fit_are_refused(tmp_path, capsys, train, valid, says):
    np.save(tmp_path / "valid.npy", valid)
    if train is None:
        (tmp_path / "train.npy").touch()
    else:
        np.save(tmp_path / "train.npy", train)
    assert launch("text_encoder", tmp_path / "run", "--tower.features", str(tmp_path)) == 2
    assert says in error_line(capsys.readouterr().err)


def test_another_encoder_or_tokenizer_is_another_cache_and_another_training(tmp_path, pretrained):
    first = make_task(tmp_path, "--encoder.name", pretrained["bert"])
    config = json.loads((pretrained["bert"] / "config.json").read_text())
    other = shutil.copytree(pretrained["bert"], tmp_path / "other")
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    second = make_task(tmp_path, "--encoder.name", other)
    assert len(list((tmp_path / "text_states").iterdir())) == 2
    assert first.identity["data"] == second.identity["data"]
    assert first.identity["encoder_0"] != second.identity["encoder_0"]
    make_task(tmp_path, "--encoder.name", other, "--encoder.max_length", 20)
    assert len(list((tmp_path / "text_states").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tower.features", "x", "--tower.name", "y"], "expected one of them"),
        (["--tower.weights", "y"], "give its name too"),
        (["--tower.features", "x", "--augment.shift", "2"], "leave mirror and shift at 0"),
        (["--encoder.lora_rank", "2"], "are for a pretrained encoder"),
        (["--encoder", "{name: x, lora_rank: 2, train_layers: 1}"], "expected one of them"),
        (["--loss.infonce", "1", "--train.accumulation", "2"], "expected accumulation 1"),
        (["--encoder.max_length", "8", "--strict", "true"], "first is in row 0,.*shorten them, raise encoder"),
        (["--encoder.name", "ViT-B-32", "--encoder.weights", "none.pt"], r"no weights file none\.pt"),
        (["--tower.features", "/nowhere"], "tower.features: /nowhere/train.npy cannot be read"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_nothing_written(tmp_path, capsys, arguments, says):

    assert launch("text_encoder", tmp_path / "run", *arguments) == 2
    assert re.search(says, error_line(capsys.readouterr().err))
    assert not (tmp_path / "run" / "text_encoder").exists()


def test_the_share_of_cut_captions_is_said_before_training(tmp_path, capsys):
    task = make_task(tmp_path, "--encoder.max_length", 8)
    said = capsys.readouterr().err
    assert "shapes:train:" in said and "captions (" in said and "more than 8 tokens" in said and "loses" in said
    inputs = task.inputs(make_batch(task))
    end = task.stage.encoders[0].tokenizer.eos_token_id
    last = inputs["mask_0"].sum(1) - 1
    assert (inputs["ids_0"][torch.arange(len(last)), last] == end).all()
