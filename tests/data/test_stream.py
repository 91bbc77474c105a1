"""Sources that are read as a stream, and connections that are lost while they are read."""

import http.client
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pyarrow.parquet as pq
import pytest

from sd_mini import images
from sd_mini.data import stream
from sd_mini.data.captioned import DataConfig, load
from sd_mini.data.retries import iterate_with_retries, with_retries
from sd_mini.data.sources import open_source
from sd_mini.errors import UserError
from tests.data.test_sources import arrow_rows
from tests.data.test_tars import shades

SIDE = 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def config(source, **fields) -> DataConfig:
    return DataConfig(source=str(source), resolution=SIDE, streaming=True, **fields)


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    names = datasets.ClassLabel(names=["cat", "dog"])
    rows = arrow_rows(6, label=[0, 1, 1, -1, 0, 1], aliases=[["a"], [], None, ["d"], ["e"], ["f"]])
    rows = rows.cast_column("label", names)
    for shard in range(2):
        rows.select(range(3 * shard, 3 * shard + 3)).to_parquet(folder / f"{shard}.parquet")
    return folder


def test_a_stream_of_parquet_is_what_is_read_otherwise(shards, tmp_path):
    plain = config(shards, aliases_column="aliases").model_copy(update={"streaming": False})
    whole, streamed = load(plain), load(config(shards, aliases_column="aliases"))
    assert streamed.fingerprint == whole.fingerprint and shades(streamed) == list(range(6))
    table, other = open_source(config(shards), "data"), open_source(plain, "data")
    assert len(table) == 6 and table.is_streamed and not other.is_streamed and table.columns == other.columns
    assert [table.id(i) for i in range(6)] == [other.id(i) for i in range(6)]
    assert table.source_state() == other.source_state()
    chosen = table.select([1, 4]).pictures("image")
    assert [int(images.decode(one)[0, 0, 0]) for one in chosen] == [1, 4]
    assert load(config(shards, aliases_column="aliases", count=4)).captions == whole.captions[:4]
    labelled = load(config(shards, text_column="label", template="{article} {label}", count=3))
    assert labelled.captions == [["a cat"], ["a dog"], ["a dog"]]
    with pytest.raises(UserError, match=r"row 3 of .*a caption is a NoneType"):
        load(config(shards, text_column="label"))


def test_pictures_of_a_stream_are_read_in_any_order(shards, monkeypatch):
    """By threads in about their order from one reading, going back from another, and in a forked process."""
    monkeypatch.setattr(stream, "_KEPT", 3)
    table = open_source(config(shards), "data")
    starts, read = [], table._rows._pictures
    monkeypatch.setattr(table._rows, "_pictures", lambda column, first: (starts.append(first), read(column, first))[1])

    def shade(row):
        return int(images.decode(table.picture(row, "image"))[0, 0, 0])

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(shade, range(6))) == list(range(6))
    assert len(starts) <= 2 and (shade(5), shade(1), shade(2)) == (5, 1, 2) and starts[-1] == 1
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put([shade(0), shade(4)]))
    process.start()
    assert queue.get(timeout=60) == [0, 4]
    process.join()


def test_a_stream_writes_no_copy_of_the_data(shards, tmp_path):
    load(config(shards))
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_column_of_no_pictures_is_refused(shards):
    with pytest.raises(UserError, match=r"column 'label' of .* as pictures"):
        load(config(shards, image_column="label"))
    with pytest.raises(UserError, match="no column 'picture'; there are image, text"):
        load(config(shards, image_column="picture"))


@pytest.fixture
def on_the_hub(shards, monkeypatch):
    """`datasets`' own parquet reader under a hub name, as there is no hub here."""
    files = [str(path) for path in sorted(shards.iterdir())]
    load_dataset, builder = datasets.load_dataset, datasets.load_dataset_builder

    def named(name, split, **options):
        assert name == "owner/name"
        return load_dataset("parquet", data_files={"train": files}, split=split, **options)

    monkeypatch.setattr(datasets, "load_dataset", named)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder("parquet", data_files={"train": files}))
    return files


def test_a_hub_name_is_streamed_where_the_count_is_known_or_given(on_the_hub):
    with pytest.raises(UserError, match=r"^data.count: 'owner/name' does not tell how many rows .*give data.count"):
        load(config("owner/name"))
    loaded = load(config("owner/name", count=5))
    assert shades(loaded) == list(range(5)) and loaded.captions == [[str(i)] for i in range(5)]
    table = open_source(config("owner/name", count=5), "data")
    assert table.id(3) == "train/3" and len(table.source_state()) == 64
    with pytest.raises(UserError, match=r"'owner/name' ended after 6 of 9 rows; give data.count 6"):
        load(config("owner/name", count=9))
    plain = load(config("owner/name").model_copy(update={"streaming": False}))
    assert shades(plain) == list(range(6))


# connections


class Flaky:
    """An iterator over 0 to 9 whose connection is lost before the given items, as often as each is listed."""

    def __init__(self, *lost, error=ConnectionResetError):
        self.lost, self.error, self.starts = list(lost), error, []

    def __call__(self, start):
        self.starts.append(start)
        for number in range(start, 10):
            if number in self.lost:
                self.lost.remove(number)
                raise self.error("the peer went away")
            yield number


def test_a_lost_connection_is_taken_up_where_it_was_lost(capsys):
    pauses = []
    flaky = Flaky(0, 3, 3, 3, 8)
    assert list(iterate_with_retries(flaky, "'a/b'", pauses.append)) == list(range(10))
    assert flaky.starts == [0, 0, 3, 3, 3, 8] and pauses == [1, 1, 2, 4, 1]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5 and said[2] == "note: 'a/b': the peer went away; trying again in 2 s (2 of 3)"


class Transport(Exception):
    pass


Transport.__name__ = "TransportError"  # as the HTTP clients call it


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, Transport])
def test_a_connection_that_stays_lost_is_named(error):
    pauses = []
    with pytest.raises(UserError, match=r"^'a/b': no connection after 4 tries \(the peer went away\); run the command"):
        list(iterate_with_retries(Flaky(*[5] * 4, error=error), "'a/b'", pauses.append))
    assert pauses == [1, 2, 4]

    def read():
        raise OSError("outer") from error("the peer went away")

    with pytest.raises(UserError, match=r"no connection after 4 tries \(outer\)"):
        with_retries(read, "'a/b'", pauses.append)
    assert pauses == [1, 2, 4, 1, 2, 4]


@pytest.mark.parametrize("error", [FileNotFoundError, ValueError, KeyError])
def test_other_errors_pass_at_once(error):
    with pytest.raises(error):
        list(iterate_with_retries(Flaky(5, error=error), "'a/b'", lambda _: pytest.fail("waited")))


def test_a_stalled_server_is_tried_again(tmp_path):
    """A real one that sends half of a file, thrice, and then all of it."""
    arrow_rows(4).to_parquet(tmp_path / "x.parquet")
    content, served = (tmp_path / "x.parquet").read_bytes(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if len(served) > 3 else content[:100])
            if len(served) <= 3:
                released.wait(5)

        def log_message(self, *_):
            pass

    released = threading.Event()
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def read():
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=0.2)
        connection.request("GET", "/x.parquet")
        return connection.getresponse().read()

    try:
        pauses = []
        body = with_retries(read, "the server", lambda s: (pauses.append(s), released.set(), released.clear()))
    finally:
        released.set()
        server.shutdown()
        server.server_close()
    (tmp_path / "y.parquet").write_bytes(body)
    assert pq.read_metadata(tmp_path / "y.parquet").num_rows == 4 and pauses == [1, 2, 4] and len(served) == 4
