"""A metric added through the documented door stands in report.json, on the page, in the card and on the terminal."""

import json
import shutil
from dataclasses import replace

import pytest

from eval.metrics import registry
from eval.metrics.registry import METRICS, Metric, Row, register
from tests.support.reporting import Page, run


@pytest.fixture
def brightness():
    """The example of CONTRIBUTING.md."""
    metric = Metric(
        name="brightness",
        measure=lambda sample: {"mean": float(sample.pictures.mean()), "n": len(sample.pictures)},
        rows=lambda part: [Row("mean brightness", f"{part['mean']:.2f}", "", str(part["n"]))],
        line=lambda part: [f"brightness {part['mean']:.2f} of {part['n']}"],
    )
    register(metric)
    yield metric
    del METRICS["brightness"]


def test_a_registered_metric_is_everywhere(brightness, tiny_run, tmp_path, capsys):
    pipeline, out = tmp_path / "run" / "pipeline", tmp_path / "report"
    shutil.copytree(tiny_run, tmp_path / "run")
    assert run(pipeline, out, "--data", "shapes", "--prompts", "2") == 0
    part = json.loads((out / "report.json").read_text())["brightness"]
    assert 0 < part["mean"] < 255 and part["n"] == 2
    value = f"{part['mean']:.2f}"
    assert f"brightness {value} of 2" in capsys.readouterr().out
    assert "mean brightness" in Page(out / "report.html").text
    assert f"| mean brightness | {value} |  | 2 |" in (pipeline / "README.md").read_text()


def test_a_name_is_registered_once(brightness):
    with pytest.raises(ValueError, match="brightness"):
        registry.register(brightness)


@pytest.mark.parametrize("name", ["text", "blame", "protocol"])
def test_the_report_s_own_parts_are_no_metrics(name, brightness):
    with pytest.raises(ValueError, match=name):
        register(replace(brightness, name=name))
    assert name not in METRICS
