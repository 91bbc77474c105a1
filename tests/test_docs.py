"""README and docs say what the programs do: every command of the README runs, the config reference is current."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.__main__ import main as evaluate
from sd_mini.cli.commands import main as sd_mini_main
from sd_mini.config import command
from tests.support.launching import MAINS, PROGRAMS
from training.engine import reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
SHELL = [line for kind, text in BLOCKS if kind == "sh" for line in text.replace("\\\n", " ").splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in SHELL if line.strip() and not line.startswith("#")]
# what continuous integration runs (make setup, make test), or another test (the wheel; make demo by its recipe's parts)
ELSEWHERE = (["make", "demo"], ["make", "setup"], ["pip", "install"], ["source"])
FEW = "--train.steps 1 --train.batch_size 4 --train.preview_every 1 --train.checkpoint_every 1 --train.warmup_steps 0"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


def test_the_config_reference_is_current():
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == reference.markdown()


def test_the_reference_shows_the_defaults_that_hold():
    """`valid` takes from `data` what is left out."""
    shown = {field.name: field.default for field in reference.fields_of(MAINS["text_encoder"].config)}
    assert (shown["data.split"], shown["valid.split"], shown["valid.count"]) == ("train", "null", "500")


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{page}: {target}"


def test_the_readme_s_python_makes_a_picture(tiny_run):
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    names: dict = {}
    exec(code.replace("runs/shapes/pipeline", str(tiny_run / "pipeline")), names)
    assert names["picture"].size == (32, 32)


def test_the_page_of_editing_makes_pictures(tiny_run, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "editing.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "m.png"):
        Image.linear_gradient("L").resize((48, 32)).save(name)
    names: dict = {}
    exec(code.replace("runs/shapes/pipeline", str(tiny_run / "pipeline")), names)
    assert names["similar"].images[0].size == names["repainted"].images[0].size == (48, 32)


def test_the_readme_s_commands_on_a_model(tiny_run, tmp_path, monkeypatch):
    commands = [words for words in COMMANDS if words[0] == ".venv/bin/sd-mini"]
    assert [words[1] for words in commands] == ["generate", "generate", "export", "doctor"]
    monkeypatch.chdir(tmp_path)
    for _, *words in commands:
        assert sd_mini_main([word.replace("runs/shapes", str(tiny_run)) for word in words]) in (0, None)
    assert (tmp_path / "a.png").is_file() and (tmp_path / "picture.png").is_file()
    assert (tmp_path / "shapes-64" / "pipeline.py").is_file()


def test_the_readme_s_stages_after_stage_3(smoke_run, tmp_path):
    """By the smoke recipes of the same names."""
    shutil.copytree(smoke_run, run := tmp_path / "run")
    launches = [words for words in COMMANDS if words[0] == "accelerate" and "runs/shapes" in words]
    assert len(launches) == 2
    for words in launches:
        stage = words[words.index("-m") + 1].removeprefix("training.")
        config = ROOT / words[words.index("--config") + 1].replace("/shapes/", "/smoke/")
        assert command(PROGRAMS[stage], ["--config", str(config), "--run", str(run), "--steps", "2"]) == 0
    (export,) = [words for words in COMMANDS if "--predictor" in words]
    assert sd_mini_main([*export[1:2], str(run), *export[3:]]) in (0, None)
    index = json.loads((run / "pipeline" / "model_index.json").read_text())
    tuned = json.loads((run / "reward" / "final" / "stage.json").read_text())
    assert index["stages"]["noise_predictor"] == tuned["hash"]


def test_the_readme_s_way_from_pictures_to_a_report(tmp_path, monkeypatch):
    """The very commands, with one update a stage."""
    draw, folder = np.random.default_rng(0), tmp_path / "PICTURES"
    folder.mkdir()
    for number in range(60):
        cells = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        cells.resize((70, 66), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a plain picture, the {number}th")
    (tmp_path / "training").symlink_to(ROOT / "training")
    monkeypatch.chdir(tmp_path)
    ours = [words for words in COMMANDS if not any(words[: len(skip)] == skip for skip in ELSEWHERE)]
    (survey,) = [words for words in ours if words[:2] == ["sd-mini", "data"]]
    assert sd_mini_main(survey[1:]) in (0, None) and (tmp_path / "sheet.png").is_file()
    (init,) = [words for words in ours if words[:2] == ["sd-mini", "init"]]
    assert sd_mini_main(init[1:]) in (0, None) and len(list((tmp_path / "mine").iterdir())) == 4
    launches = [
        words for words in ours if words[0] == "accelerate" and "..." not in words and "runs/shapes" not in words
    ]
    assert len(launches) == 3
    for words in launches:
        stage = words[words.index("-m") + 1].removeprefix("training.")
        few = [word for pair in re.findall(r"(--\S+ \S+)", FEW) for word in pair.split()]
        assert command(MAINS[stage], [*words[words.index("-m") + 2 :], *few]) == 0
    (export,) = [words for words in ours if words[:3] == ["sd-mini", "export", "runs/mine"]]
    assert sd_mini_main(export[1:]) in (0, None)
    (report,) = [words for words in ours if words[:3] == ["python", "-m", "eval"]]
    assert command(evaluate, report[3:]) == 0
    assert (tmp_path / "runs" / "mine" / "report" / "report.html").is_file()
