"""A corpus of malformed pictures and captions: the right pixels or text, or a rejection with the row's name, never a
traceback."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from sd_mini import images
from sd_mini.data.captioned import DataConfig, load
from sd_mini.data.sources import open_source
from sd_mini.errors import UserError
from tests.test_image_formats import heic
from tests.test_images import encoded

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
PNG, JPEG, GIF = encoded(PICTURE), encoded(PICTURE, "JPEG", quality=95), encoded(PICTURE.quantize(8), "GIF")
BMP, TIFF, WEBP = encoded(PICTURE, "BMP"), encoded(PICTURE, "TIFF"), encoded(PICTURE, "WEBP", lossless=True)
AVIF, HEIC, JP2 = encoded(PICTURE, "AVIF"), heic(PICTURE), encoded(PICTURE, "JPEG2000")


def png(*chunks: tuple[bytes, bytes], crc: int = 0) -> bytes:
    """A PNG of these chunks; `crc` is added to each checksum."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in chunks:
        parts += [struct.pack(">I", len(content)), kind, content, struct.pack(">I", zlib.crc32(kind + content) + crc)]
    return b"".join(parts)


def header(width=16, height=16, depth=8, colour=2, compression=0, interlace=0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">2I5B", width, height, depth, colour, compression, 0, interlace)


def lines(filter_type: int = 0) -> bytes:
    return b"".join(bytes([filter_type]) + row.tobytes() for row in PIXELS)


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


END = (b"IEND", b"")
BODY = (b"IDAT", zlib.compress(lines()))
FLIPPED = changed(encoded(PICTURE, compress_level=0), 400, b"\x55\xaa\x55")
EXIF_9 = Image.Exif()
EXIF_9[0x0112] = 9  # no such orientation

RIGHT: dict[str, tuple[bytes, np.ndarray]] = {  # odd files with a picture in them, and its pixels
    "png called jpeg.jpg": (PNG, PIXELS),
    "jpeg called png.png": (JPEG, np.asarray(Image.open(io.BytesIO(JPEG)))),
    "webp called bmp.bmp": (WEBP, PIXELS),
    "no end.png": (PNG[:-12], PIXELS),
    "end cut.png": (PNG[:-3], PIXELS),
    "text after it.png": (PNG + b"<html>", PIXELS),
    "text after it.jpg": (JPEG + b"<html>", np.asarray(Image.open(io.BytesIO(JPEG)))),
    "no end.gif": (GIF[:-1], np.asarray(Image.open(io.BytesIO(GIF)).convert("RGB"))),
    "unknown orientation.png": (encoded(PICTURE, exif=EXIF_9), PIXELS),
    "pixels in two chunks.png": (
        png(header(), (b"IDAT", BODY[1][:50]), (b"IDAT", BODY[1][50:]), END),
        PIXELS,
    ),
    "unknown chunk.png": (png(header(), (b"vpAg", bytes(9)), BODY, END), PIXELS),
    "UPPER.PNG": (PNG, PIXELS),
}
REJECTED: dict[str, bytes] = {
    "empty.png": b"",
    "one byte.png": b"\x89",
    "zeros.png": bytes(4096),
    "text.jpg": b"hello",
    "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "error.jpg": b'{"error": "access denied"}',
    "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "document.png": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "film.jpg": b"\0\0\0\x20ftypisom" + bytes(500),
    "archive.png": b"PK\x03\x04" + bytes(100),
    "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    **{f"half.{kind}": data[: len(data) // 2] for kind, data in {
        "png": PNG, "jpg": JPEG, "gif": GIF, "bmp": BMP, "tif": TIFF, "webp": WEBP, "avif": AVIF, "heic": HEIC,
        "jp2": JP2}.items()},
    **{f"header.{kind}": data[:size] for kind, data, size in (
        ("png", PNG, 33), ("jpg", JPEG, 20), ("gif", GIF, 13), ("bmp", BMP, 54), ("tif", TIFF, 8), ("webp", WEBP, 20),
        ("heic", HEIC, 32), ("avif", AVIF, 32))},
    "last byte cut.jpg": JPEG[:-1],
    "wrong checksum.png": png(header(), BODY, END, crc=1),
    "flipped pixels.png": FLIPPED,
    "no width.png": png(header(width=0), BODY, END),
    "no pixels.png": png(header(), END),
    "too few pixels.png": png(header(), (b"IDAT", zlib.compress(lines()[:200])), END),
    "colour type 5.png": png(header(colour=5), BODY, END),
    "3 bits.png": png(header(depth=3), BODY, END),
    "filter 9.png": png(header(), (b"IDAT", zlib.compress(lines(9))), END),
    "no zlib.png": png(header(), (b"IDAT", lines()), END),
    "no header.png": png(BODY, END),
    "chunk of 2 GiB.png": png(header()) + struct.pack(">I", 2**31 - 1) + b"IDAT" + bytes(50),
    "no scan.jpg": JPEG[: JPEG.index(b"\xff\xda")] + b"\xff\xd9",
    "no height.jpg": changed(JPEG, JPEG.index(b"\xff\xc0") + 5, b"\0\0"),
    "no tables.jpg": JPEG[:2] + JPEG[JPEG.index(b"\xff\xc0") :],
    "offset outside.tif": changed(TIFF, 4, b"\xff\xff\xff\x7f"),
    "directory in itself.tif": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "no frame.gif": GIF[: GIF.index(b"\x2c\0\0\0\0")] + b"\x3b",
    "frame without screen.gif": changed(GIF, 6, b"\0\0\0\0")[:20],
    "compression 77.bmp": changed(BMP, 30, b"\x4d"),
    "no size.bmp": changed(BMP, 18, bytes(8)),
    "floats.tif": encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"),
    "wide integers.tif": encoded(Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)), "TIFF"),
    "negative.tif": encoded(Image.fromarray(np.full((4, 4), -1, dtype=np.int32)), "TIFF"),
    "broken profile.tif": encoded(Image.new("CMYK", (4, 4)), "TIFF", icc_profile=b"x" * 300),
    "strip.png": encoded(Image.new("1", (20_001, 1))),
}  # fmt: skip
UNREADABLE: dict[str, Callable] = {  # what lies there and is no file of bytes
    "folder.png": lambda path: (path.mkdir(), (path / "notes.md").write_text("a")),
    "pipe.png": os.mkfifo,
    "dangling.png": lambda path: path.symlink_to("nowhere.png"),
    "loop.png": lambda path: path.symlink_to(path.name),
    "device.png": lambda path: path.symlink_to("/dev/zero"),
}


