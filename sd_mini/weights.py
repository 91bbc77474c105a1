"""Weights from folders: every tensor that a network has is found there, or the load is refused by the tensor's name."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sd_mini.errors import UserError
from sd_mini.files import PIPELINE_MARK, read_json
from sd_mini.remarks import remark

# model.safetensors, model.fp16.safetensors, and of several files model.fp16-00001-of-00002.safetensors, or, as older
# libraries have it, model-00001-of-00002.fp16.safetensors
_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model)(\.(?P<first>\w+))?(-\d{5}-of-\d{5})?(\.(?P<last>\w+))?\.safetensors"
)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
_NAMED = 3  # tensors that a message names
_diffusers_logger = logging.getLogger("diffusers.pipelines.pipeline_utils")


def load_complete(
    cls: Any,
    name: str | Path,
    what: str,
    may_lack: Callable[[str], bool] = lambda key: False,
    has_only: bool = False,
    complaint: str = "its weights lack",
    **kwargs: Any,
) -> Any:
    """`cls.from_pretrained(name, **kwargs)`, of diffusers or transformers, from safetensors alone, plain or `variant`.

    Raises ValueError, one line that begins with `what`, for tensors that the files lack, but for those that `may_lack`,
    and with `has_only` for tensors that have no place in `cls`; and whatever the libraries raise for files that cannot
    be read.
    """
    folder = Path(name, kwargs.get("subfolder") or "")
    kwargs.setdefault("variant", variant_of(folder))
    with quiet():
        loaded, report = cls.from_pretrained(name, use_safetensors=True, output_loading_info=True, **kwargs)
    check_found(what, [key for key in report["missing_keys"] if not may_lack(key)], complaint)
    if has_only and (extra := sorted(report["unexpected_keys"])):
        raise UserError(
            f"{what}: its weights file holds besides {extra[0]}, for which {cls.__name__} has no place; give its own"
        )
    return loaded


# in a standalone folder our components name the file beside their weights, COMPONENT_FILE, instead of these
LIBRARIES = {"TextAdapter": "sd_mini.text_encoder", "Autoencoder": "sd_mini.autoencoder"} | dict.fromkeys(
    ("AutoregressiveGenerator", "NormalizingFlow", "OnePassGenerator", "PriorGenerator"), "sd_mini.generators"
)
COMPONENT_FILE = "stage"
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")  # options of a hub name


def is_hub_name(name: str | Path) -> bool:
    """Whether it is a name such as user/name, and no file or folder on this machine."""
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def snapshot(name: str, options: Mapping[str, Any], patterns: Sequence[str]) -> Path:
    """A hub's repository => the folder of those of its files that match, downloaded or from the cache.

    Raises UserError, one line: no such repository or revision, or no connection.
    """
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except Exception as error:  # its errors are of several libraries, and of the transport's
        raise UserError(
            f"{name}: no such folder here, and as a hub name it cannot be loaded ({reason(error)}); mend the name, or "
            "give a folder"
        ) from error
    remark(f"{name}: no such folder here; taken from the hub")  # it may be a folder's name, seen from elsewhere
    return found


@contextmanager
def quiet() -> Generator[None]:
    """In which the libraries that load weights log errors alone: they would print a table of what is missing."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "timm")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_found(what: str, missing: Iterable[str], complaint: str = "its weights lack") -> None:
    """Raises ValueError for tensors that a file lacks, the first few named."""
    missing = sorted(missing)
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise UserError(
            f"{what}: {complaint} {', '.join(missing[:_NAMED])}{more}; give the weights of this very network"
        )


def variant_of(folder: str | Path) -> str | None:
    """The variant (such as fp16) that a model's folder holds alone; none where the plain weights are there, or none at
    all, or several variants."""
    matches = [_WEIGHTS.fullmatch(file.name) for file in Path(folder).glob("*.safetensors")]
    variants = {match["first"] or match["last"] for match in matches if match is not None}
    return variants.pop() if len(variants) == 1 else None


def pipeline_variant(folder: str | Path) -> str | None:
    """The variant that a diffusers pipeline's folder needs to be asked for: that of a component without plain ones."""
    found = {variant_of(part) for part in Path(folder).glob("*/")} - {None}
    return found.pop() if len(found) == 1 else None


def upload(
    folder: Path,
    files: Sequence[str],
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload these files of a folder, and no others, to the hub, where the repository is made if it is missing => its
    address. Raises UserError, one line: no connection, no token, no right to write there."""
    from huggingface_hub import HfApi

    try:
        hub = HfApi(token=token)
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message=commit_message,
            create_pr=create_pr,
        )
    except Exception as error:  # its errors are of several libraries, and of the transport's
        raise UserError(
            f"{repo_id}: {folder} is written but not uploaded ({reason(error)}); log in (hf auth login), then upload it"
        ) from error
    return str(address)


def own_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline's index, of a standalone folder as if sd_mini had saved it: no code of the folder is run by it."""
    found = dict(index)
    if isinstance(found.get("_class_name"), list):
        found["_class_name"] = found["_class_name"][-1]
    for name, entry in found.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] == COMPONENT_FILE:
            found[name] = [LIBRARIES.get(entry[1], entry[0]), entry[1]]
    return found


def load_components(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The networks of a diffusers pipeline's folder, but for those among `options`, each complete, by name.

    `options`: of `DiffusionPipeline.from_pretrained`; of those that say where weights go (device_map,
    quantization_config) diffusers alone knows what to do, and loads the networks itself. Raises ValueError, one
    line, that names a tensor that is missing.
    """
    if options.get("device_map") is not None or options.get("quantization_config") is not None:
        return {}
    dtypes, loaded = options.get("torch_dtype", options.get("dtype")), {}
    for name, entry in own_index(read_json(folder / PIPELINE_MARK) or {}).items():
        if name not in options:
            _check_tokenizer(folder / name, entry)
        cls = _network_class(entry) if name not in options else None
        if cls is None:
            continue
        dtype = dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes
        variants = (options.get("variant"), variant_of(folder / name))
        variant = next((variant for variant in variants if variant and _has(folder / name, variant)), None)
        given: dict[str, Any] = {"variant": variant, "dtype": dtype or torch.float32}
        try:
            loaded[name] = load_complete(cls, folder / name, f"{folder / name}", **given).eval()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{folder / name}: cannot be loaded ({reason(error)}); save it again, as safetensors"
            ) from error
        # as diffusers says it of the parts that it loads itself
        _diffusers_logger.info(f"Loaded {name} as {cls.__name__} from `{name}` subfolder of {folder}.")
    return loaded


def _check_tokenizer(folder: Path, entry: Any) -> None:
    """Raises UserError for a tokenizer's folder without its words: transformers would make one that knows none."""
    cls = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else ""
    if "Tokenizer" in cls and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(f"{folder}: {cls} lacks {' or '.join(TOKENIZER_FILES)}; save the pipeline again")


def _network_class(entry: Any) -> Any:
    """The class that a pipeline's index names as [library, class], if it is one of weights, of diffusers, transformers
    or ours."""
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if not isinstance(library, str) or library.split(".")[0] not in ("diffusers", "transformers", "sd_mini"):
        return None
    cls = getattr(importlib.import_module(library), str(name), None)
    return cls if isinstance(cls, type) and issubclass(cls, torch.nn.Module) else None


def _has(folder: Path, variant: str | None) -> bool:
    matches = [_WEIGHTS.fullmatch(file.name) for file in folder.glob("*.safetensors")]
    return any(variant in (match["first"], match["last"]) for match in matches if match is not None)


def reason(error: Exception) -> str:
    """A library's complaint on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
