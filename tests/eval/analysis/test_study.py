"""Several text stages against several noise predictors, from real reports of real folders."""

import json
import shutil

import pytest

from eval.analysis.study import main, read_run


@pytest.fixture
def runs(tiny_run, shapes_report, tmp_path):
    """The measured tiny run, and three more that differ in the text stage's hash, the parameters, and what came out."""
    found = []
    for number, (text, parameters) in enumerate([("a", 1000), ("a", 4000), ("b", 1000), ("b", 4000)]):
        run = tmp_path / f"run{number}"
        for kind in ("text_encoder", "noise_predictor"):
            folder = run / kind / "final"
            folder.mkdir(parents=True)
            contract = json.loads((tiny_run / kind / "final" / "stage.json").read_text())
            if kind == "text_encoder":
                contract["hash"] = text * 64
            else:
                contract["parameters"] = parameters
            (folder / "stage.json").write_text(json.dumps(contract))
        shutil.copytree(shapes_report, run / "report")
        report = json.loads((run / "report" / "report.json").read_text())
        report["protocol"]["stages"]["text_encoder"] = text * 64
        for name in ("fd", "low", "high"):
            report["distances"]["FD-mini"][name] += number
        (run / "report" / "report.json").write_text(json.dumps(report))
        found.append(run)
    return found


def test_a_study_of_four_runs(runs, tmp_path, capsys):
    assert main([*map(str, reversed(runs)), "--out", str(tmp_path / "study")]) == 0
    rows = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [(row["text_hash"][0], row["parameters"]) for row in rows] == [
        ("a", 1000),
        ("a", 4000),
        ("b", 1000),
        ("b", 4000),
    ]
    report = json.loads((runs[2] / "report" / "report.json").read_text())
    assert rows[2]["scores"]["FD-mini"]["value"] == report["distances"]["FD-mini"]["fd"]
    exact = report["composition"]["heldout_pairs"]["all"]
    found = rows[2]["scores"]["exact, heldout_pairs, %"]
    assert found == {"value": 100 * exact["exact"], "low": 100 * exact["low"], "high": 100 * exact["high"]}
    figure = (tmp_path / "study" / "study.svg").read_text()
    assert figure.startswith("<?xml") and "path" in figure
    said = capsys.readouterr().out
    assert said.count("trained from nothing (aaaaaa), 0.00 M") == 2 and str(runs[3]) in said


def test_the_encoder_s_name_comes_from_its_config(runs):
    (runs[0] / "text_encoder" / "config.yaml").write_text("encoder: {name: models/t5-small}\n")
    assert read_run(runs[0])["text_encoder"] == "t5-small (aaaaaa)"


def harm(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run: (run / "report" / "report.json").unlink(), "no report yet; measure it"),
        (lambda run: shutil.rmtree(run / "noise_predictor"), "no noise_predictor stage here"),
        (
            lambda run: harm(run / "report" / "report.json", lambda r: r["protocol"].update(reference_hash="0")),
            "measure both alike",
        ),
        (
            lambda run: harm(run / "text_encoder" / "final" / "stage.json", lambda c: c.update(hash="c" * 64)),
            "measures another text_encoder",
        ),
        (
            lambda run: harm(
                run / "report" / "report.json", lambda r: r["protocol"].update(extractors={"FD-mini": "0" * 64})
            ),
            "its FD-mini is by another network than",
        ),
        (
            lambda run: harm(
                run / "report" / "report.json",
                lambda r: r.update(composition={}, diversity={}, distances={"FID": {"fd": 1.0}}),
            ),
            "no score that all runs have",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, capsys, change, says):
    change(runs[1])
    assert main([str(runs[0]), str(runs[1]), "--out", str(tmp_path / "study")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "study").exists()


def test_one_run_is_no_study(runs, tmp_path, capsys):
    assert main([str(runs[0]), "--out", str(tmp_path / "study")]) == 2
    assert "at least two runs" in capsys.readouterr().err
