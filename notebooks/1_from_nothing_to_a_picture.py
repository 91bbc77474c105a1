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
# # 1. From nothing to a picture
#
# Three networks are trained from random weights, each in one cell, then joined, and the joined model draws what a text
# says. It takes a minute or two on two cores and needs nothing but this repository.
#
# So that a minute is enough, the world is tiny: one large object on white, of four colours, four shapes and five
# places.

# %%
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.append("..")  # Jupyter starts in notebooks/, and `eval` and `training` lie beside it

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from eval.judge.judge import judge
from sd_mini import Pipeline, shapes
from sd_mini.images import grid, to_pil
from training.chain import main as chain

if not Path("training").is_dir():
    os.chdir("..")
plt.rcParams["figure.dpi"] = 80
WORLD, RUN = Path("runs/tiny_world"), Path("runs/from_nothing")


def run(command):
    """`python -m COMMAND`, but in this process, which has imported the libraries already."""
    assert chain(shlex.split(command)) == 0


# %% [markdown]
# ## The data
#
# A captioned data set is a folder: pictures, and a text for each. Ours is drawn. A part of it, `test`, is held out:
# what we look at while training was not trained on. Four pairs of colour and shape are in neither (red cross, yellow
# triangle, green circle, blue square): at the end we ask for these, too.

# %%
COLOURS = ("red", "yellow", "green", "blue")
scenes = shapes.sample_scenes(12_000, "train", kinds=["one_object"])
scenes = [s for s in scenes if s.groups[0].size == "large" and s.groups[0].colour in COLOURS][:2000]

for number, picture in enumerate(to_pil(shapes.draw_batch(scenes, 32))):
    folder = WORLD / ("test" if number < 64 else "train")
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{number}.png")
    (folder / f"{number}.txt").write_text(shapes.caption(scenes[number], 0))
captions = sorted({shapes.caption(scene, 0) for scene in scenes})
print(len(scenes), "pictures with", len(captions), "different captions")
grid(shapes.draw_batch(scenes[:6], 32), columns=6, labels=[shapes.caption(s, 0) for s in scenes[:6]], scale=2)

# %% [markdown]
# ## Stage 2 first: the autoencoder
#
# A picture is 3 x 32 x 32 numbers. The autoencoder learns to fold it into 8 x 8 x 8, the *latents*, and to unfold it
# again. It needs no captions, so it may be trained before, after, or beside the text encoder.
#
# Each training is one command: a recipe, a folder for the run, the data, and what is changed in the recipe. Here it is
# made small.

# %%
run(f"""
    training.autoencoder --config training/configs/pictures/autoencoder.yaml --run {RUN} --log_with none
    --data.source {WORLD} --data.resolution 32 --valid.source {WORLD} --valid.split test
    --model.patch_size 2 --model.network.latent_channels 8
    --model.network.encoder_block_out_channels '[16, 32]' --model.network.decoder_block_out_channels '[32, 64]'
    --train.steps 480 --train.preview_every 480
""")
Image.open(RUN / "autoencoder/samples/step-00000480.png")

# %% [markdown]
# Top: held-out pictures. Bottom: their reconstructions.
#
# ## Stage 1: the text encoder
#
# It turns each caption into vectors, one a word, and is trained to find the caption's picture among others. To find a
# picture by its caption is not yet to draw it, but the same facts are needed.

# %%
run(f"""
    training.text_encoder --config training/configs/pictures/text_encoder.yaml --run {RUN} --log_with none
    --encoder.dim 96 --encoder.max_length 16 --adapter.dim 96 --tower.width 32
    --train.batch_size 32 --train.steps 120 --train.preview_every 120
""")
Image.open(RUN / "text_encoder/samples/step-00000120.png")

# %% [markdown]
# For eight captions, the held-out picture that the encoder finds first.
#
# ## Stage 3: the noise predictor
#
# Now latents of the pictures are mixed with noise, and a network learns to tell the two apart, given the caption's
# vectors and how much noise there is. It sees no pixel and no letter: only what the first two stages make of them.

# %%
run(f"""
    training.noise_predictor --config training/configs/pictures/noise_predictor.yaml --run {RUN} --log_with none
    --network.network.hidden_size 96 --network.network.num_heads 3 --network.network.depth 4
    --captions_per_picture 1 --objective.weighting log --sampling.steps 10 --sampling.guidance 2
    --train.batch_size 32 --train.lr 3e-3 --train.muon_lr 0.03 --train.ema_every 4
    --train.steps 800 --train.preview_every 400
""")
both = [Image.open(RUN / f"noise_predictor/samples/step-{step:08d}.png") for step in (400, 800)]
grid(both, columns=1)

# %% [markdown]
# Eight held-out captions, drawn from fixed noise after 400 updates (top) and after 800 (bottom).
#
# ## What went down
#
# Each stage's loss, from the file that every training writes.

# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 2.6))
for axes, stage in zip(panels, ("autoencoder", "text_encoder", "noise_predictor"), strict=True):
    lines = [json.loads(line) for line in (RUN / stage / "metrics.jsonl").read_text().splitlines()]
    axes.plot(*zip(*((line["step"], line["loss"]) for line in lines if "loss" in line), strict=True))
    axes.set(title=stage, xlabel="update")
panels[0].set_ylabel("loss")
plt.show()

# %% [markdown]
# ## Join them
#
# The three were trained apart; joined they are one diffusers pipeline: text to vectors, noise to latents, latents to a
# picture.

# %%
run(f"sd_mini export {RUN}")
pipeline = Pipeline.from_pretrained(RUN / "pipeline")
pipeline.set_progress_bar_config(disable=True)
pipeline("a large red circle in the top left", generator=torch.Generator().manual_seed(0)).images[0].resize((160, 160))

# %% [markdown]
# ## The same prompt, several seeds
#
# The text says what and about where. All else, here the exact place and size, is drawn from noise, and the seed decides
# it.


# %%
def draw(prompts, **settings):
    """Prompts => (N, 3, 32, 32) uint8, the i-th from seed i."""
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    pictures = pipeline(list(prompts), generator=seeds, **settings).images
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])


grid(draw(["a large yellow cross in the bottom right"] * 8), columns=8, scale=2)

# %% [markdown]
# ## The same seed, several prompts

# %%
prompts = [f"a large {colour} {shape} in the centre" for colour in COLOURS for shape in ("circle", "square", "cross")]
grid(draw(prompts), columns=6, labels=[prompt.removeprefix("a large ") for prompt in prompts], scale=2)

# %% [markdown]
# ## How many are right?
#
# A program, the judge, reads colour, shape, size and place of the objects in a picture. We ask it about every caption
# of the training world, and about the pairs that were never shown.

# %%
unseen = [s for s in shapes.sample_scenes(6000, "heldout_pairs", kinds=["one_object"]) if s.groups[0].size == "large"]
asked = {
    "pairs of the training": {shapes.caption(scene, 0): scene for scene in scenes},
    "pairs never shown": {shapes.caption(s, 0): s for s in unseen if s.groups[0].colour in COLOURS},
}
for name, by_caption in asked.items():
    pictures = draw(by_caption)
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, by_caption.values(), strict=True)]
    print(f"{name}: {sum(v.exact for v in verdicts)} of {len(verdicts)} right in everything")
labels = [caption.removeprefix("a large ") for caption in by_caption]
grid(pictures[:12], columns=6, labels=labels[:12], scale=2)

# %% [markdown]
# ## What it can do, and what it cannot
#
# It draws the colours, shapes and places that it was shown, each time a little elsewhere. Pairs that it has never seen
# often come out right, too: it has learned colour and shape apart, not by heart. And it knows nothing else. There is no
# second object in its world, no small one, and no word beside the few of its captions:

# %%
odd = ("a large red circle in the top left and a large blue cross in the bottom right", "a small red circle", "a cat")
grid(draw(odd), columns=3, labels=odd, scale=3)

# %% [markdown]
# The recipe in `training/configs/shapes` learns up to four objects, their number and how they stand to each other: the
# same three stages, ten times as long (`make demo`).
#
# ## Exercises
#
# **1.** Which of the three stages may be trained in any order, and which has to wait?
#
# <details><summary>Answer</summary>
#
# The autoencoder and the text encoder know nothing of each other. The noise predictor has to wait for both: it reads
# the latents of the one and the vectors of the other, and would have to be trained anew if either changed.
#
# </details>
#
# **2.** Draw with `num_inference_steps=1`, then 2, 4 and 10. Which is the first that is good enough?
#
# <details><summary>Answer</summary>
#
# `grid(draw(["a large blue cross in the centre"] * 4, num_inference_steps=1), columns=4, scale=2)`. One step gives a
# soft mixture of all answers; from about four steps on, shapes have edges. Notebook 2 shows why.
#
# </details>
#
# **3.** Set `guidance_scale=1` in `draw`, and count again how many are right. Why does guidance help?
#
# <details><summary>Answer</summary>
#
# Of the pairs never shown, fewer are right. Guidance compares the prediction with the prompt with the one without it,
# and goes further in that direction, so the prompt has more weight. Notebook 2 draws these directions as arrows.
#
# </details>
#
# **4.** Train all three again with a third of the updates. Which stage suffers most? (Delete `runs/from_nothing` first:
# a finished stage is not trained again.)
#
# <details><summary>Answer</summary>
#
# Look at each stage's own samples: reconstructions become softer, but are still right; most captions find their
# picture; the noise predictor's pictures fall apart. It has the hardest task, and in all our recipes it takes most of
# the time.
#
# </details>
