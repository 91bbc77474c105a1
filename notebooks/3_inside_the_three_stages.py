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
# # 3. Inside the three stages
#
# The text encoder, the noise predictor and the autoencoder are trained apart and only then joined. This works because
# little passes between them: prompt embeddings and latents. Here we look at both, and at what is lost.
#
# This notebook needs a trained run: `make demo` trains one in about 12 minutes on two cores (`runs/shapes`). For
# another run set the environment variable `RUN` to its folder.

# %%
import os
import sys
from pathlib import Path

sys.path.append("..")  # Jupyter starts in notebooks/, and `eval` lies beside it

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.functional import cosine_similarity, normalize

from eval.judge.judge import judge
from sd_mini import Pipeline, load_stage, shapes
from sd_mini.images import grid, psnr, to_pixels, to_uint8

torch.set_grad_enabled(False)
plt.rcParams["figure.dpi"] = 80
ROOT = Path() if Path("training").is_dir() else Path("..")
run = Path(os.environ.get("RUN", ROOT / "runs/shapes"))
pipeline = Pipeline.from_pretrained(run / "pipeline")
pipeline.set_progress_bar_config(disable=True)
SIDE = pipeline.config.resolution

# %% [markdown]
# ## What passes between the stages

# %%
caption = "a small red circle to the left of a large blue cross"
embeds, mask = pipeline.encode_prompt(caption)
latent_shape = pipeline.latent_shape(SIDE, SIDE)
print("text stage:      ", repr(caption), "=>", tuple(embeds.shape[1:]), "prompt embeddings,", int(mask.sum()), "used")
print("noise predictor: ", tuple(embeds.shape[1:]), "embeddings and", latent_shape, "noise =>", latent_shape, "latents")
print("decoder:         ", latent_shape, "latents =>", (3, SIDE, SIDE), "picture")
for name in ("text_encoder", "text_adapter", "noise_predictor", "autoencoder"):
    print(f"{name:16}{sum(p.numel() for p in getattr(pipeline, name).parameters()):>10,} parameters")

# %% [markdown]
# A noise predictor fits only the two stages whose embeddings and latents it was trained on. Each exported stage
# therefore records the hashes of the others, and `Pipeline.from_stages` refuses stages that do not belong together.

# %%
contract = load_stage(run / "noise_predictor/final").contract
for stage, expected in contract["trained_against"].items():
    there = load_stage(run / stage / "final").contract["hash"]
    print(f"{stage}: trained against {expected[:8]}, there is {there[:8]}")

# %% [markdown]
# # The text stage
#
# ## Tokens
#
# A caption is cut into tokens of a vocabulary that was learned from the captions. Each token has a vector of its own,
# the word vector. The encoder, a small transformer, makes of these a state for each token, in which it has looked at
# the tokens before it.

# %%
print(pipeline.tokenizer.tokenize(caption))

# %% [markdown]
# ## Can it tell captions apart?
#
# One caption, and five that differ from it: the same said otherwise, then one thing changed, and in the last one the
# two colours exchanged. We compare three vectors of a caption by their cosine with those of the first caption: the mean
# of its word vectors, the encoder's own summary, and the vector of the adapter that was trained on top. What all
# captions have in common, the mean over 300 of them, is subtracted before.

# %%
changed = {
    "said otherwise": "a large blue cross to the right of a small red circle",
    "size": "a large red circle to the left of a large blue cross",
    "shape": "a small red square to the left of a large blue cross",
    "relation": "a small red circle to the right of a large blue cross",
    "colours exchanged": "a small blue circle to the left of a large red cross",
}
stage = pipeline.text_stage
others = [shapes.caption(scene, 0) for scene in shapes.sample_scenes(300, "test", seed=5)]
prompts = [caption, *changed.values(), *others]
(hidden,) = stage.hidden(stage.tokenize(prompts))
weight = hidden.mask[..., None].float()
vectors = {
    "mean of word vectors": (hidden.words * weight).sum(1) / weight.sum(1),
    "encoder": hidden.pooled,
    "adapter": stage.encode(prompts).pooled,
}
figure, axes = plt.subplots(figsize=(8, 3))
for i, (name, each) in enumerate(vectors.items()):
    centred = each - each[-len(others) :].mean(0)
    cosines = cosine_similarity(centred[1 : 1 + len(changed)], centred[:1])
    print(f"{name:22}", [round(value, 2) for value in cosines.tolist()])
    axes.bar(np.arange(len(changed)) + 0.27 * (i - 1), cosines, width=0.25, label=name)
axes.axhline(0, color="black", linewidth=0.6)
axes.set(xticks=range(len(changed)), xticklabels=list(changed), ylabel="cosine with the first caption")
axes.legend(fontsize=8, loc="lower left")
plt.show()