def config(source, **fields) -> DataConfig:
    return DataConfig(source=str(source), resolution=16, **fields)


def test_the_corpus_is_large():
    assert len(REJECTED) + len(RIGHT) + len(UNREADABLE) >= 60 and len(REJECTED) >= 30
    assert len(CAPTIONS) + len(TEXT_FILES) + len(TABLES) >= 20


@pytest.mark.parametrize("name", RIGHT)
def test_odd_pictures_are_read_to_the_last_pixel(tmp_path, name):
    data, pixels = RIGHT[name]
    (tmp_path / name).write_bytes(data)
    assert (load(config(tmp_path)).pictures == pixels.transpose(2, 0, 1)).all()


@pytest.mark.filterwarnings("ignore")  # of Pillow's, about what it is about to refuse
@pytest.mark.parametrize("name", REJECTED)
def test_malformed_pictures_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(REJECTED[name])
    table = open_source(config(tmp_path), "data")
    assert table.id(0) == name
    for source in (table.picture(0, "image"), REJECTED[name]):  # a file's, and those of parquet and of tars
        with pytest.raises(UserError, match=r"^cannot decode .+: .+; replace it or leave it out$") as caught:
            images.decode(source)
        assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)
    with pytest.raises(UserError, match=name):
        load(config(tmp_path))


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_file_is_named_or_left_out(tmp_path, name, capsys):
    UNREADABLE[name](tmp_path / name)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    if name == "folder.png":
        assert len(load(config(tmp_path))) == 1 and "left out 1 file" in capsys.readouterr().err
        return
    with pytest.raises(UserError, match=name) as caught:
        load(config(tmp_path))
    assert "\n" not in str(caught.value)


