"""sd-mini doctor: what is found, what is missing and the remedy."""

import os
from importlib import metadata

import pytest

from sd_mini.cli import commands as cli
from sd_mini.cli import doctor


def findings(capsys, *argv):
    assert cli.main(["doctor", *map(str, argv)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[6:20].strip(): (line[:5].strip(), line[21:]) for line in lines[:-1]}, lines[-1]


def test_versions_devices_and_extras(tmp_path, capsys):
    found, last = findings(capsys, tmp_path)
    assert found["torch"] == ("ok", metadata.version("torch"))
    assert found["threads"][0] in ("ok", "") and " cores" in found["threads"][1]
    assert str(tmp_path) in found["runs"][1] and "GB free" in found["runs"][1]
    declared = set(metadata.metadata("sd-mini").get_all("Provides-Extra"))
    assert {name.strip("[]") for name in found if name.startswith("[")} == declared == set(doctor.PURPOSES)
    for name, (state, fact) in found.items():
        assert state in ("ok", "mend", "")
        assert state == "ok" or ";" in fact or ":" in fact, f"{name}: no remedy"
    assert last.endswith("to mend")


def test_what_is_missing_or_too_old_has_a_remedy(monkeypatch, tmp_path, capsys):
    def version(name):
        if name == "scipy":
            raise metadata.PackageNotFoundError(name)
        return "4.0.0" if name == "transformers" else real(name)

    real = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found, last = findings(capsys, tmp_path)
    assert found["transformers"][0] == "mend"
    assert (
        found["transformers"][1].startswith("4.0.0, expected >=")
        and "pip install 'transformers" in found["transformers"][1]
    )
    state, fact = found["[train]"]
    assert state == "" and "lacks scipy" in fact and "pip install 'sd-mini[train]'" in fact
    assert found["C compiler"][0] == "mend" and "install gcc" in found["C compiler"][1]
    assert last == "2 to mend"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    tmp_path.chmod(0o500)
    found, _ = findings(capsys, tmp_path / "runs")
    assert found["runs"][0] == "mend" and "cannot be written" in found["runs"][1]


def test_more_threads_than_cores(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    ((state, _, fact),) = doctor.threads()
    assert state == "mend" and "set OMP_NUM_THREADS=" in fact
