"""The ways from text to a picture side by side: what is refused, the table, the page."""

import json
import math
import re

import pytest

from sd_mini.config import command
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.launching import SMOKE, launch, prepared
from training.studies import families, families_page


def row(one, bits=None):
    kinds = {"one_object": one, "two_objects": one / 2, "count": one / 4, "all": one / 2}
    return {
        "exact": dict.fromkeys(("test", "heldout_pairs", "heldout_relations"), kinds),
        **dict.fromkeys(("ceiling", "fd_mini", "recall", "coverage", "diversity"), one),
        **{"bits": bits, "parameters": 1.5e6, "seconds": 10, "steps": 5},
    }


ROWS = {"noise_predictor/0": row(0.9), "noise_predictor/1": row(0.7), "gan/0": row(0.5), "vae/0": row(0.1, 2.0)}


def test_scores_are_means_over_seeds_with_student_s_interval():
    scores = families_page.by_family(ROWS)
    mean, half = scores["noise_predictor"]["one object, %"]
    # two values 20 apart: their mean's standard error is 10, and t of one degree of freedom 12.706
    assert mean == pytest.approx(80) and half == pytest.approx(127.06, rel=1e-3)
    assert scores["gan"]["one object, %"] == (pytest.approx(50), None)
    assert "bits a dimension" not in scores["gan"] and scores["vae"]["bits a dimension"].mean == 2


def test_words_say_the_place_the_best_the_worst_and_what_held_out_pairs_cost():
    said = families_page.words("gan", families_page.by_family(ROWS), {})
    assert "25.0 % of the test prompts" in said and "number 2 of 3:" in said
    assert "one object best (50.0 %), count worst (12.5 %)" in said and "cost it 0.0 points" in said


@pytest.fixture(scope="module")
def folders(smoke_run, tmp_path_factory):
    """The pipelines of the smoke run: its noise predictor's, and a GAN's over the same stages."""
    run = prepared("gan", smoke_run, tmp_path_factory.mktemp("families") / "run")
    assert launch("gan", run, "--log_with", "none") == 0
    for name, source in (("noise_predictor", smoke_run), ("gan", run)):
        Pipeline.from_run(source, name).save(run / "pipelines" / name)
    return {name: run / "pipelines" / name for name in ("noise_predictor", "gan")}


def test_the_page_shows_scores_speed_passes_and_the_same_prompts_by_each(folders, tmp_path):
    families_page.write({"noise_predictor/0": row(0.9), "gan/0": row(0.5)}, folders, tmp_path, 150)
    page = (tmp_path / families_page.PAGE).read_text()
    assert page.count("<img") == 2 and "trained for 150 seconds" in page and "by 1\nseed." in page
    passes = re.search(r"passes a picture</th>(.*?)</tr>", page).group(1)
    found = [int(one) for one in re.findall(r"<td>(\d+)</td>", passes)]
    config = Pipeline.from_pretrained(folders["noise_predictor"]).config
    assert tuple(config.default_interval) == (0, 1) and config.default_guidance != 1  # each step is guided
    assert found == [2 * config.default_steps, 1]
    assert all(math.isfinite(float(one)) for one in re.findall(r"<td>([\d.]+) \[", page))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--only", "gann"], "--only: got 'gann', expected one of"),
        (["--seconds", "0"], "got '0', expected a whole number"),
        (["--run", "nowhere"], "nowhere/text_encoder/final: no text_encoder stage here"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(smoke_run, tmp_path, capsys, more, says):
    assert command(families.main, ["--run", str(smoke_run), "--out", str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_is_trained_and_judged_and_a_second_start_finds_it_done(smoke_run, tmp_path, capsys):
    out = tmp_path / "out"
    started = ["--run", str(smoke_run), "--out", str(out), "--seconds", "1", "--recipes", str(SMOKE)]
    started += ["--seeds", "1", "--only", "noise_predictor", "gan"]
    assert command(families.main, started) == 0
    found = json.loads((out / families.RESULTS).read_text())
    assert set(found["rows"]) == {"noise_predictor/0", "gan/0"} and (out / families_page.PAGE).is_file()
    before = capsys.readouterr().out.splitlines()[:5]
    assert command(families.main, started) == 0
    assert capsys.readouterr().out.splitlines()[:5] == before
    assert command(families.main, [*started[:5], "2", *started[6:]]) == 2
    assert "give another --out" in capsys.readouterr().err
