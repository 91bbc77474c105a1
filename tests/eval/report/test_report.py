"""`python -m eval` on a real tiny run: every number of the report against the same measured by hand, and the page."""

import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from eval.analysis.blame import share_out
from eval.features.features import open_features
from eval.features.reference import FeatureSet
from eval.judge.judge import judge, summarise
from eval.metrics.reconstruction import PROMPTS, reconstruct
from eval.report.gallery import pick_galleries
from eval.report.report import seconds, stages_beside, table
from sd_mini import Pipeline, images, png, shapes
from sd_mini.data.captioned import DataConfig, load
from tests.support.reporting import PROMPTS_ASKED, SEED, SPLITS, STEPS, Page, run

SCORE_FIELDS = {"exact", "soft", "abstain", "n", "low", "high"}


@pytest.fixture(scope="module")
def pipeline(tiny_run):
    loaded = Pipeline.from_pretrained(tiny_run / "pipeline")
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")  # the command's own choice
    loaded.set_progress_bar_config(disable=True)
    loaded.accelerate()  # as the evaluators do, where it can be
    return loaded


@pytest.fixture(scope="module")
def folder(shapes_report):
    return shapes_report


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def asked():
    """Split => scenes and captions, as the protocol says they are drawn."""
    scenes = {split: shapes.sample_scenes(PROMPTS_ASKED, split, 1000 + SEED) for split in SPLITS}
    return {split: (drawn, [shapes.captions(s)[i % 4] for i, s in enumerate(drawn)]) for split, drawn in scenes.items()}


@pytest.fixture(scope="module")
def made(pipeline, asked):
    """The test split's pictures, (N, 3, 32, 32) uint8, in batches of 8 like the report's."""
    captions = asked["test"][1]
    pictures = []
    for start in range(0, len(captions), 8):
        generators = [torch.Generator().manual_seed(i) for i in range(start, min(start + 8, len(captions)))]
        part = captions[start : start + 8]
        pictures += pipeline(part, num_inference_steps=STEPS, guidance_scale=1.5, generator=generators).images
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])


