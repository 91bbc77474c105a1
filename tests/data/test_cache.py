"""The cache of stage 3: whole shards or none, checked each time they are opened, and what float16 costs."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState

from sd_mini import files
from sd_mini.data import cache
from tests.support.faults import Canary
from tests.support.launching import apart, on_two_ranks

WIDTH = 3000  # float16 values a row, enough for half a shard to reach the file before its last row
MANIFEST = "manifest.json"


def rows_of(rows: slice) -> dict[str, np.ndarray]:
    """Thirds, which float16 has to round, a whole number and a bool: all known from the row's number."""
    i = np.arange(rows.start, rows.stop)
    thirds = (i[:, None] + np.arange(WIDTH)) / np.float32(3)
    return {"thirds": thirds.astype(np.float32), "number": i, "even": i % 2 == 0}


@pytest.fixture
def encoder(monkeypatch):
    """`rows_of`, and a note of what was asked for, in shards of 5 rows."""
    monkeypatch.setattr(cache, "MIN_SHARD_ROWS", 5)
    asked = []

    def encode_rows(rows):
        asked.append((rows.start, rows.stop))
        return rows_of(rows)

    return encode_rows, asked


def home_of(folder: Path) -> Path:
    (home,) = folder.iterdir()
    return home


def content(folder: Path) -> dict[str, str]:
    return files.file_hashes(home_of(folder), "")


