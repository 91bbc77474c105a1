"""The three usual denoisers at their smallest: fields that the other stages do not decide."""

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
