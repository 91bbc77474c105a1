"""LoRA by diffusers' everyday calls, on the noise predictor: `load_lora_weights`, `set_adapters`, `fuse_lora`, ...

The names and semantics are those of diffusers' `LoraBaseMixin`; the layers are peft's. diffusers' own mixin needs a
network of its `PeftAdapterMixin`, which PRX is not.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakSet

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.peft_utils import (
    delete_adapter_layers,
    recurse_remove_peft_layers,
    set_adapter_layers,
    set_weights_and_activate_adapters,
)
from safetensors.torch import save_file
from torch import Tensor

from sd_mini import lora
from sd_mini.config import check_choice
from sd_mini.diffusion.objective import Process, unwrapped
from sd_mini.errors import UserError
from sd_mini.files import combined_hash
from sd_mini.offload import is_offloaded_by_layers
from sd_mini.weights import HUB, is_hub_name, snapshot

_alive: WeakSet[Adapters] = (
    WeakSet()
)  # every pipeline: those made by from_pipe share a network, and what is merged into it
_alive_lock = threading.Lock()  # a page makes pipelines in its requests' threads


class Adapters(DiffusionPipeline):
    """The part of a pipeline that holds LoRA adapters of its noise predictor, several by name, not merged."""

    config: Any  # diffusers' FrozenDict, whose entries are attributes too
    noise_predictor: Any  # none in a pipeline that is loaded for its text half
    process: Process

    def register_modules(self, **modules: Any) -> None:
        super().register_modules(**modules)
        with _alive_lock:
            _alive.add(self)

    def load_lora_weights(
        self,
        path: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        **hub: Any,
    ) -> None:
        """Add a LoRA and make it the active one; the network's own weights stay.

        Args:
            path: a folder in peft's or diffusers' format, diffusers' file, its tensors by name, or a hub name.
            adapter_name: by which the other calls know it; default_0, default_1, ... if left out.
            weight_name: of the file in the folder or on the hub; `pytorch_lora_weights.safetensors` if left out.
            hub: revision, token, cache_dir, local_files_only, as of `huggingface_hub.snapshot_download`.

        Raises:
            UserError: a name that is taken, files that are missing or cut short, layers that the network does not have.
        """
        if unknown := sorted(set(hub) - set(HUB)):
            raise UserError(f"load_lora_weights: unknown option {unknown[0]}; known: weight_name, {', '.join(HUB)}")
        if self._network is None:
            raise UserError("load_lora_weights: this pipeline has no noise predictor to add it to; leave it out")
        if is_offloaded_by_layers(self._network):
            raise UserError("load_lora_weights: the noise predictor is offloaded by layers; load the LoRA before that")
        if self.num_fused_loras:
            raise UserError("load_lora_weights: another LoRA is fused; unfuse_lora() or unload_lora_weights() first")
        names = self.get_list_adapters()["noise_predictor"]
        name = adapter_name or next(f"default_{i}" for i in range(len(names) + 1) if f"default_{i}" not in names)
        if name in names:
            raise UserError(f"adapter_name {name!r}: is loaded already; give another, or delete_adapters({name!r})")
        if "." in name:
            raise UserError(f"adapter_name {name!r}: has a dot in it, by which peft parts names; leave it out")
        if isinstance(path, Mapping):
            with TemporaryDirectory() as folder:
                save_file(
                    {key: tensor.contiguous() for key, tensor in path.items()}, Path(folder) / lora.DIFFUSERS_WEIGHTS
                )
                self.load_lora_weights(folder, name)
            return
        if hub and not is_hub_name(path):
            raise UserError(f"load_lora_weights: {', '.join(hub)} go with a hub name, and {path} is none")
        place = snapshot(str(path), hub, ["*.safetensors", "*.json"]) if is_hub_name(path) else Path(path)
        if weight_name is not None and place.is_dir():
            place /= weight_name
        lora.load(self._network, place, self.process.model_dump(), name)
        self.set_adapters(name)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Make these adapters, and no others, active, each times its weight (1 if left out)."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise UserError(f"{len(weights)} adapter_weights for {len(names)} adapters; give one, or one each")
        self._check_names(names)
        set_weights_and_activate_adapters(self._network, names, [1.0 if w is None else w for w in weights])

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The adapters that are loaded, by component."""
        return {"noise_predictor": list(dict.fromkeys(name for layer in self._layers() for name in layer.lora_A))}

    def get_active_adapters(self) -> list[str]:
        enabled = [layer for layer in self._layers() if not layer.disable_adapters]
        return list(dict.fromkeys(n for layer in enabled for n in layer.active_adapters if n in layer.lora_A))

    def enable_lora(self) -> None:
        set_adapter_layers(self._network, enabled=True)

    def disable_lora(self) -> None:
        """The network as it is without adapters, which stay loaded."""
        set_adapter_layers(self._network, enabled=False)

    def fuse_lora(
        self,
        components: Sequence[str] = ("noise_predictor",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """Add the active adapters, or those named, times `lora_scale`, to the weights: no cost a step from then on.

        `unfuse_lora` takes them out again, with a rounding error; `unload_lora_weights` forgets the adapters.
        """
        for component in components:
            check_choice("components", component, ("noise_predictor",))
        adapter_names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_names(adapter_names or [])
        for layer in self._layers():
            if lora_scale != 1.0:
                layer.scale_layer(lora_scale)
            layer.merge(safe_merge=safe_fusing, adapter_names=adapter_names)

    def unfuse_lora(self, components: Sequence[str] = ("noise_predictor",)) -> None:
        for component in components:
            check_choice("components", component, ("noise_predictor",))
        for layer in self._layers():
            layer.unmerge()

    @property
    def adapter_hash(self) -> str | None:
        """Of the adapters that change the network, loaded or fused, and their scales; none of no such."""
        active, digest, is_any = self.get_active_adapters(), hashlib.sha256(), False
        for layer in self._layers():
            for name in (n for n in layer.merged_adapters or active if n in layer.lora_A):
                is_any = True
                digest.update(f"{name} {layer.scaling[name]!r}".encode())
                for side in (layer.lora_A[name], layer.lora_B[name]):
                    digest.update(side.weight.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest() if is_any else None

    @property
    def num_fused_loras(self) -> int:
        return len({name for layer in self._layers() for name in layer.merged_adapters})

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        if set(names) == set(self.get_list_adapters()["noise_predictor"]):
            self.unload_lora_weights()
            return
        for name in names:
            delete_adapter_layers(self._network, name)
            self._network.peft_config.pop(name)

    def unload_lora_weights(self) -> None:
        """Forget all adapters; what `fuse_lora` has added to the weights stays in them."""
        if self.num_fused_loras and (adapters := self.adapter_hash) is not None:
            self._record(adapters)
        recurse_remove_peft_layers(self._network)
        self._network.__dict__.pop("peft_config", None)

    def save_lora_weights(self, save_directory: str | Path, adapter_name: str | None = None) -> None:
        """Write an adapter, the first active one if left out, in peft's and in diffusers' format."""
        active = self.get_active_adapters()
        if not active:
            raise UserError("save_lora_weights: no adapter is loaded and active; load_lora_weights(FOLDER) first")
        self._check_names([adapter_name or active[0]])
        base = {"objective": self.process.model_dump()}
        lora.save(self._network, Path(save_directory), base, adapter_name or active[0])

    def _record(self, adapters: str) -> None:
        """Record that the noise predictor is no stage's own any more, as adapters are in its weights: in the settings
        of this pipeline and of all that share the network."""
        with _alive_lock:
            pipelines = {self, *_alive}
        for pipeline in pipelines:
            if pipeline._network is self._network:
                stages = dict(pipeline.config.stages)
                merged = {"into": stages.get("noise_predictor"), "adapters": adapters}
                pipeline.register_to_config(stages={**stages, "noise_predictor": combined_hash(merged)})

    @property
    def _network(self) -> Any:
        return unwrapped(self.noise_predictor)

    def _layers(self) -> list[Any]:
        """peft's layers of the network."""
        network = self._network
        return [] if network is None else [module for module in network.modules() if lora.is_adapted_layer(module)]

    def _check_names(self, names: Sequence[str]) -> None:
        known = self.get_list_adapters()["noise_predictor"]
        for name in names:
            check_choice("adapter_names", name, known)
