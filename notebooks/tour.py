# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of a trained run
# `make demo` has made `runs/shapes`. This walks once through it: a prompt becomes embeddings, noise becomes latents,
# latents become a picture, and the judge reads it. Open it in Jupyter with jupytext, or run it as a script.

# %%
import os
from pathlib import Path

import numpy as np
import torch

from eval.judge.judge import judge
from sd_mini import Pipeline, shapes
from sd_mini.images import grid

run = Path(os.environ.get("RUN", "runs/shapes"))
pipeline = Pipeline.from_pretrained(run / "pipeline")
pipeline.set_progress_bar_config(disable=True)

# %% [markdown]
# A scene graph, one of its captions, and what the text stage makes of it: one embedding a token.

# %%
scenes = shapes.sample_scenes(4, "heldout_pairs", seed=7)
prompts = [shapes.caption(scene, 0) for scene in scenes]
prompt_embeds, prompt_mask = pipeline.encode_prompt(prompts)
print(prompts[0], tuple(prompt_embeds.shape), prompt_mask.sum(1).tolist())

# %% [markdown]
# The same embeddings can be given back instead of the prompts. Each picture has a generator of its own.

# %%
generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
pictures = pipeline(prompt_embeds=prompt_embeds, prompt_mask=prompt_mask, generator=generators).images
grid(pictures, columns=4, labels=prompts, scale=2)

# %% [markdown]
# The judge reads the picture and compares it with the graph, not with the caption.

# %%
for picture, scene in zip(pictures, scenes, strict=True):
    verdict = judge(np.asarray(picture).transpose(2, 0, 1), scene)
    print(verdict.exact, round(verdict.soft, 2), scene.groups)
