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
# # 2. Inside diffusion
#
# Why text does not determine a picture, what noise has to do with it, and how a network that predicts noise becomes a
# network that draws.
#
# This notebook needs a trained run: `make demo` trains one in about 12 minutes on two cores (`runs/shapes`). For
# another run set the environment variable `RUN` to its folder.

# %%
import os
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from sd_mini import Pipeline, shapes
from sd_mini.diffusion import flow_noise, flow_target
from sd_mini.images import grid, to_pixels, to_uint8
from sd_mini.noise_predictor import predict

ROOT = Path() if Path("training").is_dir() else Path("..")  # Jupyter starts in notebooks/
torch.set_grad_enabled(False)
plt.rcParams["figure.dpi"] = 80

pipeline = Pipeline.from_pretrained(Path(os.environ.get("RUN", ROOT / "runs/shapes")) / "pipeline")
pipeline.set_progress_bar_config(disable=True)
SIDE = pipeline.config.resolution

# %% [markdown]
# ## One caption, many pictures
#
# Eight pictures from the training world that all have the same caption. All of them are right.

# %%
CAPTION = "two large red circles"
several = [scene for scene in shapes.sample_scenes(30_000, kinds=["count"]) if shapes.caption(scene, 0) == CAPTION]
answers = shapes.draw_batch(several, SIDE)  # (N, 3, SIDE, SIDE) uint8
print(len(answers), "pictures of", repr(CAPTION))
grid(answers[:8], columns=8)

# %% [markdown]
# ## The best single answer is a blur
#
# Suppose a network maps the caption $c$ straight to a picture, and is trained by squared error. The best it can learn
# is the mean of all the right answers:
#
# $$f^* = \arg\min_f \; \mathbb{E}\,\lVert x - f(c) \rVert^2 = \mathbb{E}[\,x \mid c\,]$$
#
# So we fit one: least squares from the text encoder's vector of a caption to the pixels of a picture.

# %%
world = shapes.sample_scenes(6000, kinds=["count"])
texts = sorted({shapes.caption(scene, 0) for scene in world})
vectors = dict(zip(texts, pipeline.text_stage.encode(texts).pooled, strict=True))
inputs = torch.stack([torch.cat([vectors[shapes.caption(scene, 0)], torch.ones(1)]) for scene in world])
targets = to_pixels(shapes.draw_batch(world, SIDE)).flatten(1)  # (6000, 3 * SIDE * SIDE)
weights = torch.linalg.lstsq(inputs, targets).solution
print("from", inputs.shape[1], "numbers of a text to", targets.shape[1], "of a picture")

# %% [markdown]
# Its answer to three captions (bottom), the mean of all true pictures (middle), and one true picture (top). The text
# says the colour, the size and the number. It does not say where, so the answer is everywhere.

# %%
rows = [[], [], []]
for caption in (CAPTION, "four large blue circles", "three small green squares"):
    true = shapes.draw_batch([scene for scene in world if shapes.caption(scene, 0) == caption], SIDE)
    regressed = torch.cat([vectors[caption], torch.ones(1)]) @ weights
    rows[0].append(true[0])
    rows[1].append(true.mean(0).round().astype(np.uint8))
    rows[2].append(to_uint8(regressed.view(1, 3, SIDE, SIDE))[0])
grid([*rows[0], *rows[1], *rows[2]], columns=3)

# %% [markdown]
# ## The rest comes from noise
#
# A generative model draws what the text leaves open. All the usual families do it, each in its own way: a VAE decodes
# random numbers, a flow bends noise into data, a diffusion model removes noise step by step, a token model draws one
# token after the other, and a GAN's discriminator can be attached to any of them. Here is diffusion: one prompt, eight
# seeds. (Some have a circle too many: to count is what our small model finds hardest, as larger ones do.)

# %%
seeds = [torch.Generator().manual_seed(seed) for seed in range(8)]
grid(pipeline([CAPTION] * 8, generator=seeds).images, columns=8)

