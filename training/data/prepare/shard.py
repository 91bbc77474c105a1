"""What a step takes and gives: a batch of rows as an Arrow table, and the rows of it that it refuses."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

STEPS = ("read", "harmful", "markup", "quality", "duplicates", "decontamination")


class Refusal(NamedTuple):
    """Why a row is not kept."""

    step: str
    reason: str
    detail: str


Refusals = dict[int, Refusal]
"""By row number within the batch."""


def texts(batch: pa.Table) -> list[list[str]]:
    """Each row's captions, the main one first; none for rows that were read without."""
    return batch["captions"].to_pylist()


def with_texts(batch: pa.Table, captions: list[list[str]]) -> pa.Table:
    column = pa.array(captions, pa.list_(pa.string()))
    return batch.set_column(batch.schema.get_field_index("captions"), "captions", column)


def pictures(batch: pa.Table, rows: list[int]) -> np.ndarray:
    """The pictures (N, 3, R, R) uint8 that were kept for a model."""
    stored = batch["model_picture"].take(rows)
    side = round((batch.schema.field("model_picture").type.byte_width / 3) ** 0.5)
    return np.frombuffer(b"".join(stored.to_pylist()), np.uint8).reshape(len(rows), 3, side, side)
