"""Settings in pictures: `generate --like` makes the same picture again, `inspect` shows what it was made with."""

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_mini import png
from sd_mini.cli import commands as cli
from tests.cli.test_cli import PROMPT, assert_refused
from tests.support.editing import HALF, picture

OTHER = "ein roter Kreis, красный круг, 赤い丸"


def run(*argv):
    assert cli.main([str(word) for word in argv]) == 0


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def made(tiny_run, tmp_path_factory):
    """A picture with many settings that are not the recipe's."""
    path = tmp_path_factory.mktemp("like") / f"{OTHER}.png"
    options = ["--negative", "a blue cross", "--seed", 5, "--steps", 3, "--guidance", 2.5, "--interval", 0.2, 0.8]
    options += ["--rescale", 0.5, "--sampler", "heun", "--height", 48, "--width", 32, "--tile", 8]
    run("generate", tiny_run, OTHER, *options, "--out", path)
    return path


def test_the_same_picture_bit_for_bit(made, tiny_run, tmp_path, capsys):
    run("generate", tiny_run, "--like", made, "--out", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == made.read_bytes()
    assert "note:" not in capsys.readouterr().err
    settings = png.read(made)
    assert (settings.prompt, settings.seed, settings.sampler, settings.height) == (OTHER, 5, "heun", 48)


def test_the_recipe_s_own_values_are_written_out(tiny_run, tmp_path, capsys):
    run("generate", tiny_run, PROMPT, "--out", tmp_path / "a.png")
    settings = png.read(tmp_path / "a.png")
    assert None not in (
        settings.num_inference_steps,
        settings.guidance_scale,
        settings.guidance_interval,
        settings.sampler,
    )
    assert settings.stages and (settings.width, settings.height) == Image.open(tmp_path / "a.png").size
    # once more, with all of them given
    run("generate", tiny_run, "--like", tmp_path / "a.png", "--out", tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_options_change_some(made, tiny_run, tmp_path):
    run("generate", tiny_run, PROMPT, "--like", made, "--seed", 6, "--count", 2, "--out", tmp_path / "a.png")
    for i in range(2):
        expected = png.read(made).model_copy(update={"prompt": PROMPT, "seed": 6 + i})
        assert png.read(tmp_path / f"a_{i}.png") == expected
    assert not np.array_equal(pixels(tmp_path / "a_0.png"), pixels(tmp_path / "a_1.png"))


def test_another_model_is_remarked(made, tiny_run, tmp_path, capsys):
    settings = png.read(made)
    other = settings.model_copy(update={"stages": settings.stages | {"autoencoder": "b" * 64}})
    png.save(picture(), tmp_path / "a.png", other)
    run("generate", tiny_run, "--like", tmp_path / "a.png", "--out", tmp_path / "b.png")
    err = capsys.readouterr().err
    assert err.count("note:") == 1 and "autoencoder bbbbbbbbbbbb" in err
    assert (tmp_path / "b.png").read_bytes() == made.read_bytes()


def test_a_picture_s_own_picture_is_asked_for(tiny_run, tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    HALF.save(tmp_path / "m.png")
    sources = ["--image", tmp_path / "a.png", "--mask", tmp_path / "m.png"]
    run("generate", tiny_run, PROMPT, *sources, "--strength", 0.7, "--out", tmp_path / "b.png")
    capsys.readouterr()
    like = ["generate", tiny_run, "--like", tmp_path / "b.png", "--out", tmp_path / "c.png"]
    assert_refused(like, capsys, "from a picture", "--image")
    assert_refused([*like, *sources[:2]], capsys, "from a mask", "--mask")
    run(*like, *sources)
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "note:" not in capsys.readouterr().err
    picture(size=(48, 32)).rotate(180).save(tmp_path / "a.png")
    picture(size=(48, 32)).convert("L").save(tmp_path / "m.png")
    run(*like, *sources)
    assert capsys.readouterr().err.count("other pixels") == 2


def test_inspect_shows_them_and_obeys_none(made, tmp_path, capsys):
    run("inspect", made)
    out = capsys.readouterr().out
    assert OTHER in out and "seed                   5" in out and "stage noise_predictor" in out
    forged = png.Settings(prompt="a\x1b[2Jb\nsecond <b>")
    png.save(picture(), tmp_path / "f.png", forged)
    run("inspect", tmp_path / "f.png")
    assert r"a\x1b[2Jb\nsecond <b>" in capsys.readouterr().out


def test_options_may_stand_before_the_prompt(tiny_run, tmp_path, capsys):
    run("generate", tiny_run, "--seed", 7, PROMPT, "--steps", 2, "--out", tmp_path / "a.png")
    run("generate", "--steps", 2, "--out", tmp_path / "b.png", tiny_run, PROMPT, "--seed", 7)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    capsys.readouterr()
    assert_refused(["generate", tiny_run, PROMPT, "another"], capsys, "unrecognized arguments: another")


def test_an_older_version_is_remarked_and_a_forged_one_obeys_nothing(made, tiny_run, tmp_path, capsys):
    old = png.read(made).model_copy(update={"version": "0.0.1\x1b[2J", "lora": "style"})
    png.save(picture(), tmp_path / "a.png", old)
    run("generate", tiny_run, "--like", tmp_path / "a.png", "--out", tmp_path / "b.png")
    err = capsys.readouterr().err
    assert r"sd_mini 0.0.1\x1b[2J" in err and "\x1b" not in err
    assert (tmp_path / "b.png").read_bytes() == made.read_bytes()  # with this version's number, and without a LoRA
    chunks = PngInfo()
    chunks.add_itxt("sd_mini", json.dumps({"prompt": "a", "\x1b[2J": 1}))
    picture().save(tmp_path / "c.png", pnginfo=chunks)
    assert cli.main(["inspect", str(tmp_path / "c.png")]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_seeds_end_somewhere(made, tiny_run, tmp_path, capsys):
    last = png.read(made).model_copy(update={"seed": 2**63 - 1})
    png.save(picture(), tmp_path / "a.png", last)
    argv = ["generate", tiny_run, "--like", tmp_path / "a.png", "--count", 2, "--out", tmp_path / "b.png"]
    assert_refused(argv, capsys, "seeds below")


def test_what_is_missing(tiny_run, tmp_path, capsys):
    assert_refused(["generate", tiny_run, "--out", tmp_path / "a.png"], capsys, "PROMPT", "--like")
    picture().save(tmp_path / "plain.png")
    for argv in (["generate", tiny_run, "--like", tmp_path / "plain.png"], ["inspect", tmp_path / "plain.png"]):
        assert_refused(argv, capsys, "holds no settings")


def test_other_formats_say_that_they_keep_none(tiny_run, tmp_path, capsys):
    run("generate", tiny_run, PROMPT, "--out", tmp_path / "a.webp")
    assert "PNG files alone" in capsys.readouterr().err
