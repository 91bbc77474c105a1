"""Two trainings that fill one cache at the same time."""

import subprocess
import sys

BESIDE = """
import sys, time
from pathlib import Path
import numpy as np
from sd_mini.data import cache
cache.MIN_SHARD_ROWS, folder, own, other = 4, *map(Path, sys.argv[1:])
def encode_rows(rows):
    own.touch()
    while not other.exists():  # so that both have found all shards missing before one of them writes
        time.sleep(0.01)
    return {"x": np.arange(rows.start, rows.stop)}
print(cache.encode(folder, {}, 40, encode_rows, "rows", chunk=2)["x"][np.arange(40)].tolist() == list(range(40)))
"""


def test_two_that_begin_at_once_do_not_spoil_each_other_s_shards(tmp_path):
    marks = [str(tmp_path / "a"), str(tmp_path / "b")]
    argv = [sys.executable, "-c", BESIDE, str(tmp_path / "cache")]
    both = [
        subprocess.Popen([*argv, *order], stdout=subprocess.PIPE, text=True) for order in (marks, list(reversed(marks)))
    ]
    assert [(one.communicate(timeout=120)[0], one.returncode) for one in both] == [("True\n", 0)] * 2
    assert len(list((tmp_path / "cache").glob("*/0????"))) == 10
