"""The second pass: what is kept, as parquet shards with the pictures' bytes, and what is not, as rejected.parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sd_mini.errors import UserError
from sd_mini.files import atomic_file
from training.data.prepare.config import PrepareConfig
from training.data.prepare.facts import Facts
from training.data.prepare.hashes import bytes_hash
from training.data.prepare.source import open_rows
from training.data.prepare.verdicts import REASONS, Verdicts

# encoded pictures are compressed already
_COMPRESSION = {
    "image.bytes": "none",
    "image.path": "zstd",
    "text": "zstd",
    "aliases.list.element": "zstd",
    "id": "zstd",
}
GROUP_ROWS = 100  # of a row group: as many pictures are in memory at once
REJECTED = pa.schema({"id": pa.string(), "step": pa.string(), "reason": pa.string(), "detail": pa.string()})


def output_schema(has_captions: bool, has_aliases: bool) -> pa.Schema:
    """Columns with the hub's own metadata, by which `datasets` decodes the pictures."""
    import datasets

    text: dict = {"text": datasets.Value("string")} if has_captions else {}
    aliases: dict = {"aliases": datasets.List(datasets.Value("string"))} if has_aliases else {}
    sizes = {"width": datasets.Value("int32"), "height": datasets.Value("int32")}
    return datasets.Features(
        {"image": datasets.Image(), **text, **aliases, "id": datasets.Value("string"), **sizes}
    ).arrow_schema


def write_shard(config: PrepareConfig, facts: Facts, kept: Path, number: int, schema: pa.Schema, path: Path) -> None:
    """The task of the second pass: the kept rows [number * shard_rows, ...), read from the source once more."""
    start = number * config.shard_rows
    rows = np.load(kept, mmap_mode="r")[start : start + config.shard_rows].tolist()
    known = facts.take(rows, ["id", "captions", "width", "height", "source_hash"])
    with (
        atomic_file(path) as partial,
        pq.ParquetWriter(
            partial,
            schema,
            compression=_COMPRESSION,
            use_dictionary=False,
            write_statistics=False,
        ) as writer,
    ):
        for group in _groups(config, rows, known):
            writer.write_table(pa.Table.from_pylist(group, schema), row_group_size=GROUP_ROWS)
        if not rows:
            writer.write_table(schema.empty_table())


def _groups(config: PrepareConfig, rows: list[int], known: dict[int, dict]) -> Iterator[list[dict]]:
    group: list[dict] = []
    for row, read in zip(rows, open_rows(config, "data").read(rows), strict=True):
        own = known[row]
        if read.id != own["id"] or read.picture is None or bytes_hash(read.picture) != own["source_hash"]:
            raise UserError(
                f"data.source: {config.data.source!r} has changed since it was read (row {own['id']}); delete the "
                "--out folder and clean it anew"
            )
        captions = own["captions"]
        fields = {"text": captions[0] if captions else None, "aliases": captions[1:]}
        sizes = {"width": own["width"], "height": own["height"]}
        group.append({"image": {"bytes": read.picture, "path": own["id"]}, "id": own["id"], **fields, **sizes})
        if len(group) == GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group


def rejected(facts: Facts, test: Facts | None, verdicts: Verdicts) -> Iterator[pa.Table]:
    """Every refused row, a table a shard of the source."""
    is_test = np.array([step == "decontamination" for step, _ in REASONS])
    of_test, of_data = is_test[verdicts.code], ~is_test[verdicts.code] & (verdicts.other >= 0)
    names = _Names(facts, verdicts.other[of_data], "row")
    test_names = _Names(test, verdicts.other[of_test], "test row") if test is not None else names
    start = 0
    for table in facts.shards(["id", "step", "reason", "detail"]):
        own = slice(start, start + len(table))
        codes, others = verdicts.code[own], verdicts.other[own]
        rows = table.to_pylist()
        for local in np.flatnonzero(codes).tolist():
            step, reason = REASONS[codes[local]]
            detail = (test_names if is_test[codes[local]] else names)[others[local]]
            rows[local] |= {"step": step, "reason": reason, "detail": detail}
        yield pa.Table.from_pylist([row for row in rows if row["step"] is not None], REJECTED)
        start += len(table)


class _Names:
    """The ids of the rows that others are refused for, each shard read once."""

    def __init__(self, facts: Facts, rows: np.ndarray, kind: str):
        self.rows, self.kind = np.unique(rows), kind
        self.ids = facts.ids(self.rows)

    def __getitem__(self, row: int) -> str:
        if row < 0:
            return ""
        return f"{self.kind} {self.ids[int(np.searchsorted(self.rows, row))].as_py()}"


def write_rejected(facts: Facts, test: Facts | None, verdicts: Verdicts, path: Path) -> None:
    with atomic_file(path) as partial, pq.ParquetWriter(partial, REJECTED, compression="zstd") as writer:
        for table in rejected(facts, test, verdicts):
            writer.write_table(table)
