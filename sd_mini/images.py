"""Pictures in and out: files and PIL images <=> (3, H, W) uint8 sRGB <=> float32 pixels in [-1, 1].

The only module that knows the value ranges. The numbers of RGB and grey pictures are taken as sRGB, whatever profile
they carry; CMYK, whose numbers mean nothing without one, is converted through its embedded profile.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageDraw,
    ImageFile,
    ImageFont,
    ImageOps,
    UnidentifiedImageError,
)

from sd_mini.errors import UserError

if TYPE_CHECKING:
    import torch  # half a gigabyte, which processes that only decode do not need

WHITE = (255, 255, 255)

MAX_SIDE = 20_000  # px; beyond it a picture is a mistake or an attack, not training data
MAX_PIXELS = 2**28 // 3  # a quarter GiB of RGB, the size at which Pillow warns of a decompression bomb

_HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # ISO/IEC 23008-12, annex B

_GAP = 4  # px around every tile of a grid
_LABEL_SIZE = 11  # px; the smallest at which Pillow's own font reads well
_LABEL_WIDTH = 96  # px; a labelled column is at least this wide, so that words keep whole


@cache
def picture_suffixes() -> frozenset[str]:
    """Endings, in lower case, of the files that `decode` reads: ".png", ".jpg", ".avif", ".heic", ...

    Left out are the formats that it knows without being able to read a pixel: its stubs (HDF5, GRIB, ...) and MPEG.
    """
    Image.preinit()  # the common formats first: Pillow tries each plugin in the order in which they were loaded
    known = Image.registered_extensions()  # which also loads every plugin of Pillow's
    pixels = frozenset(suffix for suffix, name in known.items() if name in Image.OPEN and _reads_pixels(name))
    return pixels | _HEIF_SUFFIXES


def _reads_pixels(name: str) -> bool:
    factory = Image.OPEN[name][0]
    is_stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    return name != "MPEG" and not is_stub


def is_picture(path: str | Path) -> bool:
    """Whether a file's ending says that it is a picture."""
    return os.path.splitext(path)[1].lower() in picture_suffixes()


