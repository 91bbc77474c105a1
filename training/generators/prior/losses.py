"""The losses of the prior, of the text's embedding and of the decoder, side by side: they share no weights."""

from __future__ import annotations

from torch import Tensor, nn

from sd_mini.diffusion.objective import TimeConfig
from sd_mini.generators.prior import PRIOR, PriorGenerator
from training.noise_predictor.losses import answer_and_target, log_losses


class PriorObjective(nn.Module):
    """`times`: the distribution of the decoder's noise levels, and the weights of its errors."""

    def __init__(self, network: PriorGenerator, times: TimeConfig):
        super().__init__()
        self.network, self.times = network, times

    def forward(
        self,
        latents: Tensor,
        embeddings: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        prior_noise: Tensor,
        prior_timesteps: Tensor,
        is_kept: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (b, C, h, w), embeddings of their pictures (b, D), a noise and a time for each, and whether the
        decoder is given the embedding (b,) => the sum of three losses (b,), and each to log."""
        network, times, prompt = self.network, self.times, (prompt_embeds, prompt_mask)

        # the decoder, on prompt and embedding
        condition = network.condition(prompt, embeddings, is_kept)
        answer, target = answer_and_target(network.body, times, latents, noise, timesteps, *condition)
        errors = (answer - target).square().mean((1, 2, 3))
        decoder, weights = errors, times.weights(timesteps)
        if weights is not None:
            decoder = weights * errors
        if times.weighting == "log":
            decoder = log_losses(errors)

        # the prior: the squared error of the embedding itself, eq. 2
        standardised = network.prior.standardised(embeddings)
        answer, target = answer_and_target(network.prior, PRIOR, standardised, prior_noise, prior_timesteps, *prompt)
        prior = (answer.float() - target).square().mean(1)

        # the text's embedding: by the same error
        text = (network.prior.text_embeddings(*prompt).float() - standardised).square().mean(1)
        metrics = {"decoder": errors.mean(), "prior": prior.mean(), "text": text.mean()}
        return decoder + prior + text, {name: value.detach() for name, value in metrics.items()}
