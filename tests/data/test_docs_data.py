"""Every example of docs/data.md reads what it says, from one tiny real source of each kind."""

import re
from pathlib import Path

import pytest
import yaml

from sd_mini.data.captioned import DataConfig, load
from tests.data.test_path_table import URLS, downloads, pictures, write_table
from tests.data.test_sources import arrow_rows
from tests.data.test_tars import encoded, write_tar

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = [yaml.safe_load(block)["data"] for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]
ON_THE_HUB = "uoft-cs/cifar10"
EXPECTED = {
    "described": ["a cat"],
    "captioned": ["one", "two"],
    "classes": ["a photo of an owl", "a photo of a tabby cat"],
    "pets.csv": ["number 0", "number 1", "number 2"],
    "urls.csv": ["number 2", "number 0"],
    "shards": ["0", "1", "2", "3"],
    "pets-{000..001}.tar": ["0", "1"],
}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "described/1.jpg",
        "captioned/1.jpg",
        "captioned/2.jpg",
        "classes/owl/1.jpg",
        "classes/tabby_cat/1.jpg",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(encoded(1, "JPEG"))
    Path("described/metadata.jsonl").write_text('{"file_name": "1.jpg", "text": "a cat"}\n')
    Path("captioned/1.txt").write_text("one")
    Path("captioned/2.txt").write_text("two\n")
    pictures(tmp_path / "there")
    rows = [{"path": f"there/pictures/{i}.png", "caption": f"number {i}"} for i in range(3)]
    write_table(tmp_path / "pets.csv", rows)
    write_table(tmp_path / "urls.csv", [{"url": URLS[i], "text": f"number {i}"} for i in (2, 0)])
    downloads(tmp_path / "pictures", "tar")
    for shard in range(2):
        (tmp_path / "shards").mkdir(exist_ok=True)
        arrow_rows(4).select([2 * shard, 2 * shard + 1]).to_parquet(tmp_path / "shards" / f"{shard}.parquet")
        write_tar(tmp_path / f"pets-00{shard}.tar", [("a.png", encoded(shard)), ("a.txt", str(shard).encode())])


def test_the_examples_of_the_page_read_what_it_says(sources):
    examples = [example for example in EXAMPLES if example["source"] != ON_THE_HUB]
    assert len(examples) == len(EXPECTED) + 2  # a mixture of two of them, and one of them in buckets
    for example in examples:
        captions = [several[0] for several in load(DataConfig(resolution=64, **example)).captions]
        names = (
            [example["source"]] if isinstance(example["source"], str) else [one["source"] for one in example["source"]]
        )
        assert captions == [caption for name in names for caption in EXPECTED[name]]


def test_the_page_s_python_runs(sources, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(code, {})
    assert capsys.readouterr().out == "2 ['image', 'text'] 1.jpg one\n"
