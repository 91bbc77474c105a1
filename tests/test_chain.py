import signal
import sys

import pytest

from training import chain


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`one` and `two` write down what they are called with; `fails` ends with exit code 3, `says` with a message."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            "import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n    sys.exit(0)\n"
        )
    (tmp_path / "plain.py").write_text("print('plain')\n")
    (tmp_path / "fails.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "says.py").write_text("import sys\nsys.exit('no room')\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_each_is_run_with_its_own_arguments(programs, capsys):
    before = sys.argv
    assert chain.main(["one", "--a", "1", "--", "plain", "--", "two", "b"]) == 0
    assert capsys.readouterr().out.splitlines() == ["['--a', '1']", "plain", "['b']"]
    assert sys.argv is before


@pytest.mark.parametrize(("program", "code"), [("fails", 3), ("says", 1)])
def test_the_first_that_fails_ends_the_chain(programs, capsys, program, code):
    assert chain.main(["one", "--", program, "--", "two"]) == code
    assert capsys.readouterr().out.splitlines() == ["[]"]


def test_a_training_that_is_stopped_ends_the_chain(programs, tmp_path, capsys):
    """It saves, exits with 0, and nothing comes after it; elsewhere SIGTERM ends the chain at once."""
    (tmp_path / "trains.py").write_text(
        "import os, signal, sys\n"
        "from training.process import Stop\n"
        "with Stop(1) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.asked()\n"
        "print('saved')\n"
        "sys.exit(stop.exit_code)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    assert chain.main(["trains", "--", "plain"]) == 0
    assert capsys.readouterr().out.splitlines() == ["saved"]
    (tmp_path / "works.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(9)\n")
    assert chain.main(["works", "--", "plain"]) == 143
    assert capsys.readouterr().out == "" and signal.getsignal(signal.SIGTERM) is before


def test_two_at_the_same_time(programs, tmp_path, capsys, monkeypatch):
    """Each waits for what the other writes down; the next begins when both have ended."""
    for own, other in (("left", "right"), ("right", "left")):
        (tmp_path / f"{own}.py").write_text(
            "import os, sys, time\nfrom pathlib import Path\n"
            f"Path({str(tmp_path)!r}, '{own}').touch()\n"
            f"while not Path({str(tmp_path)!r}, '{other}').exists(): time.sleep(0.01)\n"
            f"print('{own}', sys.argv[1:], file=sys.stderr if '{own}' == 'left' else sys.stdout)\n"
        )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert chain.main(["left", "a", "--beside", "right", "b", "--", "plain"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == ["right ['b']", "plain"] and said.err.splitlines() == ["left ['a']"]


def test_one_beside_that_fails_ends_the_chain_and_one_that_is_not_needed_any_more_is_stopped(
    programs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert chain.main(["says", "--beside", "one", "--", "two"]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == ["[]"] and said.err.splitlines() == ["no room"]
    (tmp_path / "bar.py").write_text("import sys\nsys.stderr.write('\\r1 of 2\\r2 of 2\\nnote\\n')\n")
    assert chain.main(["bar", "--beside", "one"]) == 0
    assert capsys.readouterr().err.splitlines() == ["2 of 2", "note"]
    (tmp_path / "waits.py").write_text(
        "import signal, sys, time\nfrom pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *given: sys.exit(print('saved')))\n"
        f"Path({str(tmp_path)!r}, 'waiting').touch()\ntime.sleep(60)\n"
    )
    (tmp_path / "late.py").write_text(
        f"import sys, time\nfrom pathlib import Path\nwhile not Path({str(tmp_path)!r}, 'waiting').exists():\n"
        "    time.sleep(0.01)\nsys.exit(3)\n"
    )
    assert chain.main(["waits", "--beside", "late", "--", "two"]) == 3
    assert capsys.readouterr().out.splitlines() == ["saved"]
