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
    """It saves, exits with 143, and nothing comes after it; elsewhere SIGTERM ends the chain at once."""
    (tmp_path / "trains.py").write_text(
        "import os, signal, sys\n"
        "from training.engine.loop import Stop\n"
        "with Stop(1) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.is_asked()\n"
        "print('saved')\n"
        "sys.exit(stop.exit_code)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    assert chain.main(["trains", "--", "plain"]) == 143
    assert capsys.readouterr().out.splitlines() == ["saved"]
    (tmp_path / "works.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(9)\n")
    assert chain.main(["works", "--", "plain"]) == 143
    assert capsys.readouterr().out == "" and signal.getsignal(signal.SIGTERM) is before
