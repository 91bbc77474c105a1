"""sd-mini generate --image, --mask and --strength: the same pictures as the Python API's, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd_mini import ImageToImagePipeline, InpaintingPipeline
from sd_mini.cli import commands as cli
from sd_mini.cli import generate
from tests.cli.test_cli import DEVICE, PROMPT, assert_refused
from tests.support.editing import HALF, picture


@pytest.fixture
def folder(tmp_path):
    """a.png, and m.png of its size."""
    picture().save(tmp_path / "a.png")
    HALF.save(tmp_path / "m.png")
    return tmp_path


def by_hand(cls, run, seed, *inputs, **more):
    pipeline = cls.from_pretrained(run / "pipeline").to(DEVICE)
    return np.asarray(pipeline(PROMPT, *inputs, generator=torch.Generator().manual_seed(seed), **more).images[0])


def test_pictures_from_a_picture(tiny_run, folder):
    argv = [
        "generate",
        tiny_run,
        PROMPT,
        "--image",
        folder / "a.png",
        "--strength",
        "0.6",
        "--steps",
        "5",
        "--count",
        "2",
    ]
    assert cli.main([str(word) for word in [*argv, "--out", folder / "out.png"]]) == 0
    for seed in range(2):
        expected = by_hand(ImageToImagePipeline, tiny_run, seed, picture(), strength=0.6, num_inference_steps=5)
        assert np.array_equal(np.asarray(Image.open(folder / f"out_{seed}.png")), expected)


def test_a_part_is_repainted(tiny_run, folder, capfd):
    argv = ["generate", tiny_run, PROMPT, "--image", folder / "a.png", "--mask", folder / "m.png"]
    assert cli.main([str(word) for word in [*argv, "--out", folder / "out.png", "--seed", "3"]]) == 0
    # nor does a library warn, as diffusers does of parts that are cast
    assert all("it/s]" in line for line in capfd.readouterr().err.splitlines() if line.strip())
    expected = by_hand(InpaintingPipeline, tiny_run, 3, picture(), HALF)
    assert np.array_equal(np.asarray(Image.open(folder / "out.png")), expected)


def test_the_size_is_the_turned_picture_s(tiny_run, folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(size=(32, 48)).save(folder / "turned.jpg", exif=exif)
    argv = ["generate", str(tiny_run), PROMPT, "--image", str(folder / "turned.jpg"), "--out", str(folder / "out.png")]
    assert cli.main(argv) == 0
    assert Image.open(folder / "out.png").size == (48, 32)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--mask", "m.png"], ["--mask", "give it by --image"]),
        (["--strength", "0.5"], ["--strength", "give it by --image"]),
        (["--image", "none.png"], ["none.png", "no such file"]),
        (["--image", "a.txt"], ["a.txt", "not a picture"]),
        (["--image", "a.png", "--mask", "a.txt"], ["a.txt", "not a picture"]),
        (["--image", "a.png", "--strength", "1.5"], ["--strength", "'1.5'", "0 to 1"]),
        (["--image", "a.png", "--strength", "nan"], ["--strength", "'nan'"]),
        (["--image", "a.png", "--strength", "half"], ["--strength", "'half'"]),
    ],
)
def test_options_are_refused_before_anything_is_loaded(options, parts, tiny_run, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "a.txt").write_text("no picture")
    monkeypatch.setattr(generate, "open_pipeline", lambda folder: pytest.fail("the pipeline was loaded"))
    assert_refused(["generate", tiny_run, PROMPT, *options], capsys, *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--image", "odd.png"], ["image of 33 x 32 px", "nearest size is 32 x 32", "give height and width"]),
        (["--image", "a.png", "--mask", "odd.png"], ["mask_image 0 is 33 x 32 px, its image 32 x 32"]),
        (["--image", "a.png", "--strength", "0"], ["strength 0 leaves none of 2 steps"]),
    ],
)
def test_pictures_that_do_not_fit_are_refused(options, parts, tiny_run, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    picture(size=(33, 32)).save("odd.png")
    assert_refused(["generate", tiny_run, PROMPT, *options, "--out", "out.png"], capsys, *parts)
    assert not (folder / "out.png").exists()
    argv = [
        "generate",
        str(tiny_run),
        PROMPT,
        "--image",
        "odd.png",
        "--height",
        "32",
        "--width",
        "32",
        "--out",
        "out.png",
    ]
    assert cli.main(argv) == 0 and Image.open("out.png").size == (32, 32)
