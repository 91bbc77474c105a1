"""An exported stage's folder: weights, config and `stage.json`."""

from sd_mini.stages.contract import (
    KINDS,
    Stage,
    check_belonging,
    check_files,
    encoder_of,
    export,
    latents_of,
    load_stage,
    model_hash,
    read_contract,
)

__all__ = [
    "KINDS",
    "Stage",
    "check_belonging",
    "check_files",
    "encoder_of",
    "export",
    "latents_of",
    "load_stage",
    "model_hash",
    "read_contract",
]
