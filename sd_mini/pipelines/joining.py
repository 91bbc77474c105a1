"""What a pipeline is made of: its components, joined from stages, loaded, saved and exchanged."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sd_mini import lora
from sd_mini.autoencoder.model import Autoencoder
from sd_mini.config import check, check_choice
from sd_mini.cpu import accelerate
from sd_mini.diffusion.flow_map import check_network
from sd_mini.diffusion.objective import Process, unwrapped
from sd_mini.errors import UserError
from sd_mini.files import (
    CONTRACT,
    MANIFEST,
    PIPELINE_MARK,
    atomic_folder,
    atomic_text,
    file_hash,
    read_json,
    usual_modes,
    written,
    written_to,
)
from sd_mini.generators.base import LatentGenerator
from sd_mini.pipelines.adapters import Adapters
from sd_mini.remarks import remark
from sd_mini.sampling import samplers
from sd_mini.sampling.few_steps import FewSteps
from sd_mini.stages.contract import (
    DRAWERS,
    GENERATOR,
    KINDS,
    Stage,
    check_belonging,
    check_files,
    load_stage,
)
from sd_mini.text_encoder.adapter import TextAdapter
from sd_mini.weights import HUB, is_hub_name, load_components, own_index, pipeline_variant, snapshot, upload

# of a pipeline's files what is loaded; none of it can execute anything
_PARTS = (PIPELINE_MARK, MANIFEST, *(f"*/*.{ending}" for ending in ("json", "safetensors", "txt", "model")))


_DENOISING = {"noise_predictor", "scheduler"}  # what another family's generator stands in for
_PUSH = ("push_to_hub", "repo_id", "private", "token", "commit_message", "create_pr")


class JoinedPipeline(Adapters):
    """Text encoder + TextAdapter, noise predictor, autoencoder and a diffusers scheduler; or a `latent_generator` of
    another family (autoregressive, gan, ...) in the place of noise predictor and scheduler, which are then None.

    `resolution` is the training size in pixels and the default height and width; `default_steps`, `default_guidance`
    and `default_interval` are the recipe's own; `objective` says what the network predicts, which the scheduler has to
    step by; `guide` is an earlier snapshot of the network, for autoguidance; `stages` holds the hashes of the stages
    this was joined from; `few_steps` (fields of `FewSteps`) is of a network made for a few evaluations. Any part may be
    None for a pipeline of which the rest is used: its text half to encode prompts, or all but that to make pictures of
    embeddings.
    """

    model_cpu_offload_seq = (
        "text_encoder->text_encoder_2->text_encoder_3->text_adapter->noise_predictor->latent_generator->autoencoder"
    )
    tile: int | None = None  # latent cells, of `enable_vae_tiling`
    _checked_scheduler: tuple[Any, dict[str, Any]] | None = None
    _optional_components: ClassVar[list[str]] = [  # ty: ignore[incompatible-attribute-override]
        "tokenizer_2",
        "text_encoder_2",
        "tokenizer_3",
        "text_encoder_3",
        "guide",
        "latent_generator",
        "noise_predictor",  # these two beside a latent_generator alone
        "scheduler",
    ]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        text_adapter: TextAdapter,
        noise_predictor: ModelMixin | None,
        autoencoder: Autoencoder,
        scheduler: SchedulerMixin | None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        guide: ModelMixin | None = None,
        latent_generator: LatentGenerator | None = None,
        resolution: int = 64,
        default_steps: int = 20,
        default_guidance: float = 3.0,
        default_interval: list[float] | tuple[float, float] = (0.0, 1.0),
        objective: dict[str, Any] | None = None,
        stages: dict[str, str] | None = None,
        few_steps: dict[str, Any] | None = None,
    ):
        super().__init__()
        process = self.process = Process.of({"objective": objective})  # what the network was trained to predict
        self.few_steps = None if few_steps is None else check(FewSteps, few_steps, "few_steps")
        if self.few_steps is not None and self.few_steps.end_blocks and noise_predictor is not None:
            check_network(noise_predictor, self.few_steps.end_blocks)
        if latent_generator is not None and (noise_predictor is not None or scheduler is not None):
            given = "noise_predictor" if noise_predictor is not None else "scheduler"
            raise UserError(
                f"{given} beside a latent_generator ({latent_generator.family}): one of them draws; give None for it"
            )
        if scheduler is not None:
            self.check_scheduler(scheduler)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            text_adapter=text_adapter,
            noise_predictor=noise_predictor,
            autoencoder=autoencoder,
            scheduler=scheduler,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            tokenizer_3=tokenizer_3,
            text_encoder_3=text_encoder_3,
            guide=guide,
            latent_generator=latent_generator,
        )
        self.register_to_config(
            resolution=resolution,
            default_steps=default_steps,
            default_guidance=default_guidance,
            default_interval=tuple(default_interval),
            objective=process.model_dump(),
            stages=dict(stages or {}),
            few_steps=few_steps,
        )

    def check_scheduler(self, scheduler: Any) -> None:
        """Raises UserError, one line, for a scheduler that does not step by what the network predicts."""
        if getattr(self, "latent_generator", None) is not None:
            raise UserError(
                f"scheduler {type(scheduler).__name__}: a {self.latent_generator.family} generator takes no denoising "
                "steps and has no sampler; leave it out"
            )
        samplers.check(scheduler, self.process)
        if self.few_steps is not None:
            self.few_steps.check_scheduler(scheduler)
        self._checked_scheduler = scheduler, dict(scheduler.config)

    @classmethod
    def from_stages(
        cls,
        text_encoder: str | Path | Stage,
        autoencoder: str | Path | Stage,
        noise_predictor: str | Path | Stage,
        scheduler: SchedulerMixin | None = None,
        guide: str | Path | Stage | None = None,
    ) -> Self:
        """Join three exported stages (folders, or loaded), and an earlier noise predictor to guide away from.

        `noise_predictor` may be a generator of another family. Raises UserError, both hashes named, if they do not fit.
        """
        stages = {}
        for kind, given in zip(KINDS, (text_encoder, autoencoder, noise_predictor), strict=True):
            wanted = kind if isinstance(given, Stage) or kind != KINDS[2] else _third_kind(Path(given))
            stages[kind] = given if isinstance(given, Stage) else load_stage(given, wanted)
        text, vae, predictor = stages.values()
        check_belonging(predictor.contract, text_encoder=text.contract, autoencoder=vae.contract)
        if predictor.contract["kind"] == GENERATOR:
            return cls._with_generator(text, vae, predictor, scheduler, guide)
        sampling, process = dict(predictor.contract["sampling"]), Process.of(predictor.contract)
        sampler = sampling.pop("sampler", None) or samplers.default(process)
        joined = cls(
            **{name: part for name, part in text.parts.items() if name != "matcher"},  # which only stage 1 needs
            **vae.parts,
            **predictor.parts,
            scheduler=scheduler or samplers.build(sampler, process),
            **sampling,
            objective=process.model_dump(),
            stages={kind: stage.hash for kind, stage in stages.items()},
            few_steps=predictor.contract.get("few_steps"),
        )
        if guide is not None:
            joined.add_guide(guide, {"text_encoder": text.contract, "autoencoder": vae.contract})
        return joined

    @classmethod
    def _with_generator(cls, text: Stage, vae: Stage, generator: Stage, scheduler: Any, guide: Any) -> Self:
        """The pipeline that draws its latents by a generator of another family."""
        network = generator.parts["latent_generator"]
        for name, given in (("scheduler", scheduler), ("guide", guide)):
            if given is not None:
                raise UserError(f"{name}: a {network.family} generator takes no denoising steps; leave it out")
        return cls(
            **{name: part for name, part in text.parts.items() if name != "matcher"},
            **vae.parts,
            noise_predictor=None,
            scheduler=None,
            latent_generator=network,
            **generator.contract["sampling"],
            default_steps=1,
            stages={"text_encoder": text.hash, "autoencoder": vae.hash, GENERATOR: generator.hash},
        )

    def add_guide(self, guide: str | Path | Stage, joined_to: dict[str, dict[str, Any]]) -> None:
        """Take an earlier, or smaller, noise predictor of the same two other stages to guide away from (autoguidance).

        `joined_to`: their contracts. Raises UserError if it was trained against others, or predicts something else.
        """
        if self.few_steps is not None:
            self.few_steps.check_guidance(1.0, guide=True)
        stage = guide if isinstance(guide, Stage) else load_stage(guide, "noise_predictor")
        check_belonging(stage.contract, **joined_to)
        if Process.of(stage.contract) != self.process:
            raise UserError(
                f"guide {stage.folder}: predicts {Process.of(stage.contract).kind}, but the noise predictor "
                f"{self.process.kind}; give a snapshot of the same training"
            )
        self.register_modules(guide=stage.parts["noise_predictor"])

    def use_sampler(self, name: str) -> None:
        """Step by another sampler: euler, heun, dpm++, unipc, and on a discrete schedule ddim, ddpm too.

        Raises UserError for one that does not fit what the network predicts.
        """
        if self.latent_generator is not None:
            raise UserError(
                f"sampler {name}: a {self.latent_generator.family} generator takes no denoising steps; leave it out"
            )
        scheduler = samplers.build(name, self.process)
        self.check_scheduler(scheduler)
        self.register_modules(scheduler=scheduler)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """diffusers'. Raises UserError with a generator of another family, which is on its device as a whole."""
        self._check_whole("enable_sequential_cpu_offload")
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """diffusers'. Raises UserError with a generator of another family, which is on its device as a whole."""
        self._check_whole("enable_group_offload")
        super().enable_group_offload(*args, **kwargs)

    def _check_whole(self, call: str) -> None:
        if (generator := self.latent_generator) is not None:
            raise UserError(
                f"{call}: a {generator.family} generator is on its device as a whole; use enable_model_cpu_offload()"
            )

    def accelerate(self) -> None:
        """Make the noise predictor, the guide and what a generator has of their kind faster on a CPU, by C kernels for
        PRX, compiled here (seconds). Where one stays as it is, a remark says why."""
        generator = self.latent_generator
        networks = [("noise_predictor", self.noise_predictor), ("guide", self.guide)]
        networks += [] if generator is None else [("latent_generator", one) for one in generator.noise_predictors]
        for name, network in networks:
            if network is not None and (reason := accelerate(network)) is not None:
                remark(f"{name}: not accelerated, {reason}")

    def load_lora(self, folder: str | Path) -> None:
        """Merge the LoRA in `folder` (peft's or diffusers' files) into the noise predictor. Raises UserError if it does
        not fit."""
        network = unwrapped(self.noise_predictor)
        lora.load(network, folder, self.process.model_dump())
        lora.merge(network)
        self._record(file_hash(lora.weights_file(folder)))

    @classmethod
    def from_run(cls, run: str | Path, predictor: str = "noise_predictor", **kwargs: Any) -> Self:
        """Join the exported stages of a run folder, `RUN/STAGE/final`.

        predictor: the stage that draws the latents: stage 3, one tuned from it (few_steps, reward), or a generator of
        another family (autoregressive, normalizing_flow, gan, vae, regression, prior).
        """
        if predictor not in DRAWERS:
            check_choice("predictor", predictor, DRAWERS)
        first, second, third = (Path(run) / stage / "final" for stage in (*KINDS[:2], predictor))
        return cls.from_stages(first, second, third, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Another pipeline of the same parts, settings and tiles; `kwargs` replace some of them, or give a `dtype`.

        diffusers' own would leave out a network whose class is not the very one of the annotation, and cast the parts,
        which are `pipeline`'s too, to float32. Raises UserError for a pipeline of other parts.
        """
        names, settings = cls._get_signature_keys(cls)
        dtypes = [kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs]
        config: Any = pipeline.config
        parts = {name: part for name, part in pipeline.components.items() if name in names}
        given = parts | {name: config[name] for name in settings if name in config} | kwargs
        optional = set(cls._optional_components) - (set() if given.get("latent_generator") else {*_DENOISING})
        if missing := sorted(set(names) - optional - set(given)):
            raise UserError(f"from_pipe: {type(pipeline).__name__} has no {missing[0]}; give a pipeline of sd_mini's")
        joined = cls(**given)
        joined.tile = getattr(pipeline, "tile", None)
        joined.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        for dtype in dtypes:
            joined.to(dtype=dtype)
        return joined

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> Self:  # ty: ignore[incompatible-method-override]
        """Load what `save_pretrained` wrote: a folder, or a hub name such as user/name. Weights come from safetensors
        only.

        kwargs: diffusers', as dtype, variant, device_map and components; of a hub name also revision, token, cache_dir,
        local_files_only and force_download.

        Raises UserError, one line, where a file is not the one that was saved (its manifest says so; an older folder
        has none), and for a tensor that a component's weights lack.
        """
        hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
        is_from_hub = is_hub_name(folder)
        folder = snapshot(str(folder), hub, _PARTS) if is_from_hub else Path(folder)
        if not (folder / PIPELINE_MARK).is_file():
            raise UserError(f"{folder}: no pipeline here ({PIPELINE_MARK} is missing); join one: sd-mini export RUN")
        # the index holds settings (steps, guidance, ...), which a user may edit
        manifest = {name: digest for name, digest in written(folder).items() if digest and name != PIPELINE_MARK}
        if is_from_hub:  # a card and the code of a standalone folder were not asked for
            manifest = {name: digest for name, digest in manifest.items() if any(fnmatch(name, p) for p in _PARTS)}
        mend = f"the pipeline cannot be loaded: save it again, or delete {MANIFEST} if you changed it yourself"
        check_files(folder, manifest, mend)
        kwargs.setdefault("use_safetensors", True)
        kwargs.setdefault("variant", pipeline_variant(folder))
        index = own_index(read_json(folder / PIPELINE_MARK) or {})
        if index.get("latent_generator", [None])[0] is None and (lacking := sorted(_DENOISING - {*index, *kwargs})):
            raise UserError(
                f"{folder / PIPELINE_MARK}: names no {lacking[0]}; join the pipeline again: sd-mini export RUN"
            )
        return super().from_pretrained(folder, **kwargs | load_components(folder, kwargs))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """diffusers', but a standalone folder's own code is left alone: its classes are here."""
        loaded: Any = super().load_config(*args, **kwargs)
        return own_index(loaded) if isinstance(loaded, dict) else loaded

    # ty: ignore[incompatible-method-override]
    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """diffusers', and a manifest of the files that were written, by which `from_pretrained` checks them."""
        if self.get_list_adapters()["noise_predictor"]:
            raise UserError(
                "save_pretrained: LoRA adapters are loaded, which have no place in the files; unload_lora_weights() "
                "first, after fuse_lora() if they are to stay in the weights"
            )
        push = {name: kwargs.pop(name) for name in _PUSH if name in kwargs}
        folder = Path(save_directory)
        before, listed = _states(folder), written(folder)
        super().save_pretrained(save_directory, *args, **kwargs)
        after = _states(folder)
        files = {}
        for name in sorted(after):
            if after[name] != before.get(name):
                usual_modes(folder / name)
                files[name] = file_hash(folder / name)
            elif listed.get(name):  # as of another variant
                files[name] = listed[name]
        atomic_text(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")
        if push.pop("push_to_hub", False):  # after the manifest, which diffusers would leave behind
            push.setdefault("repo_id", folder.name)
            upload(folder, [*files, MANIFEST], **push)

    def save(self, folder: str | Path) -> None:
        """`save_pretrained`, but all or nothing: a folder that is there is only replaced by a complete one.

        Files in it that are not a pipeline's stay (a user's notes). Raises UserError, one line, if it cannot be
        written.
        """
        with written_to(Path(folder)), atomic_folder(Path(folder), keep=True) as partial:
            self.save_pretrained(partial)


def _third_kind(folder: Path) -> str:
    """Of a third stage's folder: a generator's where there is one, else a noise predictor's is expected."""
    found = read_json(folder / CONTRACT) or {}
    return GENERATOR if found.get("kind") == GENERATOR else "noise_predictor"


def _states(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells whether a file was written anew, by relative path."""
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
