"""A stage's exported folder: weights, config and `stage.json`, the contract that says what it belongs with.

A stage is named by the SHA-256 of its files. Whatever is made from it (a cache, a noise predictor, a pipeline) records
that name, and is refused where another stage stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sd_mini.errors import UserError
from sd_mini.files import (
    CONTRACT,
    atomic_folder,
    combined_hash,
    file_hash,
    file_hashes,
    forget_origins,
    written_to,
)

KINDS = ("text_encoder", "autoencoder", "noise_predictor")
TUNED = ("few_steps", "reward")  # stages that train a noise predictor further; each exports one of its own
PREDICTORS = ("noise_predictor", *TUNED)
# the other ways from text to latents
FAMILIES = ("autoregressive", "normalizing_flow", "gan", "vae", "regression", "prior")
DRAWERS = (*PREDICTORS, *FAMILIES)  # the stages of which a pipeline has one, and which draws its latents
STAGES = (*KINDS, *TUNED, *FAMILIES)  # the folders of a run
GENERATOR = "generator"


def kind_of(stage: str) -> str:
    """A stage's folder in a run => the kind of what it exports, one of KINDS or GENERATOR."""
    return GENERATOR if stage in FAMILIES else "noise_predictor" if stage in TUNED else stage


def program_of(stage: str) -> str:
    """The program that trains a stage, as `python -m` and `accelerate launch -m` know it."""
    return f"training.generators.{stage}" if stage in FAMILIES else f"training.{stage}"


def drawer_of(stages: Mapping[str, str]) -> str | None:
    """The hash of what draws the latents, of the stages' hashes that a pipeline records by kind."""
    return stages.get("noise_predictor", stages.get(GENERATOR))


def exported_drawers(run: Path) -> dict[str, dict[str, Any]]:
    """The contracts of a run's exported noise predictors and other generators by stage, stage 3's own first."""
    finals = {stage: run / stage / "final" for stage in DRAWERS}
    return {s: read_contract(final, kind_of(s)) for s, final in finals.items() if (final / CONTRACT).is_file()}


def lineage(run: Path, digest: str | None) -> list[str]:
    """The stages of a run that led to the exported noise predictor or generator with that hash, which is the last
    one's: stage 3, then what was tuned from it. Empty where none has that hash."""
    contracts, stages = exported_drawers(run), []
    while (stage := next((s for s, contract in contracts.items() if contract["hash"] == digest), None)) is not None:
        stages.insert(0, stage)
        digest = contracts[stage].get("tuned_from")
    return stages


@dataclass(frozen=True)
class Stage:
    """A loaded stage: `parts` are its models (and tokenizer) by name, `contract` is its stage.json."""

    folder: Path
    contract: dict[str, Any]
    parts: dict[str, Any]

    @property
    def hash(self) -> str:
        return self.contract["hash"]


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
    assert kind in (*KINDS, GENERATOR)
    with written_to(folder), atomic_folder(folder, keep=True) as partial:
        for name, part in parts.items():
            part.save_pretrained(partial / name)
        forget_origins(partial)  # else a stage's hash would depend on the folder of what it was tuned from
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

    from sd_mini import generators
    from sd_mini.autoencoder.model import Autoencoder
    from sd_mini.noise_predictor.network import class_of
    from sd_mini.text_encoder.adapter import TextAdapter
    from sd_mini.text_encoder.loading import load_encoder
    from sd_mini.text_encoder.matcher import Matcher
    from sd_mini.weights import load_complete

    if folder.name.startswith("tokenizer"):
        return AutoTokenizer.from_pretrained(folder)
    if folder.name.startswith("text_encoder"):
        return load_encoder(folder, tokenizer=False)[1]
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    classes: dict[str, Any] = {cls.__name__: cls for cls in (Autoencoder, Matcher, TextAdapter)}
    classes |= dict.fromkeys(generators.CLASSES.values())
    if folder.name == "noise_predictor":
        cls = class_of(str(name))
    else:
        cls = classes.get(name) or generators.class_named(str(name))
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
