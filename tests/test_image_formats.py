"""Formats beyond PNG and JPEG, against the pixels they were written from; pictures that would take too much memory."""

import io
import multiprocessing
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from sd_mini import images
from sd_mini.errors import UserError
from tests.test_images import assert_within, encoded, noise, rgb

SMOOTH = np.stack(np.meshgrid(np.arange(0, 256, 8), np.arange(0, 256, 8), [90]), -1)[:, :, 0].astype(np.uint8)


def heic(picture: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(picture).save(buffer, **options)
    return buffer.getvalue()


def test_lossless_webp_is_exact_and_lossy_formats_are_near():
    assert (rgb(images.decode(encoded(Image.fromarray(SMOOTH), "WEBP", lossless=True))) == SMOOTH).all()
    for data in (
        encoded(Image.fromarray(SMOOTH), "WEBP", quality=95),
        encoded(Image.fromarray(SMOOTH), "AVIF", quality=95),
        heic(Image.fromarray(SMOOTH), quality=95),
    ):
        assert_within(rgb(images.decode(data)), SMOOTH, 16)


def test_heic_is_read_from_a_file_of_any_name(tmp_path):
    for name in ("a.heic", "a.HEIF", "a.jpg"):
        (tmp_path / name).write_bytes(heic(Image.fromarray(SMOOTH), quality=95))
        assert_within(rgb(images.decode(tmp_path / name)), SMOOTH, 16)
        assert images.is_picture(tmp_path / name)


def test_the_orientation_of_a_heic_is_applied_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = heic(Image.fromarray(SMOOTH[:, :16]), quality=95, exif=exif.tobytes())
    assert_within(rgb(images.decode(data)), np.rot90(SMOOTH[:, :16], -1), 16)


def test_without_its_package_a_heic_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    with pytest.raises(UserError, match=r"need the package pillow-heif: pip install 'sd-mini\[heic\]'"):
        images.decode(heic(Image.fromarray(SMOOTH)))


def test_the_first_frame_of_an_animation_with_transparency_and_offsets():
    """A GIF whose second frame only changes a part, and an APNG whose frames differ."""
    first, second = Image.new("RGB", (6, 6), "red"), Image.new("RGB", (6, 6), "red")
    second.paste("blue", (2, 2, 4, 4))
    for kind in ("GIF", "PNG"):
        data = encoded(first, kind, save_all=True, append_images=[second])
        assert (rgb(images.decode(data)) == (255, 0, 0)).all()
    default = encoded(second, "PNG", save_all=True, append_images=[first], default_image=True)
    assert rgb(images.decode(default))[3, 3].tolist() == [0, 0, 255]  # what a viewer without animations shows


def png16(wide: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG, which Pillow does not write in colour."""
    height, width = wide.shape[:2]
    lines = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in wide.reshape(height, -1))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">2I5B", width, height, 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_colour_keeps_its_high_bytes():
    wide = np.random.default_rng(0).integers(0, 65536, (5, 7, 3))
    assert (rgb(images.decode(png16(wide, 2))) == wide >> 8).all()
    wide = np.random.default_rng(0).integers(0, 65536, (5, 7, 1))
    grey = rgb(images.decode(png16(wide, 0)))
    assert (grey == np.rint(wide / 257)).all()


# A CMYK profile by hand (ICC.1:2001-04, sections 6.1 header, 6.5.8 lut8Type): Lab at the 16 full inks, between which a
# converter interpolates

LAB = [(255 - 17 * i, 128 + i % 3 * 10 * (i < 15), 128 - i % 5 * 6 * (i < 15)) for i in range(16)]


def cmyk_profile(space: bytes = b"CMYK") -> bytes:
    identity = struct.pack(">9i", *(65536 * one for one in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    linear = bytes(range(256))
    grid = bytes(value for lab in LAB for value in lab)
    text = b"test\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text" + bytes(4) + text,
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061),
        b"A2B0": b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * linear + grid + 3 * linear,
    }
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">2I", start + len(data), len(content))
        data += content
    header = struct.pack(">I4xI", start + len(data), 0x02400000) + b"prtr" + space + b"Lab "
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + table + data


def srgb_of_lab(lightness: float, a: float, b: float) -> list[int]:
    """CIE Lab (D50) => sRGB, IEC 61966-2-1, with Bradford's adaptation to D65 in the matrix."""
    y = (lightness + 16) / 116

    def inverse(t):
        return t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29)

    xyz = np.array([0.9642, 1, 0.8249]) * [inverse(y + a / 500), inverse(y), inverse(y - b / 200)]
    to_rgb = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.clip(to_rgb @ xyz, 0, 1)
    return np.rint(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)).tolist()


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_goes_through_its_embedded_profile(kind):
    inks = np.array([[255 * (i >> (3 - c) & 1) for c in range(4)] for i in range(16)], dtype=np.uint8)
    blocks = inks.reshape(1, 16, 4).repeat(8, 0).repeat(8, 1)  # a block of JPEG's for each
    options = {"quality": 100} if kind == "JPEG" else {}
    got = rgb(images.decode(encoded(Image.fromarray(blocks, "CMYK"), kind, icc_profile=cmyk_profile(), **options)))
    expected = np.array([srgb_of_lab(100 * lab[0] / 255, lab[1] - 128, lab[2] - 128) for lab in LAB])
    assert_within(got[4, 4::8], expected, 2)