# %% [markdown]
# The mean of word vectors cannot see an exchange, since the words are the same, and takes a paraphrase for a change. An
# encoder that is trained only to find the picture of a caption may treat a caption as such a bag of words. Our adapter
# is also trained against *twins*, captions with one thing changed, so that the paraphrase comes out alike and the
# exchange apart. (The encoder's own summary is not used for anything but this, and hardly differs at all. Nor does the
# adapter's summary show all: here the shape is missing, and is found in the tokens below.) That is what a picture of
# two objects needs: all parts are joined through these embeddings, and no larger noise predictor can restore a
# distinction that they lack.

# %% [markdown]
# ## What the adapter keeps, and what it adds
#
# The noise predictor does not read the summary but every token. A token's embedding is, before it is standardised,
#
# $$\underbrace{W\,\text{word} + \text{place}}_{\text{kept}} + \underbrace{\lambda\,\text{refiner}}_{\text{added}}$$
#
# with a fixed $W$ that keeps distances, and a refiner that reads the encoder's states. To see both parts we change one
# word, *red* to *green*, and measure how far each token moves. The kept part moves at that word alone. All else is what
# the adapter adds: what the sentence makes of a word.

# %%
other = caption.replace("red", "green")
(hidden,) = stage.hidden(stage.tokenize([caption, other]))
encoded = stage.encode([caption, other])
length = int(encoded.mask[0].sum())


def moved(tokens):
    """Two captions' tokens (2, L, D) => (L,): how far each moves, as a share of its length."""
    return ((tokens[0] - tokens[1]).norm(dim=-1) / tokens[0].norm(dim=-1))[:length]


names = ["start", *(token.removesuffix("</w>") for token in pipeline.tokenizer.tokenize(caption)), "end"]
figure, axes = plt.subplots(figsize=(9, 3))
axes.bar(np.arange(length) - 0.2, moved(hidden.words), width=0.4, label="word vectors")
axes.bar(np.arange(length) + 0.2, moved(encoded.tokens), width=0.4, label="prompt embeddings")
axes.set(xticks=range(length), ylabel="distance / length", title="red => green")
axes.set_xticklabels(names, rotation=60)
axes.legend()
plt.show()

# %% [markdown]
# The word's own identity stays. Here are the eight colours, each in "a large ... circle in the centre": on the left how
# alike their word vectors are, on the right how alike the prompt embeddings at that place. If the adapter had turned
# each caption into one vector, copied to all places, colours would have run together here.

