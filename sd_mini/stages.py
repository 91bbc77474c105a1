"""A stage's exported folder: weights, config and `stage.json`, the contract that says what it belongs with.

A stage is named by the SHA-256 of its files. Whatever is made from it (a cache, a noise predictor, a pipeline) records
that name, and is refused where another stage stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sd_mini.errors import UserError
from sd_mini.files import CONTRACT, GENERATED, MANIFEST, PIPELINE_MARK, read_json, usual_modes

KINDS = ("text_encoder", "autoencoder", "noise_predictor")


@dataclass(frozen=True)
class Stage:
    """A loaded stage: `parts` are its models (and tokenizer) by name, `contract` is its stage.json."""

    folder: Path
    contract: dict[str, Any]
    parts: dict[str, Any]

    @property
    def hash(self) -> str:
        return self.contract["hash"]


@contextmanager
def atomic_folder(target: Path, keep: bool = False) -> Iterator[Path]:
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
def written_to(path: Path) -> Iterator[None]:
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
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


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


def combined_hash(values: Any) -> str:
    """One SHA-256 for any JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def model_hash(model: Any) -> str:
    """SHA-256 of how a torch module is built and of its weights."""
    import torch

    config = getattr(model, "config", "")
    if isinstance(config, dict):  # diffusers'; where it was loaded from is no part of it
        said = json.dumps({name: value for name, value in config.items() if name[0] != "_"}, sort_keys=True)
    else:
        said = config.to_json_string() if config else ""
    digest = hashlib.sha256(f"{model} {said}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def export(folder: Path, kind: str, parts: dict[str, Any], contract: dict[str, Any]) -> str:
    """Write a stage folder in one go: each part by its own `save_pretrained`, then `stage.json`. Returns its hash."""
    assert kind in KINDS
    with written_to(folder), atomic_folder(folder, keep=True) as partial:
        for name, part in parts.items():
            part.save_pretrained(partial / name)
        files = file_hashes(partial, CONTRACT)
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        full = {"kind": kind, "hash": combined_hash(files), "files": files, "versions": versions, **contract}
        (partial / CONTRACT).write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")
    return full["hash"]


def read_contract(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """The contract of the stage in `folder`. Raises ValueError when there is none or it is of another kind."""
    path = Path(folder) / CONTRACT
    if not path.is_file():
        wanted = f"{kind or 'stage'} stage"
        raise UserError(
            f"{folder}: no {wanted} here ({CONTRACT} is missing); train it first, or give its final/ folder"
        )
    try:
        contract = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); export the stage again") from error
    if kind is not None and contract.get("kind") != kind:
        raise UserError(f"{folder}: expected a {kind} stage, this is a {contract.get('kind')} stage")
    return contract


def load_stage(folder: str | Path, kind: str | None = None) -> Stage:
    """Load a stage's parts in evaluation mode, float32, after its files are checked against `stage.json`.

    Raises ValueError that names the file when one is missing or is not the one that was exported.
    """
    folder = Path(folder)
    contract = read_contract(folder, kind)
    check_files(folder, contract["files"], "export the stage again")
    parts = {}
    for name in sorted({name.split("/")[0] for name in contract["files"] if "/" in name}):
        try:
            parts[name] = _load_part(folder / name)
        except Exception as error:  # the libraries raise whatever their parsers do, bare Exceptions among it
            raise UserError(f"{folder / name}: cannot be loaded ({error}); export the stage again") from error
    return Stage(folder, contract, parts)


def check_files(folder: Path, files: dict[str, str], mend: str) -> None:
    """Raises ValueError, the file named, unless each of `files` is there with its SHA-256; others may lie there."""
    for name, expected in files.items():
        is_there = (folder / name).is_file()
        if not is_there or file_hash(folder / name) != expected:
            what = "is not the file that was exported (SHA-256 differs)" if is_there else "is missing"
            raise UserError(f"{folder / name}: {what}; {mend}")


def _load_part(folder: Path) -> Any:
    """Load by the folder's name and the class its config names; weights from safetensors only."""
    import torch
    from transformers import AutoTokenizer

    from sd_mini.autoencoder import Autoencoder
    from sd_mini.load_encoder import load_encoder
    from sd_mini.noise_predictor import class_of
    from sd_mini.retrieval import Matcher
    from sd_mini.text_encoder import TextAdapter
    from sd_mini.weights import load_complete

    if folder.name.startswith("tokenizer"):
        return AutoTokenizer.from_pretrained(folder)
    if folder.name.startswith("text_encoder"):
        return load_encoder(folder, tokenizer=False)[1]
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    classes = {cls.__name__: cls for cls in (Autoencoder, Matcher, TextAdapter)}
    cls = class_of(str(name)) if folder.name == "noise_predictor" else classes.get(name)
    if cls is None:
        raise UserError(f"{folder}: class {name!r} is none of {', '.join(sorted(classes))}")
    return load_complete(cls, folder, str(folder), dtype=torch.float32).eval()


def latents_of(contract: dict[str, Any]) -> str:
    """The hash that names an autoencoder's latents: its own, or that of the one whose latents it decodes too."""
    return contract.get("latents_of", contract["hash"])


def encoder_of(contract: dict[str, Any]) -> str:
    """The hash that names what encodes: an autoencoder's own, or that of the one whose encoder it has kept."""
    return contract.get("encoder_of", contract["hash"])


def check_belonging(contract: dict[str, Any], **stages: dict[str, Any]) -> None:
    """Refuse stages that do not belong to the one with `contract`: `stages` are the contracts of those there now."""
    for name, other in stages.items():
        expected, found = contract["trained_against"][name], latents_of(other)
        if found != expected:
            raise UserError(
                f"the {contract['kind']} was trained against {name} {expected[:12]}, but this {name} is {found[:12]}: "
                f"give the stage it was trained against, or train the {contract['kind']} again"
            )
