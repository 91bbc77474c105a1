"""Reading pictures of level 2: segmentation (`regions`), outlines and patterns (`fit`), objects (`objects`)."""

from eval.judge.level2 import objects

__all__ = ["objects"]
