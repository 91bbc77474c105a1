import numpy as np
import pytest

from training import cache


@pytest.fixture
def encoder(monkeypatch):
    """Rows (i, i^2) and a note of what was asked for, in shards of 5 rows."""
    monkeypatch.setattr(cache, "SHARD_ROWS", 5)
    asked = []

    def encode_rows(rows):
        asked.append((rows.start, rows.stop))
        i = np.arange(rows.start, rows.stop)
        return {"pairs": np.stack([i, i**2], axis=1).astype(np.float16), "even": i % 2 == 0}

    return encode_rows, asked


def test_rows_come_back_from_any_shard_in_any_order(tmp_path, encoder):
    rows = cache.encode(tmp_path, {"a": 1}, 13, encoder[0], "rows", chunk=2)
    ids = np.array([12, 0, 7, 7, 4, 5])
    assert rows["pairs"][ids].tolist() == [[i, i**2] for i in ids]
    assert rows["even"][ids].tolist() == [i % 2 == 0 for i in ids]
    assert len(rows["pairs"]) == 13 and rows["pairs"][ids].dtype == np.float16
    assert encoder[1][:4] == [(0, 2), (2, 4), (4, 5), (5, 7)]


def test_the_same_key_is_read_and_another_is_encoded(tmp_path, encoder):
    encode_rows, asked = encoder
    cache.encode(tmp_path, {"a": 1}, 13, encode_rows, "rows")
    asked.clear()
    assert len(cache.encode(tmp_path, {"a": 1}, 13, encode_rows, "rows")["pairs"]) == 13 and not asked
    cache.encode(tmp_path, {"a": 2}, 13, encode_rows, "rows")
    assert len(asked) == 3


def test_cut_short_it_goes_on_at_the_first_missing_shard(tmp_path, encoder):
    encode_rows, asked = encoder

    def dies(rows):
        if rows.start >= 10:
            raise KeyboardInterrupt
        return encode_rows(rows)

    with pytest.raises(KeyboardInterrupt):
        cache.encode(tmp_path, {}, 13, dies, "rows")
    asked.clear()
    rows = cache.encode(tmp_path, {}, 13, encode_rows, "rows")
    assert asked == [(10, 13)]
    assert rows["pairs"][np.arange(13)][:, 0].tolist() == list(range(13))
