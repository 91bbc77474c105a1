"""Step 2: HTML tags, entities and mojibake out of captions. Line breaks and punctuation stay."""

from __future__ import annotations

import html
import re
from functools import lru_cache

import pyarrow as pa

from training.data.prepare.config import PrepareConfig
from training.data.prepare.shard import Refusal, Refusals, texts, with_texts

_NAMES = (
    "a abbr address article aside audio b base bdi bdo big blockquote body br button canvas caption center cite code "
    "col dd del details dfn div dl dt em embed fieldset figcaption figure font footer form frame h1 h2 h3 h4 h5 h6 "
    "head header hr html i iframe img input ins kbd label legend li link main map mark meta nav noscript object ol "
    "option p param picture pre q s samp script section select small source span strike strong style sub summary sup "
    "svg table tbody td template textarea tfoot th thead time title tr tt u ul var video wbr"
)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"'<>]+)"""
_ATTRIBUTES = rf"(?:\s+[\w:-]+\s*=\s*{_VALUE}|\s+(?:controls|disabled|checked|hidden|async|defer|loop|muted))*"
# a known element, with attributes that have values: "5 < 6", "<3", "a<b and c>d" and "<smile>" are none
_TAG = re.compile(
    rf"</?(?:{_NAMES.replace(' ', '|')}){_ATTRIBUTES}\s*/?>|<!--.*?-->|<!doctype[^<>]*>", re.DOTALL | re.IGNORECASE
)
_ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});")
_BREAKING = re.compile(
    r"<\s*(?:br|/?p|/?div|/?li|/?tr|/?h[1-6]|/?ul|/?ol|/?table|/?blockquote)\b[^<>]*>", re.IGNORECASE
)
_SPACES = re.compile(r"[^\S\n]+")


def clean(batch: pa.Table, config: PrepareConfig, refused: Refusals) -> tuple[pa.Table, Refusals]:
    """Captions without markup; a further caption that is empty afterwards is dropped, a main one refuses its row."""
    more: Refusals = {}
    cleaned = []
    for row, captions in enumerate(texts(batch)):
        own = [cleaned_caption(caption) for caption in captions]
        if own and not own[0] and row not in refused:
            more[row] = Refusal("markup", "empty", f"nothing but markup: {captions[0][:200]!r}")
        cleaned.append(list(dict.fromkeys(caption for i, caption in enumerate(own) if caption or not i)))
    return with_texts(batch, cleaned), more


@lru_cache(maxsize=4096)
def cleaned_caption(caption: str) -> str:
    """A caption without tags, entities and mojibake, its runs of spaces made one; "" where nothing else was in it."""
    text = mended(caption)
    if _ENTITY.search(text) and not _TAG.search(text):
        text = html.unescape(text)  # "&lt;b&gt;" becomes a tag, which goes below
    if _TAG.search(text):
        text = _without_tags(text)
    lines = (_SPACES.sub(" ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line) if text != caption else caption.strip()


def mended(text: str) -> str:
    """Mojibake, and broken control characters, undone; quotes, ligatures and full-width letters as they were."""
    import ftfy

    if text.isascii() and text.isprintable():
        return text
    return ftfy.fix_text(
        text,
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        normalization="NFC",
    )


def _without_tags(text: str) -> str:
    from selectolax.lexbor import LexborHTMLParser

    marked = _BREAKING.sub("\n", text)
    # a "<" that begins no tag is text, which a parser might take for one
    tags = [match.span() for match in _TAG.finditer(marked)]
    escaped, end = [], 0
    for start, stop in [*tags, (len(marked), len(marked))]:
        escaped += [marked[end:start].replace("<", "&lt;"), marked[start:stop]]
        end = stop
    body = LexborHTMLParser("".join(escaped))
    body.strip_tags(["script", "style", "noscript", "template", "head"], recursive=True)
    return body.text(deep=True, separator="") if body.root is not None else ""
