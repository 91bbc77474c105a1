"""The negative log-likelihood of a picture's codes."""

from __future__ import annotations

from torch import Tensor, nn

from sd_mini.generators.autoregressive import AutoregressiveGenerator


class AutoregressiveObjective(nn.Module):
    def __init__(self, network: AutoregressiveGenerator):
        super().__init__()
        self.network = network

    def forward(self, codes: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes (b, h w) => losses (b,): nats a code, -1/N sum_i log p(code_i | prompt, codes before it)."""
        logits = self.network(codes, prompt_embeds, prompt_mask)
        # a row a cell: torch's softmax is slow over any dimension but the last
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")
        return losses.view(codes.shape).mean(1), {}
