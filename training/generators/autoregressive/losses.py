"""The negative log-likelihood of a picture's codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sd_mini.generators.autoregressive import AutoregressiveGenerator


class AutoregressiveObjective(nn.Module):
    def __init__(self, network: AutoregressiveGenerator):
        super().__init__()
        self.network = network

    def forward(
        self, codes: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes (b, h w) => losses (b,): nats a code, -1/N sum_i log p(code_i | prompt, codes before it)."""
        logits = self.network(codes, prompt_embeds, prompt_mask)
        losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none")
        with torch.no_grad():
            right = (logits.argmax(-1) == codes).float().mean()
        return losses.mean(1), {"right": right}