# %% [markdown]
# ## The forward process
#
# Training needs no drawing at all, only spoiling. Latents $x_0$ (the autoencoder's small version of a picture) are
# mixed with noise $\epsilon \sim \mathcal{N}(0, I)$ at a level $t$ between 0 (the picture) and 1 (the noise):
#
# $$x_t = (1 - t)\,x_0 + t\,\epsilon$$
#
# Decoded, for $t$ = 0, 0.2, 0.4, 0.6, 0.8, 1:

# %%
latents = pipeline.autoencoder.encode(to_pixels(answers[1:2]))
noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
noised = [flow_noise(latents, noise, torch.tensor([t])) for t in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
print("a picture of", 3 * SIDE**2, "numbers, latents of", latents.numel())
grid(to_uint8(pipeline.autoencoder.decode(torch.cat(noised))), columns=6)

# %% [markdown]
# ## Why removing noise is drawing
#
# One dimension is enough to see it. Our "pictures" are numbers near $-1$ or near $1.5$. On the left, pairs of a picture
# and its noise, joined by straight lines: this is the training data. The lines cross, so at a crossing the network
# cannot know where it came from, and learns the mean direction. On the right we follow that mean from the noise
# ($t = 1$) back to $t = 0$. These paths cannot cross, and they end at the pictures, with the right share at each.


# %%
def mean_velocity(x, t, centres=(-1.0, 1.5), shares=(0.6, 0.4), spread=0.12):
    """E[eps - x_0 | x_t = x], exact for a mixture of two normal distributions."""
    centres, shares = np.array(centres)[:, None], np.array(shares)[:, None]
    variance = (1 - t) ** 2 * spread**2 + t**2
    odds = shares * np.exp(-((x - (1 - t) * centres) ** 2) / (2 * variance))
    clean = centres + (1 - t) * spread**2 / variance * (x - (1 - t) * centres)  # E[x_0], if it is of that centre
    return (x - (odds * clean).sum(0) / odds.sum(0)) / t


draw = np.random.default_rng(0)
pairs = np.where(draw.random(60) < 0.6, -1.0, 1.5) + 0.12 * draw.standard_normal(60), draw.standard_normal(60)
times, path = np.linspace(1, 0, 200), [draw.standard_normal(60)]
for t, following in pairwise(times):
    path.append(path[-1] + (following - t) * mean_velocity(path[-1], t))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
left.plot([0, 1], np.stack(pairs), color="tab:blue", linewidth=0.6)
left.set(title="training: pairs", xlabel="t: picture (0) to noise (1)")
right.plot(times, np.stack(path), color="tab:red", linewidth=0.6)
right.set(title="sampling: the mean velocity", xlabel="t: picture (0) to noise (1)")
plt.show()

# %% [markdown]
# ## The noise predictor
#
# Ours sees $x_t$, the level $t$ and the prompt, and predicts the velocity $v = \epsilon - x_0$. That is the same as
# predicting the noise or the clean latents, because $x_t$ is known: $\hat x_0 = x_t - t\,v$ and
# $\hat\epsilon = x_t + (1 - t)\,v$.


# %%
def velocity(noised, level, prompt):
    """Noised latents (B, C, h, w), their level in [0, 1], (prompt_embeds, prompt_mask) => the predicted velocity."""
    timesteps = torch.full((len(noised),), 1000.0 * level)  # diffusers' networks count to 1000
    condition = [part.expand(len(noised), *part.shape[1:]) for part in prompt]
    return predict(pipeline.noise_predictor, noised, timesteps, *condition)


prompt, null = pipeline.encode_prompt(CAPTION), pipeline.null_condition(1)
print(velocity(noised[3], 0.6, prompt).shape)

# %% [markdown]
# ## One prediction at every noise level
#
# The top row is what the network gets, the bottom row is its one-step guess $\hat x_0$ of the picture. At $t = 1$ it
# has only the text, and its guess mixes several right answers: circles too many, or half there. (Squared error would
# give the mean, as the regression. Ours is trained with the logarithm of it, which prefers sharper answers.) The more
# of the picture is left, the more of the guess is settled. This is why one step is not enough and a few steps are.

# %%
levels = (1.0, 0.9, 0.8, 0.65, 0.5, 0.3, 0.1)
given = torch.cat([flow_noise(latents, noise, torch.tensor([t])) for t in levels])
guesses = torch.cat([x - t * velocity(x, t, prompt) for x, t in zip(given.split(1), levels, strict=True)])
labels = [f"t = {t}" for t in levels] + [""] * len(levels)
grid(to_uint8(pipeline.autoencoder.decode(torch.cat([given, guesses]))), columns=len(levels), labels=labels)

# %% [markdown]
# ## Why it has to know the step
#
# The same network serves all levels, so the level is an input. Here it gets latents whose true level is 0.3, 0.6 or
# 0.9, and is told another one. Each curve is the error of its velocity, lowest about where it is told the truth.

# %%
many = shapes.sample_scenes(64, "test", seed=1)
clean = pipeline.autoencoder.encode(to_pixels(shapes.draw_batch(many, SIDE)))
prompts = pipeline.encode_prompt([shapes.caption(s, 0) for s in many])
eps = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
told = np.linspace(0.02, 1, 25)

plt.figure(figsize=(6, 3))
for true_level in (0.3, 0.6, 0.9):
    mixed = flow_noise(clean, eps, torch.full((64,), true_level))
    errors = [(velocity(mixed, t, prompts) - flow_target(clean, eps)).square().mean().item() for t in told]
    (line,) = plt.plot(told, errors, label=f"true level {true_level}")
    plt.axvline(true_level, color=line.get_color(), linestyle=":", linewidth=1)
plt.xlabel("level that the network is told")
plt.ylabel("squared error of the velocity")
plt.legend()
plt.show()

# %% [markdown]
# ## Guidance, as arrows
#
# Classifier-free guidance asks twice, with the prompt and without it (the null condition that stage 1 has trained), and
# goes further in the direction in which the prompt leads:
#
# $$\tilde v = v_\varnothing + s\,(v_c - v_\varnothing)$$
#
# To see it we need two dimensions. We take latents of large red circles in the four corners, and the two directions in
# which these differ most (principal components). Small dots: true latents, a colour a place. Each arrow starts at the
# guess $\hat x_0$ without the prompt and ends at the guess with it, "a large red circle in the top left", for one noise
# at $t = 0.9$. The thin continuation is guidance with $s = 2$.

# %%
single = [s for s in shapes.sample_scenes(60_000, kinds=["one_object"]) if s.groups[0].size == "large"]
single = [s for s in single if (s.groups[0].colour, s.groups[0].shape) == ("red", "circle")]
single = [s for s in single if s.groups[0].place != "centre"][:300]
cloud = pipeline.autoencoder.encode(to_pixels(shapes.draw_batch(single, SIDE)))
centre = cloud.mean(0)
directions = torch.linalg.svd((cloud - centre).flatten(1), full_matrices=False).Vh[:2].T  # (C h w, 2)


def flat(latents):
    return ((latents - centre).flatten(1) @ directions).numpy()


LEVEL, SCALE = 0.9, 2.0
start = flow_noise(cloud[:24], torch.randn(24, *cloud.shape[1:], generator=torch.Generator().manual_seed(3)),
                   torch.full((24,), LEVEL))  # fmt: skip
top_left = pipeline.encode_prompt("a large red circle in the top left")
with_prompt, without = (start - LEVEL * velocity(start, LEVEL, condition) for condition in (top_left, null))
guided = without + SCALE * (with_prompt - without)

plt.figure(figsize=(6, 4.5))
for place in ("top left", "top right", "bottom left", "bottom right"):
    points = flat(cloud[[i for i, s in enumerate(single) if s.groups[0].place == place]])
    plt.scatter(*points.T, s=6, alpha=0.5, label=place)
for a, b, c in zip(flat(without), flat(with_prompt), flat(guided), strict=True):
    plt.plot(*np.stack([b, c]).T, color="grey", linewidth=0.5)
    plt.annotate("", xy=b, xytext=a, arrowprops={"arrowstyle": "->", "color": "black", "linewidth": 0.9})
plt.legend(fontsize=7)
plt.xlabel("first principal component")
plt.ylabel("second")
plt.show()

# %% [markdown]
# The arrows lead from the middle of everything towards the cloud of the place that was asked for. The continuation may
# leave the cloud: too much guidance overshoots what any true picture has. Our recipe therefore guides in the middle of
# the way only (`guidance_interval`). Here are three seeds at $s$ = 0 (the prompt is ignored), 1 (no guidance), 3 and 8,
# guided at every step:

# %%
scales, asked = (0.0, 1.0, 3.0, 8.0), "two small blue crosses"
pictures = []
for scale in scales:
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    pictures += pipeline([asked] * 3, guidance_scale=scale, guidance_interval=(0, 1), generator=seeds).images
grid(pictures, columns=3, labels=[f"s = {scale:g}" for scale in scales for _ in range(3)])


# %% [markdown]
# ## The sampling loop
#
# Everything is there. Start from noise at $t = 1$, go to $t = 0$ in a few steps (Euler's method), guide within the
# interval, decode:
#
# $$x_{t'} = x_t + (t' - t)\,\tilde v(x_t, t)$$


# %%
def sample(prompt, seed, steps, scale, interval):
    """Prompt => latents, from the noise of `seed`."""
    x = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(seed))
    for t, following in pairwise(np.linspace(1, 0, steps + 1)):
        v = velocity(x, t, prompt)
        if scale != 1 and interval[0] <= round(t, 6) <= interval[1]:
            v = velocity(x, t, null) + scale * (v - velocity(x, t, null))
        x = x + (following - t) * v
    return x


