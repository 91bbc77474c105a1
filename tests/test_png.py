"""Settings in PNG files: what is written is read, by us and by others; forged and damaged files are refused."""

import io
import json
import time

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_mini import png
from sd_mini.errors import UserError

SETTINGS = png.Settings(
    prompt='ein "roter" Kreis <b>&</b>, красный круг, 赤い丸, 🔴',
    negative_prompt="blau\nblue",
    seed=2**62 + 1,
    num_inference_steps=8,
    guidance_scale=3.1,
    guidance_interval=(0.5, 0.9),
    sampler="euler",
    height=64,
    width=48,
    strength=0.6,
    image="c" * 64,
    stages={"noise_predictor": "a" * 64},
)


def picture(width=8):
    return Image.new("RGB", (width, 8), (255, 0, 0))


def test_what_is_written_is_read(tmp_path):
    png.save(picture(), tmp_path / "a.png", SETTINGS)
    assert png.read(tmp_path / "a.png") == SETTINGS
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_disk_that_is_full_half_way_leaves_the_old_picture_and_nothing_beside_it(tmp_path, monkeypatch):
    png.save(picture(), tmp_path / "a.png", SETTINGS)
    before = (tmp_path / "a.png").read_bytes()

    def full(own, path, *given, **options):
        path.write_bytes(before[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        png.save(picture(16), tmp_path / "a.png", SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == before


def test_a_grid_holds_those_of_each_picture(tmp_path):
    others = [SETTINGS, SETTINGS.model_copy(update={"seed": 1, "prompt": "[a]"})]
    png.save(png.attach(picture(16), *others), tmp_path / "grid.png")
    assert png.read_all(tmp_path / "grid.png") == others
    with pytest.raises(UserError, match="grid of 2 pictures"):
        png.read(tmp_path / "grid.png")
    png.save(picture(), tmp_path / "plain.png")
    with pytest.raises(UserError, match="holds no settings"):
        png.read_all(tmp_path / "plain.png")


def test_others_read_it_as_json_and_as_the_web_ui_s_text():
    stream = io.BytesIO()
    png.save(picture(), stream, SETTINGS)
    text = Image.open(stream).text
    assert json.loads(text["sd_mini"])["prompt"] == SETTINGS.prompt
    *prompts, last = text["parameters"].split("\n")
    assert prompts == [SETTINGS.prompt, "Negative prompt: blau", "blue"]
    assert last.startswith(
        "Steps: 8, Sampler: euler, CFG scale: 3.1, Seed: 4611686018427387905, Size: 48x64, Model hash"
    )


def with_chunk(path, text):
    chunks = PngInfo()
    if text is not None:
        chunks.add_itxt("sd_mini", text, zip=True)
    picture().save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "holds no settings"),
        ("{", "cannot be used"),
        ("[" * 100_000, "cannot be used"),
        ("[]", "cannot be used"),
        ('{"prompt": 3}', "prompt: got 3"),
        ('{"prompt": "a", "seed": -1}', "seed: got -1"),
        ('{"prompt": "a", "guidance_scale": NaN}', "guidance_scale"),
        ('{"prompt": "a", "run_command": "rm"}', "run_command: unknown field"),
        ('{"prompt": "a", "height": 1e9}', "height"),
        ('{"prompt": "a", "height": 65536, "width": 65536}', "are more than a picture"),
        ('{"prompt": "a", "strength": 0.5}', "without a picture"),
        ('{"prompt": "a", "mask_image": "ab"}', "without a picture"),
        ('{"seed": 1}', "prompt: missing"),
        ('[{"prompt": "a"}, {"prompt": "a", "sed": 1}]', "did you mean 'seed'"),
        (json.dumps({"prompt": "a", "x" * 300_000: 1}), "unknown field"),
        (json.dumps({"prompt": "a", "stages": {"\x1b[2J": "aa"}}), "stages"),
        (json.dumps({"prompt": "a", "stages": {"n" * 300_000: "aa"}}), "stages"),
        (json.dumps({"prompt": "a" * 500_000}), "prompt"),
        (json.dumps({"prompt": "a" * 3_000_000}), "cannot be read as a PNG"),
    ],
)
def test_forged_settings_are_one_short_line(text, part, tmp_path):
    with pytest.raises(UserError) as refusal:
        png.read(with_chunk(tmp_path / "a.png", text))
    assert part in str(refusal.value) and str(tmp_path / "a.png") in str(refusal.value)
    assert len(str(refusal.value)) < 700 and "VALUE" not in str(refusal.value)


def test_files_that_are_no_png(tmp_path):
    picture().save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.jpg").read_bytes())
    png.save(picture(), tmp_path / "c.png", SETTINGS)
    (tmp_path / "d.png").write_bytes((tmp_path / "c.png").read_bytes()[:60])
    for name, part in (
        ("a.jpg", "as a PNG"),
        ("b.png", "as a PNG"),
        ("d.png", "d.png"),
        ("missing.png", "no such file"),
    ):
        with pytest.raises(UserError, match=part):
            png.read(tmp_path / name)


def test_fifty_megabytes_are_read_without_their_pixels(tmp_path):
    png.save(picture(), tmp_path / "a.png", SETTINGS)
    with (tmp_path / "a.png").open("ab") as file:
        file.write(bytes(50 * 2**20))
    start = time.perf_counter()
    assert png.read(tmp_path / "a.png") == SETTINGS
    assert time.perf_counter() - start < 1
