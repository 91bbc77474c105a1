"""The three usual denoisers at their smallest: fields that the other stages do not decide; and a PRX to call."""

import torch

from sd_mini import noise_predictor

PRX = {"hidden_size": 32, "num_heads": 2, "depth": 3}
PIXART = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "norm_num_groups": 4}
UNET = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
NETWORKS = {"prx": PRX, "pixart": PIXART, "unet": UNET}

SHAPE, DIM = (4, 8, 8), 24


def tiny(**more):
    """A PRX of two blocks, its weights moved off their start."""
    torch.manual_seed(0)
    fields = {"patch_size": 2, "hidden_size": 32, "num_heads": 2, "depth": 2, "mlp_ratio": 2.0}
    made = noise_predictor.build("prx", fields | more, SHAPE, DIM)
    for parameter in made.parameters():  # a fresh PRX outputs zeros
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made


def inputs():
    """What `predict` takes beside the network, for two samples."""
    draws = torch.Generator().manual_seed(1)
    latents, tokens = torch.randn(2, *SHAPE, generator=draws), torch.randn(2, 6, DIM, generator=draws)
    return latents, torch.tensor([200.0, 800.0]), tokens, torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
