"""sd-mini doctor: what is found, what is missing and the remedy."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from sd_mini.cli import commands as cli
from sd_mini.cli import doctor
from tests.cli.test_cli import NOWHERE, assert_refused


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
    count = sum(state == "mend" for state, _ in found.values())
    assert last == (f"{count} to mend" if count else "nothing to mend")


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


def test_without_torch_and_without_being_installed(tmp_path):
    """The rest is still said."""
    code = f"""if True:
        import sys
        from importlib import metadata
        sys.modules["torch"] = None
        def missing(name):
            raise metadata.PackageNotFoundError(name)
        metadata.metadata = missing
        from sd_mini.cli import commands
        sys.exit(commands.main(["doctor", {str(tmp_path)!r}]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install torch" in done.stdout and "sd-mini is not installed" in done.stdout
    assert "GB free" in done.stdout and done.stdout.endswith("2 to mend\n")


def test_a_torch_for_cpus_beside_an_nvidia_driver(monkeypatch, tmp_path):
    import torch

    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, part in ((None, "built for CPUs alone"), ("13.0", "sees none")):
        monkeypatch.setattr(torch.version, "cuda", version)
        ((state, _, fact),) = doctor.devices()
        assert state == "mend" and part in fact


def test_the_compiler_is_the_one_that_is_used(monkeypatch, tmp_path):
    (tmp_path / "mycc").write_text("#!/bin/sh\n")
    (tmp_path / "mycc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "mycc")
    ((state, _, fact),) = doctor.compiler()
    assert state == "ok" and str(tmp_path / "mycc") in fact


def test_a_file_is_no_place_for_runs(tmp_path, capsys):
    (tmp_path / "a.png").touch()
    assert_refused(["doctor", tmp_path / "a.png"], capsys, "is a file")


@pytest.mark.skipif(not os.path.isdir(NOWHERE), reason="Linux alone has such a folder")
def test_a_folder_that_cannot_be_written(capsys):
    found, _ = findings(capsys, f"{NOWHERE}/runs")
    assert found["runs"][0] == "mend" and "nothing can be written" in found["runs"][1]


def test_more_threads_than_cores(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    ((state, _, fact),) = doctor.threads()
    assert state == "mend" and "set OMP_NUM_THREADS=" in fact
