"""The benchmark's prompts, and anybody's pictures of them: both levels through `python -m eval`."""

import json

import numpy as np
import pytest
from PIL import Image

from eval import prompts
from eval.__main__ import main
from eval.data_options import asked_data
from eval.makers.questions import folder_question
from eval.options import check_data, parser
from sd_mini.data.captioned import DataConfig
from sd_mini.data.parts import check_alike
from sd_mini.shapes import draw, sample_scenes
from sd_mini.shapes.level2.graph import Group, Scene


def write_folder(folder, pictures, texts):
    folder.mkdir()
    lines = []
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("level", [1, 2])
def test_prompts_as_json_are_the_evaluation_s_own(level, tmp_path):
    out = tmp_path / "sub" / "prompts.json"
    assert prompts.main(["--level", str(level), "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["level"] == level and len(written["prompts"]) == 1100
    assert len({one["id"] for one in written["prompts"]}) == 1100
    texts = [one["text"] for one in written["prompts"]]
    found = folder_question(DataConfig(level=level), texts[495:505], 0, 10)
    assert [asked.split for asked in found.splits] == ["test", "heldout_pairs"]
    for asked in found.splits:
        for row, caption, scene in zip(asked.rows, asked.captions, asked.scenes, strict=True):
            assert texts[495 + row] == caption
            groups = written["prompts"][495 + row]["graph"]["groups"]
            assert [group["shape"] for group in groups] == [group.shape for group in scene.groups]
    if level == 2:
        graph = written["prompts"][0]["graph"]
        groups = tuple(Group(**group) for group in graph["groups"])
        (scene,) = sample_scenes(1, "test", 1000, level=2)
        assert Scene(graph["kind"], groups, tuple(graph["relations"]), ()).canonical() == scene.canonical()


def test_a_folder_of_level_2_is_judged_by_its_splits(tmp_path, capsys):
    texts, pictures = [], []
    benchmark = prompts.benchmark(2, 0)["prompts"]
    for split in ("heldout_relations", "test"):
        for one, scene in zip(
            [p for p in benchmark if p["split"] == split], sample_scenes(6, split, 1000, level=2), strict=False
        ):
            texts += [one["text"]] * 4
            pictures += [draw(scene), np.full((3, 64, 64), 245, dtype=np.uint8)] * 2  # right, and empty
    folder = write_folder(tmp_path / "pictures", pictures, texts)
    out = tmp_path / "report"
    given = [str(folder), "--data", "shapes", "--level", "2", "--out", str(out), "--reference", "20"]
    assert main(given) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert set(report["composition"]) == {"test", "heldout_relations"}
    assert all(scores["all"]["exact"] == 0.5 and scores["all"]["n"] == 24 for scores in report["composition"].values())
    assert report["protocol"]["level"] == 2 and report["diversity"]["mini"]["vendi"]["n_prompts"] == 12


def test_prompts_of_the_benchmark_and_others_are_not_mixed():
    own = prompts.benchmark(2, 0)["prompts"][0]["text"]
    with pytest.raises(ValueError, match="1 of 2 prompts are not those of shapes, level 2, seed 0, such as 'a dog'"):
        folder_question(DataConfig(level=2), [own, "a dog"], 0, 10)
    (alone,) = folder_question(DataConfig(level=2), ["a dog"], 0, 10).splits
    assert alone.scenes is None and alone.captions == ["a dog"]


def test_the_level_is_the_run_s_own_unless_it_is_given():
    recorded = {"valid": DataConfig(level=2)}

    def level(*given, known=recorded):
        options = parser().parse_args(["run", "--out", "report", "--data", "shapes", *given])
        return asked_data(options, known, "valid", "test").level

    assert (level(), level("--level", "1"), level(known={}), level("--level", "2", known={})) == (2, 1, 1, 2)
    other = parser().parse_args(["run", "--out", "report", "--data", "pictures", "--level", "2"])
    with pytest.raises(ValueError, match="--level 2: is of shapes"):
        check_data(other)


def test_levels_of_a_config_are_checked():
    with pytest.raises(ValueError, match="level 2 is for source shapes"):
        DataConfig(source="pictures", level=2)
    with pytest.raises(ValueError, match=r"level is 2, valid\.level 1"):
        check_alike(DataConfig(level=2), DataConfig(split="test"))
