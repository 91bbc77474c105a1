import io
import json

import datasets
import pytest
from PIL import Image

from eval.analysis.words import main, scores


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A folder with train.parquet: a black cat, a white dog, a grey cathedral."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = []
    for shade in (0, 255, 128):
        encoded = io.BytesIO()
        Image.new("RGB", (40, 40), (shade,) * 3).save(encoded, "PNG")
        rows.append({"bytes": encoded.getvalue(), "path": None})
    (tmp_path / "data").mkdir()
    texts = {"text": ["Cat face", "dog", "cathedral"], "aliases": [["a pet"], ["another pet"], []]}
    datasets.Dataset.from_dict({"image": rows, **texts}).to_parquet(tmp_path / "data" / "train.parquet")
    return tmp_path / "data"


def test_scores_are_shares():
    found = scores(["a", "a", "b", "b"], [True, False, True, True])
    assert found["right"] == 0.75 and found["words"] == {"a": 0.5, "b": 1.0} and found["low"] < 0.75 < found["high"]


def test_a_report_of_two_runs(known, tiny_run, tmp_path):
    out = tmp_path / "out"
    arguments = [str(tiny_run), str(tiny_run / "pipeline"), "--data", str(known), "--aliases", "aliases"]
    assert main([*arguments, "--words", "kitten=cat", "hound=pet", "--seeds", "2", "--out", str(out)]) == 0
    report = json.loads((out / "words.json").read_text())
    assert report["chance"] == pytest.approx({"kitten": 1 / 3, "hound": 2 / 3})  # a cathedral holds no cat
    first, second = report["runs"].values()
    assert first == second and first["n"] == 4 and set(first["words"]) == {"kitten", "hound"}
    assert Image.open(out / "words.png").size[0] > 2 * 32


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["kitten"], "expected WORD=KNOWN"),
        (["dog=cat"], "holds 'dog' itself"),
        (["kitten=lion"], "no caption of data:train holds 'lion'"),
    ],
)
def test_words_that_say_nothing_are_refused(known, tiny_run, tmp_path, capsys, words, says):
    arguments = [str(tiny_run), "--data", str(known), "--out", str(tmp_path / "out"), "--words", *words]
    assert main(arguments) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()