def verdicts_of(pictures, scenes):
    return [judge(np.ascontiguousarray(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)]


def test_report_has_every_field_and_no_other(report, tiny_run):
    assert set(report) == {
        "composition", "ceiling", "chance", "text", "blame", "distances", "diversity", "sweep", "reconstruction",
        "remarks", "seconds", "protocol",
    }  # fmt: skip
    for part in ("composition", "ceiling", "chance"):
        assert tuple(report[part]) == SPLITS
        for split, categories in report[part].items():
            two_objects_only = split == "heldout_relations"
            expected = {"two_objects", "colour", "size", "relation", "binding", "all"}
            assert set(categories) == expected | (set() if two_objects_only else {"one_object", "count", "place"})
            assert all(set(score) == SCORE_FIELDS for score in categories.values())
            assert categories["all"]["n"] == PROMPTS_ASKED
    assert set(report["reconstruction"]) == {"psnr", "psnr_global", "psnr_low", "psnr_high", "ssim", "n"}
    hashes = {
        k: json.loads((tiny_run / k / "final" / "stage.json").read_text())["hash"] for k in report["protocol"]["stages"]
    }
    protocol = dict(report["protocol"])
    assert set(protocol.pop("versions")) == {"torch", "diffusers", "transformers", "open_clip_torch", "timm"}
    assert protocol.pop("device") and len(hashes) == 3
    assert protocol.pop("extractors") == {"FD-mini": open_features("mini").hash}
    assert re.fullmatch("[0-9a-f]{64}", protocol.pop("pipeline_hash"))
    reference = load(DataConfig(split="test", count=1000, seed=500_001_000 + SEED, resolution=32))
    assert protocol.pop("reference_hash") == reference.fingerprint
    assert protocol == {
        "data": "shapes",
        "reference": "shapes:test",
        "reference_count": 1000,
        "reference_resize": "drawn at that size",
        "weights": dict.fromkeys(hashes, "the trained weights at step 1"),
        "prompts": dict.fromkeys(SPLITS, PROMPTS_ASKED),
        "several_of_each": f"{8 * PROMPTS_ASKED} pictures of {PROMPTS_ASKED} prompts",
        "generator_seed": "the picture's index within its split",
        "level": 1,
        "scene_seed": 1000 + SEED,
        "phrasing": "the index modulo their number",
        "steps": STEPS,
        "guidance": 1.5,
        "guidance_rescale": 0.0,
        "guidance_interval": [0.0, 1.0],
        "autoguidance": False,
        "batch": 8,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "resolution": 32,
        "stages": hashes,
        "cpu_count": os.cpu_count(),
    }


def test_enough_prompts_are_asked_by_default():
    assert all(n >= 300 for n in PROMPTS.values())
    kinds = [scene.kind for scene in shapes.sample_scenes(PROMPTS["test"], "test", 1000)]
    assert min(kinds.count("one_object"), kinds.count("two_objects")) >= 150


def test_chance_is_the_verdict_by_the_next_prompt(report, asked, made):
    scenes = asked["test"][0]
    assert report["chance"]["test"] == summarise(verdicts_of(made, [*scenes[1:], scenes[0]]))


def test_the_distance_is_to_other_true_drawings(report, asked, made, pipeline):
    extract = open_features("mini")
    reference = shapes.draw_batch(shapes.sample_scenes(1000, "test", 500_001_000 + SEED), 32)
    known, drawn = FeatureSet.of(extract(reference)), shapes.draw_batch(asked["test"][0], 32)
    found = report["distances"]["FD-mini"]
    assert found["fd"] == pytest.approx(FeatureSet.of(extract(made)).distance(known), rel=1e-6)
    assert found["n"] == PROMPTS_ASKED and found["n_reference"] == 1000 and found["low"] < found["fd"] < found["high"]
    assert "fd_infinity" not in found and "13 pictures, at least 512 needed" in " ".join(report["remarks"])
    shares = {part: one["share"] for part, one in report["blame"]["test"]["FD-mini"]["shares"].items()}
    assert sum(shares.values()) == pytest.approx(found["fd"], rel=1e-6)
    assert shares["floor"] == pytest.approx(FeatureSet.of(extract(drawn)).distance(known), rel=1e-6)
    through = FeatureSet.of(extract(reconstruct(pipeline.autoencoder, drawn, 8))).distance(known)
    assert shares["floor"] + shares["autoencoder"] == pytest.approx(through, rel=1e-6)


def test_the_blame_adds_up_to_what_is_wrong(report):
    for split in SPLITS:
        exact, ceiling = (report[part][split]["all"]["exact"] for part in ("composition", "ceiling"))
        entry = report["blame"][split]["not exact"]
        shares = {part: one["share"] for part, one in entry["shares"].items()}
        assert set(shares) == {"floor", "autoencoder", "text_encoder", "noise_predictor"}
        assert sum(shares.values()) == pytest.approx(1 - exact)
        assert shares["floor"] + shares["autoencoder"] == pytest.approx(1 - ceiling)
        assert all(one["low"] <= one["share"] <= one["high"] for one in entry["shares"].values())
        assert entry["shuffled"] == pytest.approx(1 - report["chance"][split]["all"]["exact"])
    without_text = share_out({"real": 0.0, "autoencoder": 0.1, "made": 0.4})
    assert without_text == pytest.approx({"floor": 0, "autoencoder": 0.1, "rest": 0.3})


def test_the_sweep_s_chosen_scale_is_the_evaluation_s_own(report):
    sweep = report["sweep"]
    assert [point["guidance"] for point in sweep["points"]] == [1.0, 1.5, 4.0] and sweep["chosen"] == 1.5
    chosen = sweep["points"][1]
    assert chosen["n"] == PROMPTS_ASKED and chosen["fd"] == pytest.approx(report["distances"]["FD-mini"]["fd"])
    assert chosen["fit"] == report["composition"]["test"]["all"]["exact"]
    # of the first 64 // 8 prompts
    assert [point["diversity"]["n_prompts"] for point in sweep["points"]] == [8, 8, 8]


def test_the_model_card_lies_by_the_pipeline(report, folder):
    card = (folder.parent / "run" / "pipeline" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n")
    assert f"| FD-mini | {report['distances']['FD-mini']['fd']:.4g} |" in card
    assert "- steps: 2" in card and report["protocol"]["pipeline_hash"] in card


def test_composition_is_the_verdict_on_the_pipelines_pictures(report, asked, made):
    assert report["composition"]["test"] == summarise(verdicts_of(made, asked["test"][0]))


@pytest.mark.parametrize("split", SPLITS)
def test_ceiling_is_the_verdict_on_true_drawings_through_the_autoencoder(split, report, asked, pipeline):
    scenes = asked[split][0]
    pixels = images.to_pixels(shapes.draw_batch(scenes, 32)).to(pipeline.device)
    vae = pipeline.autoencoder
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(part)) for part in pixels.split(8)]).cpu()
    expected = summarise(verdicts_of(images.to_uint8(decoded).numpy(), scenes))
    found = report["ceiling"][split]
    for category, score in expected.items():
        assert found[category] == pytest.approx(score), category
    assert 0 < found["all"]["soft"] < 1  # some facts outlive the tiny autoencoder and some do not