CAPTIONS: dict[str, tuple[object, str]] = {  # cells of a metadata.jsonl, and the caption or the reason
    "null": (None, "a caption is a NoneType (None); expected text"),
    "number": (7, "a caption is a int (7)"),
    "not a number": (float("nan"), "a caption is a float (nan)"),
    "boolean": (True, "a caption is a bool (True)"),
    "object": ({"en": "a"}, "a caption is a dict"),
    "empty": ("", "a caption is empty"),
    "blank": (" \t\n\u3000", "a caption is empty"),
    "no captions": ([], "its list of captions is empty"),
    "null in a list": (["a", None], "a caption is a NoneType"),
    "list in a list": ([["a"]], "a caption is a list"),
    "blank in a list": (["a", " "], "a caption is empty"),
    "lone surrogate": ("a \ud83d", "has a lone surrogate, U+D83D, at character 2"),
    "line separators": ("a\u2028b\u0085c", "=a\u2028b\u0085c"),
    "null byte": ("a\0b", "=a\0b"),
    "directions": ("\u202ea\u202c b", "=\u202ea\u202c b"),
    "markup": ("<b>a</b> &amp; b", "=<b>a</b> &amp; b"),
    "placeholders": ("{label} %s \\n", "={label} %s \\n"),
    "emoji of several": ("\U0001f468\u200d\U0001f469", "=\U0001f468\u200d\U0001f469"),
    "a megabyte": ("red " * 250_000, "=" + "red " * 250_000),
    "looks like a number": ("1984", "=1984"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_malformed_captions_are_named_and_odd_ones_kept(tmp_path, case):
    cell, expected = CAPTIONS[case]
    rows = [{"file_name": "a.png", "text": "fine"}, {"file_name": "b.png", "text": cell}]
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(PNG)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if expected.startswith("="):
        assert load(config(tmp_path)).captions == [["fine"], [expected[1:]]]
        return
    with pytest.raises(UserError) as caught:
        load(config(tmp_path))
    said = str(caught.value)
    assert "row 1 of" in said and "(b.png)" in said and expected in said and "\n" not in said


TEXT_FILES: dict[str, tuple[bytes, str]] = {
    "latin 1": (b"caf\xe9", "b.txt: is not UTF-8 (byte 0xe9 at position 3); save it as UTF-8"),
    "utf-16": ("a cup".encode("utf-16"), "b.txt: is not UTF-8 (byte 0xff at position 0)"),
    "cut in a letter": ("caf\u00e9".encode()[:-1], "b.txt: is not UTF-8 (byte 0xc3 at position 3)"),
    "surrogates in utf-8": (b"a \xed\xa0\xbd", "b.txt: is not UTF-8"),
    "empty": (b"", "a caption is empty"),
    "mark alone": (b"\xef\xbb\xbf", "a caption is empty"),
    "blank lines": (b"\r\n \n\n", "a caption is empty"),
    "mark and Windows' ends": (b"\xef\xbb\xbfa cup\r\n", "=a cup"),
}


@pytest.mark.parametrize("case", TEXT_FILES)
def test_malformed_caption_files_are_named(tmp_path, case):
    content, expected = TEXT_FILES[case]
    for name, text in (("a", b"fine"), ("b", content)):
        (tmp_path / f"{name}.png").write_bytes(PNG)
        (tmp_path / f"{name}.txt").write_bytes(text)
    if expected.startswith("="):
        assert load(config(tmp_path)).captions == [["fine"], [expected[1:]]]
        return
    with pytest.raises(UserError) as caught:
        load(config(tmp_path))
    assert "(b.png)" in str(caught.value) and expected in str(caught.value) and "\n" not in str(caught.value)


TABLES: dict[str, tuple[bytes, str]] = {  # of a .csv: what its message says
    "open quotes": (b'image,text\na.png,"red\n', "is not readable as CSV"),
    "too many fields": (b"image,text\na.png,red, blue\n", "line 2 has another number of fields"),
    "too few fields": (b"image,text\na.png\n", "line 2 has another number of fields"),
    "two columns of one name": (b"image,text,text\na.png,a,b\n", "has 'text' more than once"),
    "latin 1": (b"image,text\na.png,caf\xe9\n", "is not UTF-8 (byte 0xe9"),
    "no header": (b"a.png,red\n", "has no rows"),
    "another delimiter": (b"image;text\na.png;red\n", "no column 'image' in"),
    "null bytes": (b"image,text\na.png,\0\0\n", "=\0\0"),
}


@pytest.mark.parametrize("case", TABLES)
def test_malformed_tables_are_named(tmp_path, case):
    content, expected = TABLES[case]
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "rows.csv").write_bytes(content)
    if expected.startswith("="):
        assert load(config(tmp_path / "rows.csv")).captions == [[expected[1:]]]
        return
    with pytest.raises(UserError) as caught:
        load(config(tmp_path / "rows.csv"))
    assert "rows.csv" in str(caught.value) and expected in str(caught.value) and "\n" not in str(caught.value)
