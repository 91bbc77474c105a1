"""The shapes world: an endless captioned picture set whose every picture can be checked against what was asked.

    scenes = sample_scenes(1000, "train", seed=0)   # typed scene graphs, one to four objects; level=2 for harder ones
    pictures = draw_batch(scenes, 64)               # (1000, 3, 64, 64) uint8 sRGB
    texts = [caption(scene, 0) for scene in scenes] # "a small red circle to the left of a large blue square"

The graph is the truth: the caption and the picture are made from it, and `eval/judge/` reads it back from a
picture. No graph is ambiguous: objects keep a gap, and places and relations a margin to where they stop to hold.
This module gathers the world's public names: level 1's from `graph` (vocabulary, palette, rules), `sample` (with
`layout`), `caption` and `draw` (outlines as functions of an object's radius); functions of both levels from `worlds`.
Level 2's own words and rules are in `level2`; docs/benchmark.md describes both.
"""

from sd_mini.shapes.caption import PHRASINGS
from sd_mini.shapes.draw import MIN_RESOLUTION
from sd_mini.shapes.graph import (
    BACKGROUND,
    COLOURS,
    COUNTS,
    GAP,
    HELDOUT_PAIRS,
    HELDOUT_RELATIONS,
    INVERSE,
    KINDS,
    MARGIN,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Group,
    Scene,
    check_scene,
    heldout_split,
    lab,
)
from sd_mini.shapes.sample import CHANGES
from sd_mini.shapes.worlds import (
    LEVELS,
    AnyScene,
    Level,
    caption,
    captions,
    draw,
    draw_batch,
    redrawn,
    sample_scene,
    sample_scenes,
    swapped,
)

__all__ = [
    "BACKGROUND", "CHANGES", "COLOURS", "COUNTS", "GAP", "HELDOUT_PAIRS", "HELDOUT_RELATIONS", "INVERSE", "KINDS",
    "LEVELS", "MARGIN", "MIN_RESOLUTION", "PHRASINGS", "PLACES", "RELATIONS", "SHAPES", "SIZES", "SPLITS", "AnyScene",
    "Group", "Level", "Scene", "caption", "captions", "check_scene", "draw", "draw_batch", "heldout_split", "lab",
    "redrawn", "sample_scene", "sample_scenes", "swapped",
]  # fmt: skip
