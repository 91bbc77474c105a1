"""An exported stage's folder: weights, config and `stage.json`."""

from sd_mini.stages.contract import (
    KINDS,
    PREDICTORS,
    STAGES,
    TUNED,
    Stage,
    check_belonging,
    check_files,
    encoder_of,
    export,
    exported_predictors,
    kind_of,
    latents_of,
    lineage,
    load_stage,
    model_hash,
    read_contract,
)

__all__ = [
    "KINDS",
    "PREDICTORS",
    "STAGES",
    "TUNED",
    "Stage",
    "check_belonging",
    "check_files",
    "encoder_of",
    "export",
    "exported_predictors",
    "kind_of",
    "latents_of",
    "lineage",
    "load_stage",
    "model_hash",
    "read_contract",
]
