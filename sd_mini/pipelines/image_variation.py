"""A picture => pictures like it, without a prompt: from its embedding alone, by a pipeline of DALL-E 2's kind."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from sd_mini.config import check_choice
from sd_mini.errors import UserError
from sd_mini.generators.prior import PriorGenerator
from sd_mini.pipelines.inputs import OUTPUT_TYPES, as_tensor, check_counts
from sd_mini.pipelines.pictures import as_pictures
from sd_mini.pipelines.text_to_image import Pipeline
from sd_mini.sampling.loop import Generators, Guidance, as_generators, number, one_each


class ImageVariationPipeline(Pipeline):
    """`ImageVariationPipeline.from_pipe(pipeline)(image).images`: Ramesh et al. 2022, sec. 3.1.

    It shares the components of the pipeline that it is made from, whose latents a prior generator draws.
    """

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        generator: Generators = None,
        image_embeddings: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Make `num_images_per_prompt` pictures from the embedding of each picture.

        Args:
            image: one or several, of the size that was trained on, in any form that `ImageToImagePipeline` takes.
            guidance_scale: of the decoder; leads away from neither prompt nor embedding. 1 is none.
            generator: one for all pictures, or one each.
            image_embeddings: (N, D) of length 1, as `latent_generator.embed` gives them, instead of an image.
            output_type: "pil", "np", "pt" or "latent", as of `Pipeline.__call__`.

        Raises:
            UserError: a ValueError of one line, as for pictures of another size and for a pipeline of another family.
        """
        prior, count = self._prior(), number(num_images_per_prompt)
        check_counts(num_images_per_prompt=count)
        scale = Guidance(self.config.default_guidance if guidance_scale is None else guidance_scale).scale
        if output_type not in OUTPUT_TYPES:
            check_choice("output_type", output_type, OUTPUT_TYPES)
        if (image is None) == (image_embeddings is None):
            raise UserError(f"expected either image or image_embeddings, got {'neither' if image is None else 'both'}")
        embeddings = self._embed(prior, image) if image_embeddings is None else self._checked(prior, image_embeddings)
        embeddings = embeddings.to(self._execution_device).repeat_interleave(count, 0)

        batch = len(embeddings)
        draws = one_each(as_generators(generator), batch)
        latents = prior.vary(embeddings, self.null_condition(batch), draws, scale)
        try:
            pictures: Any = latents if output_type == "latent" else self._decode(latents, output_type, draws)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _prior(self) -> PriorGenerator:
        generator = self.latent_generator
        if isinstance(generator, PriorGenerator):
            return generator
        kind = "noise predictor" if generator is None else f"{generator.family} generator"
        raise UserError(
            f"image: variations need a prior generator, and this pipeline has a {kind}; join the run with one: "
            "Pipeline.from_run(RUN, 'prior')"
        )

    def _embed(self, prior: PriorGenerator, image: Any) -> Tensor:
        """Pictures of the training's size => embeddings (N, D)."""
        pictures, side = as_pictures(image), self.config.resolution
        for i, picture in enumerate(pictures):
            if tuple(picture.shape[1:]) != (side, side):
                raise UserError(
                    f"image {i} is {picture.shape[2]} x {picture.shape[1]} px; expected {side} x {side}, the size that "
                    "was trained on: scale it first"
                )
        pixels = 2 * torch.stack(pictures) - 1
        return prior.embed(pixels.to(self._execution_device, prior.dtype))

    @staticmethod
    def _checked(prior: PriorGenerator, embeddings: Any) -> Tensor:
        """Raises UserError for anything but floats (N, D) of length 1."""
        embeddings, expected = as_tensor(embeddings), f"expected floats (N, {prior.config.dim}), each of length 1"
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or embeddings.shape[1] != prior.config.dim:
            what = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else f"a {type(embeddings).__name__}"
            raise UserError(f"image_embeddings: {what}; {expected}")
        lengths = embeddings.float().norm(dim=1)
        if not embeddings.is_floating_point() or not len(lengths) or not bool(((lengths - 1).abs() < 0.01).all()):
            raise UserError(f"image_embeddings: {embeddings.dtype} of lengths {lengths.tolist()[:3]}; {expected}")
        return embeddings