# %%
colours = list(shapes.COLOURS)
phrases = [f"a large {colour} circle in the centre" for colour in colours]
(hidden,) = stage.hidden(stage.tokenize(phrases))
place = 1 + [token.removesuffix("</w>") for token in pipeline.tokenizer.tokenize(phrases[0])].index(colours[0])
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), gridspec_kw={"wspace": 0.35})
for axes, (title, each) in zip(
    panels,
    {"word vectors": hidden.words, "prompt embeddings": stage.encode(phrases).tokens}.items(),
    strict=True,
):
    unit = normalize(each[:, place] - each[:, place].mean(0), dim=-1)
    shown = axes.imshow(unit @ unit.T, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set(title=f"cosine of {title}", xticks=range(8), yticks=range(8))
    axes.set_xticklabels(colours, rotation=60, fontsize=7)
    axes.set_yticklabels(colours, fontsize=7)
figure.colorbar(shown, ax=panels)
plt.show()

# %% [markdown]
# # The autoencoder
#
# ## Latents as pictures
#
# The encoder folds a picture into a few channels of a few cells, standardised to mean 0 and standard deviation 1,
# because the noise that they will be mixed with has just these. Each channel, as a grey picture:

# %%
scenes = shapes.sample_scenes(256, "test", seed=3)
pictures = shapes.draw_batch(scenes, SIDE)
latents = pipeline.autoencoder.encode(to_pixels(pictures))
print(f"mean {latents.mean():.2f}, standard deviation {latents.std():.2f}")
print(f"{pictures[0].size:,} numbers of a picture, {latents[0].numel():,} of its latents")

shown = [i for i, scene in enumerate(scenes) if scene.kind == "two_objects"][:3]
figure, panels = plt.subplots(3, 1 + len(latents[0]), figsize=(10, 3.6))
for row, number in zip(panels, shown, strict=True):
    row[0].imshow(pictures[number].transpose(1, 2, 0))
    for axes, channel in zip(row[1:], latents[number], strict=True):
        axes.imshow(channel, vmin=-3, vmax=3, cmap="gray")
for axes in panels.flat:
    axes.axis("off")
plt.show()

# %% [markdown]
# ## A cell stands for its place
#
# Push one cell of one channel by 3 standard deviations and decode (top; the first is as it was). Below, what that
# changed, four times enlarged: only the neighbourhood of the cell. Latents are still a picture, in coarse cells, which
# is why a noise predictor can place objects in them.

# %%
base = latents[shown[:1]]
row, column = base.shape[2] // 2, base.shape[3] // 4
pushed = base.repeat(4, 1, 1, 1)
for channel in range(4):
    pushed[channel, channel, row, column] += 3
decoded = to_uint8(pipeline.autoencoder.decode(torch.cat([base, pushed]))).numpy()
change = np.clip(4 * np.abs(decoded.astype(int) - decoded[:1].astype(int)), 0, 255)
grid([*decoded, *(255 - change).astype(np.uint8)], columns=5)

# %% [markdown]
# ## Between two pictures
#
# Halfway between two pictures, pixel by pixel, is a double exposure (top). Halfway between their latents, decoded
# (bottom), is often the same here: this autoencoder is trained to keep a picture, not to make the space between
# pictures meaningful. To find what lies between is left to the noise predictor.

# %%
steps = torch.linspace(0, 1, 5).view(-1, 1, 1, 1)
a, b = shown[:2]
blend = to_uint8((1 - steps) * to_pixels(pictures[a : a + 1]) + steps * to_pixels(pictures[b : b + 1]))
between = to_uint8(pipeline.autoencoder.decode((1 - steps) * latents[a] + steps * latents[b]))
grid([*blend, *between], columns=5)

# %% [markdown]
# ## What the decoder loses
#
# Encode, decode, compare: this needs no captions, and neither does the training of this stage. Top: pictures. Middle:
# what comes back. Bottom: the error, four times enlarged.

# %%
back = to_uint8(pipeline.autoencoder.decode(latents)).numpy()
error = np.abs(pictures.astype(int) - back.astype(int))
first = slice(0, 8)
grid([*pictures[first], *back[first], *(255 - np.clip(4 * error[first], 0, 255)).astype(np.uint8)], columns=8)

# %% [markdown]
# The error sits at the edges, of which large objects have more. As a number: the peak signal-to-noise ratio,
#
# $$\mathrm{PSNR} = 10 \log_{10} \frac{255^2}{\text{mean squared error}} \text{ dB}$$

# %%
decibels = psnr(pictures, back)
plt.figure(figsize=(6, 2.8))
for size in shapes.SIZES:
    one_size = [db for db, scene in zip(decibels, scenes, strict=True) if {g.size for g in scene.groups} == {size}]
    plt.hist(one_size, bins=np.linspace(decibels.min(), decibels.max(), 25), alpha=0.6, label=f"{size} objects")
plt.xlabel(f"PSNR, dB (mean {decibels.mean():.1f})")
plt.ylabel("pictures")
plt.legend()
plt.show()

# %% [markdown]
# Decibels are not yet meaning. What matters is whether the picture still shows what it showed, and the *judge*
# (notebook 4) can say so: the share of reconstructions that it still reads right is a ceiling for all pictures that go
# through this decoder. Here are the ones that it reads wrong.

# %%
verdicts = [judge(picture, scene) for picture, scene in zip(back, scenes, strict=True)]
wrong = [i for i, verdict in enumerate(verdicts) if not verdict.exact][:4]
print(f"{np.mean([verdict.exact for verdict in verdicts]):.1%} of {len(scenes)} reconstructions are read right")
worst = wrong or [int(decibels.argmin())]
pairs = [picture for i in worst for picture in (pictures[i], back[i])]
grid(pairs, columns=2, labels=["picture", "reconstruction"] * len(worst), scale=2)

# %% [markdown]
# ## Exercises
#
# **1.** Add noise of standard deviation 0.1, 0.3 and 1 to `latents` and decode. How much does the decoder bear, and why
# is that useful?
#
# <details><summary>Answer</summary>
#
# A little noise hardly shows: stage 2 was trained with noise on its latents (`loss.latent_noise`). The noise
# predictor's latents are never quite right, and a decoder that bears small errors repairs them.
#
# </details>
#
# **2.** Give the noise predictor prompt embeddings that are halfway between those of two prompts (`prompt_embeds`,
# `prompt_mask`). What comes out for *red* and *green*, and for *left* and *right*?
#
# <details><summary>Answer</summary>
#
# Embeddings between two prompts were never trained on. Usually one of the two wins or parts of both appear; a mixed
# colour or a place in the middle is rare, since the world has neither.
#
# </details>
#
# **3.** The lecture says: the quality of the text encoder matters more than the size of the noise predictor. Which plot
# above says why?
#
# <details><summary>Answer</summary>
#
# The first. If two captions have the same embeddings (as the mean of word vectors has for exchanged colours), then the
# conditional mean and every sample are the same for both, however large the network that reads them.
#
# </details>
#
# **4.** Why can stage 2 be trained on pictures without captions, and what does that allow?
#
# <details><summary>Answer</summary>
#
# Its loss compares a picture with its reconstruction. So it can use many more pictures than have captions, and one
# autoencoder serves any number of text encoders and noise predictors.
#
# </details>