def written(shard: Path) -> dict[str, tuple[int, int]]:
    """Which files these are, and when they were written."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shard.iterdir()}


def test_rows_come_back_from_any_shard_in_any_order(tmp_path, encoder):
    rows = cache.encode(tmp_path, {"a": 1}, 13, encoder[0], "rows", chunk=2)
    ids = np.array([12, 0, 7, 7, 4, 5])
    assert rows["number"][ids].tolist() == ids.tolist() and rows["number"][ids].dtype == np.int64
    assert rows["even"][ids].tolist() == [i % 2 == 0 for i in ids]
    expected = ((ids[:, None] + np.arange(WIDTH)) / np.float32(3)).astype(np.float16)
    assert np.array_equal(rows["thirds"][ids], expected) and rows["thirds"][ids].dtype == np.float16
    assert len(rows["thirds"]) == 13 and rows["thirds"][[]].shape == (0, WIDTH)
    assert encoder[1] == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 9), (9, 10), (10, 12), (12, 13)]


@pytest.mark.parametrize("ids", [[-1], [0, 13], [0.0], [True], [[1]], 13, -1])
def test_row_numbers_that_are_none_are_refused(tmp_path, encoder, ids):
    rows = cache.encode(tmp_path, {}, 13, encoder[0], "rows")
    with pytest.raises(IndexError):
        rows["thirds"][ids]


@pytest.mark.parametrize(("count", "shards"), [(5, 1), (13, 3), (160, 32), (161, 27), (1000, 32)])
def test_no_more_than_32_shards(tmp_path, encoder, count, shards):
    rows = cache.encode(tmp_path, {}, count, lambda rows: {"x": rows_of(rows)["number"]}, "rows")
    assert len(list(home_of(tmp_path).glob("0????"))) == shards
    assert rows["x"][np.arange(count)].tolist() == list(range(count))


def test_the_same_key_is_read_in_silence_and_another_is_encoded(tmp_path, encoder, capsys):
    encode_rows, asked = encoder
    cache.encode(tmp_path, {"a": 1}, 13, encode_rows, "rows")
    asked.clear()
    capsys.readouterr()
    assert len(cache.encode(tmp_path, {"a": 1}, 13, encode_rows, "rows")["thirds"]) == 13 and not asked
    assert capsys.readouterr() == ("", "")
    for number, (key, dtype) in enumerate(
        [({"a": 2}, "float16"), ({"a": 1, "b": 1}, "float16"), ({"a": 1}, "float32")]
    ):
        cache.encode(tmp_path, key, 13, encode_rows, "rows", dtype)
        assert len(asked) == 3 * (number + 1)
    keys = {home.name: json.loads((home / "key.json").read_text()) for home in tmp_path.iterdir()}
    assert len(keys) == 4 and all(name == files.combined_hash(key)[:24] for name, key in keys.items())
    assert {"a": 2, "dtype": "float16", "version": cache.VERSION} in keys.values()


def test_what_is_written_is_said_first_and_what_it_cost_last(tmp_path, encoder, capsys):
    cache.encode(tmp_path, {}, 13, encoder[0], "thirds of a row", chunk=2)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "row/s" not in line.strip()]
    first, last = (line for line in lines if line.strip() and "?row" not in line)
    assert "thirds of a row: 13 rows of 6,009 bytes, 78.1kB in float16" in first
    assert str(home_of(tmp_path)) in first and "free" in first
    # from 512 on float16 has steps of 1/2, and a third is 1/6 away from the nearest
    assert "float16 error of thirds at most 0.17, rms 0.00018 of the values' rms" in last


def die_in_row_7(folder: Path) -> None:
    cache.MIN_SHARD_ROWS = 5

    def encode_rows(rows):
        if rows.start == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows_of(rows)

    cache.encode(folder, {}, 13, encode_rows, "rows", chunk=1)


def test_killed_it_goes_on_at_the_first_missing_shard(tmp_path, encoder):
    encode_rows, asked = encoder
    assert apart(die_in_row_7, tmp_path / "a") == -signal.SIGKILL
    home = home_of(tmp_path / "a")
    assert {p.name for p in home.iterdir()} == {".lock", "key.json", "00000", ".00001.partial"}
    assert 0 < (home / ".00001.partial" / "thirds.npy").stat().st_size < 5 * 2 * WIDTH
    before = written(home / "00000")
    cache.encode(tmp_path / "a", {}, 13, encode_rows, "rows", chunk=1)
    assert asked == [(i, i + 1) for i in range(5, 13)] and written(home / "00000") == before
    cache.encode(tmp_path / "b", {}, 13, encode_rows, "rows", chunk=1)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda shard: truncate(shard / "thirds.npy"),
    "a bit flipped": lambda shard: flip_a_bit(shard / "thirds.npy"),
    "a bit flipped in the small file": lambda shard: flip_a_bit(shard / "even.npy"),
    "removed": lambda shard: (shard / "thirds.npy").unlink(),
    "another file": lambda shard: shutil.copy(shard / "even.npy", shard / "more.npy"),
    "of another shard": lambda shard: [shutil.rmtree(shard), shutil.copytree(shard.with_name("00002"), shard)],
    "no manifest": lambda shard: (shard / MANIFEST).unlink(),
    "half a manifest": lambda shard: truncate(shard / MANIFEST) or os.truncate(shard / MANIFEST, 100),
    "a bit flipped in the manifest": lambda shard: flip_a_bit(shard / MANIFEST),
    "another manifest": lambda shard: (shard / MANIFEST).write_text('{"files": {"even.npy": 1}}'),
    "empty": lambda shard: [path.unlink() for path in shard.iterdir()],
}


def test_what_a_file_manager_leaves_in_a_shard_is_no_damage(tmp_path, encoder, capsys):
    encode_rows, asked = encoder
    cache.encode(tmp_path, {}, 13, encode_rows, "rows")
    (home_of(tmp_path) / "00001" / ".DS_Store").write_bytes(b"1")
    asked.clear()
    cache.encode(tmp_path, {}, 13, encode_rows, "rows")
    assert not asked


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_and_encoded_again_the_others_stay(tmp_path, encoder, capsys, damage):
    encode_rows, asked = encoder
    cache.encode(tmp_path, {}, 13, encode_rows, "rows")
    whole, home = content(tmp_path), home_of(tmp_path)
    others = written(home / "00000"), written(home / "00002")
    DAMAGE[damage](home / "00001")
    assert content(tmp_path) != whole
    asked.clear()
    capsys.readouterr()
    rows = cache.encode(tmp_path, {}, 13, encode_rows, "rows")
    assert asked == [(5, 10)] and content(tmp_path) == whole
    assert rows["number"][np.arange(13)].tolist() == list(range(13))
    assert (written(home / "00000"), written(home / "00002")) == others
    said = capsys.readouterr().err
    assert f"{home / '00001'} is encoded again: " in said and "00000" not in said.replace(str(home / "00001"), "")
    asked.clear()
    cache.encode(tmp_path, {}, 13, encode_rows, "rows")
    assert not asked and capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["an array of objects", "no array at all"])
def test_a_pickle_in_a_shard_never_runs(tmp_path, encoder, capsys, kind):
    """The manifest is made to match it, so that nothing but numpy's own refusal stands in its way."""
    cache.encode(tmp_path / "cache", {}, 13, encoder[0], "rows")
    shard = home_of(tmp_path / "cache") / "00001"
    canary, planted = tmp_path / "canary", shard / "number.npy"
    if kind == "an array of objects":
        np.save(planted, np.array([Canary(canary)] * 5, dtype=object))
    else:
        planted.write_bytes(pickle.dumps(Canary(canary)))
    data = planted.read_bytes()
    manifest = json.loads((shard / MANIFEST).read_text())
    manifest["files"]["number.npy"] |= {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "dtype": "object",
        "shape": [5],
    }
    (shard / MANIFEST).write_text(json.dumps(manifest))
    encoder[1].clear()
    rows = cache.encode(tmp_path / "cache", {}, 13, encoder[0], "rows")
    assert not canary.exists() and encoder[1] == [(5, 10)] and "00001 is encoded again" in capsys.readouterr().err
    assert rows["number"][np.arange(13)].tolist() == list(range(13))
    planted.write_bytes(data)
    np.load(planted, allow_pickle=True)
    assert canary.exists()  # it does run where it is let


