"""WebDataset tars: what is read of them, and which are refused."""

import io
import json
import multiprocessing
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from sd_mini import images
from sd_mini.data.captioned import DataConfig, load
from sd_mini.data.sources import open_source
from sd_mini.data.tars import expand_braces
from sd_mini.errors import UserError

SIDE = 8


def encoded(shade: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (shade, shade, shade)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members, **options):
    """Members in this order: bytes, or a TarInfo for what is no plain file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            else:
                archive.addfile(entry)
    return path


def config(source, **fields) -> DataConfig:
    return DataConfig(source=str(source), resolution=SIDE, **fields)


def shades(loaded) -> list[int]:
    return loaded.pictures[:, 0, 0, 0].tolist()


def refused(settings, pattern) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        load(settings)
    assert "\n" not in str(caught.value)


def four(folder):
    """Two shards of two samples: captions in .txt, in .json's `caption` and `text`."""
    first, second = [("a.png", encoded(1)), ("a.txt", b"one")], [("b.txt", b"two"), ("b.png", encoded(2))]
    write_tar(folder / "00000.tar", [*first, *second])
    third, fourth = json.dumps({"caption": "three", "width": 8}), json.dumps({"text": "four", "caption": "no"})
    write_tar(folder / "00001.tar", [("c.webp", encoded(3, "WEBP")), ("c.json", third.encode()),
                                     ("d.jpg", encoded(4, "JPEG")), ("d.json", fourth.encode())])  # fmt: skip
    return folder


