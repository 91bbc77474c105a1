"""A picture and a prompt => pictures like both: the noised picture instead of pure noise to begin with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from sd_mini.errors import UserError
from sd_mini.pipelines.inputs import Request, as_list, one_call
from sd_mini.pipelines.pictures import as_pictures, batch_of
from sd_mini.pipelines.text_to_image import Callback, Pipeline
from sd_mini.sampling.loop import Edit, Generators, first_step, number


@dataclass
class EditRequest(Request):
    """The arguments of a call that starts from pictures. Height and width are theirs where they are left out.

    `source`: the pictures as pixels (N, 3, H, W) in [-1, 1], or as the latents (N, C, h, w) that were given; N is 1 or
    the number of prompts.
    """

    image: Any
    strength: Any

    def __post_init__(self):
        if self.pipeline.latent_generator is not None:
            generator = self.pipeline.latent_generator
            raise UserError(f"image: a {generator.family} generator {generator.use_of_image}")
        strength = self.strength = number(self.strength)
        if not isinstance(strength, int | float) or isinstance(strength, bool) or not 0 <= strength <= 1:
            raise UserError(f"strength {strength!r}: expected a number above 0 (keeps the picture) and at most 1")
        self.is_latent = self._is_latent()
        self._pictures = [] if self.is_latent else as_pictures(self.image)
        self._take_size()
        super().__post_init__()
        steps = self.num_inference_steps
        if first_step(self.pipeline.process, steps, strength) >= steps:
            least = math.ceil(1000 / steps) / 1000
            raise UserError(
                f"strength {strength:g} leaves none of {steps} steps to run, and the picture as it is; give at least "
                f"{least:g}, or more num_inference_steps"
            )
        # the VaeImageProcessor's: [0, 1] => [-1, 1]
        size = self.height, self.width
        self.source = self.image.detach() if self.is_latent else 2 * batch_of(self._pictures, size) - 1
        self.check_count("images", len(self.source))

    @property
    def prompts(self) -> int:
        """How many."""
        return len(self.prompt_embeds) if self.prompt is None else len(as_list(self.prompt))

    def check_count(self, name: str, count: int) -> None:
        if count not in (1, self.prompts):
            raise UserError(f"{count} {name} for {self.prompts} prompts; give one, or one each")

    def _is_latent(self) -> bool:
        """Whether the image is a tensor of latents, which has their number of channels and not a picture's three."""
        image, channels = self.image, self.pipeline.autoencoder.latent_channels
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != channels or channels == 3:
            return False
        if not image.is_floating_point() or not image.isfinite().all():
            raise UserError(f"image: latents of {image.dtype}; expected finite floats, (N, {channels}, h, w)")
        return True

    def _take_size(self) -> None:
        """Height and width are the pictures' own where they are left out; `own_sizes` are (H, W) of each picture."""
        stride = self.pipeline.autoencoder.stride
        self.own_sizes: list[tuple[int, ...]] = [tuple(picture.shape[1:]) for picture in self._pictures]
        if self.is_latent:
            self.own_sizes = [(self.image.shape[2] * stride, self.image.shape[3] * stride)]
        height, width = self.own_sizes[0]
        is_asked = self.height is not None or self.width is not None
        self.height = height if self.height is None else number(self.height)
        self.width = width if self.width is None else number(self.width)
        if self.is_latent and (self.height, self.width) != (height, width):
            raise UserError(
                f"image: latents of {width} x {height} px cannot be scaled to {self.width} x {self.height}; leave out "
                "height and width"
            )
        if is_asked:
            return
        mend = "give height and width to have it scaled and cropped"
        for i, (own_height, own_width) in enumerate(self.own_sizes):
            if (own_height, own_width) != (height, width):
                raise UserError(f"image {i} is {own_width} x {own_height} px, image 0 {width} x {height}; {mend}")
        cell = self.pipeline.cell
        if height % cell or width % cell:
            near_height, near_width = (max(round(side / cell), 1) * cell for side in (height, width))
            raise UserError(
                f"image of {width} x {height} px: expected multiples of {cell}; the nearest size is {near_width} x "
                f"{near_height}; {mend}"
            )


class ImageToImagePipeline(Pipeline):
    """Pictures from a picture and a prompt: `ImageToImagePipeline.from_pipe(pipeline)(prompt, image).images`.

    It shares the components of the pipeline it is made from, and loads like one (`from_run`, `from_pretrained`).
    """

    @one_call
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
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
        """Noise the picture to the level of a step in the middle, and denoise from there. SDEdit, Meng et al. 2022.

        The picture is encoded to the mean of its latents (a stock pipeline draws from their distribution), so the
        generator draws the noise alone. All that is not named here is as in `Pipeline.__call__`.

        Args:
            image: one, or one a prompt: PIL images of any mode (turned as EXIF says), arrays (N, H, W, 3) or tensors
                (N, 3, H, W) of floats in [0, 1] or uint8, or latents (N, C, h, w) as output_type "latent" gives them.
            strength: in (0, 1], the part of the steps that is run: of N steps the last N * strength, rounded down on a
                discrete schedule and up on the linear path. With 1 nothing of the picture is left on the linear path,
                and on a discrete schedule what its first step leaves.
            height, width: pixels, to which the picture is scaled and cropped; its own size if left out.
            latents: the noise N(0, I) to add, (B, C, h, w), instead of a draw.

        Raises:
            UserError: a ValueError of one line, as for pictures of another number than the prompts, for values outside
                [0, 1] and NaN, and for a strength that leaves no step.
        """
        return self._make(EditRequest.of(self, locals()), callback_on_step_end, return_dict)

    def _prepare_edit(self, request: Any, batch: int) -> Edit:
        return Edit(self._source_latents(request, batch), request.strength)

    def _source_latents(self, request: EditRequest, batch: int) -> Tensor:
        """The picture's latents, (B, C, h, w): those of picture i for all the pictures of prompt i."""
        latents, device = request.source.to(self._execution_device), self._execution_device
        if not request.is_latent:
            latents = self.autoencoder.encode(latents.to(self.autoencoder.dtype))
        return latents.to(device, self.noise_predictor.dtype).repeat_interleave(batch // len(latents), 0)