def test_intervals_are_wilsons(report):
    for score in report["ceiling"]["test"].values():
        n, p, z = score["n"], score["exact"], 1.959964
        for bound in (score["low"], score["high"]):  # both solve (p - b)^2 = z^2 b (1 - b) / n
            assert (p - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-6)


def test_reconstruction_is_over_the_test_scenes(report, asked, pipeline):
    drawn = shapes.draw_batch(asked["test"][0], 32).astype(float)
    error = drawn - reconstruct(pipeline.autoencoder, drawn.astype(np.uint8), 8)
    expected = [10 * math.log10(255**2 / np.mean(one**2)) for one in error]
    together = 10 * math.log10(255**2 / np.mean(error**2))
    found = {name: report["reconstruction"][name] for name in ("psnr", "psnr_global", "n")}
    assert found == pytest.approx({"psnr": np.mean(expected), "psnr_global": together, "n": PROMPTS_ASKED})


def test_seconds_are_those_of_the_stages_that_were_joined(report, tiny_run, tmp_path):
    spent = report["seconds"]
    trained = {"text_encoder": 1.5, "autoencoder": 2.25, "noise_predictor": 3.0}
    assert spent == {**trained, "evaluation": spent["evaluation"], "total": spent["total"]}
    assert spent["evaluation"] > 0 and spent["total"] == pytest.approx(
        sum(trained.values()) + spent["evaluation"], abs=0.1
    )
    stages = report["protocol"]["stages"]
    assert stages_beside(tiny_run, stages) == stages_beside(tiny_run / "pipeline", stages)
    other = stages_beside(tiny_run / "pipeline", {**stages, "autoencoder": "0" * 64})
    assert seconds(other, 1.0) == {"text_encoder": 1.5, "noise_predictor": 3.0, "evaluation": 1.0, "total": 5.5}
    assert stages_beside(tmp_path, stages) == {} and seconds({}, 1.0) == {"evaluation": 1.0, "total": 1.0}


def test_the_page_stands_alone_and_shows_the_first_prompts(folder, asked, made):
    page = Page(folder / "report.html")
    assert not page.tags & {"script", "iframe", "object"}
    addresses = [address for address in page.addresses if not address.startswith("#") and address != "data:,"]
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    without_pictures = re.sub(r"base64,[\w+/=]+", "", (folder / "report.html").read_text())
    assert "http" not in without_pictures and "@import" not in without_pictures
    assert set(re.findall(r"url\((.)", without_pictures)) <= {"#"}  # of the figures' own parts
    assert page.alternatives[:PROMPTS_ASKED] == asked["test"][1]
    for shown, picture in zip(page.pictures(), made, strict=False):
        assert np.array_equal(shown.transpose(2, 0, 1), picture)
    for words in (
        "Ceiling",
        "heldout_relations",
        "Which stage is to blame",
        "How far to guide",
        "13 prompts of 13, whatever came of them",
        "scheduler",
        "dB PSNR",
    ):
        assert words in page.text


