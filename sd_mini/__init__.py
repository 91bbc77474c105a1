"""sd_mini: a latent text-to-image model from nothing, in three stages trained apart and joined in one `Pipeline`.

Importing this package loads no torch; each name is resolved when it is first used (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sd_mini.pipelines.image_to_image import ImageToImagePipeline
    from sd_mini.pipelines.image_variation import ImageVariationPipeline
    from sd_mini.pipelines.inpainting import InpaintingPipeline
    from sd_mini.pipelines.text_to_image import Pipeline
    from sd_mini.stages.contract import load_stage

_HOME = {
    "ImageToImagePipeline": "sd_mini.pipelines.image_to_image",
    "ImageVariationPipeline": "sd_mini.pipelines.image_variation",
    "InpaintingPipeline": "sd_mini.pipelines.inpainting",
    "Pipeline": "sd_mini.pipelines.text_to_image",
    "load_stage": "sd_mini.stages.contract",
}
__all__ = [
    "ImageToImagePipeline",
    "ImageVariationPipeline",
    "InpaintingPipeline",
    "Pipeline",
    "__version__",
    "load_stage",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'sd_mini' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
