"""Noise predictors by size: fields of the three usual diffusers networks, from 1 million to 1 billion parameters."""

from __future__ import annotations

from typing import Any

from sd_mini.errors import UserError

# width, blocks, heads; heads of 32 to 64
_PRX = {"1m": (96, 5, 3), "4m": (160, 7, 5), "20m": (320, 10, 5), "100m": (576, 14, 9), "400m": (960, 20, 15)}
_PRX["1b"] = (1408, 24, 22)
_PIXART = {"1m": (96, 6, 3), "4m": (160, 9, 5), "20m": (320, 11, 5), "100m": (640, 15, 10), "400m": (1152, 19, 16)}
_PIXART["1b"] = (1536, 27, 24)
# channels of the levels, residual blocks a level
_UNET: dict[str, tuple[tuple[int, ...], int]]
_UNET = {"1m": ((32, 72), 1), "4m": ((64, 144), 1), "20m": ((80, 160, 240), 2), "100m": ((192, 384, 512), 2)}
_UNET |= {"400m": ((320, 640, 1200), 2), "1b": ((352, 704, 1408, 1408), 2)}

SIZES = tuple(_PRX)


def preset(kind: str, size: str) -> dict[str, Any]:
    """prx, pixart or unet, and one of SIZES => the network's fields.

    A size is what the network holds, within a fifth, for latents of 8 channels and prompt embeddings of width 128;
    wider ones add to it. Raises ValueError for a kind or a size without a preset.
    """
    if kind not in ("prx", "pixart", "unet"):
        raise UserError(f"network.preset {size}: kind {kind!r} has no presets; give its own fields as network.network")
    if size not in SIZES:
        raise UserError(f"network.preset {size!r}: expected one of {', '.join(SIZES)}")
    if kind == "prx":
        width, depth, heads = _PRX[size]
        return {"patch_size": 2, "hidden_size": width, "num_heads": heads, "depth": depth, "mlp_ratio": 3.0}
    if kind == "pixart":
        width, depth, heads = _PIXART[size]
        head = {"num_attention_heads": heads, "attention_head_dim": width // heads}
        return {"patch_size": 2, "num_layers": depth, **head}
    channels, layers = _UNET[size]
    levels = len(channels) - 1
    return {
        "block_out_channels": list(channels),
        "down_block_types": ["CrossAttnDownBlock2D"] * levels + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * levels,
        "layers_per_block": layers,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
