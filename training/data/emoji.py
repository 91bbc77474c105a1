"""Noto Color Emoji => train.parquet and test.parquet: captioned 128 x 128 RGBA pictures.

    python -m training.data.emoji --from font --out data/emoji

Columns: `image` (PNG bytes), `text` (the English name), `aliases` (further names) and `emoji` (without the variation
selector U+FE0F, as the picture's file name leaves it out). Pictures come from the colour bitmaps of an installed font
or from a clone of googlefonts/noto-emoji, names from the `emoji` package.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

from sd_mini.cli.arguments import Parser
from sd_mini.config import command
from sd_mini.errors import UserError

try:
    import emoji
    from fontTools.ttLib import TTFont, TTLibError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.name} is not installed; pip install -e '.[emoji]' gives it") from error

SIDE = 128  # px
TEST_SHARE = 300 / 3543  # of the emoji drawn when this was written
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
INSTALL = "apt-get install fonts-noto-color-emoji"

_FEATURES = datasets.Features(
    image=datasets.Image(),
    text=datasets.Value("string"),
    aliases=datasets.List(datasets.Value("string")),
    emoji=datasets.Value("string"),
)


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m training.data.emoji", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--from", dest="source", required=True, help="a clone of noto-emoji, a font file, or `font`: the installed one"
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder for train.parquet and test.parquet")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists already; give a new folder, or remove that one")
    left_out: Counter[str] = Counter()
    source = Path(args.source)
    rows = _rows(_from_clone(source, left_out) if source.is_dir() else _from_font(args.source), left_out)
    _write(rows, args.out)
    tests = sum(is_test(row["emoji"]) for row in rows)
    print(f"{args.out}: {len(rows)} pictures, {len(rows) - tests} in train.parquet and {tests} in test.parquet")
    for reason, number in left_out.items():
        print(f"left out: {number} {reason}")


def is_test(character: str) -> bool:
    """Whether an emoji belongs to the test split: by its own hash, so that every source splits alike."""
    first = hashlib.sha256(character.encode()).digest()[:8]
    return int.from_bytes(first, "big") < TEST_SHARE * 2**64


def names() -> dict[str, tuple[str, list[str]]]:
    """Every emoji of the `emoji` package, without U+FE0F, but for flags of places => its name and further names.

    Flags of places are left out for their names, "France", which are no description of a picture.
    """
    complete = (emoji.STATUS["fully_qualified"], emoji.STATUS["component"])
    return {
        _bare(character): (_words(entry["en"]), [_words(alias) for alias in entry.get("alias", [])])
        for character, entry in emoji.EMOJI_DATA.items()
        if entry["status"] in complete and not _is_flag_of_place(character)
    }


def _is_flag_of_place(character: str) -> bool:
    # two regional indicators (a country), or a black flag with tag letters (England)
    return "\U0001f1e6" <= character[0] <= "\U0001f1ff" or character.endswith("\U000e007f")


def _bare(character: str) -> str:
    return character.replace("\ufe0f", "")


def _words(name: str) -> str:
    return name.strip(":").replace("_", " ")


def _from_clone(clone: Path, left_out: Counter[str]) -> dict[str, Image.Image]:
    """png/128/emoji_u1f600.png, the code points joined by _ => emoji to picture; counts the files left out."""
    folder, pictures = clone / "png/128", {}
    files = sorted(folder.glob("emoji_u*.png"))
    if not files:
        raise UserError(f"--from: no pictures emoji_u*.png in {folder}; give the root of a clone of noto-emoji")
    for file in files:
        try:
            character = "".join(chr(int(point, 16)) for point in file.stem.removeprefix("emoji_u").split("_"))
        except ValueError:
            left_out["files whose name is not code points"] += 1
            continue
        pictures[_bare(character)] = _open(file.read_bytes(), str(file))
    return pictures


def _from_font(source: str) -> dict[str, Image.Image]:
    """A font's largest colour bitmaps (table CBDT) => emoji to picture.

    One code point is found through cmap, a sequence through cmap and then a GSUB ligature of just these glyphs.
    """
    path = _find_font() if source == "font" else Path(source)
    if not path.is_file():
        raise UserError(f"--from: {source}: no such file or folder; give a clone of noto-emoji, a font file, or `font`")
    try:
        font: Any = TTFont(path, lazy=True)
        cmap, strikes = font.getBestCmap(), font["CBDT"].strikeData
    except (TTLibError, KeyError) as error:
        raise UserError(f"--from: {path} is not a font with colour bitmaps (CBDT); {INSTALL} gives one") from error
    sizes = [strike.bitmapSizeTable.ppemY for strike in font["CBLC"].strikes]
    bitmaps, ligatures = strikes[sizes.index(max(sizes))], _ligatures(font)

    pictures = {}
    for character in names():
        glyphs = tuple(cmap.get(ord(point)) for point in character)
        glyph = glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs)
        if glyph in bitmaps:
            pictures[character] = _open(bitmaps[glyph].imageData, f"glyph {glyph} of {path}")
    return pictures


def _find_font() -> Path:
    if FONT.is_file():
        return FONT
    try:
        found = subprocess.run(
            ["fc-match", "--format=%{file}", "Noto Color Emoji"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        found = ""
    if "NotoColorEmoji" not in found:  # fc-match answers with the nearest font when it has not the one asked for
        raise UserError(f"--from font: Noto Color Emoji is not installed; {INSTALL}, or give a font file or a clone")
    return Path(found)


def _ligatures(font: TTFont) -> dict[tuple[str, ...], str]:
    """Sequences of glyph names => the glyph that GSUB puts in their place."""
    found = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            for first, ligatures in getattr(getattr(table, "ExtSubTable", table), "ligatures", {}).items():
                found |= {(first, *ligature.Component): ligature.LigGlyph for ligature in ligatures}
    return found


def _open(data: bytes, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"--from: {where} is not a readable PNG; fetch it again") from error


def _rows(pictures: dict[str, Image.Image], left_out: Counter[str]) -> list[dict]:
    """Emoji to picture => rows of the columns in order of code points; counts the pictures and names left out."""
    known = names()
    left_out["flags of places, whose names describe no picture"] = sum(map(_is_flag_of_place, emoji.EMOJI_DATA))
    left_out[f"names in emoji {emoji.__version__} that have no picture there"] = len(known.keys() - pictures.keys())
    rows = []
    for character, picture in sorted(pictures.items()):
        if _is_flag_of_place(character):
            continue
        if character not in known:
            left_out[f"pictures that have no name in emoji {emoji.__version__}"] += 1
            continue
        text, aliases = known[character]
        path = f"emoji_u{'_'.join(f'{ord(point):04x}' for point in character)}.png"
        image = {"bytes": _png(picture), "path": path}
        rows.append({"image": image, "text": text, "aliases": aliases, "emoji": character})
    return rows


def _png(picture: Image.Image) -> bytes:
    """RGBA of any size => PNG of 128 x 128, centred: cropped where larger (a font's are 136 wide), else padded."""
    left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
    square = picture.crop((left, top, left + SIDE, top + SIDE))  # beyond the picture: transparent
    buffer = io.BytesIO()
    square.save(buffer, format="PNG")
    return buffer.getvalue()


def _write(rows: list[dict], out: Path) -> None:
    """Rows => `out`/train.parquet and test.parquet; the folder appears complete or not at all."""
    splits = {"train": [], "test": []}
    for row in rows:
        splits["test" if is_test(row["emoji"]) else "train"].append(row)
    if not splits["train"] or not splits["test"]:
        raise UserError(f"--from: only {len(rows)} named pictures there, too few for two splits; give a whole set")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        folder = Path(beside) / out.name
        folder.mkdir()
        for split, members in splits.items():
            datasets.Dataset.from_list(members, features=_FEATURES).to_parquet(folder / f"{split}.parquet")
        os.rename(folder, out)


if __name__ == "__main__":
    sys.exit(command(main))