def test_the_grid_is_saved(folder, asked, made):
    expected = images.grid(list(made), 6, asked["test"][1], 2)
    assert np.array_equal(np.asarray(Image.open(folder / "grid.png")), np.asarray(expected))
    assert sorted(path.name for path in folder.iterdir()) == ["grid.png", "report.html", "report.json"]
    settings = png.read_all(folder / "grid.png")
    assert [(one.prompt, one.seed) for one in settings] == [(p, i) for i, p in enumerate(asked["test"][1])]
    assert settings[0].num_inference_steps == STEPS and settings[0].guidance_scale == 1.5 and settings[0].stages


def test_galleries_are_picked_by_rules():
    values = np.array([1.0] * 30 + [0.5] * 30 + [0.0] * 3)
    pictures = np.zeros((len(values), 3, 32, 32), dtype=np.uint8)
    prompts = [f"prompt {i}" for i in range(len(values))]
    galleries = pick_galleries(pictures, prompts, values, "share", ["note"] * len(values))
    assert [gallery.title for gallery in galleries] == ["In order", "At random", "Best", "Worst"]
    shown = [[tile.prompt for tile in gallery.tiles] for gallery in galleries]
    assert shown[0] == prompts[:24] and shown[2] == prompts[:12] and shown[3] == prompts[:50:-1]
    drawn = np.random.default_rng(0).permutation(63)[:12]
    assert shown[1] == [prompts[i] for i in sorted(drawn)]
    assert "12 lowest of 63 by share" in galleries[3].rule
    assert len(pick_galleries(pictures[:24], prompts[:24], values[:24], "share", ["note"] * 24)) == 1


def test_the_table_has_every_number(report):
    lines = table(report).splitlines()
    assert [line[:13].strip() for line in lines[2:11]] == [
        "one object", "two objects", "count", "colour", "size", "place", "relation", "binding", "all",
    ]  # fmt: skip
    assert lines[1].split() == list(SPLITS)
    assert lines[2].split()[-1] == "-"  # no single objects among the held-out relations
    score, ceiling = (report[part]["test"]["all"] for part in ("composition", "ceiling"))
    interval = f"[{100 * score['low']:.1f}-{100 * score['high']:.1f}]"
    expected = [f"{100 * score['exact']:.1f}", interval, str(PROMPTS_ASKED), f"{100 * ceiling['exact']:.1f}"]
    assert lines[10].split()[1:5] == expected
    assert lines[11].startswith("text stage: test: binding")
    assert lines[12] == f"FD-mini {report['distances']['FD-mini']['fd']:.4g} of 13, KID " + lines[12].split()[-1]
    vendi = report["diversity"]["mini"]["vendi"]
    assert f"diversity within a prompt, Vendi by mini, of the data's: {100 * vendi['share']:.1f} %" in "\n".join(lines)
    assert [line.split(": ")[0] for line in lines if line.startswith("blame")] == [
        "blame, test, not exact",
        "blame, test, FD-mini",
        "blame, heldout_pairs, not exact",
        "blame, heldout_relations, not exact",
    ]
    assert f"{report['reconstruction']['psnr']:.2f} dB" in "\n".join(lines)
    assert "noise predictor 3.0" in lines[-1] and f"total {report['seconds']['total']:.1f}" in lines[-1]


def test_the_same_seed_gives_the_same_report(folder, report, tiny_run, tmp_path, capsys):
    options = ["--data", "shapes", "--prompts", str(PROMPTS_ASKED), "--seed", str(SEED), "--batch", "8"]
    options += ["--steps", str(STEPS), "--guidance", "1.5", "--sweep", "1", "4"]
    out = tmp_path / "report"
    shutil.copytree(folder, out)  # an older report is replaced
    (out / "report.json").write_text("old")
    assert run(tiny_run / "pipeline", out, *options) == 0
    again = json.loads((out / "report.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in report.items() if k != "seconds"}
    assert (out / "grid.png").read_bytes() == (folder / "grid.png").read_bytes()
    assert capsys.readouterr().out == f"{table(again)}\n{out / 'report.html'}\n"
