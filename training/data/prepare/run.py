"""A cleaning from its folder's first file to its last: what is whole there is not made again."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sd_mini.errors import UserError
from sd_mini.files import atomic_file, atomic_text, check_writable, only_writer, read_json, written_to
from sd_mini.remarks import remark
from training.data.prepare import decontamination, duplicates, harmful, quality, report
from training.data.prepare.config import PrepareConfig
from training.data.prepare.engine import Engine, Task, open_engine, run_missing
from training.data.prepare.facts import Facts, shard_rows, write_facts
from training.data.prepare.search import PairSearch
from training.data.prepare.shards import output_schema, write_rejected, write_shard
from training.data.prepare.source import Source, close_sources, open_rows
from training.data.prepare.verdicts import Rows, Verdicts

MARK = "prepare.json"  # by which a folder of ours is known
WORK = ".work"  # what the passes leave for each other
VERSION = 2  # of the rules: raise it when the same config gives other bytes
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_PACKAGES = ("selectolax", "datasketch", "xxhash", "scipy", "jinja2")
_SAMPLE = 64  # rows by which the size of the pictures is estimated
_FACTS_BYTES = 250  # of a row's facts beside its caption


@dataclass(frozen=True)
class Work:
    """A cleaning's folders and sizes."""

    config: PrepareConfig
    out: Path
    rows: int
    test_rows: int

    @property
    def folder(self) -> Path:
        return self.out / WORK

    def paths(self, part: str) -> list[Path]:
        shards = -(-(self.rows if part == "data" else self.test_rows) // self.config.shard_rows)
        return [self.folder / f"{part}-{number:05d}.parquet" for number in range(shards)]

    def facts(self, part: str) -> Facts:
        return Facts(self.paths(part), self.config.shard_rows)

    @property
    def test(self) -> Facts | None:
        return self.facts("test") if self.test_rows else None


def clean(config: PrepareConfig, out: Path) -> dict[str, Any]:
    """Clean `config.data` into the folder `out` => report.json's content.

    Raises UserError, one line, before anything is written: for a folder that holds anything else or a cleaning with
    another config, for a source that cannot be read, for models that cannot be loaded, and for too little disk.
    """
    _check_folder(config, out)
    if _is_complete(out):
        shutil.rmtree(out / WORK, ignore_errors=True)  # where a kill came just before the end
        print(f"{out}: already cleaned")
        return read_json(out / "report.json") or {}
    _check_models(config)
    close_sources()
    source = open_rows(config, "data")
    has_test = config.test is not None and config.decontamination.enabled
    work = Work(config, out.absolute(), len(source), len(open_rows(config, "test")) if has_test else 0)
    _check_disk(work, source)
    with written_to(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with only_writer(out, option="--out"), open_engine(config) as engine:
            return _clean(work, engine)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(f"--out {out}: {error.strerror}; make room and run the same command again") from error


def _clean(work: Work, engine: Engine) -> dict[str, Any]:
    mark = {"version": VERSION, "rows": work.rows, "test_rows": work.test_rows, "config": work.config.content()}
    if (before := read_json(work.out / MARK)) is not None and (before["rows"], before["test_rows"]) != (
        work.rows,
        work.test_rows,
    ):
        raise UserError(
            f"{work.out}: the source had {before['rows']:,} rows (test: {before['test_rows']:,}) when this cleaning "
            f"began and has {work.rows:,} (test: {work.test_rows:,}); delete the folder, or give another --out"
        )
    atomic_text(work.out / MARK, json.dumps(mark, indent=2) + "\n")
    work.folder.mkdir(exist_ok=True)
    # both parts at once, so that no worker waits for the last of one
    shards = [(part, number) for part in ("test", "data") for number in range(len(work.paths(part)))]
    paths = [work.paths(part)[number] for part, number in shards]
    run_missing(engine, paths, "reading", lambda i, path: _facts_task(work, *shards[i], path))
    verdicts = _verdicts(work, PairSearch(engine, work.folder, work.config.duplicates.bits))
    _write_kept(work, engine, verdicts)
    facts, test = work.facts("data"), work.test
    rejected = work.out / "rejected.parquet"
    write_rejected(facts, test, verdicts, rejected)
    summary = report.summary(work.config, facts, work.test_rows, verdicts)
    atomic_text(work.out / "report.html", report.page(work.config, facts, verdicts, rejected, summary))
    atomic_text(work.out / "report.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    atomic_text(work.out / MARK, json.dumps({**mark, "complete": True}, indent=2) + "\n")
    shutil.rmtree(work.folder)
    return summary


def _facts_task(work: Work, part: str, number: int, path: Path) -> Task:
    rows = shard_rows(work.rows if part == "data" else work.test_rows, work.config, number)
    return Task(write_facts, (work.config.located(), part, rows, path))


def _verdicts(work: Work, find_pairs: PairSearch) -> Verdicts:
    """What the rows are refused for together, from the hashes alone."""
    path = work.folder / "verdicts.npz"
    if path.is_file():
        return Verdicts.load(path)
    config, facts = work.config, work.facts("data")
    verdicts, rows = Verdicts.begin(_not_refused(facts)), Rows.of(facts)
    if config.quality.enabled:
        duplicates.refuse_repeated_captions(config.quality, rows, verdicts)
    if config.duplicates.enabled:
        duplicates.refuse_duplicates(config.duplicates, rows, facts, find_pairs, verdicts)
    if work.test is not None:
        test = work.test
        readable = _not_refused(test)
        decontamination.refuse_test_rows(config, rows, Rows.of(test), readable, find_pairs, verdicts)
    for line in verdicts.remarks:
        remark(line)
    verdicts.save(path)
    return verdicts


def _not_refused(facts: Facts) -> np.ndarray:
    """(N,) bool: whether steps 1 to 3 left each row."""
    return np.concatenate([table["step"].is_null().to_numpy() for table in facts.shards(["step"])])


def _write_kept(work: Work, engine: Engine, verdicts: Verdicts) -> None:
    """The parquet shards of the kept rows, of equal numbers of rows but the last."""
    kept = work.folder / "kept.npy"
    (rows,) = np.nonzero(verdicts.alive)
    with atomic_file(kept) as partial, partial.open("wb") as file:
        np.save(file, rows)
    facts, config = work.facts("data"), work.config.located()
    shards = max(1, -(-len(rows) // config.shard_rows))
    paths = [work.out / f"train-{number:05d}-of-{shards:05d}.parquet" for number in range(shards)]
    schema = output_schema(config.data.text_column is not None, _has_aliases(facts))
    run_missing(
        engine, paths, "writing", lambda number, path: Task(write_shard, (config, facts, kept, number, schema, path))
    )


def _has_aliases(facts: Facts) -> bool:
    return any(max(map(len, table["captions"].to_pylist()), default=0) > 1 for table in facts.shards(["captions"]))


def _is_complete(out: Path) -> bool:
    return bool((read_json(out / MARK) or {}).get("complete"))


def _check_folder(config: PrepareConfig, out: Path) -> None:
    """Raises UserError unless `out` is new, empty, or a folder of this very cleaning."""
    check_writable(out)
    mark = read_json(out / MARK)
    if mark is None:
        strangers = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.is_dir() else []
        if strangers:
            raise UserError(f"--out {out}: holds other files ({min(strangers)}); give a new folder")
        return
    now = {"version": VERSION, "config": config.content()}
    changed = [name for name in _flat(now) if _flat(mark).get(name) != _flat(now)[name]]
    if changed:
        what = ", ".join(
            f"{n.removeprefix('config.')} was {_flat(mark).get(n)!r}, now {_flat(now)[n]!r}" for n in changed[:4]
        )
        raise UserError(f"--out {out}: was begun with another config: {what}; give another folder, or delete it")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        flattened |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flattened


def _check_models(config: PrepareConfig) -> None:
    """Load what the tasks will need, so that what is missing is said before they begin."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise UserError(f"not installed: {', '.join(missing)}; pip install -e '.[train,prepare]' gives them")
    if config.harmful.enabled:
        harmful.word_pattern(config.harmful)
        if config.harmful.classifier is not None:
            harmful.load_classifier(config.harmful.classifier)
    if config.quality.enabled and config.quality.clip is not None:
        quality.load_clip(config.quality.clip)


def _check_disk(work: Work, source: Source) -> None:
    """Raises UserError where what will be written does not fit, by the size of some rows, evenly spread."""
    sample = [i * work.rows // min(_SAMPLE, work.rows) for i in range(min(_SAMPLE, work.rows))]
    sizes = [len(row.picture or b"") + 2 * len(" ".join(row.captions).encode()) for row in source.read(sample)]
    needed = round(work.rows * (sum(sizes) / len(sizes) + 2 * _FACTS_BYTES))
    there = sum(path.stat().st_size for path in work.out.rglob("*") if path.is_file()) if work.out.is_dir() else 0
    nearest = next(path for path in (work.out, *work.out.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    print(f"{work.rows:,} rows: at most about {_gib(needed)} to write, {_gib(free)} free")
    if needed - there > free:
        raise UserError(
            f"--out {work.out}: about {_gib(needed - there)} more are needed; make room, or give another disk"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
