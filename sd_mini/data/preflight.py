"""What a data source holds, before anything is trained on it: `sd-mini data SOURCE`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sd_mini import images
from sd_mini.data.arrays import shapes_of, spans
from sd_mini.data.buckets import Size
from sd_mini.data.captioned import DataConfig, rows_of
from sd_mini.data.decoding import Decoded, decoded, fault_of_picture, read_picture, remarks_on
from sd_mini.data.rejected import reasons_of
from sd_mini.data.rows import captions_of, check_column
from sd_mini.data.sources import source_name
from sd_mini.data.table import Table
from sd_mini.errors import UserError
from sd_mini.openmp import cores
from sd_mini.texts import shown

SAMPLE = 1_000  # rows whose pictures are decoded, evenly spread
SHEET = 40  # rows of the contact sheet
_NAMED = 5


def survey(config: DataConfig, tokenizer: str | None = None, sheet: Path | None = None) -> list[str]:
    """What `config` names, a line a subject: rows, captions, pictures, what cannot be used, the cache.

    Captions are read of all rows, pictures of SAMPLE. `tokenizer`: folder or hub name of the encoder's, whose limit and
    broken words are reported. `sheet`: a picture file of SHEET rows with their captions. Raises UserError as
    `captioned.load`.
    """
    table = rows_of(config, "data")
    check_column(table, "data", "image_column", config.image_column)
    faults = {row: fault for row in range(len(table)) if (fault := table.fault(row)) is not None}
    captions = captions_of(table, config, "data", faults)
    lines = [f"{source_name(config)}: {len(table):,} rows; columns {', '.join(table.columns)}"]
    lines += _of_captions([own for own in captions if own])
    sample = table.select(_spread(len(table), SAMPLE))
    lines += _of_pictures(sample, config, len(table), faults)
    lines += _of_tokens([own[0] for own in captions if own], tokenizer) if tokenizer is not None else []
    if sheet is not None:
        chosen = _spread(len(table), SHEET)
        read = [(row, _tile(table, config, row)) for row in chosen]
        tiles = [(row, picture) for row, picture in read if picture is not None]
        labels = [" | ".join(captions[row]) or table.id(row) for row, _ in tiles]
        images.grid([picture for _, picture in tiles], columns=8, labels=labels).save(sheet)
        lines.append(f"contact sheet of {len(tiles)} rows: {sheet}")
    return lines


def counted(config: DataConfig, most: int = 200) -> tuple[int, np.ndarray]:
    """The rows of a source, and the width and height in px, (N, 2), of at most `most` of its pictures, evenly spread.

    Raises UserError as `captioned.load`, and for a source without a picture that can be read, or of which no text stage
    could be trained: without captions, with the same one everywhere, or with too many that are missing.
    """
    table = rows_of(config, "data")
    check_column(table, "data", "image_column", config.image_column)
    faults: dict[int, str] = {}
    captions = captions_of(table, config, "data", faults)
    name, different = source_name(config), {text for own in captions for text in own}
    if not any(captions) and not faults:
        raise UserError(f"{name}: no captions; name their column by --text_column, or make them by --template")
    if len(faults) > config.max_bad * len(table):
        raise UserError(
            f"{name}: {len(faults):,} of {len(table):,} rows cannot be used, more than max_bad {config.max_bad:g}, "
            f"the first: {next(iter(faults.values()))}; sd-mini data names them"
        )
    if len(different) < 2:
        raise UserError(
            f"{name}: every caption is {shown(next(iter(different), ''))}; a text stage needs different ones"
        )
    sample = table.select(_spread(len(table), most))
    pictures = decoded(sample, config, "data", None)
    if not pictures.is_read.any():
        raise UserError(f"{source_name(config)}: none of {len(sample):,} pictures can be read; sd-mini data names why")
    return len(table), pictures.sizes[pictures.is_read]


def _spread(count: int, most: int) -> list[int]:
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def _tile(table: Table, config: DataConfig, row: int) -> np.ndarray | None:
    found = read_picture(table, config.squares, row, Size(96, 96))
    return None if found is None else found[0]


def _of_captions(captions: Sequence[list[str]]) -> list[str]:
    if not captions:
        return ["captions: none"]
    texts = [text for own in captions for text in own]
    words = np.array([len(text.split()) for text in texts])
    line = (
        f"captions: {len(texts):,}, {len(set(texts)):,} of them different; words from {words.min()} to {words.max()}, "
        f"median {np.median(words):g}, 95 % at most {np.quantile(words, 0.95):g}"
    )
    text, number = Counter(texts).most_common(1)[0]
    return [line, *([f"most common caption: {shown(text)}, {number:,} times"] if number > 1 else [])]


def _of_pictures(sample: Table, config: DataConfig, count: int, faults: dict[int, str]) -> list[str]:
    started = time.perf_counter()
    pictures = decoded(sample, config, "data", None)
    pace = (time.perf_counter() - started) / len(sample)
    of_sample = {row: fault_of_picture(sample, config, row) for row in pictures.rows[~pictures.is_read].tolist()}
    good = pictures.is_read
    lines = []
    if good.any():
        sizes, hashes = pictures.sizes[good], pictures.hashes[good]
        lines.append(
            f"pictures ({len(sizes):,} looked at): {sizes[:, 0].min()} to {sizes[:, 0].max()} px wide, "
            f"{sizes[:, 1].min()} to {sizes[:, 1].max()} px high; width / height from "
            f"{(sizes[:, 0] / sizes[:, 1]).min():.2f} to {(sizes[:, 0] / sizes[:, 1]).max():.2f}"
        )
        lines += [f"at {config.resolution} px: {line}" for line in remarks_on(sizes, hashes, config)]
        if config.max_aspect > 1:
            lines.append(f"buckets, of {len(sizes):,} looked at: {_of_buckets(pictures)}")
    if faults:
        lines.append(f"cannot be used, of {count:,} rows: {len(faults):,}, the first: {next(iter(faults.values()))}")
    if of_sample:
        lines.append(f"cannot be used, of {len(sample):,} pictures looked at: {reasons_of(sample, of_sample)}")
    size, seconds = count * 3 * config.resolution**2 / 2**20, count * pace
    lines.append(f"cache at {config.resolution} px: {size:,.0f} MiB, in about {seconds:,.0f} s on {cores()} cores")
    return lines


def _of_buckets(pictures: Decoded) -> str:
    sizes = zip(spans(pictures.pictures), shapes_of(pictures.pictures), strict=True)
    counts = {Size(*shape[1:]): int(pictures.is_read[span.start : span.stop].sum()) for span, shape in sizes}
    return ", ".join(f"{count:,} of {size}" for size, count in counts.items() if count)


def _of_tokens(texts: Sequence[str], name: str) -> list[str]:
    """How many tokens captions have, and which words the tokenizer breaks up most often."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {name}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    lengths = np.array([len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]])
    limit = min(int(tokenizer.model_max_length), 10**6)
    lines = [
        f"tokens by {Path(name).name}: from {lengths.min()} to {lengths.max()}, median {np.median(lengths):g}; "
        f"{int((lengths > limit).sum()):,} captions have more than {limit}, all that are read"
    ]
    words = Counter(word for text in texts for word in text.split())
    pieces = {word: tokenizer.tokenize(word) for word in words}
    broken = [(word, parts) for word, parts in pieces.items() if len(parts) > 1 and word.isalpha()]
    broken.sort(key=lambda pair: (-words[pair[0]], pair[0]))
    named = ", ".join(f"{word} = {'|'.join(p.removesuffix('</w>') for p in parts)}" for word, parts in broken[:_NAMED])
    if broken:
        lines.append(f"words it breaks up: {len(broken):,} of {len(words):,}, most often {named}")
    return lines
