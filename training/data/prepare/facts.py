"""The first pass over a shard of the source: each picture decoded once, its hashes, the verdicts of steps 1 to 3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sd_mini import images
from sd_mini.errors import UserError
from sd_mini.files import atomic_file
from training.data.prepare import harmful, hashes, markup, quality
from training.data.prepare.config import PrepareConfig
from training.data.prepare.shard import Refusal, Refusals, texts
from training.data.prepare.source import SourceRow, open_rows

BATCH = 256  # rows that a step gets at once: with the pictures of a model at 320 px 75 MiB
_DECODED_SIDE = 512  # px that a JPEG keeps at least when it is decoded at a part of its size
_ROW_STEPS = {"harmful": harmful.clean, "markup": markup.clean, "quality": quality.clean}

FACTS = pa.schema(
    {
        "id": pa.string(),
        "captions": pa.list_(pa.string()),
        "changed": pa.bool_(),
        "step": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "contrast": pa.float32(),
        "sharpness": pa.float32(),
        "source_hash": pa.uint64(),
        "content": pa.uint64(),
        "hash": pa.uint64(),
        "mirrored": pa.uint64(),
        "thumbnail": pa.binary(hashes.THUMBNAIL[0] * hashes.THUMBNAIL[1] * 3),
        "caption": pa.uint64(),
        "length": pa.int32(),
        "bands": pa.list_(pa.uint32()),
    }
)


def shard_rows(rows: int, config: PrepareConfig, number: int) -> range:
    """The source's rows of a shard; they depend on nothing but the config."""
    return range(number * config.shard_rows, min(rows, (number + 1) * config.shard_rows))


def write_facts(config: PrepareConfig, part: str, rows: range, path: Path) -> None:
    """The task of the first pass."""
    batches = [batch_facts(batch, config, part) for batch in _batches(open_rows(config, part).read(rows))]
    with atomic_file(path) as partial:
        pq.write_table(pa.concat_tables(batches), partial, compression="zstd", compression_level=3)


def _batches(rows: Iterable[SourceRow]) -> Iterator[Iterator[SourceRow]]:
    source = iter(rows)
    for first in source:
        yield _chained(first, source)


def _chained(first: SourceRow, rest: Iterator[SourceRow]) -> Iterator[SourceRow]:
    yield first
    yield from islice(rest, BATCH - 1)


def batch_facts(rows: Iterable[SourceRow], config: PrepareConfig, part: str) -> pa.Table:
    """Rows => FACTS. Of a test source only step 2 is done, so that captions are compared in the same form."""
    batch, refused = read_batch(rows, config)
    before = texts(batch)
    for name, step in _ROW_STEPS.items():
        if getattr(config, name).enabled and (part == "data" or name == "markup"):
            batch, more = step(batch, config, refused)
            refused = {**more, **refused}
    after = texts(batch)
    firsts = [captions[0] if captions else "" for captions in after]
    min_words = config.duplicates.min_words if config.duplicates.enabled and part == "data" else None
    verdicts = [refused.get(row) for row in range(len(batch))]
    columns = {
        **{name: batch[name] for name in batch.column_names if name in FACTS.names},
        "changed": [a != b for a, b in zip(before, after, strict=True)],
        **{name: [v and getattr(v, name) for v in verdicts] for name in ("step", "reason", "detail")},
        "caption": pa.array([hashes.caption_key(first) for first in firsts], pa.uint64()),
        "length": [len(first) for first in firsts],
        "bands": [None] * len(firsts) if min_words is None else hashes.caption_bands(firsts, min_words),
    }
    return pa.table({name: columns[name] for name in FACTS.names}, FACTS)


