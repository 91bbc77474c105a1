"""A record of what every step saw, by which two runs can be compared row by row: `trace-RANK.jsonl`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from training.engine.loader import StepInputs


def write(folder: Path, rank: int, inputs: StepInputs) -> None:
    """A line for each row of this process's passes: step, place in the global batch, sample id, a hash of each input.

    Inputs that are not one row a sample (a batch's texts, which all its pictures share) are left out.
    """
    with (folder / f"trace-{rank}.jsonl").open("a", encoding="utf-8") as file:
        for rows, tensors in zip(inputs.rows, inputs.passes, strict=True):
            for number, row in enumerate(range(rows.start, rows.stop)):
                hashes = {
                    name: hashlib.sha256(value[number].contiguous().numpy().tobytes()).hexdigest()[:16]
                    for name, value in tensors.items()
                    if value.dim() and len(value) == rows.stop - rows.start
                }
                line = {"step": inputs.step, "row": row, "id": int(inputs.ids[row]), **hashes}
                file.write(json.dumps(line) + "\n")
