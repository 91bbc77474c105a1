"""sd_mini.images against Pillow's own compositing and exact arithmetic."""

import io
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from sd_mini import images

GREY = (10, 100, 200)  # a background no two of whose channels agree


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rgb(picture: np.ndarray) -> np.ndarray:
    assert (
        picture.dtype == np.uint8 and picture.shape[0] == 3 and picture.flags.c_contiguous and picture.flags.writeable
    )
    return picture.transpose(1, 2, 0)  # (3, H, W) => (H, W, 3)


def composited(rgba: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """The over operator in exact fractions, rounded to the nearest."""
    out = np.empty((*rgba.shape[:2], 3), dtype=np.uint8)
    for y, x in np.ndindex(rgba.shape[:2]):
        alpha = Fraction(int(rgba[y, x, 3]), 255)
        for c in range(3):
            out[y, x, c] = round(alpha * int(rgba[y, x, c]) + (1 - alpha) * background[c])
    return out


def assert_within(got: np.ndarray, expected: np.ndarray, levels: int) -> None:
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= levels


def test_rgb_is_untouched_from_bytes_path_and_pil(tmp_path):
    pixels = noise(5, 7, 3)
    image = Image.fromarray(pixels)
    path = tmp_path / "picture.png"
    image.save(path)
    for source in (encoded(image), path, str(path), image):
        assert (rgb(images.decode(source)) == pixels).all()


def test_one_bit_and_grey_repeat_in_three_channels():
    bits = noise(4, 9) > 127
    assert (rgb(images.decode(encoded(Image.fromarray(bits)))) == np.where(bits, 255, 0)[..., None]).all()
    grey = noise(4, 9)
    assert (rgb(images.decode(encoded(Image.fromarray(grey)))) == grey[..., None]).all()


def test_rgba_and_la_are_blended_onto_the_background():
    rgba = noise(8, 8, 4)
    rgba[0, 0, 3], rgba[0, 1, 3] = 0, 255
    got = rgb(images.decode(encoded(Image.fromarray(rgba)), GREY))
    assert_within(got, composited(rgba, GREY), 1)  # Pillow rounds in fixed point
    assert tuple(got[0, 0]) == GREY and (got[0, 1] == rgba[0, 1, :3]).all()

    la = noise(8, 8, 2)
    repeated = np.concatenate([np.repeat(la[..., :1], 3, axis=-1), la[..., 1:]], axis=-1)
    assert_within(rgb(images.decode(encoded(Image.fromarray(la, "LA")), GREY)), composited(repeated, GREY), 1)


def test_white_is_the_background_unless_another_is_asked_for():
    assert (images.decode(Image.new("RGBA", (2, 2), (1, 2, 3, 0))) == 255).all()


@pytest.mark.parametrize("transparency", [1, bytes([0, 128, 255])])
def test_palette_with_transparency(transparency):
    palette = [255, 0, 0, 0, 255, 0, 0, 0, 255]
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette(palette)
    alphas = [255, 0, 255] if transparency == 1 else list(transparency)
    rgba = np.array([[[*palette[3 * i : 3 * i + 3], alphas[i]] for i in range(3)]], dtype=np.uint8)
    got = rgb(images.decode(encoded(image, transparency=transparency), GREY))
    assert_within(got, composited(rgba, GREY), 1)


def test_palette_without_transparency():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([9, 8, 7, 6, 5, 4])
    assert rgb(images.decode(encoded(image))).tolist() == [[[9, 8, 7], [6, 5, 4]]]


def test_colour_key_transparency():
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert rgb(images.decode(encoded(image, transparency=(1, 2, 3)), GREY)).tolist() == [[list(GREY), [4, 5, 6]]]


def test_cmyk():
    cmyk = Image.fromarray(noise(8, 8, 4), "CMYK")
    data = np.asarray(cmyk).astype(int)
    expected = (
        (255 - data[..., :3]) * (255 - data[..., 3:]) / 255
    )  # naive separation: what Pillow does without profiles
    assert_within(rgb(images.decode(encoded(cmyk, "TIFF"))), expected, 1)


def test_sixteen_bit_grey_is_rounded_for_every_value():
    wide = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.array([round(Fraction(v, 257)) for v in range(65536)]).reshape(256, 256)
    assert Image.open(io.BytesIO(encoded(Image.fromarray(wide)))).mode == "I;16"
    assert (rgb(images.decode(encoded(Image.fromarray(wide)))) == expected[..., None]).all()
    big_endian = Image.frombytes("I;16B", (256, 256), wide.astype(">u2").tobytes())
    assert (rgb(images.decode(big_endian)) == expected[..., None]).all()


def test_sixteen_bit_grey_with_a_transparent_level():
    data = encoded(Image.fromarray(np.array([[257, 514]], dtype=np.uint16)), transparency=514)
    assert rgb(images.decode(data, GREY)).tolist() == [[[1, 1, 1], list(GREY)]]


def test_float_and_out_of_range_integers_are_refused():
    with pytest.raises(ValueError, match=r"mode F.*expected 8 or 16 bits"):
        images.decode(Image.fromarray(np.zeros((2, 2), dtype=np.float32)))
    with pytest.raises(ValueError, match="70000, expected 0 to 65535"):
        images.decode(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)))


