"""The rules of steps 1 to 3, row by row."""

import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFilter

from sd_mini.errors import UserError
from training.data.prepare import harmful, quality
from training.data.prepare.config import HarmfulConfig, PrepareConfig, QualityConfig
from training.data.prepare.markup import cleaned_caption


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("<p>A <b>red</b> car</p>", "A red car"),
        ("one<br>two<br/>three", "one\ntwo\nthree"),
        ('<a href="http://x.org?a=1&b=2">a cat</a> &amp; a dog', "a cat & a dog"),
        ("&lt;i&gt;a cat&lt;/i&gt;", "a cat"),
        ("a cat<script>alert('x < y')</script> sleeps", "a cat sleeps"),
        ("a cat <!-- not shown --> sleeps", "a cat sleeps"),
        ("5 < 6 and 7 > 2", "5 < 6 and 7 > 2"),
        ("I <3 cats; a<b and c>d", "I <3 cats; a<b and c>d"),
        ("<b>5 < 6</b>", "5 < 6"),
        ("x &lt; y", "x < y"),
        ("AT&T; R&D", "AT&T; R&D"),
        ("cafÃ© â€œhereâ€\x9d", "café “here”"),
        ("“curly” — ﬁne … ½ １２", "“curly” — ﬁne … ½ １２"),
        ("first line\nsecond:  two  spaces", "first line\nsecond:  two  spaces"),
        ("line\r\nline", "line\nline"),
        ("日本語の猫", "日本語の猫"),
        ("<smile> says <end>", "<smile> says <end>"),
        ("<p></p>&nbsp;", ""),
    ],
)
def test_markup(caption, expected):
    assert cleaned_caption(caption) == expected
    assert cleaned_caption(expected) == expected


@pytest.mark.parametrize(
    "caption", ["hard PORN scene", "ｐｏｒｎ", "<b>por</b>n", "p&#111;rn!", "child\nporn", "gang-bang"]
)
def test_harmful_words_are_found_in_disguise(caption):
    assert harmful.word_pattern(HarmfulConfig()).search(harmful.normalised(caption))


@pytest.mark.parametrize(
    "caption", ["a popcorn machine", "Scunthorpe", "a cocktail", "sextant on a map", "pornic, france"]
)
def test_words_are_whole(caption):
    assert not harmful.word_pattern(HarmfulConfig()).search(harmful.normalised(caption))


def test_a_user_s_terms(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# ours\nＢＡＤ thing\n")
    pattern = harmful.word_pattern(HarmfulConfig(words=file, builtin_words=False))
    assert pattern.search(harmful.normalised("a Bad  Thing")) and not pattern.search("porn")
    assert harmful.word_pattern(HarmfulConfig(builtin_words=False)) is None


def bright(pictures, captions):
    return pictures.mean((1, 2, 3)) > 128


def broken(pictures, captions):
    return np.zeros(len(pictures) + 1)


def batch(levels, side=8):
    pictures = [np.full((3, side, side), level, np.uint8).tobytes() for level in levels]
    captions = [["a plain picture"]] * len(levels)
    return pa.table({"captions": captions, "model_picture": pa.array(pictures, pa.binary(3 * side * side))})


def config(classifier):
    return PrepareConfig.model_validate({"harmful": {"classifier": classifier, "resolution": 16}})


def test_a_classifier_of_one_s_own_skips_what_is_refused():
    refused = {2: "by an earlier step"}
    _, more = harmful.clean(batch([0, 200, 255, 250]), config(f"module:{__name__}:bright"), refused)
    assert {row: refusal.reason for row, refusal in more.items()} == {1: "picture", 3: "picture"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nudenet", "safety"),
        ("module:no.such:thing", "cannot be imported"),
        ("mine", "expected nudenet or module:"),
        (f"module:{__name__}:broken", "expected a boolean or a probability for each"),
    ],
)
def test_a_classifier_that_cannot_be_used_is_named(name, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)  # as where the package is not installed
    with pytest.raises(UserError, match=message):
        harmful.clean(batch([0]), config(name), {})


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("IMG_0001", "camera_name"), ("DSC00412.JPG", "camera_name"), ("IMG-20240101-WA0003", "camera_name"),
        ("DSCF-1", "camera_name"), ("img of a cat", None), ("photo 3 of a cat", None),
        ("my holiday.png", "file_name"), ("b2c7.jpeg", "file_name"), ("a cat. A dog", None), ("ends with png", None),
        ("https://example.org/a b", None), ("http://example.org/cat", "address"), ("www.example.org", "address"),
        ("example.org/cats/1", "address"), ("Untitled 3", "placeholder"), ("a photo", None), ("Photo", "placeholder"),
        ("...", "no_words"), ("☀️", "no_words"), ("7", None), ("猫", None),
    ],
)  # fmt: skip
def test_boilerplate(caption, reason):
    fault = quality.caption_fault(QualityConfig(), caption)
    assert (fault and fault[0]) == reason
    assert quality.caption_fault(QualityConfig(boilerplate=False), caption) is None


@pytest.mark.parametrize(
    ("caption", "scripts", "is_kept"),
    [
        ("a small cat in Москва", ["latin"], True),
        ("чёрная кошка in a box", ["latin"], False),
        ("кошка", ["latin", "cyrillic"], True),
        ("日本語の猫", ["han", "hiragana"], True),
        ("日本語の猫", ["latin"], False),
        ("１２３ !", ["latin"], True),
    ],
)
def test_languages_by_script(caption, scripts, is_kept):
    fault = quality.caption_fault(QualityConfig(languages=scripts), caption)
    assert (fault is None) == is_kept


def test_limits_of_pictures():
    own = QualityConfig(min_side=32, max_aspect=3)
    assert quality.picture_fault(own, 32, 96, 50, 50) is None
    assert quality.picture_fault(own, 31, 60, 50, 50) == ("too_small", "31 x 60 px")
    assert quality.picture_fault(own, 32, 97, 50, 50) == ("aspect", "32 x 97 px")
    off = QualityConfig(min_side=0, max_aspect=0, min_contrast=0, min_sharpness=0)
    assert quality.picture_fault(off, 1, 900, 0, 0) is None


def test_sharpness_is_the_variance_of_the_laplacian():
    from scipy.ndimage import laplace

    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 256, (40, 70), dtype=np.uint8))
    expected = laplace(np.asarray(grey, np.float64))[1:-1, 1:-1].var()
    assert quality.sharpness(grey.convert("RGB")) == pytest.approx(expected)
    blurred = grey.convert("RGB").filter(ImageFilter.GaussianBlur(6))
    assert quality.sharpness(blurred) < QualityConfig().min_sharpness


def test_sharpness_does_not_depend_on_the_size():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    large, larger = (picture.resize((side, side), Image.Resampling.BICUBIC) for side in (256, 1024))
    assert quality.sharpness(quality.scaled_grey(large)) == pytest.approx(
        quality.sharpness(quality.scaled_grey(larger)), rel=0.1
    )


def test_contrast_counts_colours_of_one_brightness():
    small = np.zeros((2, 24, 24, 3), np.uint8)
    small[0, :, :12], small[0, :, 12:] = (200, 0, 0), (0, 102, 0)
    assert quality.contrasts(small).tolist() == [100.0, 0.0]
