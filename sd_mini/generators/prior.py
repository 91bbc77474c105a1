"""Text => the embedding of its picture (the prior) => latents (the decoder): DALL-E 2.

Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents". Both parts are diffusion models,
drawn by the samplers of `sd_mini.sampling`. The embedding is that of stage 1's picture tower, of length 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models import PriorTransformer
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad

from sd_mini.diffusion.objective import Process
from sd_mini.draws import Draws, normals
from sd_mini.errors import UserError
from sd_mini.generators.base import Condition, LatentGenerator
from sd_mini.noise_predictor.network import build
from sd_mini.sampling import samplers
from sd_mini.sampling.loop import Guidance, SamplingRun
from sd_mini.text_encoder.matcher import Matcher

PRIOR = Process(kind="sample", schedule="cosine")  # sec. 2.2: it predicts the embedding itself; app. C
DECODER = Process(kind="flow")


class EmbeddingPrior(nn.Module):
    """diffusers' PriorTransformer, called as a noise predictor is, and the text's own embedding.

    It reads the prompt's tokens, the text's embedding, the time and the noised embedding, in this order, and a last
    token whose output is the answer (sec. 2.2). Embeddings are standardised by channel; the network's own fields
    `clip_mean` and `clip_std` hold their statistics.
    """

    def __init__(self, length: int, dim: int, fields: dict[str, Any]):
        super().__init__()
        self.length = length
        self.network = PriorTransformer(embedding_dim=dim, num_embeddings=length, **fields)
        for statistic in (self.network.clip_mean, self.network.clip_std):
            statistic.requires_grad_(False).fill_(1)
        self.text = nn.Linear(dim, dim)

    def text_embeddings(self, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
        """(B, L, D), (B, L) => (B, D), standardised: the mean token, mapped to where its picture's embedding is.

        Stage 1's text vector is made of states that a pipeline does not hold; this stands for it.
        """
        weights = prompt_mask[..., None].to(prompt_embeds.dtype)
        return self.text((prompt_embeds * weights).sum(1) / weights.sum(1).clamp(min=1))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Noised standardised embeddings (B, D), timesteps (B,) from 0 to 999, a prompt => ((B, D),), without noise."""
        missing = self.length - encoder_hidden_states.shape[1]  # a network of a fixed number of tokens
        prompt = pad(encoder_hidden_states, (0, 0, 0, missing)), pad(encoder_attention_mask, (0, missing))
        text = self.text_embeddings(*prompt).detach()  # which has a loss of its own
        return self.network(hidden_states, timestep, text, *prompt, return_dict=False)

    def set_statistics(self, embeddings: Tensor) -> None:
        """Measure those of the training pictures, (N, D)."""
        self.network.clip_mean.copy_(embeddings.mean(0, keepdim=True))
        self.network.clip_std.copy_(embeddings.std(0, keepdim=True).clamp(min=1e-6))

    def standardised(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, D) of length 1 => with mean 0 and standard deviation 1 by channel."""
        return (embeddings - self.network.clip_mean) / self.network.clip_std

    def embeddings(self, standardised: Tensor) -> Tensor:
        """The inverse of `standardised`, brought back to length 1: (B, D)."""
        return normalize(self.network.post_process_latents(standardised).float(), dim=-1)


class PriorGenerator(LatentGenerator):
    """Fields: `latent_shape` (C, h, w); `length` and `dim` of prompt embeddings (L, D), `dim` of picture embeddings
    too; `kind` and `network`, the decoder's, as of a noise predictor; `prior_network`, of PriorTransformer;
    `matcher`, of the `Matcher` whose picture side makes embeddings (none: no picture can be varied), and `tower_size`,
    px that it reads.

    How it draws: `candidates` embeddings of which the one nearest to the text's is kept (sec. 2.2), each in
    `prior_steps`, guided by `prior_guidance`; then latents in `steps`, guided between the noise levels `interval`.
    """

    is_guided: ClassVar[bool] = True
    use_of_image: ClassVar[str] = "varies a picture without a prompt: ImageVariationPipeline.from_pipe(pipeline)(image)"

    @register_to_config
    def __init__(
        self,
        family: str = "prior",
        latent_shape: tuple[int, int, int] = (8, 8, 8),
        length: int = 32,
        dim: int = 128,
        kind: str = "prx",
        network: dict[str, Any] | None = None,
        prior_network: dict[str, Any] | None = None,
        matcher: dict[str, Any] | None = None,
        tower_size: int = 64,
        candidates: int = 2,
        prior_steps: int = 10,
        prior_guidance: float = 1.0,
        steps: int = 8,
        interval: tuple[float, float] = (0.0, 1.0),
    ):
        super().__init__()
        self.prior = EmbeddingPrior(length, dim, dict(prior_network or {}))
        # words (D) and the embedding (D + 1) have columns of their own in the first layer's weights
        self.body = build(kind, dict(network or {}), tuple(latent_shape), 2 * dim + 1)
        self.tower = None if matcher is None else Matcher(**matcher).requires_grad_(False)

    def condition(self, prompt: Condition, embeddings: Tensor | None, is_kept: Tensor | None = None) -> Condition:
        """A prompt and embeddings (B, D) => what the decoder reads, (B, L + 1, 2 D + 1), (B, L + 1).

        The embedding is one more token of the prompt (sec. 2.1), standardised, with a 1; without one, and where
        `is_kept` (B,) is 0, zeros.
        """
        (words, mask), dim = prompt, self.config.dim
        token = words.new_zeros(len(words), 1, 2 * dim + 1)
        if embeddings is not None:
            present = words.new_ones(len(words), 1) if is_kept is None else is_kept[:, None].to(words.dtype)
            standardised = self.prior.standardised(embeddings).to(words.dtype)
            token[:, 0, dim:] = torch.cat([standardised, torch.ones_like(present)], dim=1) * present
        return torch.cat([token, pad(words, (0, dim + 1))], dim=1), pad(mask, (1, 0), value=True)

    def sample(self, prompt: Condition, null: Condition | None, draws: Draws, guidance: float) -> Tensor:
        return self.decode(prompt, self.draw_embeddings(prompt, null, draws), null, draws, guidance)

    def draw_embeddings(self, prompt: Condition, null: Condition | None, draws: Draws) -> Tensor:
        """Prompts => embeddings of pictures (B, D), of several draws the one nearest to the text's embedding.

        `null`: the condition that `prior_guidance` leads away from; none: no guidance.
        """
        config = self.config
        count = config.candidates
        noise = normals((count, config.dim), draws).flatten(0, 1)
        each = [part.repeat_interleave(count, 0) for part in prompt]
        each_null = None if null is None else [part.repeat_interleave(count, 0) for part in null]
        drawn = self._denoised(self._prior_run(null is not None), noise, each, each_null)
        candidates = self.prior.embeddings(drawn).unflatten(0, (-1, count))  # (B, count, D)
        # sec. 2.2: the draw with the higher inner product with the text's embedding
        text = self.prior.embeddings(self.prior.text_embeddings(*prompt))
        nearness = (candidates @ text[..., None])[..., 0]
        return candidates[torch.arange(len(candidates)), nearness.argmax(1)]

    def decode(
        self, prompt: Condition, embeddings: Tensor, null: Condition | None, draws: Draws, guidance: float
    ) -> Tensor:
        """Prompts and embeddings (B, D) => latents (B, C, h, w); guidance leads away from neither."""
        noise = normals(tuple(self.config.latent_shape), draws)
        away = None if null is None else self.condition(null, None)
        run = self._decoder_run(1.0 if null is None else guidance)
        return self._denoised(run, noise, self.condition(prompt, embeddings), away)

    @property
    def noise_predictors(self) -> list[Any]:
        return [self.body]

    def passes(self, guidance: float) -> int:
        """Calls of prior and decoder that a picture takes, guided by that scale; a guided one counts twice."""
        runs = self._prior_run(guidance != 1), self._decoder_run(guidance)
        of_prior, of_decoder = (len(run.timesteps) + sum(run.is_guided) for run in runs)
        return self.config.candidates * of_prior + of_decoder

    def _prior_run(self, is_guided: bool) -> SamplingRun:
        config = self.config
        guidance = Guidance(config.prior_guidance if is_guided else 1.0)
        return self._run(self.prior, PRIOR, guidance, config.prior_steps)

    def _decoder_run(self, scale: float) -> SamplingRun:
        return self._run(self.body, DECODER, Guidance(scale, 0.0, *self.config.interval), self.config.steps)

    def _run(self, network: Any, process: Process, guidance: Guidance, steps: int) -> SamplingRun:
        scheduler = samplers.build(samplers.default(process), process)
        return SamplingRun(network, scheduler, process, guidance, steps, self.device)

    def _denoised(self, run: SamplingRun, noise: Tensor, condition: Any, null: Any) -> Tensor:
        """A sampling run from noise to its end."""
        latents = run.start(noise.to(self.device, self.dtype))
        for i in range(len(run.timesteps)):
            latents = run.step(i, latents, condition, null)
        return latents

    @apply_forward_hook
    @torch.no_grad()
    def vary(self, embeddings: Tensor, null: Condition, draws: Draws, guidance: float = 1.0) -> Tensor:
        """Embeddings of pictures (B, D) => latents (B, C, h, w) of pictures like them, without a prompt (sec. 3.1)."""
        return self.decode(null, embeddings, null if guidance != 1 else None, draws, guidance)

    @apply_forward_hook
    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, R, R) in [-1, 1] => embeddings (B, D) of length 1, scaled to the tower's size first."""
        if self.tower is None:
            raise UserError(
                "image: stage 1 was trained on the features of a frozen tower, which this prior does not hold; give "
                "image_embeddings instead"
            )
        size = self.config.tower_size
        if pixels.shape[-1] != size:
            pixels = interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        return self.tower(pixels).vector
