"""What every `--help` shows, what is proposed for a slip of the pen, and what a plain run prints."""

import argparse
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sd_mini.cli import commands as cli
from tests.cli.test_cli import PROMPT, assert_refused


def parsers():
    parser = cli._parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices


@pytest.mark.parametrize("command", list(parsers()))
def test_every_option_has_its_default_in_its_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    capsys.readouterr()
    for action in parsers()[command]._actions:
        if action.option_strings and action.dest != "help":
            assert action.help, action.option_strings
            assert action.required or "(default: " in action.help, action.option_strings


def test_every_command_is_listed(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in parsers())


def test_the_nearest_option_is_proposed(tiny_run, capsys):
    assert_refused(["generate", tiny_run, PROMPT, "--gidance", "3"], capsys, "--gidance", "did you mean --guidance?")
    assert_refused(["generate", tiny_run, PROMPT, "--zzz"], capsys, "unrecognized arguments: --zzz; `sd-mini --help`")


def test_a_plain_run_prints_the_file_alone(tiny_run, tmp_path):
    """As from a shell, stderr in a file: no bar, no warning of a library."""
    argv = [sys.executable, "-m", "sd_mini", "generate", str(tiny_run), PROMPT, "--out", str(tmp_path / "a.png")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr) == SimpleNamespace(
        code=0, out=f"{tmp_path / 'a.png'}\n", err=""
    )
