"""Pictures made by several processes, after a kill, by other people's pipelines, and pictures that lie in a folder."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from eval.__main__ import main
from eval.features.features import open_features
from eval.features.reference import FeatureSet
from eval.makers.generate import Job, Kept, generate
from eval.makers.questions import PromptSet, Question
from eval.makers.sources import Sampling, Stock, open_source
from eval.measure import Tools, measure
from eval.metrics.clip_score import Clip
from sd_mini import shapes
from sd_mini.cli.inspection import inspect
from sd_mini.errors import UserError
from sd_mini.sampling.loop import Guidance
from sd_mini.text_encoder.loading import clip_tokenizer, open_clip_encoder
from tests.support.launching import on_two_ranks
from tests.text_encoder.test_open_clip import save_model

PROMPTS = [f"a small red circle and {i} others" for i in range(11)]
SAMPLING = Sampling(2, Guidance(2.0), 3)


class Silent:
    def update(self, _):
        pass


@pytest.fixture(scope="module")
def ours(tiny_run):
    return open_source(tiny_run / "pipeline", None, "cpu")


@pytest.fixture(scope="module")
def expected(ours):
    return generate(ours, PROMPTS, SAMPLING, Silent())


def jobs(prompts=PROMPTS, sampling=SAMPLING):
    return [Job("test", list(prompts), sampling)]


def test_every_picture_is_its_own_seed_s(ours, expected):
    """Whatever batch it is made in, up to the rounding of the last bits."""
    alone = ours.make(PROMPTS[7:8], [7], SAMPLING)
    assert np.abs(alone[0].astype(int) - expected[7]).max() <= 1
    assert not np.array_equal(expected[0], expected[1])


def test_what_a_killed_evaluation_has_made_is_not_made_again(ours, expected, tmp_path):
    kept = Kept(tmp_path / "report", ours, jobs())
    kept.make()
    assert np.array_equal(kept.read("test"), expected)
    lost = sorted(kept.folder.iterdir())[1]
    lost.unlink()
    made = []
    original = ours.make
    ours.make = lambda prompts, seeds, sampling: made.append(list(seeds)) or original(prompts, seeds, sampling)
    again = Kept(tmp_path / "report", ours, jobs())
    again.make()
    del ours.make
    assert made == [[3, 4, 5]] and np.array_equal(again.read("test"), expected)
    lost.write_bytes(b"cut")
    with pytest.raises(UserError, match="delete it, and it is made again"):
        again.read("test")
    again.delete()
    assert not list(tmp_path.iterdir())


def test_pictures_of_anything_else_are_made_anew(ours, tmp_path):
    other = Sampling(2, Guidance(3.0), 3)
    asked = (jobs(), jobs(PROMPTS[:-1]), jobs(sampling=other))
    folders = {Kept(tmp_path / "report", ours, one).folder for one in asked}
    changed = open_source(ours.folder, None, "cpu")
    changed.hash = "another"
    assert len(folders | {Kept(tmp_path / "report", changed, jobs()).folder}) == 4


def rank(folder, out):
    kept = Kept(out, open_source(folder, None, "cpu"), jobs())
    kept.make(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    (out.parent / f"rank-{os.environ['RANK']}").touch()


def test_two_processes_make_the_same_pictures(ours, expected, tmp_path):
    assert on_two_ranks(rank, ours.folder, tmp_path / "report") == [0, 0]
    kept = Kept(tmp_path / "report", ours, jobs())
    assert len(list(kept.folder.iterdir())) == 4  # batches of 3
    # the children have other numbers of threads, which changes last bits
    assert np.abs(kept.read("test").astype(int) - expected).max() <= 1


def evaluate_ranked(pipeline, out):
    arguments = [str(pipeline), "--data", "shapes", "--out", str(out), "--prompts", "9", "--sweep"]
    assert main([*arguments, "--batch", "4", "--steps", "2"]) == 0


@pytest.mark.slow
def test_two_processes_write_the_report_of_one(tiny_run, tmp_path):
    evaluate_ranked(tiny_run / "pipeline", tmp_path / "one")
    assert on_two_ranks(evaluate_ranked, tiny_run / "pipeline", tmp_path / "two") == [0, 0]
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    for part in ("composition", "ceiling", "protocol"):
        assert one[part] == two[part]
    assert one["distances"]["FD-mini"]["fd"] == pytest.approx(two["distances"]["FD-mini"]["fd"], rel=1e-3)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A Stable Diffusion pipeline, tiny and untrained, in diffusers' own folder."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(PROMPTS, 600, 24)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                          down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=16, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=16,
                                  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
                                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1),
        scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("stock") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


def test_a_stock_pipeline_is_measured(stock, tmp_path, capsys):
    out = tmp_path / "report"
    options = [
        "--prompts",
        "3",
        "--steps",
        "2",
        "--sweep",
        "--features",
        "mini",
        "module:tests.eval.features.test_features:own_network",
    ]
    assert main([str(stock), "--data", "shapes", "--out", str(out), *options]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["protocol"]["pipeline"] == "StableDiffusionPipeline" and report["protocol"]["resolution"] == 32
    assert report["composition"]["test"]["all"]["n"] == 3 and report["protocol"]["guidance"] == 7.5
    assert set(report["distances"]) == {"FD-mini", "FD-own_network"}
    # its autoencoder is a stock one, its text stage is nobody's
    assert report["reconstruction"]["n"] == 3 and "text" not in report
    assert set(report["blame"]["test"]["not exact"]["shares"]) == {"floor", "autoencoder", "rest"}
    assert not {"guidance_interval", "autoguidance", "sampler"} & set(report["protocol"])
    card = (out / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("FOLDER")' in card and "sd_mini" not in card
    assert not (stock / "README.md").exists()
    capsys.readouterr()


def test_a_score_by_the_model_that_conditioned_is_said(stock, tmp_path, capsys):
    """The stock pipeline with an open_clip model's text half in the place of its own, scored by that very model."""
    name = save_model(tmp_path / "clip", {"width": 16})
    _, encoder = open_clip_encoder(name)
    maker = Stock(stock, None, "cpu")
    scenes = shapes.sample_scenes(7, "test", 1000)
    captions, drawn = [shapes.caption(scene, 0) for scene in scenes], shapes.draw_batch(scenes, 32)
    question = Question([PromptSet("test", captions)], drawn, True, "shapes", "0")
    maker.text_encoders = [encoder]
    tools = Tools([open_features("mini")], tmp_path / "cache", clip=Clip(name))
    said = measure(question, {"test": drawn}, maker, tools).remarks
    assert any("also conditioned the pictures" in remark for remark in said)
    maker.text_encoders = []
    assert not any("also conditioned" in remark for remark in measure(question, {"test": drawn}, maker, tools).remarks)