# how a viewer turns the stored (H, W, 3) upright, from the EXIF specification's table of orientations
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation):
    pixels, exif = noise(3, 5, 3), Image.Exif()
    exif[0x0112] = orientation
    got = rgb(images.decode(encoded(Image.fromarray(pixels), exif=exif)))
    assert (got == UPRIGHT[orientation](pixels)).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (rgb(images.decode(data)) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_picture_is_refused(kind):
    data = encoded(Image.fromarray(noise(64, 64, 3)), kind)
    with pytest.raises(ValueError, match=r"^cannot decode a picture of \d+ bytes: ") as caught:
        images.decode(data[: len(data) // 2])
    assert "\n" not in str(caught.value)


def test_what_is_no_picture_is_refused(tmp_path):
    for data in (b"", b"hello", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ValueError, match="cannot decode a picture of"):
            images.decode(data)
    with pytest.raises(ValueError, match="not a picture format that Pillow knows") as caught:
        images.decode(b"hello")
    assert "0x" not in str(caught.value)
    with pytest.raises(ValueError, match=r"nowhere\.png: no such file"):
        images.decode(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="directory"):
        images.decode(tmp_path)
    with pytest.raises(ValueError, match="cannot decode a NoneType"):
        images.decode(None)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(30_000, 30_000), (9_500, 9_500), (20_001, 1), (1, 20_001)])
def test_bombs_are_refused_before_they_are_unpacked(size):
    # a real PNG of 1 x 1 px whose header claims `size`: unpacking it would fail with another message
    small = bytearray(encoded(Image.new("1", (1, 1))))
    small[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    small[29:33] = zlib.crc32(small[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match=r"decompression bomb|expected at most 20,000 px a side"):
        images.decode(bytes(small))


def test_a_picture_of_one_pixel_can_be_fitted():
    pixel = images.decode(encoded(Image.new("RGB", (1, 1), (1, 2, 3))))
    assert pixel.shape == (3, 1, 1)
    assert (rgb(images.fit(pixel, 4)) == (1, 2, 3)).all()


def test_fit_leaves_the_right_size_alone_and_crops_the_centre():
    square = noise(3, 16, 16)
    assert (images.fit(square, 16) == square).all()
    wide = noise(3, 16, 30)
    assert (images.fit(wide, 16) == wide[:, :, 7:23]).all()
    assert (images.fit(wide.transpose(0, 2, 1), 16) == wide.transpose(0, 2, 1)[:, 7:23]).all()


def test_the_top_of_an_upright_picture_and_the_middle_of_a_wide_one():
    tall = noise(3, 30, 16)
    assert (images.fit(tall, 16, "top") == tall[:, :16]).all()
    assert (images.fit(tall.transpose(0, 2, 1), 16, "top") == tall.transpose(0, 2, 1)[:, :, 7:23]).all()
    as_image = Image.fromarray(tall.transpose(1, 2, 0))
    assert (images.fit(as_image, 8) == images.fit(tall, 8)).all()


def test_fit_antialiases():
    # stripes one pixel wide are finer than the target holds: a filter gives grey, skipping pixels black or white
    stripes = np.zeros((3, 64, 64), dtype=np.uint8)
    stripes[:, :, ::2] = 255
    inner = images.fit(stripes, 16)[:, 2:-2, 2:-2]
    assert_within(inner, np.full_like(inner, 127), 3)


def test_fit_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match=r"expected uint8 of \(3, H, W\)"):
        images.fit(noise(8, 8, 3), 4)
    with pytest.raises(ValueError, match="got float32"):
        images.fit(np.zeros((3, 8, 8), dtype=np.float32), 4)
    with pytest.raises(ValueError, match="resolution: got 0 px"):
        images.fit(noise(3, 8, 8), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_value_survives_the_round_trip(dtype):
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    pixels = images.to_pixels(values)
    assert pixels.dtype == torch.float32 and pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(images.to_uint8(pixels.to(dtype)), values)
    expected = [float(Fraction(2 * v, 255) - 1) for v in range(256)]
    torch.testing.assert_close(pixels[0, 0].flatten().double(), torch.tensor(expected).double(), atol=1e-7, rtol=0)
    assert torch.equal(images.to_pixels(values.numpy()), pixels)


def test_to_uint8_rounds_and_clamps():
    got = images.to_uint8(torch.tensor([-7.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1.0, float("inf")]))
    assert got.tolist() == [0, 0, 0, 1, 255, 255]


def test_the_wrong_range_is_refused():
    with pytest.raises(ValueError, match=r"got torch.float32, expected uint8"):
        images.to_pixels(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"got torch.uint8, expected float"):
        images.to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="NaN"):
        images.to_uint8(torch.tensor([0.0, float("nan")]))


def test_to_pil_gives_the_pictures_back():
    pictures = noise(3, 3, 4, 6)
    for given in (pictures, torch.from_numpy(pictures)):
        back = images.to_pil(given)
        assert [image.mode for image in back] == ["RGB"] * 3 and back[0].size == (6, 4)
        assert (np.stack([images.decode(image) for image in back]) == pictures).all()
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        images.to_pil(pictures[0])
    with pytest.raises(ValueError, match="got float32"):
        images.to_pil(pictures.astype(np.float32))


def test_grid_places_every_picture_enlarged_by_whole_pixels():
    pictures = [noise(3, 8, 8, seed=i) for i in range(5)]
    sheet = np.asarray(images.grid([pictures[0], torch.from_numpy(pictures[1]), *pictures[2:]], columns=3, scale=2))
    gap = 4
    assert sheet.shape == (2 * (16 + gap) + gap, 3 * (16 + gap) + gap, 3)
    expected = np.full_like(sheet, 255)
    for i, picture in enumerate(pictures):
        y, x = gap + i // 3 * 20, gap + i % 3 * 20
        expected[y : y + 16, x : x + 16] = picture.transpose(1, 2, 0).repeat(2, axis=0).repeat(2, axis=1)
    assert (sheet == expected).all()


def test_grid_writes_labels_below_and_inside_their_column():
    long = "a small red circle to the left of a large blue square and supercalifragilisticexpialidocious too"
    pictures = [Image.new("RGBA", (96, 20), "white")] * 2
    sheet = np.asarray(images.grid(pictures, columns=2, labels=["", long]))
    dark = (sheet < 128).all(axis=-1)
    rows, columns = np.nonzero(dark)
    assert rows.min() >= 24 and rows.max() < sheet.shape[0] - 1
    assert columns.min() >= 104 and columns.max() < 200  # the second column only
    assert len(rows) > 300  # text of this length, not a smudge


def test_grid_refuses_what_cannot_be_laid_out():
    picture = noise(3, 8, 8)
    with pytest.raises(ValueError, match="got 0 pictures"):
        images.grid([], columns=2)
    with pytest.raises(ValueError, match="columns 0"):
        images.grid([picture], columns=0)
    with pytest.raises(ValueError, match="2 labels for 1 pictures"):
        images.grid([picture], columns=1, labels=["a", "b"])