def test_the_stated_error_is_the_error(tmp_path, encoder):
    values = (np.random.default_rng(0).normal(size=(13, 7, 11)) * 10.0 ** np.arange(-2, 5)[:, None]).astype(np.float32)

    def encode_rows(rows):
        return {"values": values[rows]}

    half = cache.encode(tmp_path, {}, 13, encode_rows, "values", chunk=2)["values"]
    error = values.astype(np.float64) - values.astype(np.float16).astype(np.float64)
    assert half.rounding.largest == np.abs(error).max() > 0
    assert half.rounding.relative == pytest.approx(np.sqrt((error**2).mean() / (values.astype(float) ** 2).mean()))
    manifest = json.loads((home_of(tmp_path) / "00001" / MANIFEST).read_text())
    stated = manifest["files"]["values.npy"]["rounding"]
    assert manifest["rows"] == 5 and stated["largest"] == np.abs(error[5:10]).max()
    assert stated["rms_error"] == pytest.approx(np.sqrt((error[5:10] ** 2).mean()))
    assert cache.encode(tmp_path, {}, 13, encode_rows, "values")["values"].rounding == half.rounding
    full = cache.encode(tmp_path, {}, 13, encode_rows, "values", "float32")["values"]
    assert full.rounding.largest == full.rounding.relative == 0
    assert np.array_equal(full[np.arange(13)], values) and full[[1]].dtype == np.float32


REFUSED = {
    "overflow": ("float16", 65505.0, r"is 65505: rows 7\.\.8; expected at most 65504.*set cache_dtype to float32"),
    "NaN": ("float16", np.nan, r"is not finite: rows 7\.\.8; expected finite"),
    "Inf": ("float16", -np.inf, r"is not finite: rows 7\.\.8; expected finite"),
    "NaN in float32": ("float32", np.nan, r"is not finite: rows 7\.\.8; expected finite"),
    "too small": ("float16", 1e-6, r"rows 5\.\.9: float16 loses 0\.\d+ of .* expected at most 0\.001: set cache_dtype"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_would_be_lost_are_refused(tmp_path, encoder, case):
    dtype, value, message = REFUSED[case]

    def encode_rows(rows):
        i = np.arange(rows.start, rows.stop)
        small = case == "too small" and 5 <= rows.start < 10
        return {"x": np.where((i == 7) | (i == 8) | small, value, 1.0).astype(np.float32)[:, None]}

    with pytest.raises(ValueError, match=message) as refused:
        cache.encode(tmp_path, {}, 13, encode_rows, "rows", dtype, chunk=5)
    assert "\n" not in str(refused.value) and str(refused.value).startswith("rows: x")
    assert {p.name for p in home_of(tmp_path).iterdir()} == {".lock", "key.json", "00000"}
    if case in ("overflow", "too small"):
        kept = cache.encode(tmp_path, {}, 13, encode_rows, "rows", "float32", chunk=5)["x"]
        assert kept[[7]] == np.float32(value)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, encoder, monkeypatch):
    encode_rows, asked = encoder
    usage = namedtuple("usage", "total used free")
    row_bytes = 2 * WIDTH + 8 + 1

    def free(rows):
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(0, 0, rows * row_bytes - (rows == 13)))

    free(13)
    with pytest.raises(ValueError, match=r"^rows: .*folder needs 78.1kB, and has 78.1kB free: make room") as refused:
        cache.encode(tmp_path / "new" / "folder", {}, 13, encode_rows, "rows", chunk=2)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir()) and asked == [(0, 2)]
    free(14)
    cache.encode(tmp_path / "cache", {}, 13, encode_rows, "rows")
    free(5)  # for what is missing there is
    shutil.rmtree(home_of(tmp_path / "cache") / "00001")
    assert cache.encode(tmp_path / "cache", {}, 13, encode_rows, "rows")["number"][[7]] == 7


def note_the_share(folder: Path) -> None:
    process, asked = PartialState(cpu=True), []
    sys.stderr = (folder / f"said-{process.process_index}").open("w", buffering=1)
    cache.MIN_SHARD_ROWS = 5

    def encode_rows(rows):
        asked.append(rows.start)
        return rows_of(rows)

    for key, count in (("many", 23), ("one", 3)):
        rows = cache.encode(folder / key, {}, count, encode_rows, f"rows, {key}")
        assert rows["number"][np.arange(count)].tolist() == list(range(count))
    (folder / f"asked-{process.process_index}").write_text(json.dumps(asked))


def test_two_processes_share_the_missing_shards_out(tmp_path, encoder):
    cache.encode(tmp_path / "many", {}, 23, encoder[0], "rows")
    whole = content(tmp_path / "many")
    shutil.rmtree(home_of(tmp_path / "many") / "00001")
    flip_a_bit(home_of(tmp_path / "many") / "00003" / "thirds.npy")
    assert on_two_ranks(note_the_share, tmp_path) == [0, 0]
    assert [json.loads((tmp_path / f"asked-{i}").read_text()) for i in range(2)] == [[5, 0], [15]]
    assert content(tmp_path / "many") == whole
    said = "".join((tmp_path / f"said-{i}").read_text() for i in range(2))
    for line in ("00003 is encoded again", "many: the missing 10 of 23 rows", "many: float16 error", "one: 3 rows"):
        assert said.count(line) == 1, said
