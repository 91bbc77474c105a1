"""The cache of decoded pictures: killed and started again, written by two, and bounded in memory."""

import hashlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_mini.data import cache
from sd_mini.data.captioned import DataConfig, load
from tests.support.launching import apart, on_two_ranks

COUNT, SIDE = 300, 16


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "pictures"
    source.mkdir()
    draw = np.random.default_rng(0)
    for i in range(COUNT):
        cells = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        cells.resize((128, 96), Image.Resampling.BICUBIC).save(source / f"{i:03}.jpg", quality=80)
    (source / "111.jpg").write_bytes(b"no picture")
    return source


def config(source: Path) -> DataConfig:
    return DataConfig(source=str(source), resolution=SIDE)


def decode(source: Path, where: Path, delay: float | None = None) -> None:
    """With shards of 20 rows; killed `delay` seconds after the first row, or not at all."""
    cache.MIN_SHARD_ROWS, cache.MAX_SHARDS = 20, 100
    if delay is not None:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    load(config(source), folder=where)


def content(where: Path) -> dict[str, str]:
    return {
        str(path.relative_to(where)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(where.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def check_kills(folder: Path, tmp_path: Path, kills: int) -> None:
    assert apart(config, folder) == 0  # the server that forks the children is there
    started = time.perf_counter()
    assert apart(decode, folder, tmp_path / "whole") == 0
    whole, seconds = content(tmp_path / "whole"), time.perf_counter() - started
    draw, codes = random.Random(0), []
    for _ in range(kills):
        codes.append(apart(decode, folder, tmp_path / "killed", draw.uniform(0, seconds)))
    assert -signal.SIGKILL in codes and set(codes) <= {0, -signal.SIGKILL}
    assert apart(decode, folder, tmp_path / "killed") == 0
    assert content(tmp_path / "killed") == whole


def test_killed_and_started_again_the_bytes_are_the_same(folder, tmp_path):
    check_kills(folder, tmp_path, 2)


@pytest.mark.slow
def test_killed_twenty_times_the_bytes_are_the_same(folder, tmp_path):
    check_kills(folder, tmp_path, 20)


def decode_by_rank(source: Path, where: Path) -> None:
    from training.distributed.processes import join_processes

    join_processes()
    decode(source, where)


def test_two_processes_write_the_same_bytes(folder, tmp_path):
    assert apart(decode, folder, tmp_path / "one") == 0
    assert on_two_ranks(decode_by_rank, folder, tmp_path / "two") == [0, 0]
    assert content(tmp_path / "one") == content(tmp_path / "two")


def resident() -> float:
    """MB of this process, files that are mapped included."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's resident pages")
def test_pages_that_were_read_are_let_go(tmp_path):
    """256 MB of rows: mapped whole, they would be this process's own after one pass."""
    rows = cache.encode(
        tmp_path / "rows", {}, 4096, lambda rows: {"x": np.full((rows.stop - rows.start, 2**16), 7, np.uint8)}, "rows"
    )["x"]
    before, most = resident(), 0.0
    for piece in rows.pieces():
        most = max(most, resident() - before)
        assert (piece[:, ::4096] == 7).all()
    assert most < 160  # a piece, its copy and the pages behind it


def test_a_file_that_changes_while_it_is_read_stops_the_launch(folder, tmp_path, monkeypatch):
    from sd_mini.data import decoding
    from sd_mini.errors import UserError

    real = decoding.read_picture

    def changing(table, options, row, size):
        if row == 200:
            Image.new("RGB", (9, 9)).save(folder / "200.jpg")
        return real(table, options, row, size)

    monkeypatch.setattr(decoding, "read_picture", changing)
    with pytest.raises(UserError, match=r"200\.jpg"):
        load(config(folder), folder=tmp_path / "cache")