def test_cmyk_with_a_profile_of_another_space_is_refused():
    picture = Image.new("CMYK", (4, 4))
    for profile, says in (
        (cmyk_profile(b"RGB "), "its colour profile is of RGB, its pixels are CMYK"),
        (b"x" * 200, ""),
    ):
        with pytest.raises(UserError, match=f"^cannot decode a picture of .*{says}.*; replace it or leave it out$"):
            images.decode(encoded(picture, "TIFF", icc_profile=profile))


def test_a_profile_of_an_rgb_picture_leaves_its_numbers(tmp_path):
    pixels, profile = noise(4, 4, 3), ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert (rgb(images.decode(encoded(Image.fromarray(pixels), icc_profile=profile))) == pixels).all()


def bombs() -> dict[str, bytes]:
    """Files of a few bytes whose headers claim gigabytes."""
    side = 60_000
    png = bytearray(encoded(Image.new("1", (1, 1))))
    png[16:24] = struct.pack(">2I", side, side)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    gif = bytearray(encoded(Image.new("P", (1, 1)), "GIF"))
    gif[6:10] = struct.pack("<2H", side, side)
    frame = bytearray(encoded(Image.new("P", (1, 1)), "GIF"))  # the frame is larger than the screen
    at = frame.index(b"\x2c\0\0\0\0\1\0\1\0")
    frame[at + 5 : at + 9] = struct.pack("<2H", side, side)
    bmp = bytearray(encoded(Image.new("RGB", (1, 1)), "BMP"))
    bmp[18:26] = struct.pack("<2i", side, side)
    jpeg = bytearray(encoded(Image.new("RGB", (1, 1)), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">2H", side, side)
    tiff = encoded(Image.new("L", (1, 1)), "TIFF").replace(
        b"\0\1\4\0\1\0\0\0\1\0\0\0", b"\0\1\4\0\1\0\0\0" + b"\0\0\1\0"
    )
    text = b"a\0\0" + zlib.compress(bytes(2**26))  # 64 MB of text behind a picture of one pixel
    plain = encoded(Image.new("RGB", (1, 1)))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return {
        "png": bytes(png), "gif": bytes(gif), "frame": bytes(frame), "bmp": bytes(bmp), "jpeg": bytes(jpeg),
        "tiff": tiff, "ppm": b"P6 60000 60000 255\n" + bytes(9), "text": plain[:33] + chunk + plain[33:],
        "webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + b"\xff" * 13,
        "qoi": b"qoif" + struct.pack(">2I2B", side, side, 3, 0) + bytes(7) + b"\1",
        "tga": bytes([0, 0, 2, *bytes(9)]) + struct.pack("<2H", side, side) + bytes([24, 0]),
    }  # fmt: skip


def peak() -> int:
    """The most memory that this program had at once, KiB; `ru_maxrss` holds that of the program before it, too."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def growths(pictures: dict[str, bytes]) -> list[tuple[str, int, str]]:
    """Each picture's name, by how many MiB the peak of this process's memory grew, and what became of it."""
    rows = []
    for name, data in pictures.items():
        before = peak()
        try:
            outcome = str(images.decode(data).shape)
        except UserError as error:
            outcome = str(error)
        rows.append((name, (peak() - before) // 1024, outcome))
    return rows


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_allocates_nothing_near_its_claim():
    """In a process of its own, which holds no freed memory that a picture could be put into."""
    pictures = {"large": encoded(Image.new("RGB", (3000, 3000))), **bombs()}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (_, large, shape), *rows = pool.apply(growths, (pictures,))
    assert large > 24 and shape == "(3, 3000, 3000)"  # the measurement notices what is allocated
    for name, mebibytes, outcome in rows:
        assert mebibytes < 24 and outcome.startswith("cannot decode "), (name, mebibytes, outcome)


def test_a_pipe_and_a_device_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    for name in ("a.png", "b.png"):
        with pytest.raises(UserError, match=rf"{name}: it is a pipe or a device, expected a file"):
            images.decode(tmp_path / name)
