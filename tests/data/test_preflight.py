"""`sd-mini data SOURCE`: what a source holds, before anything is trained on it."""

import numpy as np
import pytest
from PIL import Image

from sd_mini.cli import main
from sd_mini.data.captioned import DataConfig
from sd_mini.data.decoding import remarks_on
from sd_mini.text_encoder.loading import clip_tokenizer


@pytest.fixture
def folder(tmp_path):
    """Ten pictures: one too small, one too long, two alike, one that cannot be decoded; nine captions, two alike."""
    draw = np.random.default_rng(0)
    for i in range(10):
        side = (20, 90) if i == 3 else (12, 16) if i == 4 else (40, 32)
        cells = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(cells).resize(side, Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture number {i}" if i > 1 else "the very same")
    (tmp_path / "6.png").write_bytes((tmp_path / "5.png").read_bytes())
    (tmp_path / "7.png").write_bytes(b"no picture")
    (tmp_path / "8.txt").write_text(" ")
    return tmp_path


def shown(capsys, *argv) -> str:
    assert main(["data", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_a_source_in_a_few_lines(folder, capsys, tmp_path_factory):
    sheet = tmp_path_factory.mktemp("out") / "sheet.png"
    text = shown(capsys, folder, "--resolution", "16", "--sheet", sheet)
    assert f"{folder.name}:train: 10 rows; columns image, text" in text
    assert "captions: 9, 8 of them different; words from 3 to 3" in text
    assert "most common caption: 'the very same', 2 times" in text
    assert "pictures (9 looked at): 12 to 40 px wide, 16 to 90 px high; width / height from 0.22 to 1.25" in text
    assert "at 16 px: 1 of 9 pictures are smaller than 16 px" in text
    assert "at 16 px: 1 of 9 pictures are longer than 2:1" in text
    assert "at 16 px: 1 of 9 pictures look like another one" in text
    assert "cannot be used, of 10 rows: 1, the first: a caption is empty" in text
    assert "cannot be used, of 10 pictures looked at: 1 x cannot decode" in text and "(row 7, 7.png)" in text
    assert Image.open(sheet).width > 8 * 96 and "contact sheet of 9 rows" in text


def test_tokens_by_a_tokenizer(folder, capsys, tmp_path_factory):
    where = tmp_path_factory.mktemp("tokenizer")
    clip_tokenizer(["picture the very", "number"] * 50, vocab_size=600, max_length=4).save_pretrained(where)
    text = shown(capsys, folder, "--tokenizer", where)
    assert "more than 4, all that are read" in text
    assert "words it breaks up: 1 of" in text and "same = s|a|m|e" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["shapes"], "is drawn, not read"),
        (["NOWHERE"], "which is no file or folder here"),
        (["FOLDER", "--text_colum", "x"], "text_colum"),
        (["FOLDER", "--tokenizer", "NOWHERE"], "--tokenizer NOWHERE: cannot be loaded"),
        (["FOLDER", "--sheet", "sheet.txt"], "use .png"),
        (["FOLDER", "--image_column", "img"], "data.image_column: no column 'img'"),
    ],
)
def test_what_cannot_be_shown_is_one_line(folder, capsys, argv, said):
    assert main(["data", *(str(folder) if word == "FOLDER" else word for word in argv)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error: ") == 1 and "Traceback" not in error


def test_a_training_is_told_what_it_does_to_pictures():
    sizes, hashes = np.array([[64, 64], [63, 200], [130, 64]]), np.array([[1, 2], [2, 1], [5, 6]], np.uint64)
    small, long, alike = remarks_on(sizes, hashes, DataConfig(resolution=64))
    assert "1 of 3" in small and "2 of 3" in long and "1 of 3" in alike
    assert remarks_on(np.array([[64, 128]]), hashes[:1], DataConfig(resolution=64)) == []
