"""Counter-based random numbers: a row of uniforms is a function of (seed, stream, index) alone."""

import numpy as np

from sd_mini.errors import UserError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """uint64 => well mixed uint64: the output function of SplitMix64, Steele et al. 2014."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seed: int, stream: int, indices: np.ndarray, columns: int) -> np.ndarray:
    """(N,) indices => (N, columns) float64 in [0, 1); a column does not depend on how many there are."""
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: got {seed}, expected 0 to 2**63 - 1: pass another seed")
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        key = _splitmix64(_splitmix64(np.array([seed], dtype=np.uint64) + _GOLDEN) + np.uint64(stream) * _GOLDEN)
        rows = _splitmix64(key + (indices.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        bits = _splitmix64(rows[:, None] + np.arange(1, columns + 1, dtype=np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)) * 2.0**-53