def decode(source: bytes | str | Path | Image.Image, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """An encoded picture, its path, or a PIL image => (3, H, W) uint8 sRGB.

    EXIF orientation is applied, transparency is blended onto `background` (0 to 255 each), 16-bit grey is scaled by
    1 / 257, 16-bit colour keeps its high bytes, CMYK goes through its embedded profile, and an animation gives its
    first frame (a PIL image the frame it stands at). HEIC and HEIF need the extra `heic`.

    Raises ValueError, one line with the source and the reason: missing, truncated or not a picture, float pixels, more
    than MAX_SIDE a side or MAX_PIXELS in all.
    """
    rgb, _ = decode_image(source, background)
    return np.asarray(rgb).transpose(2, 0, 1).copy()  # (H, W, 3) => (3, H, W); writable, and not PIL's memory


def decode_image(
    source: bytes | str | Path | Image.Image,
    background: tuple[int, int, int] = WHITE,
    least_side: int | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """As `decode`, but => (a PIL image of mode RGB, the picture's full width and height in px).

    `least_side`: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where both sides keep at least so many px.
    """
    try:
        with _opened(source) as image:
            _check_size(image)
            width, height = image.size
            if least_side is not None:
                image.draft(None, (least_side, least_side))
            is_turned = _is_turned(image)
            if image is source:
                image = image.copy()  # which is turned in place
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _flatten(image, background)
    except Exception as error:  # on damaged bytes Pillow's decoders raise anything, from SyntaxError to struct.error
        raise UserError(f"cannot decode {_describe(source)}: {_reason(error)}; replace it or leave it out") from error
    return rgb, (height, width) if is_turned else (width, height)


def size_of(source: bytes | str | Path) -> tuple[int, int]:
    """Width and height of an encoded picture in px, turned as EXIF says, by its header alone. Raises UserError."""
    try:
        with _opened(source) as image:
            width, height = image.size
            return (height, width) if _is_turned(image) else (width, height)
    except Exception as error:  # as above
        raise UserError(f"cannot read {_describe(source)}: {_reason(error)}; replace it or leave it out") from error


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)


@contextmanager
def _opened(source: bytes | str | Path | Image.Image) -> Generator[Image.Image]:
    """A picture of which the header alone has been read."""
    if isinstance(source, Image.Image):
        yield source
        return
    if not isinstance(source, bytes) and (path := Path(source)).exists() and not (path.is_file() or path.is_dir()):
        raise UserError("it is a pipe or a device, expected a file")  # either may never end
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        yield _identified(file)


def _identified(file: IO[bytes]) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(12)
        if head[4:8] != b"ftyp" or head[8:] not in _HEIF_BRANDS:
            raise
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise UserError("HEIC and HEIF need the package pillow-heif: pip install 'sd-mini[heic]'") from None
    register_heif_opener()
    file.seek(0)
    return Image.open(file)


def _describe(source: object) -> str:
    if isinstance(source, bytes):
        return f"a picture of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"a {source.width} x {source.height} PIL image of mode {source.mode}"
    return str(source) if isinstance(source, str | Path) else f"a {type(source).__name__}"


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text shows only a memory address
        return "not a picture format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _check_size(image: Image.Image) -> None:
    # the header gives the size, so nothing of a bomb is unpacked yet
    width, height = image.size
    if min(width, height) < 1:
        raise UserError(f"{width} x {height} px holds no pixel")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise UserError(f"{width} x {height} px, expected at most {MAX_SIDE:,} px a side and {MAX_PIXELS:,} px in all")


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any Pillow mode => RGB, with transparency blended onto `background`."""
    if image.mode == "F":
        raise UserError("float pixels (mode F) have no agreed range, expected 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        image = _narrow(image)
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        return _through_profile(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")


def _through_profile(image: Image.Image) -> Image.Image:
    """CMYK => RGB by the embedded ICC profile, relative colorimetric with black point compensation."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    space = profile.profile.xcolor_space.strip()
    if space != "CMYK":
        raise UserError(f"its colour profile is of {space}, its pixels are CMYK")
    converted = ImageCms.profileToProfile(
        image,
        profile,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None  # as nothing is converted in place
    return converted


def _narrow(image: Image.Image) -> Image.Image:
    """16-bit grey (modes I;16* and I) => L, or LA where the file names a transparent grey."""
    wide = np.asarray(image).astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise UserError(f"grey values from {wide.min()} to {wide.max()}, expected 0 to 65535")
    grey = Image.fromarray(((wide + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255; rounded to the nearest
    key = image.info.get("transparency")
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(wide == key, 0, 255).astype(np.uint8)))
    return grey


Crop = Literal["center", "top", "random", "none"]


def fit(
    picture: np.ndarray | Image.Image, size: int | tuple[int, int], crop: Crop = "center", place: float = 0.5
) -> np.ndarray:
    """(3, H, W) uint8, or a PIL image of mode RGB => (3, h, w) uint8 of `size`, (h, w) px or the side of a square.

    The largest part of the picture with that ratio of sides is scaled (Lanczos, antialiased): its centre, "top" of a
    picture that is too high for it, or "random" at `place`, 0 to 1 from the left or the top. "none": all of it is
    scaled, whatever its ratio.

    Raises ValueError for another shape or dtype, and for a size below 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise UserError(f"resolution: got {min(height, width)} px, expected at least 1 px")
    if isinstance(picture, np.ndarray):
        _check_picture(picture)
        picture = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
    kept_width, kept_height = picture.size if crop == "none" else largest_part(picture.size, (height, width))
    across = down = place if crop == "random" else 0.5
    # half pixels are kept: the centre is exact
    left, top = (picture.width - kept_width) * across, (picture.height - kept_height) * down
    if crop == "top":
        top = 0.0
    box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box)).transpose(2, 0, 1).copy()


def largest_part(own: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """(width, height) of a picture and a (height, width) => width and height of its largest part with that ratio."""
    (own_width, own_height), (height, width) = own, size
    return min(own_width, own_height * width / height), min(own_height, own_width * height / width)


def _check_picture(picture: np.ndarray) -> None:
    if picture.ndim != 3 or picture.shape[0] != 3 or picture.dtype != np.uint8:
        raise UserError(f"picture: got {picture.dtype} of shape {tuple(picture.shape)}, expected uint8 of (3, H, W)")


def to_pixels(pictures: torch.Tensor | np.ndarray) -> torch.Tensor:
    """(B, 3, H, W) uint8 => (B, 3, H, W) float32 in [-1, 1], same device. Raises ValueError for another dtype."""
    import torch

    pictures = torch.as_tensor(pictures)
    if pictures.dtype != torch.uint8:
        raise UserError(f"pictures: got {pictures.dtype}, expected uint8; pixels in [-1, 1] need no conversion")
    return pictures.to(torch.float32) / 127.5 - 1


def to_uint8(pixels: torch.Tensor | np.ndarray) -> torch.Tensor:
    """(B, 3, H, W) float in [-1, 1] => uint8, rounded; what lies outside is clamped. `to_uint8(to_pixels(x)) == x`.

    Raises ValueError for integers and for NaN, which a clamp would turn into a plausible black.
    """
    import torch

    pixels = torch.as_tensor(pixels)
    if not pixels.is_floating_point():
        raise UserError(f"pixels: got {pixels.dtype}, expected float in [-1, 1]; uint8 pictures need no conversion")
    if pixels.isnan().any():
        raise UserError("pixels: got NaN, expected float in [-1, 1]; the model that made them has diverged")
    return ((pixels.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(pictures: torch.Tensor | np.ndarray) -> list[Image.Image]:
    """(B, 3, H, W) uint8 => B PIL images of mode RGB. Raises ValueError for another shape or dtype."""
    pictures = _as_numpy(pictures)
    if pictures.ndim != 4:
        raise UserError(f"pictures: got shape {tuple(pictures.shape)}, expected (B, 3, H, W)")
    for picture in pictures:
        _check_picture(picture)
    return [Image.fromarray(picture) for picture in np.ascontiguousarray(pictures.transpose(0, 2, 3, 1))]


def _as_numpy(pictures: torch.Tensor | np.ndarray) -> np.ndarray:
    to_cpu = getattr(pictures, "cpu", None)  # of a tensor
    return np.asarray(pictures) if to_cpu is None else to_cpu().numpy()


def grid(
    pictures: Sequence[np.ndarray | torch.Tensor | Image.Image],
    columns: int,
    labels: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """N pictures, (3, H, W) uint8 or PIL, any sizes => one RGB image, row by row on white, each above its label.

    `scale` enlarges by whole pixels, so that a small sample's pixels stay visible. Labels are wrapped to their column.

    Raises ValueError for no pictures, columns or scale below 1, or another number of labels than pictures.
    """
    if not len(pictures) or columns < 1 or scale < 1:
        raise UserError(
            f"grid: got {len(pictures)} pictures, columns {columns}, scale {scale}; expected at least 1 of each"
        )
    if labels is not None and len(labels) != len(pictures):
        raise UserError(f"grid: got {len(labels)} labels for {len(pictures)} pictures, expected one for each")
    tiles = [_tile(picture, scale) for picture in pictures]
    width = max(tile.width for tile in tiles) if labels is None else max(_LABEL_WIDTH, *(tile.width for tile in tiles))
    height = max(tile.height for tile in tiles)
    font = ImageFont.load_default(_LABEL_SIZE)
    texts = ["\n".join(_wrap(label, font, width)) for label in labels or []]
    below = max((_text_height(text, font) for text in texts), default=0)

    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    step_x, step_y = width + _GAP, height + below + _GAP
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), WHITE)
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x, y = _GAP + i % columns * step_x, _GAP + i // columns * step_y
        sheet.paste(tile, (x, y))
        if texts:
            draw.multiline_text((x, y + height + _GAP), texts[i], fill="black", font=font)
    return sheet


def _tile(picture: np.ndarray | torch.Tensor | Image.Image, scale: int) -> Image.Image:
    if isinstance(picture, Image.Image):
        picture = decode(picture)
    image = to_pil(_as_numpy(picture)[None])[0]
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """A label => lines of at most `width` px, broken between words, and inside a word only where it alone is wider."""
    lines = [""]
    for word in label.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _text_height(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)[3]
    return _GAP + int(np.ceil(bottom))


# PSNR = 10 log10(255^2 / MSE), a picture at a time
def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Two (B, 3, H, W) uint8 => (B,) dB in float64; equal pictures give infinity."""
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error.mean((1, 2, 3)))


SSIM_WINDOW = 11  # px a side, the Gaussian's support: 3.5 sigma to each side of the centre


# Wang et al. 2004, eq. 13, with the window of its sec. III-C: a Gaussian of sigma 1.5, moments as weighted means
def ssim(a: torch.Tensor, b: torch.Tensor, value_range: float) -> torch.Tensor:
    """Two (B, C, H, W) floats whose values span `value_range` => (B,) structural similarity, 1 for equal pictures.

    The mean over channels and over the windows that lie inside the picture, in the tensors' own dtype, with a gradient:
    scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`. Raises
    UserError for pictures smaller than the window.
    """
    import torch

    channels, height, width = a.shape[1:]
    if min(height, width) < SSIM_WINDOW:
        raise UserError(f"ssim: pictures of {width} x {height} px; expected at least {SSIM_WINDOW} px a side")
    at = torch.arange(SSIM_WINDOW, dtype=a.dtype, device=a.device) - SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (at / 1.5) ** 2)
    weights = weights / weights.sum()
    across, down = weights.view(1, 1, 1, -1), weights.view(1, 1, -1, 1)
    maps = torch.cat([a, b, a * a, b * b, a * b], dim=1)  # (B, 5 C, H, W), all averaged alike
    maps = maps.flatten(0, 1)[:, None]
    means = torch.nn.functional.conv2d(torch.nn.functional.conv2d(maps, across), down)
    mean_a, mean_b, aa, bb, ab = means.view(len(a), 5, channels, *means.shape[-2:]).unbind(1)
    c1, c2 = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * (ab - mean_a * mean_b) + c2) / (aa - mean_a**2 + bb - mean_b**2 + c2)
    return (luminance * structure).mean((1, 2, 3))