def test_a_stock_pipeline_s_pictures_are_its_own(stock):
    maker = Stock(stock, None, "cpu")
    sampling = Sampling(2, maker.guidance, 2)
    found = maker.make(PROMPTS[:2], [0, 1], sampling)
    pipeline = StableDiffusionPipeline.from_pretrained(stock, safety_checker=None)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    made = pipeline(PROMPTS[:2], num_inference_steps=2, generator=generators).images
    assert np.array_equal(found, np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in made]))


def test_a_stock_pipeline_s_guidance_is_rescaled_as_it_does_it(stock):
    maker = Stock(stock, None, "cpu")
    assert maker.takes == {"guidance_scale", "guidance_rescale"}
    found = maker.make(PROMPTS[:2], [4, 5], Sampling(2, Guidance(9.0, 0.7), 2))
    pipeline = StableDiffusionPipeline.from_pretrained(stock)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    asked = {"num_inference_steps": 2, "guidance_scale": 9.0, "generator": generators}
    made = pipeline(PROMPTS[:2], guidance_rescale=0.7, **asked).images
    assert np.array_equal(found, np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in made]))
    assert not np.array_equal(found, maker.make(PROMPTS[:2], [4, 5], Sampling(2, Guidance(9.0), 2)))


def test_a_pipeline_that_gives_nan_is_refused(stock, tmp_path, capsys):
    broken = shutil.copytree(stock, tmp_path / "broken")
    unet = UNet2DConditionModel.from_pretrained(broken / "unet")
    torch.nn.init.constant_(unet.conv_out.bias, float("nan"))
    unet.save_pretrained(broken / "unet")
    assert (
        main([str(broken), "--data", "shapes", "--out", str(tmp_path / "report"), "--prompts", "2", "--steps", "1"])
        == 2
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "NaN" in said
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]  # nothing half-written


