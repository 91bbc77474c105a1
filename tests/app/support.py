"""Runs in the states in which the page meets them."""

import json
import shutil

from training.storage import checkpoint


def unfinished(folder):
    """A run whose noise predictor is being trained, and whose last record is being written."""
    shutil.rmtree(folder / "noise_predictor" / "final")
    shutil.rmtree(folder / "pipeline")
    records = [
        {"step": 10, "loss": 0.5, "error": 1.0, "seconds": 1.5},
        {"step": 20, "loss": 0.25, "error": 0.5, "seconds": 3.0},
        {"step": 20, "valid/loss": 0.3},
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "noise_predictor" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": ']))
    return folder


def add_checkpoints(folder, pipeline, factors, widths=None):
    """Snapshots of the noise predictor, by step: its weights times a factor, and for each width times another."""
    parameters = {name: value.detach() for name, value in pipeline.noise_predictor.named_parameters()}
    for step, factor in factors.items():
        tensors = {
            f"ema-{width}": {name: factor * times * value for name, value in parameters.items()}
            for width, times in (widths or {0.05: 1.0, 0.1: 1.0}).items()
        }
        checkpoint.save(folder / "noise_predictor" / "snapshots", step, tensors, {"step": step})
