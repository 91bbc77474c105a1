"""The emoji recipe's builder: on a drawn clone of noto-emoji, and on the installed font against HarfBuzz's shaping."""

import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from sd_mini.config import command
from sd_mini.data.captioned import DataConfig, load
from tests.support.system import missing
from training.data import emoji as build

# 20 files: single code points, a keycap, a skin tone, a joined sequence; five of the test split
STEMS = [
    *("1f600", "1f601", "1f602", "1f603", "1f604", "1f605", "1f606", "1f607", "2764", "1f680", "1f308", "1f30b"),
    *("0023_20e3", "1f44b_1f3fb", "1f469_200d_1f680"),
    *("2648", "264b", "1f41c", "1f371", "1f98b"),
]


def drawn(i: int, size=(128, 128)) -> Image.Image:
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((10 + i, 20, 100, 110), fill=(10 * i, 255 - 10 * i, 99, 200))
    return image


def character_of(stem: str) -> str:
    return "".join(chr(int(point, 16)) for point in stem.split("_"))


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "noto-emoji" / "png" / "128"
    folder.mkdir(parents=True)
    for i, stem in enumerate(STEMS):
        drawn(i).save(folder / f"emoji_u{stem}.png")
    return tmp_path / "noto-emoji"


def rows(folder) -> dict[str, dict]:
    """emoji => its row, with the split's name added."""
    found = {}
    for split in ("train", "test"):
        for row in pq.read_table(folder / f"{split}.parquet").to_pylist():
            assert row["emoji"] not in found
            found[row["emoji"]] = row | {"split": split}
    return found


def picture(row) -> Image.Image:
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    assert image.mode == "RGBA" and image.size == (128, 128) and image.format == "PNG"
    return image


def run(*argv) -> int:
    return command(build.main, [str(word) for word in argv])


def test_a_clone_becomes_two_splits(clone, tmp_path, capsys):
    assert run("--from", clone, "--out", tmp_path / "deep" / "out") == 0
    found = rows(tmp_path / "deep" / "out")
    assert len(found) == 20
    assert sorted(path.name for path in (tmp_path / "deep").rglob("*")) == ["out", "test.parquet", "train.parquet"]
    for i, stem in enumerate(STEMS):
        character = character_of(stem)
        assert (np.asarray(picture(found[character])) == np.asarray(drawn(i))).all()
        assert found[character]["image"]["path"] == f"emoji_u{stem}.png"
        first = int(hashlib.sha256(character.encode()).hexdigest(), 16) / 2**256
        assert found[character]["split"] == ("test" if first < 300 / 3543 else "train")
    texts = {row["text"]: row["aliases"] for row in found.values()}
    assert texts["keycap #"] == ["hash"] and texts["grinning face"] == ["grinning"]
    assert {"waving hand light skin tone", "woman astronaut", "red heart"} <= texts.keys()
    assert "20 pictures, 15 in train.parquet and 5 in test.parquet" in capsys.readouterr().out


def test_what_cannot_be_used_is_counted(clone, tmp_path, capsys):
    for stem in ("1f1eb_1f1f7", "f0000", "not_hex"):
        shutil.copy(clone / "png/128/emoji_u1f600.png", clone / f"png/128/emoji_u{stem}.png")
    assert run("--from", clone, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert len(rows(tmp_path / "out")) == 20
    assert "1 files whose name is not code points" in printed and "1 pictures that have no name in emoji" in printed


def test_other_sizes_are_centred(clone, tmp_path):
    wide, small = drawn(3, (136, 128)), drawn(4, (100, 120))
    wide.save(clone / "png/128/emoji_u1f600.png")
    small.save(clone / "png/128/emoji_u1f601.png")
    assert run("--from", clone, "--out", tmp_path / "out") == 0
    found = rows(tmp_path / "out")
    assert (np.asarray(picture(found["😀"])) == np.asarray(wide)[:, 4:132]).all()
    padded = np.pad(np.asarray(small), ((4, 4), (14, 14), (0, 0)))
    assert (np.asarray(picture(found["😁"])) == padded).all()


def test_the_data_room_reads_what_was_built(clone, tmp_path, monkeypatch):
    monkeypatch.setattr(build.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert run("--from", clone, "--out", tmp_path / "out") == 0
    train = load(DataConfig(source=str(tmp_path / "out"), aliases_column="aliases", resolution=16))
    test = load(DataConfig(source=str(tmp_path / "out"), aliases_column="aliases", resolution=16, split="test"))
    assert (len(train), len(test)) == (15, 5)
    assert all(names[0] for names in train.captions + test.captions)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda clone: shutil.rmtree(clone / "png"), "no pictures emoji_u*.png in"),
        (lambda clone: shutil.rmtree(clone), "no such file or folder"),
        (lambda clone: (clone / "png/128/emoji_u1f600.png").write_bytes(b"hello"), "not a readable PNG"),
        (lambda clone: [p.unlink() for p in (clone / "png/128").glob("*[!0].png")], "too few for two splits"),
    ],
)
def test_wrong_sources_leave_nothing_behind(clone, tmp_path, capsys, spoil, expected):
    spoil(clone)
    assert run("--from", clone, "--out", tmp_path / "place" / "out") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: --from: ") and expected in errors and errors.count("\n") == 1
    assert not list((tmp_path / "place").rglob("*"))


