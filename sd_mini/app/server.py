"""Serves the page: on loopback unless told otherwise, with nothing fetched from elsewhere, until it is interrupted."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_mini.app.runs import Run, open_runs
from sd_mini.errors import UserError
from sd_mini.progress import progress
from sd_mini.remarks import remark

if TYPE_CHECKING:
    from collections.abc import Generator

    from sd_mini.pipelines.text_to_image import Pipeline

MAX_UPLOAD = 100 * 2**20  # bytes; the readers of pictures and settings have limits of their own below that
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# gradio's own scripts and styles are inline, and its plots compile expressions; everything is this server's
_SOURCES = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'"
_HEADERS = {
    b"content-security-policy": _SOURCES.encode(),
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


@contextmanager
def serving(folders: Sequence[Path], open_pipeline: Callable[[Path], Pipeline], host: str, port: int) -> Generator[str]:
    """Load the runs, draw a first picture with each, and serve the page; yields its address.

    Raises UserError, one line, for a folder that is no run, for a port in use, and without gradio.
    """
    port = free_port(host, port)  # before anything is loaded
    runs = open_runs(folders, open_pipeline)
    with tempfile.TemporaryDirectory(prefix="sd-mini-app-") as scratch:
        yield from _serving(runs, host, port, Path(scratch))


def _serving(runs: dict[str, Run], host: str, port: int, scratch: Path) -> Generator[str]:
    import_gradio(scratch / "gradio")
    from sd_mini.app.drawing import Studio
    from sd_mini.app.handlers import Handlers
    from sd_mini.app.page import CSS, JS, Page, theme

    studio = Studio(scratch / "pictures")
    for run in progress(runs.values(), "loading", unit=" run", leave=False):
        try:
            studio.warm(run.pipeline())
        except UserError as error:
            remark(f"{run.name}: no picture can be drawn yet: {error}")
    page = Page(Handlers(runs, studio))
    try:
        _, address, _ = page.blocks.launch(
            server_name=host,
            server_port=port,
            theme=theme(),
            css=CSS,
            js=JS,
            app_kwargs={"middleware": _middleware(host)},
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            inline=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        _press(address, page.number_of_dice)
        yield address
    finally:
        studio.close()
        page.blocks.close(verbose=False)


def _press(address: str, event: int) -> None:
    """Do what a browser does at a press: gradio's first event takes half a second longer than all others."""
    import httpx

    session = {"session_hash": "the first"}
    with httpx.Client(base_url=f"{address}gradio_api/queue/", timeout=60, trust_env=False) as browser:
        browser.post("join", json={"data": [], "fn_index": event, **session}).raise_for_status()
        with browser.stream("GET", "data", params=session) as messages:
            next(line for line in messages.iter_lines() if "process_completed" in line)


def serve(folders: Sequence[Path], open_pipeline: Callable[[Path], Pipeline], host: str, port: int) -> None:
    """`serving`, and print the address, until Ctrl-C or SIGTERM."""
    import signal

    with serving(folders, open_pipeline, host, port) as address:
        if host not in LOOPBACK:
            remark(f"--host {host}: whoever reaches this machine can draw pictures and read these runs' reports")
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(address, flush=True)
        stop.wait()


def import_gradio(files: Path) -> None:
    """Import gradio, told before that it reports to nobody, and keeps uploads, and what browsers are given, in `files`.

    Raises UserError where it is not installed.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(files)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio  # noqa: F401  # for its effect: it reads the environment above when it is first imported
    except ImportError as error:
        raise UserError(f"the page needs gradio ({error}): pip install 'sd-mini[app]'") from None


def free_port(host: str, port: int) -> int:
    """`port` if nobody listens there, and with 0 any free one. Raises UserError with another one to take."""
    try:
        return _bound(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = _bound(host, 0)
            raise UserError(
                f"--port {port}: is in use on {host}; take another, as --port {free}, or 0 for any"
            ) from None
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(
                f"--host {host}: is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all"
            ) from None
        raise UserError(f"--port {port}: cannot be used on {host} ({error.strerror}); use one above 1023") from None


def _bound(host: str, port: int) -> int:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose last user has just gone is free
        one.bind(address)
        return one.getsockname()[1]


def _middleware(host: str) -> list[Any]:
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    layers = [Middleware(Headers)]
    if host in LOOPBACK:  # a foreign name that a web page has led here is refused (DNS rebinding)
        layers.append(Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"]))
    return layers


class Headers:
    """An ASGI layer that adds `_HEADERS` to every answer: the browser itself then refuses what is from elsewhere."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS.items()]
            await send(message)

        await self.app(scope, receive, sending)
