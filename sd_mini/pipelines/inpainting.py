"""A picture, a mask and a prompt => the picture, repainted where the mask is white."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from torch.nn.functional import interpolate

from sd_mini.errors import UserError
from sd_mini.pipelines.image_to_image import EditRequest, ImageToImagePipeline
from sd_mini.pipelines.inputs import one_call
from sd_mini.pipelines.pictures import as_masks, batch_of
from sd_mini.pipelines.text_to_image import Callback
from sd_mini.remarks import remark
from sd_mini.sampling.loop import Edit, Generators


@dataclass
class InpaintingRequest(EditRequest):
    """`EditRequest` with masks of the pictures' own size. `cells`: (N, 1, h, w), 1 where latents are repainted."""

    mask_image: Any

    def __post_init__(self):
        super().__post_init__()
        masks = as_masks(self.mask_image)
        self.check_count("masks", len(masks))
        for i in range(max(len(masks), len(self.own_sizes))):  # one mask may go with each picture, and the other way
            mask, (height, width) = masks[i % len(masks)], self.own_sizes[i % len(self.own_sizes)]
            if mask.shape[1:] != (height, width):
                own = f"{mask.shape[2]} x {mask.shape[1]}"
                raise UserError(
                    f"mask_image {i % len(masks)} is {own} px, its image {width} x {height}; give a mask of that size"
                )
        white = (batch_of(masks, (self.height, self.width)) >= 0.5).float()
        # diffusers' nearest neighbour: a cell is repainted when the pixel at its top left is white
        self.cells = interpolate(white, self.pipeline.latent_shape(self.height, self.width)[1:])
        for i in (~self.cells.flatten(1).any(1)).nonzero().flatten().tolist():
            stride = self.pipeline.autoencoder.stride
            remark(f"mask_image {i}: white in no cell of {stride} x {stride} px; nothing of the picture is repainted")


class InpaintingPipeline(ImageToImagePipeline):
    """Repaints a part of a picture: `InpaintingPipeline.from_pipe(pipeline)(prompt, image, mask_image).images`.

    It shares the components of the pipeline it is made from, and loads like one (`from_run`, `from_pretrained`).
    """

    @one_call
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_mask: Tensor | None = None,
        autoguidance: bool = False,
        strict: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Denoise, and after every step put back the picture, noised to the same level, where the mask is black.

        As StableDiffusionInpaintPipeline does with a network of text to image. Kept parts are the autoencoder's
        reconstruction; strength 1 begins with pure noise. All that is not named here is as in
        `ImageToImagePipeline.__call__` and `Pipeline.__call__`.

        Args:
            mask_image: one, or one a prompt, of the image's own size: white (0.5 and above) is repainted; black and
                what is transparent is kept. PIL images of any mode, arrays (N, H, W) or tensors (N, 1, H, W) of floats
                in [0, 1], bool or uint8. A latent cell follows the pixel at its top left.
            height, width: pixels, to which picture and mask are scaled and cropped; their own size if left out.

        Raises:
            UserError: a ValueError of one line, as for a mask of another size.
        """
        return self._make(InpaintingRequest.of(self, locals()), callback_on_step_end, return_dict)

    def _prepare_edit(self, request: Any, batch: int) -> Edit:
        latents = self._source_latents(request, batch)
        mask = request.cells.to(latents).repeat_interleave(batch // len(request.cells), 0)
        return Edit(latents, request.strength, mask)
