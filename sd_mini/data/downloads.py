"""What img2dataset downloaded: URLs => pictures in its numbered folders or tars."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sd_mini.data.file_states import relative_id
from sd_mini.data.folder import list_pictures
from sd_mini.data.tar_index import Tar, TarPicture
from sd_mini.errors import UserError
from sd_mini.images import is_picture

_COLUMNS = ["url", "key", "status"]
_SUCCESS = "success"


def is_url(cell: object) -> bool:
    return isinstance(cell, str) and cell.strip().lower().startswith(("http://", "https://"))


class Downloads:
    """The shards of img2dataset in a folder and in the folders of it: NNNNN.parquet lists URLs and keys, and beside it
    are the pictures, NNNNN/KEY.jpg or NNNNN.tar."""

    def __init__(self, root: Path, shards: list[Path]):
        self._root = root
        self._rows: dict[str, tuple[Path, str, str]] = {}
        for shard in shards:
            columns = pq.read_table(shard, columns=_COLUMNS).to_pydict()
            for url, key, status in zip(*(columns[name] for name in _COLUMNS), strict=True):
                self._rows.setdefault(url, (shard, key, status))
        self._pictures = cache(_pictures)

    @classmethod
    def beside(cls, table: Path, column: str) -> Downloads:
        """Raises UserError where no shards lie in the table's folder or those in it."""
        shards = [path for path in _parquet_files(table.parent) if set(_COLUMNS) <= set(pq.read_schema(path).names)]
        if not shards:
            form = table.suffix.lstrip(".").lower()
            raise UserError(
                f"{table}: column {column!r} holds URLs, expected paths of pictures on this disk; download them first, "
                f"as by img2dataset --url_list {table.name} --input_format {form} --url_col {column} --output_folder "
                "pictures, into a folder beside it"
            )
        return cls(table.parent, shards)

    def find(self, url: str) -> tuple[str, Path | TarPicture | None, str | None]:
        """A row's id, its picture, and why there is none."""
        url = url.strip()
        if url not in self._rows:
            return url, None, f"{url} is not among what img2dataset was given"
        shard, key, status = self._rows[url]
        if status != _SUCCESS:
            return url, None, f"{url} was not downloaded: {status}"
        picture = self._pictures(shard).get(key)
        if picture is None:
            return url, None, f"{url} was downloaded as {key}, which is not beside {shard}"
        place = shard.with_suffix(".tar") if isinstance(picture, TarPicture) else shard.with_suffix("")
        return f"{relative_id(place, self._root)}/{key}", picture, None


def _parquet_files(folder: Path) -> Iterator[Path]:
    for pattern in ("*.parquet", "*/*.parquet"):
        for path in sorted(folder.glob(pattern)):
            try:
                pq.read_schema(path)
            except (OSError, pa.ArrowException):  # whatever else lies there
                continue
            yield path


def _pictures(shard: Path) -> dict[str, Path | TarPicture]:
    """The pictures of a shard by their keys."""
    folder, tar = shard.with_suffix(""), Tar(shard.with_suffix(".tar"))
    if folder.is_dir():
        return {path.stem: path for path in list_pictures(folder)}
    if not tar.path.is_file():
        return {}
    members = [member for member in tar.members() if is_picture(member.path)]
    return {Path(member.path).stem: TarPicture(tar, member) for member in members}
