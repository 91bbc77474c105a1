"""What an evaluation does with folders: a user's own files stay, and what was measured outlives the disk."""

import os

import pytest
from PIL import Image

from eval import __main__ as evaluate
from eval.makers.sources import CARD, Ours
from eval.report import card, report
from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support import reporting

QUICK = ("--data", "shapes", "--prompts", "2", "--steps", "1", "--sweep", "--training", "none")
NOWHERE = "/proc/self"  # where not even root can write


def test_a_user_s_notes_stay_and_a_failed_write_loses_no_scores(tiny_run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "report"
    out.mkdir()
    for name in (report.REPORT, "notes.md"):
        (out / name).write_text("{}")
    assert reporting.run(tiny_run / "pipeline", out, *QUICK) == 0
    assert (out / "notes.md").read_text() == "{}" and len((out / report.REPORT).read_text()) > 100
    table = capsys.readouterr().out
    assert "exact %" in table and table.endswith(f"{out / report.PAGE}\n")

    def full(*given, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(report, "render", lambda *given: "")
    assert reporting.run(tiny_run / "pipeline", out, *QUICK) == 2
    shown = capsys.readouterr()
    assert "exact %" in shown.out and "cannot be written (No space left on device)" in shown.err
    assert "Traceback" not in shown.err and (out / "notes.md").read_text() == "{}"


@pytest.mark.skipif(not os.path.isdir(NOWHERE), reason="Linux alone has such a folder")
@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_a_place_that_takes_nothing_is_found_out_first(option, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "open_source", lambda *given: pytest.fail("the pipeline was loaded"))
    places = {"--out": tmp_path / "report", "--cache": tmp_path / "cache", option: f"{NOWHERE}/x"}
    options = [str(word) for pair in places.items() for word in pair]
    assert evaluate.main([str(tiny_run / "pipeline"), *QUICK, *options]) == 2
    assert f"{option} {NOWHERE}/x" in capsys.readouterr().err


def test_a_card_goes_where_nobody_has_written_one(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "text", lambda report: f"{card.GENERATED}\ncard")
    maker = Ours(Pipeline.from_pretrained(tiny_run / "pipeline"))
    folders = [tmp_path / name for name in ("pipeline", "report")]
    for folder in folders:
        folder.mkdir()
    maker.folder = folders[0]
    assert card.write(maker, {}, folders[1]) == folders[0] / CARD
    assert card.write(maker, {}, folders[1]) == folders[0] / CARD  # its own is written anew
    (folders[0] / CARD).write_bytes("eigenes, in Latin-1: \xe4".encode("latin-1"))
    assert card.write(maker, {}, folders[1]) == folders[1] / CARD
    (folders[1] / CARD).write_text("mine")
    assert card.write(maker, {}, folders[1]) is None and (folders[1] / CARD).read_text() == "mine"
    if os.path.isdir(NOWHERE):
        maker.folder = report.Path(NOWHERE)
        assert card.write(maker, {}, tmp_path) == tmp_path / CARD
        with pytest.raises(UserError, match="cannot be written"):
            card.write(maker, {}, report.Path(NOWHERE))
