"""How fast `Pipeline` makes pictures, beside diffusers' own pipeline on the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXTransformer2DModel, SchedulerMixin
from torch import Tensor
from tqdm.auto import tqdm

from sd_mini.cli.main import open_pipeline
from sd_mini.cpu import stock_copy
from sd_mini.errors import UserError
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.sampling.loop import Condition
from training.benchmarks.interleaved import Spread, ratios
from training.benchmarks.predictor import parsed
from training.distributed.processes import join_processes, tune_cpu

ROUNDS, FEW, MANY = 9, 8, 50  # evaluations: ours, and those of the stock pipeline whose score it is held against


def pipeline_speed(argv: Sequence[str]) -> dict[str, Any]:
    """Pictures a second and latency at batch 1 and 32: ours, and stock PRX at the same number of evaluations, block by
    block in turn; and ours at FEW against stock at MANY, whose scores `python -m eval --steps` compares.

    Stock has its own network (no part sped up), its own scheduler's spacing and its own loop; both end in our decoder.
    Its guidance takes one picture at a time (its time embedding fails for more), so in batches neither is guided.
    Raises ValueError for a pipeline that is no PRX on the linear path.
    """
    pipeline = open_pipeline(parsed(argv).run)
    pipeline.accelerate()
    join_processes()
    tune_cpu(1)
    pipeline.set_progress_bar_config(disable=True)
    theirs = stock_pipeline(pipeline, FlowMatchEulerDiscreteScheduler())
    found: dict[str, Any] = {}
    for batch, scale in ((1, pipeline.config.default_guidance), (32, 1.0)):
        seconds = _interleaved(
            {
                "ours": _ours(pipeline, batch, FEW, scale),
                "stock": _theirs(theirs, pipeline, batch, FEW, scale),
                "stock, many": _theirs(theirs, pipeline, batch, MANY, scale),
            }
        )
        same, equal = ratios(seconds["stock"], seconds["ours"]), ratios(seconds["stock, many"], seconds["ours"])
        each = Spread.of([1000 * value / batch for value in seconds["ours"]])
        print(
            f"batch {batch}: {each} ms a picture in {FEW} steps, guidance {scale:g}; {same} times stock at as many "
            f"evaluations, {equal} times stock at {MANY}"
        )
        found[f"batch_{batch}"] = {
            "p50_ms": each.record(),
            "ratio_to_stock": same.record(),
            "ratio_to_stock_at_equal_score": equal.record(),
        }
    guided = _interleaved({"ours": _ours(pipeline, 32, FEW, pipeline.config.default_guidance)})["ours"]
    each = Spread.of([1000 * value / 32 for value in guided])
    print(f"batch 32, guided: {each} ms a picture")
    return {
        **found,
        "ratio_to_stock": found["batch_32"]["ratio_to_stock"],
        "ratio_to_stock_at_equal_score": found["batch_32"]["ratio_to_stock_at_equal_score"],
        "p50_ms": each.record(),
    }


def stock_pipeline(pipeline: Pipeline, scheduler: SchedulerMixin) -> PRXPipeline:
    """diffusers' own pipeline around the stock network of the same weights. ValueError for what is no PRX on flow."""
    ours = pipeline.noise_predictor
    if not isinstance(ours, PRXTransformer2DModel) or pipeline.process.kind != "flow":
        raise UserError(
            f"benchmark pipeline: {type(ours).__name__} predicting {pipeline.process.kind}; expected a PRX network "
            "trained on flow, whose stock pipeline there is"
        )
    made = PRXPipeline(stock_copy(ours).eval(), scheduler, text_encoder=None, tokenizer=None, vae=None)
    made.set_progress_bar_config(disable=True)
    return made


def stock_latents(
    made_by: PRXPipeline, condition: Condition, null: Condition, latents: Tensor, steps: int, scale: float
) -> Tensor:
    """Clean latents (B, C, h, w) by the stock loop, of the noise `latents`."""
    return made_by(
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
    given, latents = _given(pipeline, batch)

    def make() -> Any:
        sampling = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "pt"}
        return pipeline(prompt_embeds=given[0], prompt_mask=given[1], latents=latents, **sampling)

    return make


def _theirs(theirs: PRXPipeline, pipeline: Pipeline, batch: int, steps: int, scale: float) -> Callable[[], Any]:
    condition, latents = _given(pipeline, batch)
    null = pipeline.null_condition(batch)

    @torch.no_grad()
    def make() -> Any:
        return pipeline.autoencoder.decode(stock_latents(theirs, condition, null, latents, steps, scale))

    return make


def _given(pipeline: Pipeline, batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    side = pipeline.config.resolution
    draws = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    condition = pipeline.encode_prompt(["a small red circle at the top left"] * batch)
    return condition, pipeline.prepare_latents(batch, side, side, draws, None)


def _interleaved(makers: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for number in tqdm(range(ROUNDS + 1), desc="rounds"):
        for name, make in makers.items():
            start = time.perf_counter()
            make()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds
