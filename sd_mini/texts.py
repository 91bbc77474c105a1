"""Texts: how files of them are read, what may be one, and its twin, a text of nearly the same words that says something
else."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from sd_mini.errors import UserError

# words of one class stand for each other, so exchanging two of them, or taking another one, changes an attribute; those
# joined by | mean the same, which would change nothing
_ATTRIBUTES = (
    "red orange yellow green blue purple|violet pink brown black white gray|grey cyan magenta gold silver",
    "small|little|tiny large|big|huge",
    "one two three four five six seven eight nine ten",
    "happy|joyful sad angry sleeping surprised",
    "open closed", "old new|young", "full empty", "light dark", "tall short", "thin thick",
)  # fmt: skip
_OPPOSITES = (
    "left right", "above below", "over under", "up down", "upwards downwards", "top bottom", "before behind",
    "in on", "inside outside", "with without", "north south", "east west", "first last", "near far",
    "upper lower", "front back", "to from", "clockwise counterclockwise", "leftwards rightwards",
)  # fmt: skip
_MEANING = {  # word => (its class, its meaning)
    word: (number, group.index(same))
    for number, group in enumerate(words.split() for words in _ATTRIBUTES)
    for same in group
    for word in same.split("|")
}
_MOST = 64  # words of a text that are looked at, and of its twins in another order
_OPPOSITE: dict[str, str] = {a: b for pair in _OPPOSITES for a, b in (pair.split(), pair.split()[::-1])}
_WORD = re.compile(r"[^\W_]+")


def read_text(path: Path) -> str:
    """A user's text file, UTF-8 with or without a byte-order mark. Raises UserError where it cannot be read as that."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise UserError(f"{path}: is not UTF-8 ({byte}); save it as UTF-8") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a user's text file, without their ends. Raises UserError as `read_text` does.

    Only a newline ends one: U+2028, U+0085 and the like, at which `str.splitlines` cuts, may stand within a caption.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    return lines if lines[-1] else lines[:-1]


def check_text(value: object, where: str) -> None:
    """Raises ValueError, naming `where`, for what no tokenizer reads: no text, nothing in it, half a surrogate pair."""
    if not isinstance(value, str):
        raise UserError(f"{where} is a {type(value).__name__} ({shown(value)}); expected text")
    if not value.strip():
        raise UserError(f"{where} is empty; expected text that describes the picture")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(value[error.start]):04X}"
        raise UserError(
            f"{where} has a lone surrogate, {code}, at character {error.start}; expected text that UTF-8 can write: "
            "read its source as UTF-16, or leave the character out"
        ) from None


def shown(value: object) -> str:
    """A value as a message shows it, cut to one short line."""
    text = repr(value[:100] if isinstance(value, str) else value)  # a megabyte is not to be escaped for its start
    return text if len(text) <= 80 else f"{text[:77]}..."


def printable(text: str) -> str:
    """A text as a terminal may have it: what is not printable, as the characters that terminals obey, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def word_twins(text: str) -> list[str]:
    """Texts that differ from `text` by its own words: first an attribute exchanged with another in it or replaced by
    another of its class, then a relation turned round, then two of its words in each other's place.

    None where the words give none: one word of no known class, or all words alike. Matching is whole words, lower case.
    """
    spans = [match.span() for match in islice(_WORD.finditer(text), _MOST)]
    words = [text[a:b] for a, b in spans]
    found = [*_attribute_swaps(words), *_relation_swaps(words)] or _order_swaps(words)
    twins = [_rebuilt(text, spans, changed) for changed in found]
    return [twin for twin in dict.fromkeys(twins) if twin != text]


def _attribute_swaps(words: list[str]) -> list[list[str]]:
    lower = [word.lower() for word in words]
    meanings = [_MEANING.get(word) for word in lower]
    swaps = []
    for i, own in enumerate(meanings):
        if own is None:
            continue
        fellows = [j for j in range(i) if (met := meanings[j]) is not None and met[0] == own[0] and met != own]
        swaps += [_changed(words, {i: words[j], j: words[i]}) for j in fellows]
        others = [same.split("|")[0] for same in _ATTRIBUTES[own[0]].split()]
        swaps += [_changed(words, {i: w}) for w in others if _MEANING[w] != own and _MEANING[w] not in meanings]
    return swaps


def _relation_swaps(words: list[str]) -> list[list[str]]:
    return [_changed(words, {i: _OPPOSITE[w.lower()]}) for i, w in enumerate(words) if w.lower() in _OPPOSITE]


def _order_swaps(words: list[str]) -> list[list[str]]:
    pairs = ((a, b) for b in range(len(words)) for a in range(b) if words[a].lower() != words[b].lower())
    return [_changed(words, {a: words[b], b: words[a]}) for a, b in islice(pairs, _MOST)]


def _changed(words: list[str], changes: dict[int, str]) -> list[str]:
    return [changes.get(i, word) for i, word in enumerate(words)]


def _rebuilt(text: str, spans: list[tuple[int, int]], words: list[str]) -> str:
    """`text` with its words replaced, everything between them kept."""
    parts, end = [], 0
    for (a, b), word in zip(spans, words, strict=True):
        parts += [text[end:a], word]
        end = b
    return "".join([*parts, text[end:]])


# an underscore parts words, as in tags: looking_left
_SIDE = re.compile(r"(?<![^\W_])(left|right)(?=(?:most|wards?|[-_ ]?hand(?:ed)?|side)?(?![^\W_]))", re.IGNORECASE)


def with_sides_swapped(text: str) -> str:
    """A text of a picture => of its mirror image: left and right, leftmost, right-hand and their like are exchanged."""

    def other(found: re.Match[str]) -> str:
        word = found[0]
        swapped = "right" if word.lower() == "left" else "left"
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE.sub(other, text)
