"""`sd-mini app` from the shell: a busy port, no gradio, the address, the end; and who may ask for the page."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import assert_refused

ROOT = Path(__file__).parent.parent.parent


def test_a_busy_port_is_named(tiny_run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(["app", tiny_run, "--port", port], capsys, f"--port {port}: is in use on 127.0.0.1", "--port ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port 70000: expected a number from 0 to 65535"),
        (["--host", "no such host.invalid"], "--host no such host.invalid: is no address of this machine"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1: is no address of this machine"),
    ],
)
def test_no_such_place(tiny_run, capsys, options, message):
    assert_refused(["app", tiny_run, *options], capsys, message)


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert_refused(["app", tmp_path, "--port", "0"], capsys, tmp_path, "neither a run folder nor a pipeline folder")


def test_without_gradio(tiny_run, tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('No module named gradio')")
    command = [sys.executable, "-m", "sd_mini", "app", str(tiny_run), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install 'sd-mini[app]'" in done.stderr


def test_the_address_who_may_ask_and_the_end(tiny_run, tmp_path):
    import httpx

    command = [sys.executable, "-m", "sd_mini", "app", str(tiny_run), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as page:
        assert page.stdout is not None
        address = page.stdout.readline().strip()
        answer = httpx.get(address)
        assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
        assert "sd_mini: run" in answer.text
        # a name of somebody else's that leads here, and a script of another site
        assert httpx.get(address, headers={"Host": "elsewhere.invalid"}).status_code == 400
        config = httpx.get(f"{address}config", headers={"Origin": "http://elsewhere.invalid"})
        assert config.headers.get("access-control-allow-origin") is None
        for path in (tiny_run / "pipeline" / "model_index.json", "/etc/hostname"):
            assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)
        page.send_signal(signal.SIGTERM)
        assert page.wait(timeout=20) == 0
    assert [path for path in tmp_path.iterdir() if path.name.startswith("sd-mini-app-")] == []
