import shutil
from pathlib import Path

import numpy as np
import pytest

from sd_mini.data import cache


def anonymous_mb() -> float:
    """Memory of this process that no file stands behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux, as in CI, tells RssAnon apart")
def test_a_million_rows_take_no_more_memory_than_a_few(tmp_path, monkeypatch):
    """512 MB on disk, removed afterwards, in shards of 128 MB: one of them whole in memory would show."""
    monkeypatch.setattr(cache, "MAX_SHARDS", 4)
    count, columns, random, peak = 1_000_000, np.arange(256, dtype=np.float32), np.random.default_rng(0), []

    def encode_rows(rows):
        peak.append(anonymous_mb())
        return {"x": np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] % 2039 - columns}

    before = anonymous_mb()
    try:
        rows = cache.encode(tmp_path / "cache", {}, count, encode_rows, "rows")["x"]
        for _ in range(200):
            ids = random.integers(0, count, 256)
            drawn = rows[ids]
            peak.append(anonymous_mb())
            assert np.array_equal(drawn, ids[:, None] % 2039 - columns)
        assert rows.rounding.largest == 0  # float16 holds whole numbers up to 2048
    finally:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert max(peak) - before < 64
