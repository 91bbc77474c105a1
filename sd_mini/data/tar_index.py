"""Where the members of a tar lie, so that each can be read by its offset; nothing is ever extracted."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sd_mini.data.folder import is_hidden
from sd_mini.errors import UserError

_BLOCK = tarfile.BLOCKSIZE  # a tar is made of blocks of 512 bytes


class Member(NamedTuple):
    """A file of a tar: its path in it, and where its bytes lie."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class Tar:
    """A tar on disk. Reading opens it anew each time, so that threads and forked processes share no position."""

    path: Path

    def read(self, member: Member) -> bytes:
        """Raises UserError where the tar has become shorter since, or cannot be read."""
        try:
            with self.path.open("rb") as file:
                content = os.pread(file.fileno(), member.size, member.offset)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
        if len(content) < member.size:
            raise UserError(f"{self.path}: ends within {member.path}, at byte {member.offset + len(content):,}")
        return content

    def members(self) -> Iterator[Member]:
        """Every file in it, hidden ones left out.

        Raises UserError, the tar and the member or offset named, for a path that climbs out, a link or a device, a
        compressed tar, and one that is cut short or damaged.
        """
        end = 0
        try:
            with tarfile.open(self.path, "r:") as archive:
                for entry in archive:
                    self._check(entry)
                    end = entry.offset_data + -(-entry.size // _BLOCK) * _BLOCK
                    name = entry.name.removeprefix("./")
                    archive.members = []  # ty: ignore[missing-attribute]  # the library would keep them all
                    if entry.isfile() and not any(map(is_hidden, name.split("/"))):
                        yield Member(name, entry.offset_data, entry.size)
        except tarfile.TarError as error:
            raise UserError(self._damage(end, error)) from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
        self._check_end(end)

    def _check(self, entry: tarfile.TarInfo) -> None:
        if entry.name.startswith("/") or ".." in entry.name.split("/"):
            raise UserError(f"{self.path}: its member {entry.name!r} climbs out of the tar; write the tar anew without")
        if not (entry.isfile() or entry.isdir()) or entry.issparse():
            kind = "a link" if entry.issym() or entry.islnk() else "no plain file"
            raise UserError(f"{self.path}: its member {entry.name!r} is {kind}; write the tar anew with plain files")

    def _damage(self, end: int, error: Exception) -> str:
        size = self.path.stat().st_size
        if size and not end:
            return f"{self.path}: is no plain tar ({error}); unpack one that is compressed, as gunzip does"
        return f"{self.path}: is cut short or damaged: its last whole member ends at byte {end:,} of {size:,} ({error})"

    def _check_end(self, end: int) -> None:
        # the library takes a damaged header, and a file that just ends, for the end of the tar: a block of zeros
        with self.path.open("rb") as file:
            block = os.pread(file.fileno(), _BLOCK, end)
        if block != bytes(_BLOCK):
            reason = "no header follows" if block else "it lacks the end that a whole tar has"
            raise UserError(self._damage(max(end, 1), ValueError(reason)))


class TarPicture(NamedTuple):
    """A picture in a tar."""

    tar: Tar
    member: Member

    def read(self) -> bytes:
        return self.tar.read(self.member)
