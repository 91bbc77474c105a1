import re

import pytest

from sd_mini.texts import check_text, read_lines, shown, word_twins


def test_attributes_are_exchanged_before_anything_else():
    found = word_twins("a red dog and a blue cat")
    assert "a blue dog and a red cat" in found and "a green dog and a blue cat" in found
    assert all("dog" in twin and "cat" in twin for twin in found)


def test_relations_are_turned_round():
    assert word_twins("a dog above a mat") == ["a dog below a mat"]
    assert "arrow pointing right" in word_twins("arrow pointing left")


def test_other_words_change_places():
    assert word_twins("dog on mat") == ["dog in mat"]
    assert word_twins("dog, mat!") == ["mat, dog!"]
    assert sorted(word_twins("grinning cat face")) == ["cat grinning face", "face cat grinning", "grinning face cat"]


@pytest.mark.parametrize("text", ["cat", "cat cat", "...", "Cat cat"])
def test_words_that_give_no_twin(text):
    assert word_twins(text) == []


def test_a_twin_has_other_words_or_another_order():
    for text in ("Red Circle", "two GREEN stars", "日本 語", "it's a-b"):
        twins = word_twins(text)
        assert text not in twins and len(set(twins)) == len(twins)


def test_words_of_one_meaning_do_not_stand_for_each_other():
    found = word_twins("a big gray dog beside a small huge cat")
    assert not any(re.search(r"\b(large|little|tiny|grey)\b", twin) for twin in found if "big" in twin)
    assert "a small gray dog beside a big huge cat" in found  # exchanged
    assert not any("a large gray" in twin or "a huge gray" in twin for twin in found)


def test_long_texts_take_no_longer():
    assert 0 < len(word_twins("red dog " * 100_000)) < 1000
    assert len(word_twins(" ".join(f"w{i}" for i in range(5000)))) == 64


def test_check_text_names_where():
    with pytest.raises(ValueError, match=r"row 3: a caption has a lone surrogate, U\+DC00, at character 1"):
        check_text("a\udc00", "row 3: a caption")
    check_text("nul \x00 and \u202e bidi", "row 3")


def test_shown_is_one_short_line():
    assert shown("a\nb") == "'a\\nb'" and len(shown("x" * 10**6)) == 80


def test_only_a_newline_ends_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa\u2028b\u0085c\x0cd\re\r\n\nf\n".encode())
    assert read_lines(path) == ["a\u2028b\u0085c\x0cd\re", "", "f"]
    path.write_bytes("a".encode("utf-16"))
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 0xff at position 0\); save it as UTF-8"):
        read_lines(path)
