"""A noise predictor that exists already: from a diffusers folder or hub name, checked against the two other stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers.models import UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin

from sd_mini import diffusion
from sd_mini.config import check
from sd_mini.diffusion.objective import Process
from sd_mini.errors import UserError
from sd_mini.files import CONTRACT, PIPELINE_MARK
from sd_mini.noise_predictor.network import check_call, class_of, condition_field
from sd_mini.weights import load_complete, reason

_SCHEDULER = "scheduler_config.json"
_SUBFOLDERS = ("unet", "transformer", "noise_predictor")  # where a diffusers pipeline keeps its denoiser


def load_network(name: str, latent_shape: tuple[int, int, int], dim: int) -> ModelMixin:
    """A denoiser's folder, a diffusers pipeline's folder, or a hub name of either => the network, in float32.

    Weights come from safetensors only. Raises ValueError, one line, both numbers in it where one does not fit: no such
    thing, files cut short, latents of other channels, prompt embeddings of another width.
    """
    config = _config(name)
    cls = class_of(config.pop("_class_name"))
    subfolder = config.pop("subfolder")
    _check_widths(name, cls, config, latent_shape, dim)
    what = f"network.pretrained {name}"
    try:
        options: dict[str, Any] = {"subfolder": subfolder, "low_cpu_mem_usage": False}
        complaint = "its weights file lacks"
        network = load_complete(cls, name, what, has_only=True, complaint=complaint, **options).float()
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever their parsers do, bare Exceptions among it
        raise UserError(f"{what}: cannot be loaded ({reason(error)}); give a whole folder") from error
    try:
        check_call(network, latent_shape, dim)
    except Exception as error:  # whatever a network says that wants more than it is given
        raise UserError(
            f"network.pretrained {name}: {cls.__name__} cannot be called with latents {latent_shape} and prompt "
            f"embeddings of width {dim} alone ({reason(error)}); give a network without further conditions"
        ) from error
    return network


def check_process(name: str, process: Process) -> None:
    """Raises ValueError, both named, where what lies beside a network says that it predicts something else, or was
    trained on another schedule, than `process`: the stage or pipeline of ours that it is part of, or the
    scheduler_config.json of a stock pipeline. Nothing is known of a network that stands alone.

    `name`: the network's folder, that of a pipeline or stage it is part of, or a hub name.
    """
    what = f"network.pretrained {name}"
    for path in _records(name):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not readable as JSON ({error}); give a whole folder") from error
        if path.name != _SCHEDULER and "objective" not in record:
            continue
        was = _of_scheduler(record) if path.name == _SCHEDULER else Process.of(record)
        if was is None:
            raise UserError(
                f"{what}: {path} is of {record.get('_class_name')}, prediction_type {record.get('prediction_type')} "
                f"and beta_schedule {record.get('beta_schedule')}, which no objective of ours is; give another network"
            )
        # a scheduler does not tell flow from flow_x, by which it steps alike
        is_same = was == process or (path.name == _SCHEDULER and was.is_flow and process.is_flow)
        if not is_same:
            mend = [f"--objective.kind {was.kind}"]
            mend += [] if was.schedule is None else [f"--objective.schedule {was.schedule}"]
            mend += ["--objective.zero_snr true"] if was.zero_snr else []
            raise UserError(
                f"{what}: by {path} it was trained for {_said(was)}, but the objective is {_said(process)}; train with "
                f"{' '.join(mend)}, or give another network"
            )
        return


def _records(name: str) -> list[Path]:
    """The files beside a network that say what it was trained for, the plainest first, of those that are there."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(name, f"scheduler/{_SCHEDULER}")
        except ValueError:  # not a name that a hub could have
            return []
        return [Path(cached)] if isinstance(cached, str) else []
    # the folder itself, and the one that it is a part of
    wholes = [folder, folder.resolve().parent]
    found = [whole / file for whole in wholes for file in (CONTRACT, PIPELINE_MARK) if (whole / file).is_file()]
    return [*found, *(whole / "scheduler" / _SCHEDULER for whole in wholes if _is_pipeline_with_scheduler(whole))]


def _is_pipeline_with_scheduler(folder: Path) -> bool:
    return (folder / PIPELINE_MARK).is_file() and (folder / "scheduler" / _SCHEDULER).is_file()


def _said(process: Process) -> str:
    schedule = "" if process.schedule is None else f" on the {process.schedule} schedule"
    return f"{process.kind}{schedule}{' with zero_snr' if process.zero_snr else ''}"


def _of_scheduler(config: dict[str, Any]) -> Process | None:
    """What a scheduler's config says that its network was trained for; none where that is none of ours."""
    if str(config.get("_class_name")).startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return Process(kind="flow")
    usual = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}  # diffusers'
    betas = usual | {field: config[field] for field in usual if field in config}
    names = [name for name, own in diffusion.BETAS.items() if all(betas[field] == own[field] for field in own)]
    prediction = config.get("prediction_type", "epsilon")
    if not names or config.get("trained_betas") is not None or prediction not in ("epsilon", "v_prediction", "sample"):
        return None
    is_zero = bool(config.get("rescale_betas_zero_snr"))
    return check(Process, {"kind": prediction, "schedule": names[0], "zero_snr": is_zero}, _SCHEDULER)


def _config(name: str) -> dict[str, Any]:
    """The network's config.json, and the `subfolder` that it lies in."""
    folder = Path(name)
    if not folder.is_dir():
        return _hub_config(name)
    for subfolder in ("", *_SUBFOLDERS):
        path = folder / subfolder / "config.json"
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"network.pretrained {path}: not readable as JSON ({error})") from error
            if "_class_name" in config:
                return {**config, "subfolder": subfolder or None}
    raise UserError(
        f"network.pretrained {name}: no diffusers network here (config.json is missing); expected its folder, or a "
        f"pipeline's with {', '.join(_SUBFOLDERS)}"
    )


def _hub_config(name: str) -> dict[str, Any]:
    reasons = []
    for subfolder in (None, *_SUBFOLDERS):
        try:
            loaded: Any = UNet2DConditionModel.load_config(name, subfolder=subfolder)  # which any class could do
            config = dict(loaded)
        except Exception as error:  # offline, no such name, no such folder: the hub's client has a class for each
            reasons.append(" ".join(str(error).split()))
            continue
        if "_class_name" in config:
            return {**config, "subfolder": subfolder}
    raise UserError(
        f"network.pretrained {name}: neither a folder nor a network that the hub gives now ({reasons[-1]}); check the "
        "name, or give a folder"
    )


def _check_widths(
    name: str, cls: type[ModelMixin], config: dict[str, Any], latent_shape: tuple[int, int, int], dim: int
) -> None:
    channels, condition = latent_shape[0], condition_field(cls)
    expected = {"in_channels": channels, "out_channels": channels}
    if condition is not None:
        expected[condition] = dim
    what = {"in_channels": "latents", "out_channels": "latents", condition: "prompt embeddings"}
    for field, wanted in expected.items():
        found = config.get(field)
        if found is not None and found != wanted:
            raise UserError(
                f"network.pretrained {name}: {field} is {found}, but the {what[field]} have {wanted}; train the other "
                "stages to fit it, or give a network that fits them"
            )
    patch = config.get("patch_size", 1)
    if isinstance(patch, int) and any(side % patch for side in latent_shape[1:]):
        raise UserError(
            f"network.pretrained {name}: patch_size {patch} does not divide the latent grid {latent_shape[1:]}"
        )
