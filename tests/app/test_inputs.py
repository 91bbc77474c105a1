"""The page's fields and the settings of pictures; which pictures a grid holds."""

import numpy as np
import pytest
from PIL import Image

from sd_mini.app import side_by_side
from sd_mini.app.inputs import fields_of, numbers_of, settings_of, sources_of
from sd_mini.app.runs import open_runs
from sd_mini.cli.opening import open_pipeline
from sd_mini.errors import UserError
from tests.support.editing import HALF, picture

VALUES = {
    "run": "run",
    "prompt": "a small red circle",
    "negative": "",
    "seed": 7,
    "count": 2,
    "steps": 3,
    "guidance": 2.5,
    "low": 0.25,
    "high": 0.75,
    "width": 32,
    "height": 48,
    "sampler": "heun",
    "editor": None,
    "mask": None,
    "strength": 0.8,
    "kind": "guidance scales",
    "numbers": "1, 2",
    "runs": ["run"],
    "checkpoints": [],
}


@pytest.fixture(scope="module")
def runs(tiny_run):
    return open_runs([tiny_run], open_pipeline)


def test_fields_and_settings_are_inverse():
    settings = settings_of(VALUES)
    fields = fields_of(settings)
    assert fields == {name: VALUES[name] for name in fields}
    assert settings.strength is None and settings.negative_prompt is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "x" * 2**20}, "prompt"),
        ({"prompt": "half a pair \ud800"}, "prompt"),
        ({"seed": None}, "seed: got None"),
        ({"seed": -1}, "seed: got -1"),
        ({"count": 65}, "count: got 65"),
        ({"steps": 0}, "steps: got 0"),
        ({"steps": float("nan")}, "steps: got nan"),
        ({"width": 1e9}, "width: got 1000000000"),
        ({"guidance": "much"}, "guidance: got 'much'"),
        ({"guidance": float("inf")}, "guidance: got inf"),
    ],
)
def test_wrong_fields_are_named_in_one_short_line(changed, message):
    with pytest.raises(UserError, match=message) as refusal:
        settings_of(VALUES | changed)
    assert len(str(refusal.value)) < 300 and "\n" not in str(refusal.value)


def test_what_is_painted_is_the_mask():
    background = picture()
    strokes = Image.new("RGBA", (32, 32))
    strokes.paste((255, 0, 255, 90), (4, 4, 12, 12))
    editor = {"background": background.convert("RGBA"), "layers": [strokes, Image.new("RGBA", (32, 32))]}
    image, mask = sources_of(VALUES | {"editor": editor})
    assert np.array_equal(np.asarray(image), np.asarray(background)) and image.mode == "RGB"
    expected = np.zeros((32, 32), np.uint8)
    expected[4:12, 4:12] = 255
    assert np.array_equal(np.asarray(mask), expected)
    assert sources_of(VALUES | {"editor": {"background": background, "layers": []}})[1] is None
    assert settings_of(VALUES | {"editor": editor}).strength == 0.8


def test_a_mask_file_goes_before_what_is_painted(tmp_path):
    HALF.save(tmp_path / "m.png")
    editor = {"background": picture(), "layers": [Image.new("RGBA", (32, 32), "white")]}
    _, mask = sources_of(VALUES | {"editor": editor, "mask": str(tmp_path / "m.png")})
    assert np.array_equal(np.asarray(mask.convert("L")), np.asarray(HALF))
    with pytest.raises(UserError, match="no picture to repaint"):
        sources_of(VALUES | {"mask": str(tmp_path / "m.png")})


def test_numbers():
    assert numbers_of("1, 2.5;4  8", "values") == [1, 2.5, 4, 8]
    assert numbers_of("0 - 3", "values") == numbers_of("0 to 3", "values") == [0, 1, 2, 3]
    for text in ("", "1, two", "3 to 1", "0 to 64", "9" * 10_000_000):
        with pytest.raises(UserError, match="values"):
            numbers_of(text, "values")


def test_a_grid_s_rows_are_seeds_and_its_columns_the_values(runs):
    tasks, columns = side_by_side.grid(VALUES, runs)
    drawn = [(task.settings.guidance_scale, task.settings.seed, task.label) for task in tasks]
    assert columns == 2 and drawn == [
        (1, 7, "guidance 1, seed 7"),
        (2, 7, "guidance 2, seed 7"),
        (1, 8, "guidance 1, seed 8"),
        (2, 8, "guidance 2, seed 8"),
    ]
    tasks, columns = side_by_side.grid(VALUES | {"kind": "seeds", "numbers": "0 to 15"}, runs)
    assert columns == 4 and [task.settings.seed for task in tasks] == list(range(16))
    tasks, columns = side_by_side.grid(VALUES | {"kind": "runs"}, runs)
    assert columns == 1 and [task.label for task in tasks] == ["run, seed 7", "run, seed 8"]
    tasks, columns = side_by_side.grid(VALUES | {"kind": "checkpoints", "checkpoints": ["1000", "20"]}, runs)
    assert columns == 2 and [task.label for task in tasks[:2]] == ["step 20, seed 7", "step 1,000, seed 7"]


def test_grids_that_are_refused(runs):
    wrong = [
        ({"kind": "seeds", "numbers": "0.5"}, "seeds: got 0.5"),
        ({"kind": "runs", "runs": []}, "runs: none are chosen"),
        ({"count": 60}, "more than 64 pictures"),
    ]
    for changed, message in wrong:
        with pytest.raises(UserError, match=message):
            side_by_side.grid(VALUES | changed, runs)


def test_steps_are_spread():
    assert side_by_side.spread(range(100, 1000, 100)) == [100, 300, 500, 700, 900]
    assert side_by_side.spread([1, 2]) == [1, 2]