def read_batch(rows: Iterable[SourceRow], config: PrepareConfig) -> tuple[pa.Table, Refusals]:
    """Decode and measure each picture once; what cannot be read is refused."""
    side = _model_side(config)
    refused: Refusals = {}
    measured: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        fault, own = row.fault, None
        if row.picture is not None:
            try:
                own = _measured(row.picture, config, side)
            except UserError as error:
                fault = fault or ("picture", str(error))
        if fault is not None:
            refused[number] = Refusal("read", *fault)
        measured.append({"id": row.id, "captions": row.captions, **(own or _unread(side))})
    small = np.stack([row.pop("small") for row in measured])
    first, mirrored = hashes.perceptual_hashes(small)
    columns: dict[str, Any] = {name: [row[name] for row in measured] for name in measured[0] if name != "model_picture"}
    columns |= {
        "contrast": quality.contrasts(small),
        "hash": first,
        "mirrored": mirrored,
        "thumbnail": list(map(bytes, hashes.thumbnails(small))),
    }
    schema = pa.schema([FACTS.field(name) for name in columns])
    table = pa.table(columns, schema)
    if side:
        pictures = pa.array([row["model_picture"] for row in measured], pa.binary(3 * side * side))
        table = table.append_column("model_picture", pictures)
    return table, refused


def _model_side(config: PrepareConfig) -> int:
    """Side of the square pictures kept for a model, px; 0 where there is none."""
    has_clip = config.quality.enabled and config.quality.clip is not None
    has_classifier = config.harmful.enabled and config.harmful.classifier is not None
    return config.harmful.resolution if has_clip or has_classifier else 0


def _measured(encoded: bytes, config: PrepareConfig, side: int) -> dict[str, Any]:
    rgb, (width, height) = images.decode_image(encoded, config.data.background, _DECODED_SIDE)
    small = rgb.resize((hashes.SIDE, hashes.SIDE), images.Image.Resampling.BILINEAR, reducing_gap=3.0)
    own = {
        "width": width,
        "height": height,
        "sharpness": quality.sharpness(quality.scaled_grey(rgb)),
        "source_hash": hashes.bytes_hash(encoded),
        "content": hashes.content_hash(width, height, rgb.tobytes()),
        "small": np.asarray(small),
    }
    if side:
        own["model_picture"] = images.fit(rgb, side).tobytes()
    return own


def _unread(side: int) -> dict[str, Any]:
    zeros: dict[str, Any] = dict.fromkeys(("width", "height", "source_hash", "content"), 0)
    zeros |= {"sharpness": 0.0, "small": np.zeros((hashes.SIDE, hashes.SIDE, 3), np.uint8)}
    return zeros | ({"model_picture": bytes(3 * side * side)} if side else {})


class Facts:
    """All shards' facts of one part, read by columns or by rows."""

    def __init__(self, paths: Sequence[Path], shard_rows: int):
        self.paths, self.shard_rows = paths, shard_rows

    def __len__(self) -> int:
        return sum(pq.read_metadata(path).num_rows for path in self.paths)

    def shards(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        for path in self.paths:
            yield pq.read_table(path, columns=list(columns))

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, (N,); of thumbnails (N, 36) uint8."""
        if pa.types.is_fixed_size_binary(FACTS.field(name).type):
            width = FACTS.field(name).type.byte_width
            joined = [b"".join(table[name].to_pylist()) for table in self.shards([name])]
            return np.concatenate([np.frombuffer(part, np.uint8) for part in joined]).reshape(-1, width)
        return np.concatenate([table[name].to_numpy() for table in self.shards([name])])

    def ids(self, rows: np.ndarray) -> pa.Array:
        """The ids of some rows, whose numbers are sorted."""
        parts = [pa.array([], pa.string())]
        shards = rows // self.shard_rows
        for members in np.split(rows, np.flatnonzero(np.diff(shards)) + 1) if len(rows) else []:
            shard, local = int(members[0] // self.shard_rows), members % self.shard_rows
            parts.append(pq.read_table(self.paths[shard], columns=["id"])["id"].take(local).combine_chunks())
        return pa.concat_arrays(parts)

    def take(self, rows: Iterable[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Some rows' facts by row number, each shard that has any of them read once."""
        wanted: dict[int, list[int]] = {}
        for row in sorted(set(rows)):
            wanted.setdefault(row // self.shard_rows, []).append(row)
        taken: dict[int, dict[str, Any]] = {}
        for shard, members in wanted.items():
            table = pq.read_table(self.paths[shard], columns=list(columns))
            local = [row - shard * self.shard_rows for row in members]
            taken |= dict(zip(members, table.take(local).to_pylist(), strict=True))
        return taken
