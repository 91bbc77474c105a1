"""A share of the data held out by what its pictures show."""

import argparse
import io

import numpy as np
import pytest
import yaml
from PIL import Image, ImageEnhance, ImageOps

from eval.data_options import asked_data, recorded_data
from sd_mini.config import check
from sd_mini.data.captioned import DataConfig, ValidConfig, load
from sd_mini.data.near import is_near, near_pairs, picture_hashes, uniform_of
from sd_mini.data.parts import filled, load_captioned, load_pictures, resolved
from sd_mini.errors import UserError


def drawing(seed: int, side: int = 64) -> Image.Image:
    """A smooth random picture: no two are alike."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def jpeg(image: Image.Image) -> Image.Image:
    image.save(file := io.BytesIO(), "JPEG", quality=50)
    return Image.open(file)


CHANGES = {
    "jpeg": jpeg,
    "smaller": lambda image: image.resize((40, 40), Image.Resampling.LANCZOS),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.04),
    "mirrored": ImageOps.mirror,
}


def same_size(image: Image.Image) -> np.ndarray:
    return array(image.resize((32, 32), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("change", CHANGES)
def test_near_duplicates_are_found_and_others_are_not(change):
    originals = [drawing(seed) for seed in range(60)]
    hashes = np.stack([picture_hashes(image.convert("RGB")) for image in originals])
    changed = [CHANGES[change](image) for image in originals]
    pairs = near_pairs(np.stack([picture_hashes(image.convert("RGB")) for image in changed]), hashes)
    near = [
        (m, n) for m, n, is_mirrored in pairs if is_near(same_size(changed[m]), same_size(originals[n]), is_mirrored)
    ]
    assert all(m == n for m, n in near) and len(near) >= 57  # of 60


def test_a_mirror_image_has_the_same_number():
    hashes = np.stack([picture_hashes(drawing(3)), picture_hashes(ImageOps.mirror(drawing(3)))])
    assert hashes[0, 0] == hashes[1, 1] and hashes[0, 1] == hashes[1, 0]
    assert len(set(uniform_of(hashes))) == 1


def test_the_numbers_are_uniform():
    values = np.sort(uniform_of(np.random.default_rng(0).integers(0, 2**63, (4000, 2), dtype=np.uint64)))
    assert np.abs(values - (np.arange(4000) + 0.5) / 4000).max() < 0.0215  # Kolmogorov-Smirnov at 5 %


@pytest.fixture
def folder(tmp_path):
    grow(tmp_path, range(150))
    return tmp_path


def grow(folder, seeds):
    for seed in seeds:
        drawing(seed).save(folder / f"{seed:04}.png")
        (folder / f"{seed:04}.txt").write_text(f"picture {seed}")


def sides_of(folder, **fields) -> tuple[set[str], set[str]]:
    data = DataConfig(source=str(folder), resolution=16)
    train, valid = load_captioned(data, ValidConfig(share=0.2, **fields))
    return ({captions[0] for captions in part.captions} for part in (train, valid))


def test_growing_data_never_moves_a_row_across(folder):
    train, valid = sides_of(folder)
    assert len(train) + len(valid) == 150 and 15 <= len(valid) <= 45  # 30 +- 3 standard deviations
    grow(folder, range(150, 230))
    more_train, more_valid = sides_of(folder)
    assert train <= more_train and valid <= more_valid


def test_a_near_duplicate_is_never_on_the_other_side(folder, capsys):
    _, valid = sides_of(folder)
    for caption in sorted(valid):
        seed = int(caption.split()[1])
        for number, change in enumerate(CHANGES.values()):
            change(drawing(seed)).convert("RGB").save(folder / f"near-{seed}-{number}.png")
            (folder / f"near-{seed}-{number}.txt").write_text(f"near {seed}")
    train, valid = sides_of(folder)
    on_both = {caption.split()[1] for caption in train} & {caption.split()[1] for caption in valid}
    assert len(on_both) <= 1  # of about 30 originals with 4 copies each
    assert "held-out rows show what training rows show" in " ".join(capsys.readouterr().err.split())


def test_both_sides_are_one_cache_and_evaluations_read_the_same_side(folder, tmp_path_factory):
    cache, data = tmp_path_factory.mktemp("cache"), DataConfig(source=str(folder), resolution=16)
    train, valid = load_pictures(data, ValidConfig(), cache)
    own, held_out = resolved(data, ValidConfig())
    assert load(own, folder=cache).pictures_fingerprint == train.pictures_fingerprint
    assert load(held_out, folder=cache).pictures_fingerprint == valid.pictures_fingerprint
    assert len(list(cache.iterdir())) == 1
    assert valid.name == f"{folder.name}:train (valid)"


def test_fields_that_are_left_out_are_those_of_the_data():
    data = DataConfig(source="a", split="x", resolution=16, image_column="i", text_column="t", count=7)
    own, held_out = resolved(data, ValidConfig())
    assert (own.side, held_out.side) == ("train", "valid") and held_out == own.model_copy(update={"side": "valid"})
    own, other = resolved(data, ValidConfig(source="b", split="test"))
    assert own == data and other == data.model_copy(update={"source": "b", "split": "test", "count": None})
    world = DataConfig(count=9, resolution=32)
    assert resolved(world, ValidConfig())[1] == world.model_copy(update={"split": "test", "count": None})
    again = check(ValidConfig, ValidConfig(share=0.1).model_dump(), "a resolved config")
    assert resolved(data, again)[1].share == 0.1


def test_a_split_without_its_source_and_a_share_that_holds_nothing_out_are_refused(folder):
    with pytest.raises(UserError, match=r"valid.split 'test'.*give valid.source too"):
        resolved(DataConfig(source=str(folder)), ValidConfig(split="test"))
    with pytest.raises(UserError, match=r"valid.share 1e-06: of 150 rows .* 0 are held out"):
        load_pictures(DataConfig(source=str(folder), resolution=8), ValidConfig(share=1e-6))


def test_a_share_is_of_the_data_as_they_are(folder):
    data = DataConfig(source=str(folder), resolution=16)
    with pytest.raises(UserError, match=r"valid.max_bad 0.5: where valid.source is left out"):
        resolved(data, ValidConfig(max_bad=0.5))
    train, valid = load_pictures(data, ValidConfig(share=0.2, count=5, max_bad=data.max_bad))
    assert len(valid) == 5 and len(train) > 100


def test_null_is_said_of_another_source_and_kept_when_saved():
    data = DataConfig(source="a", template="a photo of {label}", streaming=True)
    valid = check(ValidConfig, {"source": "b", "template": None}, "test")
    for one in (valid, check(ValidConfig, yaml.safe_load(valid.to_yaml()), "saved"), filled(data, valid)):
        _, other = resolved(data, one)
        assert other.template is None and other.text_column == "text" and not other.streaming
    _, same = resolved(data, ValidConfig(source="b"))
    assert same.template == data.template


def test_an_evaluation_of_another_split_reads_all_of_it(folder, tmp_path_factory):
    stage = tmp_path_factory.mktemp("run") / "noise_predictor"
    stage.mkdir()
    config = {"data": {"source": str(folder)}, "valid": {"share": 0.1}}
    (stage / "config.yaml").write_text(yaml.safe_dump(config))
    recorded = recorded_data(stage)
    own = asked_data(argparse.Namespace(data=None, split=None), recorded, "valid", "test")
    assert (own.side, own.share) == ("valid", 0.1)
    other = asked_data(argparse.Namespace(data=None, split="test"), recorded, "valid", "test")
    assert (other.side, other.split) == ("all", "test")
