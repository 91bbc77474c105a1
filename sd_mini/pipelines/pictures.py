"""Pictures and masks that a call is given: PIL images, arrays and tensors => (C, H, W) float32 in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sd_mini import images
from sd_mini.errors import UserError

BLACK = (0, 0, 0)  # what is transparent in a mask is not painted there


def as_pictures(image: Any) -> list[Tensor]:
    """PIL images of any mode, arrays (H, W, 3) or tensors (3, H, W), one or several (a list, or a batch axis in front)
    => each (3, H, W) float32 in [0, 1].

    Arrays and tensors hold floats in [0, 1], as diffusers' VaeImageProcessor takes them, or uint8. Raises UserError.
    """
    return [_picture(one, f"image {i}") for i, one in enumerate(_each(image, "image", _pictures_of_array))]


def as_masks(mask_image: Any) -> list[Tensor]:
    """As `as_pictures`, of grey: arrays and tensors (H, W), (H, W, 1), (1, H, W), several with a batch axis in front
    => each (1, H, W) float32 in [0, 1]."""
    return [_mask(one, f"mask_image {i}") for i, one in enumerate(_each(mask_image, "mask_image", _masks_of_array))]


def batch_of(pictures: list[Tensor], size: tuple[int, int]) -> Tensor:
    """(C, H, W) each, in [0, 1] => (N, C, h, w) of `size`: where it is another, the centre, scaled (`images.fit`)."""
    return torch.stack([_fitted(picture, size) for picture in pictures])


def _fitted(picture: Tensor, size: tuple[int, int]) -> Tensor:
    if picture.shape[1:] == size:
        return picture
    rgb = (picture.expand(3, -1, -1) * 255).round().byte().numpy()
    return torch.from_numpy(images.fit(rgb, size)[: len(picture)]).float() / 255


def _each(value: Any, name: str, split: Callable[[Any], list[Any]]) -> list[Any]:
    """One picture or several of them, in whatever form => a list of single ones."""
    if isinstance(value, list | tuple):
        single = [one for item in value for one in _each(item, name, split)]
        if not single:
            raise UserError(f"{name} is an empty list; give at least one picture")
        return single
    if isinstance(value, Image.Image):
        return [value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "bfiu" and value.dtype.itemsize <= 8:
        # torch takes none that is read-only, nor of another byte order
        return split(value.astype(value.dtype.newbyteorder("="), order="C"))
    if isinstance(value, Tensor):
        return split(value)
    what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
    what = "missing" if value is None else what
    raise UserError(f"{name} is {what}; expected PIL images, or arrays or tensors of floats in [0, 1]")


def _pictures_of_array(array: Any) -> list[Any]:
    return list(array) if array.ndim == 4 else [array]


def _masks_of_array(array: Any) -> list[Any]:
    # three axes are a batch, unless they are one array with an axis for its one channel
    is_single = array.ndim == 2 or (isinstance(array, np.ndarray) and array.ndim == 3 and array.shape[-1] == 1)
    return [array] if is_single else list(array)


def _picture(value: Any, name: str) -> Tensor:
    if isinstance(value, Image.Image):
        return torch.from_numpy(images.decode(value)).float() / 255
    is_array = isinstance(value, np.ndarray)
    if value.ndim != 3 or value.shape[-1 if is_array else 0] != 3:
        shapes = "an array is (H, W, 3) or (N, H, W, 3)" if is_array else "a tensor is (3, H, W) or (N, 3, H, W)"
        raise UserError(f"{name} has shape {tuple(value.shape)}; {shapes}")
    # (H, W, 3) => (3, H, W)
    return _unit(torch.from_numpy(value).permute(2, 0, 1) if is_array else value, name)


def _mask(value: Any, name: str) -> Tensor:
    if isinstance(value, Image.Image):
        grey = images.decode_image(value, background=BLACK)[0].convert("L")
        return torch.from_numpy(np.array(grey))[None].float() / 255
    flat = torch.as_tensor(value)
    if flat.ndim == 3:
        flat = flat.squeeze(-1 if isinstance(value, np.ndarray) else 0)
    if flat.ndim != 2:
        raise UserError(f"{name} has shape {tuple(flat.shape)}; expected (H, W), with one channel")
    if flat.dtype == torch.uint8 and flat.numel() and flat.max() == 1:
        raise UserError(f"{name} is uint8 of 0 and 1; expected 0 to 255, or 0 and 1 as bool or float")
    return _unit(flat[None], name)


def _unit(values: Tensor, name: str) -> Tensor:
    """(C, H, W) of floats, uint8 or bool => float32 in [0, 1]. Raises UserError for what lies outside."""
    if not values.numel():
        raise UserError(f"{name} has shape {tuple(values.shape)}, which holds no pixel")
    if values.dtype == torch.uint8:
        return values.cpu().float() / 255
    if not values.is_floating_point() and values.dtype != torch.bool:
        raise UserError(f"{name} holds {values.dtype}; expected floats in [0, 1], or uint8")
    values = values.detach().cpu().float()
    if not values.isfinite().all():
        raise UserError(f"{name} holds NaN or infinity; expected floats in [0, 1]")
    low, high = (end.item() for end in values.aminmax())
    if low < 0 or high > 1:
        raise UserError(f"{name} has values from {low:.4g} to {high:.4g}; expected floats in [0, 1], or uint8")
    return values