def test_a_failure_while_writing_leaves_nothing_behind(clone, tmp_path, monkeypatch):
    written = []

    def full_disk(dataset, path):
        written.append(path)
        if len(written) == 2:
            raise OSError("no space left on device")
        path.write_bytes(b"half")

    monkeypatch.setattr(build.datasets.Dataset, "to_parquet", full_disk)
    with pytest.raises(OSError, match="no space left"):
        build.main(["--from", str(clone), "--out", str(tmp_path / "place" / "out")])
    assert len(written) == 2 and not list((tmp_path / "place").iterdir())


def test_an_existing_folder_and_a_font_without_bitmaps_are_refused(clone, tmp_path, capsys):
    assert run("--from", clone, "--out", clone) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "some.ttf").write_bytes(b"hello")
    assert run("--from", tmp_path / "some.ttf", "--out", tmp_path / "out") == 2
    assert "is not a font with colour bitmaps" in capsys.readouterr().err


def installed_font() -> Path:
    try:
        return build._find_font()
    except ValueError as error:
        missing(str(error))


@pytest.fixture(scope="module")
def from_font(tmp_path_factory):
    """Every eighth named emoji and those of the clone, built from the font: packing all PNGs takes ten seconds."""
    installed_font()
    named = build.names()
    some = set(list(named)[::8]) | {character_of(stem) for stem in STEMS}
    out = tmp_path_factory.mktemp("emoji") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "names", lambda: {character: named[character] for character in some})
        assert run("--from", "font", "--out", out) == 0
    return rows(out)


def test_the_font_has_thousands_of_named_pictures():
    installed_font()
    found, named = build._from_font("font"), build.names()
    assert len(found) > 3000
    assert not any("\ufe0f" in character for character in found)
    assert len({named[character][0] for character in found}) == len(found)
    assert 0.07 < sum(map(build.is_test, found)) / len(found) < 0.1


def test_font_and_clone_split_and_name_alike(from_font, clone, tmp_path):
    assert run("--from", clone, "--out", tmp_path / "out") == 0
    for character, row in rows(tmp_path / "out").items():
        other = from_font[character]
        assert [row[key] for key in ("split", "text", "aliases")] == [
            other[key] for key in ("split", "text", "aliases")
        ]


@pytest.mark.parametrize("joined", [False, True])
def test_the_font_s_pictures_are_what_harfbuzz_draws(from_font, joined):
    if joined and not features.check("raqm"):
        missing("Pillow finds no FriBiDi, without which it cannot join sequences: apt-get install libfribidi0")
    engine = ImageFont.Layout.RAQM if joined else ImageFont.Layout.BASIC
    font = ImageFont.truetype(installed_font(), 109, layout_engine=engine)  # 109: its only size
    characters = [character for character in from_font if (len(character) > 1) == joined]
    assert len(characters) > 100
    for character in characters[::4]:
        paper, mask = (Image.new("RGBA", (300, 300), colour) for colour in ("white", (0, 0, 0, 0)))
        for canvas in (paper, mask):
            ImageDraw.Draw(canvas).text((60, 60), character, font=font, embedded_color=True)
        theirs = np.asarray(paper.convert("RGB").crop(mask.getbbox()))
        ours = picture(from_font[character])
        white = Image.alpha_composite(Image.new("RGBA", ours.size, "white"), ours)
        ours = np.asarray(white.convert("RGB").crop(ours.getbbox()))
        assert ours.shape == theirs.shape, character
        # FreeType multiplies by alpha and Pillow divides again, which rounds
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2, character
