"""Files that we write: whole or not at all, only over what we wrote, known by their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sd_mini.errors import UserError

CONTRACT = "stage.json"  # of an exported stage
PIPELINE_MARK = "model_index.json"  # by which diffusers knows a pipeline's folder
MANIFEST = "manifest.json"  # of a pipeline's files
GENERATED = "<!-- written by python -m eval -->"  # in a model card: nobody wrote it by hand


def read_json(path: Path) -> dict[str, Any] | None:
    """The fields of a JSON file; none where it is not there. Raises UserError for one that is not readable as such."""
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); write it again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds a {type(fields).__name__}, expected an object with fields; write it again")
    return fields


def usual_modes(path: Path) -> None:
    """Give a file, or every file below a folder, the permissions that a new file has there: by the umask.

    safetensors writes its files for their owner alone, whatever the umask.
    """
    folder = path if path.is_dir() else path.parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=".mode-") as probes:
        probe = Path(probes, "probe")
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


@contextmanager
def atomic_folder(target: Path, keep: bool = False) -> Generator[Path]:
    """Yield a temporary folder beside `target`; once everything in it is on disk, it takes `target`'s name.

    `target` is never half written. A folder that it replaces is moved aside first; if the process is killed between the
    two renames, the next call moves it back. `keep`: what somebody else has put into the replaced folder is taken over
    into the new one (`foreign`). Where `target` is a link to a folder, that folder is replaced and the link stays.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, retired = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    if retired.exists() and not target.exists():
        os.rename(retired, target)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        usual_modes(partial)
        if keep and target.is_dir():
            _take_over(target, partial)
        for path in sorted(partial.rglob("*")):
            if not path.is_symlink():
                sync(path)
        sync(partial)
        if retired.exists():
            shutil.rmtree(retired)
        if target.exists():
            os.rename(target, retired)
        os.rename(partial, target)
        sync(target.parent)
        shutil.rmtree(retired, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def foreign(folder: Path) -> list[Path]:
    """Files, links and empty folders in `folder` that no stage and no pipeline of ours has written there, by relative
    path: what its stage.json or manifest.json does not list. In a folder without either, of an older pipeline, whatever
    lies in its components' folders is ours; elsewhere nothing is, and a new file of the same name replaces it.
    """
    listed = written(folder)
    parts = set() if listed or not (folder / PIPELINE_MARK).is_file() else _components(folder)
    strangers = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        is_leaf = path.is_symlink() or not path.is_dir() or not any(path.iterdir())
        if is_leaf and relative.as_posix() not in listed and relative.parts[0] not in parts and not _is_card(path):
            strangers.append(relative)
    return strangers


def written(folder: Path) -> dict[str, str]:
    """SHA-256 by relative path of what a stage's contract or a pipeline's manifest lists; itself, with "", among it.

    Empty where there is neither. Raises UserError for one that is damaged, as what is a user's could not be told.
    """
    for name in (CONTRACT, MANIFEST):
        fields = read_json(folder / name)
        if fields is not None:
            files = fields.get("files")
            if not isinstance(files, dict):
                raise UserError(f"{folder / name}: lists no files; write the folder again elsewhere, or delete this")
            return {**files, name: ""}
    return {}


def _components(folder: Path) -> set[str]:
    """What of an older pipeline is ours: its index, and the folder of each component that the index names."""
    try:
        index = json.loads((folder / PIPELINE_MARK).read_text(encoding="utf-8"))
    except ValueError:
        return {PIPELINE_MARK}
    return {PIPELINE_MARK, *(name for name, entry in index.items() if isinstance(entry, list))}


def _is_card(path: Path) -> bool:
    """A model card that an evaluation wrote: it is about the weights that it lay beside."""
    return (
        path.name == "README.md" and path.is_file() and GENERATED in path.read_text(encoding="utf-8", errors="replace")
    )


def _take_over(old: Path, new: Path) -> None:
    """Another's files of the folder `old`, linked into `new`: `old` keeps its own until it has gone."""
    for relative in foreign(old):
        source, target = old / relative, new / relative
        if os.path.lexists(target) or any((new / parent).is_file() for parent in relative.parents):
            continue  # a name that is ours now
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_dir():
            target.mkdir()
        else:
            try:
                os.link(source, target)
            except OSError:  # a file system without hard links
                shutil.copy2(source, target)


def check_writable(path: Path, option: str = "--out") -> None:
    """Raises UserError, one line, where neither `path` nor what is made beside it on the way could be written.

    A file is made and deleted again, as permissions alone do not tell (a read-only disk, a full one, root).
    """
    place = Path(os.path.realpath(path))
    nearest = next(folder for folder in place.parents if folder.exists())
    for folder in (nearest, *([place] if place.is_dir() else [])):
        if not folder.is_dir():
            raise UserError(f"{option} {path}: {folder} is a file, expected a folder; give another name")
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"0")
        except OSError as error:
            raise UserError(
                f"{option} {path}: nothing can be written in {folder} ({error.strerror}); give another place, or mend "
                "its permissions"
            ) from error


@contextmanager
def written_to(path: Path) -> Generator[None]:
    """In which a file or folder is written: an error of the disk comes out as UserError, one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"{path}: cannot be written ({reason}); make room, mend the permissions, or give another place"
        ) from error


def atomic_text(path: Path, text: str) -> None:
    """Write a text file so that it holds either what it held before or all of `text`."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """Yield the name of a file beside `path`; once what is written there is on disk, it takes `path`'s name.

    After an exception it is gone.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # it may never have been made; what went wrong before is raised
            partial.unlink()
        raise
    sync(path.parent)


@contextmanager
def only_writer(folder: Path, wait: bool = False, option: str = "--run") -> Generator[None]:
    """Lock `folder` for this process, as two programs in one folder would overwrite each other's files.

    If another process holds the lock, wait for it with `wait`, else raise UserError. The kernel releases the lock when
    the process ends.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is at work here; wait for it, stop it, or give another {option}"
            ) from None
        yield


def sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hashes(folder: Path, leave_out: str) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the one named `leave_out`, by relative path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != leave_out)
    return {p.relative_to(folder).as_posix(): file_hash(p) for p in paths}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forget_origins(folder: Path) -> None:
    """Drop from the configs in `folder` the path that diffusers loaded each model from, which it records."""
    for path in folder.rglob("*.json"):
        fields = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(fields, dict) and fields.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def combined_hash(values: Any) -> str:
    """One SHA-256 for any JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
