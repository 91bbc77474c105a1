"""Caches of encoded data: arrays in shards on disk, written once, memory-mapped when read.

HOME, a cache's folder, is named by a hash of all that its content depends on (the stage, the data, the number format),
so an edited picture or another autoencoder gets another cache; HOME/key.json holds what was hashed. HOME/00003/ is a
shard: NAME.npy for each array, and manifest.json with their SHA-256. Shards are written atomically and checked each
time the cache is opened: missing and damaged ones are encoded again. Of several trainings that begin at once one
writes, and the others wait.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain, groupby
from math import ceil, sqrt
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from sd_mini.config import check_choice
from sd_mini.data.batches import Rounding, Rows, Stored
from sd_mini.errors import UserError
from sd_mini.files import atomic_folder, combined_hash, file_hash, only_writer
from sd_mini.offload import on_device
from sd_mini.processes import process_device, rank_and_ranks, wait_for_everyone
from sd_mini.progress import progress

MIN_SHARD_ROWS = 4096
MAX_SHARDS = 32  # a random batch reads from all of them, at some microseconds each
LARGEST_RELATIVE_ERROR = 1e-3  # float16 rounding gives 2e-4; more means values too small for it
VERSION = 2  # part of every key: raise it when the encoding or the shards' format changes
MANIFEST = "manifest.json"

Arrays = dict[str, np.ndarray]
Shards = dict[Path, range]  # folder => the rows that it holds, in order


def encode(
    folder: Path,
    key: Mapping[str, object],
    count: int,
    encode_rows: Callable[[slice], Arrays],
    title: str,
    dtype: str = "float16",
    chunk: int = 256,
    models: Sequence[nn.Module] = (),
) -> dict[str, Rows]:
    """Rows 0..count of each array of `encode_rows(slice)`, from `folder/HASH_OF_KEY`; missing ones are encoded.

    `encode_rows` returns float32 arrays, stored as `dtype` ("float16" or "float32"), or bools or whole numbers, stored
    as they are. `chunk` rows are encoded and written at a time; at most two chunks are in memory. `key`: all that the
    rows depend on; `dtype` and VERSION are added. `models`: what encodes; on the device only while rows are encoded,
    and not at all where none is missing.
    A collective: each process encodes a part of the missing shards and opens all. Raises UserError for a value that is
    not finite or does not fit `dtype`, and for a disk without enough space.
    """
    check_choice("cache_dtype", dtype, ("float16", "float32"))
    assert count > 0
    key = {**key, "dtype": dtype, "version": VERSION}
    home, (rank, ranks) = folder / combined_hash(key)[:24], rank_and_ranks()
    is_main = rank == 0
    step = max(MIN_SHARD_ROWS, ceil(count / MAX_SHARDS))
    shards = {home / f"{i:05d}": range(a, min(a + step, count)) for i, a in enumerate(range(0, count, step))}
    missing = _missing(shards, title)
    local = dict(list(missing.items())[rank::ranks])
    done: set[Path] = set()  # written by another training meanwhile
    undone = ((path, rows) for path, rows in local.items() if path not in done)
    work = ((path, a, encode_rows(slice(a, min(a + chunk, r.stop)))) for path, r in undone for a in r[::chunk])

    with on_device(models, process_device()) if models and local else nullcontext():
        # Encode the first chunk before anything is written: it tells the size of a row.
        first = next(work, None)
        if first is not None:
            message(_room(home, sum(map(len, missing.values())), count, first[2], title, dtype))

        # Write, once every process knows what is missing and that it fits.
        wait_for_everyone()
        with _alone(home, key) if missing and is_main else nullcontext():
            wait_for_everyone()
            if first is not None:
                done |= {path for path, rows in local.items() if path.exists() and not _complaint(path, rows)}
                total = sum(len(rows) for path, rows in local.items() if path not in done)
                with progress(total=total, desc=title, unit="row", is_shown=is_main, mininterval=1) as bar:
                    for path, pieces in groupby(chain([first], work), key=itemgetter(0)):
                        if path not in done:
                            _write_shard(path, shards[path], pieces, title, dtype, bar)
            wait_for_everyone()
    opened = _open(shards)
    if missing:
        errors = "; ".join(f"{name} {rows.rounding}" for name, rows in opened.items() if rows.rounding is not None)
        message(f"{title}: {dtype} error of {errors}" if errors else f"{title}: stored exactly")
    return opened


@contextmanager
def _alone(home: Path, key: Mapping[str, object]) -> Generator[None]:
    """Lock the folder, for which other trainings wait, and write its key."""
    home.mkdir(parents=True, exist_ok=True)
    with only_writer(home, wait=True):
        # if interrupted it is written again, as shards are missing then too
        (home / "key.json").write_text(json.dumps(key, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        yield


def message(line: str) -> None:
    if rank_and_ranks()[0] == 0:
        tqdm.write(line, file=sys.stderr)


def _missing(shards: Shards, title: str) -> Shards:
    """The shards that are missing or damaged; damaged ones are named on stderr."""
    there = [path for path in shards if path.exists()]
    bar = {"desc": f"checking {title}", "unit": "shard", "delay": 2, "is_shown": rank_and_ranks()[0] == 0}
    with ThreadPoolExecutor() as pool:  # hashing frees the GIL
        checks = progress(pool.map(lambda path: _complaint(path, shards[path]), there), total=len(there), **bar)
        complaints = dict(zip(there, checks, strict=True))
    for path, complaint in complaints.items():
        if complaint:
            message(f"{title}: {path} is encoded again: {complaint}")
    return {path: rows for path, rows in shards.items() if complaints.get(path, "not there")}


def _complaint(shard: Path, rows: range) -> str:
    """What is wrong with a shard on disk; empty if every file has the SHA-256 of its manifest."""
    try:
        _read_shard(shard, rows, hashed=True)
        return ""
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())


def _read_shard(shard: Path, rows: range, hashed: bool) -> dict[str, Stored]:
    """A shard's arrays. Raises ValueError where manifest, folder, headers and, with `hashed`, contents do not agree.

    numpy refuses to map an array of Python objects, so nothing in a file can be executed.
    """
    read = {}
    try:
        files = json.loads((shard / MANIFEST).read_text(encoding="utf-8"))["files"]
        names = {path.name for path in shard.glob("*.npy")}  # other files, as of a file manager, do no harm
        if not files or names != files.keys():
            raise UserError(f"the files are {sorted(names)}, expected {sorted(files)}")
        for name, entry in files.items():
            if (size := (shard / name).stat().st_size) != entry["bytes"]:
                raise UserError(f"{name} has {size} bytes, expected {entry['bytes']}")
            if hashed and file_hash(shard / name) != entry["sha256"]:  # before numpy reads a header that may be damaged
                raise UserError(f"{name} is not the file that was written (SHA-256 differs)")
            array = np.asarray(np.lib.format.open_memmap(shard / name, mode="r"))  # a memmap's own indexing is slower
            form = [array.dtype.name, list(array.shape), len(array)]
            if form != (expected := [entry["dtype"], entry["shape"], len(rows)]):
                raise UserError(f"{name} is {form}, expected {expected} (type, shape, rows)")
            rounding = Rounding(**entry["rounding"]) if array.dtype.kind == "f" else None
            read[name.removesuffix(".npy")] = Stored(array, rounding)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{MANIFEST} is not one of a shard ({type(error).__name__}: {error})") from error
    return read


def _room(home: Path, rows: int, count: int, first: Arrays, title: str, dtype: str) -> str:
    """The line that announces what will be written. Raises UserError for a disk without the space."""
    row_bytes = sum(_stored_dtype(x, dtype).itemsize * x[0].size for x in first.values())
    needed = rows * row_bytes
    free = check_disk(home.parent, needed, title)
    needs, has = tqdm.format_sizeof(needed, "B"), tqdm.format_sizeof(free, "B")
    some = f"{rows:,} rows" if rows == count else f"the missing {rows:,} of {count:,} rows"
    as_floats = f" in {dtype}" if any(x.dtype.kind == "f" for x in first.values()) else ""
    return f"{title}: {some} of {row_bytes:,} bytes, {needs}{as_floats}, to {home} ({has} free)"


def check_disk(folder: Path, needed: int, title: str) -> int:
    """The bytes that are free where `folder` lies. Raises UserError for fewer than `needed`."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    needs, has = tqdm.format_sizeof(needed, "B"), tqdm.format_sizeof(free, "B")
    if needed > free:
        raise UserError(f"{title}: {folder} needs {needs}, and has {has} free: make room, or give another --run")
    return free