def test_tars_of_every_spelling_are_the_same_rows(tmp_path, monkeypatch):
    folder = four(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    for source in (folder, f"{folder}/{{00000..00001}}.tar", "set/0000{0,1}.tar"):
        loaded, table = load(config(source)), open_source(config(source), "data")
        assert shades(loaded) == [1, 2, 3, 4]
        assert loaded.captions == [["one"], ["two"], ["three"], ["four"]]
        assert [table.id(i) for i in range(4)] == ["00000.tar/a", "00000.tar/b", "00001.tar/c", "00001.tar/d"]
    assert load(config(folder / "00001.tar")).captions == [["three"], ["four"]]
    assert load(config(folder / "00001.tar", split="00001")).name == "00001.tar"


def test_tars_have_the_splits_of_their_names(tmp_path):
    for name in ("train-000", "train-001", "val-000"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", encoded(len(name))), (f"{name}.txt", name.encode())])
    assert len(load(config(tmp_path))) == 2
    assert load(config(tmp_path, split="valid")).captions == [["val-000"]]
    refused(config(tmp_path, split="test"), r"data.split: .* no split 'test'; it has train, val-000|it has train, val")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_accented_names_are_read(tmp_path, form):
    key = "/".join(["a" * 60, "b" * 60, "caf\u00e9"])
    write_tar(tmp_path / "x.tar", [(f"{key}.png", encoded(7)), (f"{key}.txt", "\ufeffa cup".encode())], format=form)
    table = open_source(config(tmp_path / "x.tar"), "data")
    assert table.id(0) == f"x.tar/{key}" and table.text(0, "text") == "a cup"
    assert load(config(tmp_path / "x.tar")).captions == [["a cup"]]


def test_a_sample_with_two_pictures_asks_which_is_meant(tmp_path, capsys):
    members = [("a.jpg", encoded(1, "JPEG")), ("a.seg.png", encoded(2)), ("a.png", encoded(3)), ("a.txt", b"one")]
    path = write_tar(tmp_path / "x.tar", [*members, ("b.txt", b"no picture"), ("._a.png", b"junk")])
    assert shades(load(config(path, image_column="png"))) == [3]
    assert "left out 1 of the tars' files, whose keys have no picture" in capsys.readouterr().err
    refused(config(path), r"\(x.tar/a\): it has 2 pictures, \.jpg, \.png; name one as the image_column, as jpg")


def test_rows_are_read_in_any_order_by_threads_and_by_a_forked_process(tmp_path):
    members = [pair for i in range(40) for pair in ((f"{i:02}.png", encoded(i)), (f"{i:02}.txt", str(i).encode()))]
    table = open_source(config(write_tar(tmp_path / "x.tar", members)), "data")

    def shade(row):
        return int(images.decode(table.picture(row, "image"))[0, 0, 0])

    rows = [*range(39, -1, -1)] * 5
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(shade, rows)) == rows
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put([shade(row) for row in (31, 2)]))
    process.start()
    assert queue.get(timeout=60) == [31, 2]
    process.join()


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "set/../../a.png"])
def test_a_path_that_climbs_out_is_refused(tmp_path, name):
    path = write_tar(tmp_path / "x.tar", [("ok.png", encoded(1)), (name, encoded(2))])
    refused(config(path), f"^data.source: .*x.tar: its member '{re.escape(name)}' climbs out of the tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    entry = tarfile.TarInfo("a.png")
    entry.type, entry.linkname = kind, "/etc/passwd"
    refused(config(write_tar(tmp_path / "x.tar", [("a.png", entry)])), r"its member 'a.png' is (a link|no plain file)")


def test_a_tar_that_is_cut_anywhere_is_named_with_its_offset(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", encoded(1)), ("a.txt", b"one"), ("b.png", encoded(2))])
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1].offset_data + 512
    for size in (end - 700, end - 1, end, end + 100):  # in a header, in a picture, before the end's two empty blocks
        path.write_bytes(whole[:size])
        refused(config(path), rf"x.tar: is cut short or damaged: its last whole member ends at byte [\d,]+ of {size:,}")
    damaged = bytearray(whole)
    damaged[1024:1100] = b"x" * 76  # the second header
    path.write_bytes(damaged)
    refused(config(path), "x.tar: is cut short or damaged: its last whole member ends at byte 1,024")
    for content in (b"", b"hello", b"\x1f\x8b" + whole):
        path.write_bytes(content)
        refused(config(path), "x.tar: is (no plain tar|cut short)")


def test_what_cannot_be_read_at_random_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(config("pipe:curl http://a/b.tar"), "would run a command; expected the path of tars")
    refused(config("set.tar.gz"), "is compressed")
    refused(config("lost.tar"), "'lost.tar': no such file or folder")
    write_tar(tmp_path / "a-0.tar", [("a.png", encoded(1))])
    refused(config("a-{0..7}.tar"), "no such file: a-1.tar, a-2.tar, a-3.tar, a-4.tar, a-5.tar, and 2 more")
    refused(config("a-{0,0}.tar"), "names a-0.tar twice")
    twice = write_tar(tmp_path / "twice.tar", [("a.png", encoded(1)), ("a.PNG", encoded(2))])
    refused(config(twice), "holds a.png twice")


def test_captions_that_cannot_be_read_are_named_by_their_key(tmp_path):
    bad = {"a.json": b"[1]", "b.json": b"{", "c.txt": b"caf\xe9", "d.json": b'{"width": 3}', "e.json": b'{"text": 5}'}
    members = (
        [(f"{key}.png", encoded(1)) for key in "abcdefg"] + list(bad.items()) + [("f.txt", b""), ("g.txt", b"fine")]
    )
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError) as caught:
        load(config(path, max_bad=0))
    said = str(caught.value)
    assert "6 of 7 rows" in said and "and 1 more" in said
    for part in ("(x.tar/a): a.json holds", "(x.tar/b): b.json holds", "(x.tar/c): c.txt: is not UTF-8 (byte 3)",
                 "(x.tar/d): it has no 'text'", "(x.tar/e): a caption is a int (5)"):  # fmt: skip
        assert part in said, said


def test_braces():
    assert expand_braces("s-{08..10}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert expand_braces("{a,b}-{9..10}") == ["a-9", "a-10", "b-9", "b-10"]
    assert expand_braces("plain.tar") == ["plain.tar"]