def test_a_pipeline_without_prompts_is_refused(tmp_path, capsys):
    network = UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                          down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMPipeline(network, DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    assert main([str(tmp_path / "pipeline"), "--data", "shapes", "--out", str(tmp_path / "report")]) == 2
    assert "DDPMPipeline takes no prompt; give a text-to-image pipeline" in capsys.readouterr().err


@pytest.fixture
def lying(tmp_path):
    """Pictures of the first 25 scenes that shapes asks for, and their prompts, in a folder."""
    scenes = shapes.sample_scenes(25, "test", 1000)
    prompts = [shapes.captions(scene)[i % 4] for i, scene in enumerate(scenes)]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(shapes.draw_batch(scenes, 48)):
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{number}.png")
    (folder / "prompts.txt").write_text("".join(prompt + "\n" for prompt in prompts))
    return folder


def measure_folder(folder, out, *options):
    return main([str(folder), "--data", "shapes", "--out", str(out), *options])


def test_a_folder_of_pictures_is_measured(lying, tmp_path, capsys):
    name = save_model(tmp_path / "clip")
    assert measure_folder(lying, tmp_path / "report", "--clip", name) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["composition"]["test"]["all"] == pytest.approx(
        {"exact": 1, "soft": 1, "abstain": 0, "n": 25, "low": 25 / (25 + 1.959964**2), "high": 1}
    )
    extract = open_features("mini")
    drawn, reference = (
        FeatureSet.of(extract(shapes.draw_batch(shapes.sample_scenes(n, "test", seed), 48)))
        for n, seed in ((25, 1000), (1000, 500_001_000))
    )
    assert report["distances"]["FD-mini"]["fd"] == pytest.approx(drawn.distance(reference), rel=1e-6)
    clip = report["clip"]
    assert clip["n"] == 25 and clip["hessel"]["mean"] == pytest.approx(clip["x100"]["mean"] / 40)
    assert clip["cosine"]["low"] < clip["cosine"]["mean"] < clip["cosine"]["high"] and clip["cmmd"] > 0
    assert report["protocol"]["pictures"] == str(lying) and "steps" not in report["protocol"]
    assert "CLIP score" in capsys.readouterr().out
    shown = "\n".join(inspect(tmp_path))  # whose report has no reconstruction
    assert "test: exact 100.0 % of 25" in shown and "reconstruction" not in shown


def test_pictures_named_by_metadata_are_the_same(lying, tmp_path):
    prompts = (lying / "prompts.txt").read_text().splitlines()
    rows = [{"file_name": f"{i}.png", "text": prompt} for i, prompt in enumerate(prompts)]
    first = open_source(lying, None, "cpu")
    (lying / "prompts.txt").unlink()
    (lying / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = open_source(lying, None, "cpu")
    assert first.prompts == second.prompts == prompts and np.array_equal(first.pictures, second.pictures)


def with_metadata(folder, name="{}.png"):
    """prompts.txt => metadata.jsonl, whose paths are written as `name`."""
    prompts = (folder / "prompts.txt").read_text().splitlines()
    (folder / "prompts.txt").unlink()
    rows = [{"file_name": name.format(i), "text": prompt} for i, prompt in enumerate(prompts)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_metadata_may_name_pictures_by_absolute_paths(lying, monkeypatch):
    first = open_source(lying, None, "cpu")
    with_metadata(lying, str(lying / "{}.png"))
    monkeypatch.chdir(lying.parent)
    second = open_source(Path(lying.name), None, "cpu")
    assert first.prompts == second.prompts and np.array_equal(first.pictures, second.pictures)


def test_metadata_may_name_pictures_of_sub_folders(lying, capsys):
    """Those of another one are left out, and that is said."""
    first = open_source(lying, None, "cpu")
    for folder in ("some", "other"):
        (lying / folder).mkdir()
    for path in lying.glob("*.png"):
        path.rename(lying / "some" / path.name)
    with_metadata(lying, "some/{}.png")
    Image.new("RGB", (9, 9)).save(lying / "other" / "1.png")
    second = open_source(lying, None, "cpu")
    assert first.prompts == second.prompts and np.array_equal(first.pictures, second.pictures)
    assert "left out 1 file (not in the metadata): other/1.png" in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save(lying / "some" / "more.png")
    with pytest.raises(UserError, match=r"not listed: some/more\.png$"):
        open_source(lying, None, "cpu")


def test_prompts_are_of_the_pictures_beside_them(lying, capsys):
    (lying / "grids").mkdir()
    Image.new("RGB", (9, 9)).save(lying / "grids" / "1.png")
    assert len(open_source(lying, None, "cpu").prompts) == 25
    assert "left out 1 file (not beside prompts.txt): grids/1.png" in capsys.readouterr().err


def test_digits_that_are_no_decimals_are_parts_of_a_name(lying):
    (lying / "24.png").rename(lying / "24\u00b2.png")
    (lying / "23.png").rename(lying / "23\u00b27.png")
    assert len(open_source(lying, None, "cpu").prompts) == 25


def test_several_pictures_of_each_prompt_are_compared_with_each_other(tmp_path):
    scenes = [scene for scene in shapes.sample_scenes(9, "test", 1000) for _ in range(4)]
    captions = [shapes.caption(s, i // 4 % len(shapes.PHRASINGS[s.kind])) for i, s in enumerate(scenes)]
    assert len(set(captions)) == 9
    (folder := tmp_path / "several").mkdir()
    for number, picture in enumerate(shapes.draw_batch(shapes.redrawn(scenes, 5), 48)):
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{number}.png")
    (folder / "prompts.txt").write_text("".join(caption + "\n" for caption in captions))
    assert measure_folder(folder, tmp_path / "report") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["composition"]["test"]["all"]["exact"] == 1 and report["composition"]["test"]["all"]["n"] == 36
    found = report["diversity"]
    assert found["compared_with"] == "fresh drawings of the same captions" and found["mini"]["vendi"]["n_prompts"] == 9
    assert found["mini"]["vendi"]["low"] < 1 < found["mini"]["vendi"]["high"] and "layouts" in found


def test_a_byte_order_mark_and_hidden_files_change_nothing(lying, tmp_path):
    """As an editor on Windows and a disk of macOS leave them: the judge still knows what was asked."""
    prompts = (lying / "prompts.txt").read_text()
    (lying / "prompts.txt").write_bytes(("\ufeff" + prompts.replace("\n", "\r\n")).encode())
    (lying / "._0.png").write_bytes(b"no picture")
    assert measure_folder(lying, tmp_path / "report") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["composition"]["test"]["all"]["exact"] == 1


def test_a_prompt_keeps_what_is_no_newline(lying):
    lines = (lying / "prompts.txt").read_text().splitlines()
    lines[3] = "a red\u2028circle"
    (lying / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    assert open_source(lying, None, "cpu").prompts == lines


def listed_wrongly(folder):
    texts = dict.fromkeys((f"{i}.png" for i in range(25)), "a red circle")
    rows = [{"file_name": name, "text": text} for name, text in texts.items() if name != "7.png"]
    rows[3]["text"] = None
    rows += [{"file_name": "lost.png", "text": "lost"}, {"file_name": "5.png", "text": "again"}]
    (folder / "prompts.txt").unlink()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def two_without_a_text(folder):
    lines = (folder / "prompts.txt").read_text().splitlines()
    lines[2] = lines[10] = " "
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n")


def three_broken(folder):
    for name in ("3.png", "11.png"):
        (folder / name).write_bytes(b"no picture")
    Image.new("RGB", (50, 50)).save(folder / "20.png")


@pytest.mark.parametrize(
    ("harm", "parts"),
    [
        (listed_wrongly, ["not listed: 7.png;", "listed but not there: lost.png;", "listed more than once: 5.png;",
                          "without a text: 3.png (None)"]),
        (two_without_a_text, ["prompts.txt", "without a text: 2.png, 10.png"]),
        (three_broken, ["3.png: not a picture", "11.png: not a picture", "20.png: 50 x 50 px, but 0.png 48 x 48 px"]),
    ],
)  # fmt: skip
def test_all_that_is_wrong_with_a_folder_of_pictures_is_named_at_once(lying, tmp_path, capsys, harm, parts):
    harm(lying)
    assert measure_folder(lying, tmp_path / "report") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(part in error for part in parts), error


def one_prompt_less(folder):
    lines = (folder / "prompts.txt").read_text().splitlines()
    (folder / "prompts.txt").write_text("\n".join(lines[:-1]))


def another_size(folder):
    Image.new("RGB", (50, 50)).save(folder / "7.png")


def not_square(folder):
    for path in folder.glob("*.png"):
        Image.new("RGB", (48, 40)).save(path)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (one_prompt_less, "25 pictures and 24 prompts, expected one prompt a picture"),
        (another_size, "7.png: 50 x 50 px, but 0.png 48 x 48 px; make all of one size"),
        (not_square, "0.png: not square"),
        (lambda folder: (folder / "3.png").write_bytes(b"no picture"), "3.png: not a picture format"),
        (lambda folder: (folder / "prompts.txt").unlink(), "neither prompts.txt nor metadata.jsonl"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "neither a pipeline folder"),
    ],
)
def test_pictures_that_cannot_be_measured_are_refused(lying, tmp_path, capsys, harm, says):
    harm(lying)
    assert measure_folder(lying, tmp_path / "report") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert not (tmp_path / "report").exists()