settings = pipeline.config
ours = sample(prompt, 0, settings.default_steps, settings.default_guidance, settings.default_interval)

# %% [markdown]
# `Pipeline` does the same, and gives the same latents:

# %%
theirs = pipeline(CAPTION, generator=torch.Generator().manual_seed(0), output_type="latent").images
torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
print("equal to within 0.0001")
grid(to_uint8(pipeline.autoencoder.decode(torch.cat([ours, theirs]))), columns=2, labels=["ten lines", "Pipeline"])

# %% [markdown]
# ## Exercises
#
# **1.** In `sample`, take 1, 2, 4, 8 and 50 steps. What does one step give, and why?
#
# <details><summary>Answer</summary>
#
# One step from $t = 1$ to $t = 0$ is $x_0 = x_1 - v$, the guess at level 1: a mixture of the pictures of the prompt.
# With 8 steps the objects are sharp, with 50 hardly sharper: the paths are nearly straight once it is settled what
# stands where.
#
# </details>
#
# **2.** Fix the seed and change one word of the prompt. What stays?
#
# <details><summary>Answer</summary>
#
# Often the places. The noise and the text decide together: the noise settles what the text leaves open, such as where
# the objects of "two large red circles" stand, and a change of colour need not change that.
#
# </details>
#
# **3.** Replace the network's level by a constant, say 0.5, in `velocity`. What becomes of the pictures?
#
# <details><summary>Answer</summary>
#
# At the beginning the network believes that half of the picture is there already and takes noise for content; at the
# end it removes noise that is no longer there. The plot of the told level shows how much each mistake costs.
#
# </details>
#
# **4.** Negative prompts: set `null` to the embeddings of "a large red circle in the top left", and `sample` the prompt
# of "two large red circles" with a scale of 3. What is left out?
#
# <details><summary>Answer</summary>
#
# Guidance leads away from whatever stands in place of the null condition, here from a circle in the top left. The
# argument of `Pipeline` that does this is `negative_prompt`.
#
# </details>
