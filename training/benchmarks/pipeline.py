"""How fast `Pipeline` makes pictures, beside diffusers' own pipeline on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXTransformer2DModel
from torch import Tensor

from sd_mini.cli.opening import open_pipeline
from sd_mini.cpu import stock_copy
from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.sampling.loop import Condition
from sd_mini.timing import Case
from training.benchmarks.predictor import parsed
from training.distributed.processes import join_processes, tune_cpu

ROUNDS = 9
FEW, MANY = 8, 50  # evaluations: ours, and those of the stock pipeline of equal score


def pipeline_speed(argv: Sequence[str]) -> dict[str, Any]:
    """Milliseconds a picture at batch 1 and 32: ours, and stock PRX at the same number of evaluations; and ours at FEW
    against stock at MANY, whose scores `python -m eval --steps` compares.

    Stock has its own network (no part sped up), its own scheduler's spacing and its own loop; both end in our decoder.
    Its guidance takes one picture at a time (its time embedding fails for more), so in batches neither is guided.
    Raises UserError for a pipeline that is no PRX on the linear path.
    """
    pipeline = open_pipeline(parsed(argv).run)
    pipeline.accelerate()
    join_processes()
    tune_cpu(1)
    pipeline.set_progress_bar_config(disable=True)
    stock = stock_pipeline(pipeline, FlowMatchEulerDiscreteScheduler())
    guidance = pipeline.config.default_guidance
    report: dict[str, Any] = {}
    for name, batch, scale in (("batch_1", 1, guidance), ("batch_32", 32, 1.0), ("batch_32_guided", 32, guidance)):
        contestants = {"ours": _ours(pipeline, batch, FEW, scale)}
        if batch == 1 or scale == 1:
            contestants["stock"] = _stock(stock, pipeline, batch, FEW, scale)
            contestants[f"stock, {MANY} steps"] = _stock(stock, pipeline, batch, MANY, scale)
        print(f"batch {batch}, {FEW} steps, guidance {scale:g}")
        each = {"ms a picture": lambda seconds, batch=batch: 1000 * seconds / batch}
        turns = Case(name, contestants, ROUNDS, warm_up_rounds=1, figures=each).run()
        report[name] = {"p50_ms": turns.figure("ours", each["ms a picture"]).record()}
        for key, other in zip(("ratio_to_stock", "ratio_to_stock_at_equal_score"), list(contestants)[1:], strict=False):
            report[name][key] = turns.ratio(other, "ours").record()
    # the headline: ratios in batches, unguided, and the time of a guided picture
    guided = report.pop("batch_32_guided")
    return report | report["batch_32"] | guided


def stock_pipeline(pipeline: Pipeline, scheduler: Any) -> Any:
    """diffusers' own pipeline around the stock network of the same weights. UserError for what is no PRX on flow."""
    ours = pipeline.noise_predictor
    if not isinstance(ours, PRXTransformer2DModel) or pipeline.process.kind != "flow":
        raise UserError(
            f"benchmark pipeline: {type(ours).__name__} predicting {pipeline.process.kind}; expected a PRX network "
            "trained on flow, whose stock pipeline there is"
        )
    pipeline_class: Any = PRXPipeline  # annotated for parts that a call with embeddings does without
    stock = pipeline_class(stock_copy(ours).eval(), scheduler, text_encoder=None, tokenizer=None, vae=None)
    stock.set_progress_bar_config(disable=True)
    return stock


def stock_latents(
    stock: Any, condition: Condition, null: Condition, latents: Tensor, steps: int, scale: float
) -> Tensor:
    """Clean latents (B, C, h, w) by the stock loop, from the noise `latents`."""
    return stock(
        prompt_embeds=condition[0],
        prompt_attention_mask=condition[1],
        negative_prompt_embeds=null[0],
        negative_prompt_attention_mask=null[1],
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=scale,
        height=latents.shape[-2] * 8,
        width=latents.shape[-1] * 8,
        output_type="latent",
        use_resolution_binning=False,
    ).images


def _ours(pipeline: Pipeline, batch: int, steps: int, scale: float) -> Callable[[], Any]:
    condition, latents = _inputs(pipeline, batch)
    kwargs = {"prompt_embeds": condition[0], "prompt_mask": condition[1], "latents": latents, "output_type": "pt"}
    return lambda: pipeline(num_inference_steps=steps, guidance_scale=scale, **kwargs)


def _stock(stock: PRXPipeline, pipeline: Pipeline, batch: int, steps: int, scale: float) -> Callable[[], Tensor]:
    condition, latents = _inputs(pipeline, batch)
    null = pipeline.null_condition(batch)

    @torch.no_grad()
    def pictures() -> Tensor:
        return pipeline.autoencoder.decode(stock_latents(stock, condition, null, latents, steps, scale))

    return pictures


def _inputs(pipeline: Pipeline, batch: int) -> tuple[Condition, Tensor]:
    side = pipeline.config.resolution
    draws = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    condition = pipeline.encode_prompt(["a small red circle at the top left"] * batch)
    return condition, pipeline.prepare_latents(batch, side, side, draws, None)
