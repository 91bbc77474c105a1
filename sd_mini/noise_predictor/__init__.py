"""The latent noise predictor: built from its config, and called."""

from sd_mini.diffusion.objective import predict, unwrapped
from sd_mini.noise_predictor.network import (
    KINDS,
    build,
    check_call,
    class_of,
    condition_field,
)

__all__ = ["KINDS", "build", "check_call", "class_of", "condition_field", "predict", "unwrapped"]