def _stored_dtype(values: np.ndarray, dtype: str) -> np.dtype:
    assert values.dtype.kind in "biu" or values.dtype == np.float32, values.dtype
    return np.dtype(dtype) if values.dtype.kind == "f" else values.dtype


def _write_shard(
    shard: Path, rows: range, pieces: Iterator[tuple[Path, int, Arrays]], title: str, dtype: str, bar: tqdm
) -> None:
    columns: dict[str, _Column] = {}
    with atomic_folder(shard) as partial, ExitStack() as files:
        for _, start, arrays in pieces:
            for name, values in arrays.items():
                if name not in columns:
                    file = files.enter_context((partial / f"{name}.npy").open("wb"))
                    columns[name] = _Column(file, values, rows, dtype, f"{title}: {name}")
                columns[name].append(values, start)
            bar.update(len(values))
        manifest = {"rows": len(rows), "files": {f"{name}.npy": column.entry() for name, column in columns.items()}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


class _Column:
    """Writes one array of a shard to its .npy file: the header, then piece by piece, hashed meanwhile."""

    def __init__(self, file: BinaryIO, like: np.ndarray, rows: range, dtype: str, title: str):
        self.file, self.rows, self.title, self.floating = file, rows, title, like.dtype.kind == "f"
        self.dtype, self.shape = _stored_dtype(like, dtype), (len(rows), *like.shape[1:])
        self.digest, self.largest, self.squares, self.error_squares = hashlib.sha256(), 0.0, 0.0, 0.0
        form = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(header := io.BytesIO(), form)
        self._put(header.getbuffer())

    def append(self, values: np.ndarray, start: int) -> None:
        """(b, ...) float32, bool or whole numbers: rows `start`..`start` + b of the whole array."""
        assert values.shape[1:] == self.shape[1:] and (values.dtype.kind == "f") == self.floating
        if self.floating:
            self._check(values, start)
        stored = np.ascontiguousarray(values, self.dtype)
        if self.floating:
            error = values - stored  # exact: float32 holds the bits that float16 dropped
            self.largest = max(self.largest, float(np.abs(error).max()))
            self.squares += _sum_of_squares(values)
            self.error_squares += _sum_of_squares(error)
        self._put(stored.reshape(-1).view(np.uint8).data)

    def _put(self, data: memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)

    def _check(self, values: np.ndarray, start: int) -> None:
        reach, limit = float(np.abs(values).max()), float(np.finfo(self.dtype).max)
        if reach <= limit:  # false for NaN
            return
        bad, what = np.abs(values) > limit, f"{reach:g}"
        mend = f"at most {limit:g}, the largest {self.dtype}: set cache_dtype to float32"
        if not np.isfinite(reach):
            bad, what = ~np.isfinite(values), "not finite"
            mend = "finite numbers: look at these samples, or train the stage that made them again"
        numbers = start + np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))
        raise UserError(f"{self.title} is {what}: rows {numbers[0]}..{numbers[-1]}; expected {mend}")

    def entry(self) -> dict[str, Any]:
        """The file's entry in the manifest, after all rows. Raises UserError for too large a rounding error."""
        size = int(np.prod(self.shape))
        rounding = Rounding(self.largest, sqrt(self.error_squares / size), sqrt(self.squares / size))
        if rounding.relative > LARGEST_RELATIVE_ERROR:
            raise UserError(
                f"{self.title}, rows {self.rows[0]}..{self.rows[-1]}: {self.dtype} loses {rounding.relative:.2g} of "
                f"the values' rms; expected at most {LARGEST_RELATIVE_ERROR:g}: set cache_dtype to float32"
            )
        form = {"bytes": self.file.tell(), "dtype": self.dtype.name, "shape": list(self.shape)}
        return {**form, "sha256": self.digest.hexdigest(), "rounding": rounding._asdict() if self.floating else None}


def _sum_of_squares(values: np.ndarray) -> float:
    flat = values.reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64, casting="safe"))  # makes no float64 copy


def _open(shards: Shards) -> dict[str, Rows]:
    try:
        read = [_read_shard(path, rows, hashed=False) for path, rows in shards.items()]
        if len({tuple((name, x.array.shape[1:]) for name, x in sorted(stored.items())) for stored in read}) > 1:
            raise UserError("its shards hold different arrays")
        return {name: Rows([stored[name] for stored in read]) for name in read[0]}
    except (OSError, ValueError) as error:
        mend = "let one launch at a time write there, on a disk that all processes see, delete it and start again"
        home, why = next(iter(shards)).parent, " ".join(str(error).split())
        raise UserError(f"{home} cannot be opened: {why}: {mend}") from error
