"""One checked call of a pipeline: its arguments, checked before the prompts are encoded, and its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from threading import get_ident
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from sd_mini.config import check_choice
from sd_mini.errors import UserError
from sd_mini.sampling.loop import Generators, Guidance, as_generators, number
from sd_mini.texts import check_text

if TYPE_CHECKING:
    from sd_mini.generators.base import LatentGenerator
    from sd_mini.pipelines.text_to_image import Pipeline

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class Request:
    """The arguments of `Pipeline.__call__`, defaults filled in from the pipeline and everything checked.

    Raises UserError, one line, for anything no picture can be made from.
    """

    pipeline: Pipeline
    prompt: Any
    negative_prompt: Any
    height: Any
    width: Any
    num_inference_steps: Any
    guidance_scale: Any
    guidance_rescale: Any
    guidance_interval: Any
    num_images_per_prompt: Any
    generator: Generators
    latents: Any
    prompt_embeds: Any
    prompt_mask: Any
    negative_prompt_embeds: Any
    negative_prompt_mask: Any
    autoguidance: bool
    strict: bool
    output_type: str
    callback_on_step_end_tensor_inputs: Sequence[str]

    def __post_init__(self):
        config = self.pipeline.config
        # numpy's numbers and arrays are as good as Python's and torch's
        self.height = config.resolution if self.height is None else number(self.height)
        self.width = config.resolution if self.width is None else number(self.width)
        steps, images = self.num_inference_steps, number(self.num_images_per_prompt)
        self.num_inference_steps = config.default_steps if steps is None else number(steps)
        self.num_images_per_prompt, self.generator = images, as_generators(self.generator)
        for name in ("latents", "prompt_embeds", "prompt_mask", "negative_prompt_embeds", "negative_prompt_mask"):
            setattr(self, name, as_tensor(getattr(self, name)))
        self.guidance = self._guidance()

        check_texts(self.prompt, self.negative_prompt, self.prompt_embeds)
        for embeds, mask in (self.embeds, self.negative_embeds):
            check_embeds(embeds, mask, *self.pipeline.embeds_shape)
        self.negative_prompt = negative_or_none(self.negative_prompt)
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise UserError("expected negative_prompt or negative_prompt_embeds, got both")
        check_counts(num_inference_steps=self.num_inference_steps, num_images_per_prompt=images)
        shape = self.pipeline.latent_shape(self.height, self.width)
        if self.latents is not None:
            check_latents(self.latents, shape)
        self._check_autoguidance()
        if self.pipeline.latent_generator is not None:
            self._check_generator(self.pipeline.latent_generator, shape)
        if (few_steps := self.pipeline.few_steps) is not None:
            is_negative = self.negative_prompt is not None or self.negative_prompt_embeds is not None
            few_steps.check_steps(self.num_inference_steps)
            few_steps.check_guidance(self.guidance.scale, negative_prompt=is_negative, autoguidance=self.autoguidance)
        if self.output_type not in OUTPUT_TYPES:
            check_choice("output_type", self.output_type, OUTPUT_TYPES)
        known = self.pipeline._callback_tensor_inputs
        for name in (name for name in self.callback_on_step_end_tensor_inputs if name not in known):
            check_choice("callback_on_step_end_tensor_inputs", name, known)

    @classmethod
    def of(cls, pipeline: Pipeline, arguments: Mapping[str, Any]) -> Request:
        """From the local variables of a call, which hold its arguments by name."""
        names = [field.name for field in fields(cls)][1:]
        return cls(pipeline, **{name: arguments[name] for name in names})

    @property
    def embeds(self) -> tuple[Tensor | None, Tensor | None]:
        return self.prompt_embeds, self.prompt_mask

    @property
    def negative_embeds(self) -> tuple[Tensor | None, Tensor | None]:
        return self.negative_prompt_embeds, self.negative_prompt_mask

    def _guidance(self) -> Guidance:
        config, interval = self.pipeline.config, self.guidance_interval
        scale = config.default_guidance if self.guidance_scale is None else self.guidance_scale
        interval = config.default_interval if interval is None else interval
        interval = interval.tolist() if isinstance(interval, np.ndarray) else interval
        if not isinstance(interval, tuple | list) or len(interval) != 2:
            raise UserError(f"guidance_interval {interval!r}: expected two noise levels from 0 to 1, the lower first")
        return Guidance(scale, self.guidance_rescale, *interval)

    def _check_generator(self, generator: LatentGenerator, shape: tuple[int, int, int]) -> None:
        """Raises UserError for what a generator without denoising steps has no use for."""
        family, config = generator.family, self.pipeline.config
        generator.check_shape(shape)
        generator.check_guidance(self.guidance.scale)
        is_negative = self.negative_prompt is not None or self.negative_prompt_embeds is not None
        interval = self.guidance.low, self.guidance.high
        for name, is_given in (
            (f"num_inference_steps {self.num_inference_steps}", self.num_inference_steps != config.default_steps),
            (f"guidance_interval {interval}", interval != (0, 1)),
            (f"guidance_rescale {self.guidance.rescale:g}", self.guidance.rescale != 0),
            ("latents", self.latents is not None),
            ("negative_prompt", is_negative and not generator.is_guided),
        ):
            if is_given:
                raise UserError(f"{name}: a {family} generator takes no such thing; leave it out")

    def _check_autoguidance(self) -> None:
        if not self.autoguidance:
            return
        if self.negative_prompt is not None or self.negative_prompt_embeds is not None:
            raise UserError("autoguidance leads away from the guide, not from a negative prompt; leave one of them out")
        if self.pipeline.guide is None:
            raise UserError(
                "autoguidance: this pipeline has no guide; join one: Pipeline.from_run(RUN, guide=FOLDER), or "
                "sd-mini export RUN --guide FOLDER"
            )


def as_tensor(value: Any) -> Any:
    """A numpy array as a tensor; anything else as it is."""
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def as_list(prompt: str | Sequence[Any]) -> list[Any]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def check_texts(prompt: Any, negative_prompt: Any, prompt_embeds: Tensor | None) -> None:
    """Raises ValueError for anything but texts, and for a prompt beside its own embeddings, or neither."""
    if (prompt is None) == (prompt_embeds is None):
        raise UserError("expected either prompt or prompt_embeds, got " + ("neither" if prompt is None else "both"))
    for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if texts is not None and not isinstance(texts, str | list | tuple):
            raise UserError(f"{name} is a {type(texts).__name__}; expected text or a list of texts")
        if texts is not None and len(texts := as_list(texts)) == 0:
            raise UserError(f"{name} is an empty list; give at least one text")
        for row, text in enumerate(texts or []):
            if name == "prompt" or not is_blank(text):
                check_text(text, f"{name} {row}")


def is_blank(negative_prompt: Any) -> bool:
    """Whether there is nothing in a negative prompt: the empty box of a page is none at all."""
    return negative_prompt is None or (isinstance(negative_prompt, str) and not negative_prompt.strip())


def negative_or_none(negative_prompt: Any) -> Any:
    """A negative prompt, or a list of them; none where all are blank."""
    if isinstance(negative_prompt, list | tuple) and len(negative_prompt):
        return None if all(map(is_blank, negative_prompt)) else negative_prompt
    return None if is_blank(negative_prompt) else negative_prompt


def check_embeds(prompt_embeds: Tensor | None, prompt_mask: Tensor | None, length: int | None, dim: int | None) -> None:
    """Raises ValueError for one without the other, and for another shape than (B, length, dim) and (B, length); with
    None any length and width."""
    if (prompt_embeds is None) != (prompt_mask is None):
        raise UserError("prompt_embeds and prompt_mask: expected both, as encode_prompt gives them, or neither")
    if prompt_embeds is None or prompt_mask is None:
        return
    for name, value in (("prompt_embeds", prompt_embeds), ("prompt_mask", prompt_mask)):
        if not isinstance(value, Tensor):
            raise UserError(f"{name} is a {type(value).__name__}; expected a tensor, as encode_prompt gives it")
    shape = tuple(prompt_embeds.shape[1:])
    if len(shape) != 2 or (length is not None and shape != (length, dim)):
        raise UserError(f"prompt_embeds are {tuple(prompt_embeds.shape)}; expected (B, {length or 'L'}, {dim or 'D'})")
    if prompt_mask.shape != prompt_embeds.shape[:2]:
        raise UserError(f"prompt_mask is {tuple(prompt_mask.shape)}; expected {tuple(prompt_embeds.shape[:2])}")


def check_latents(latents: Any, shape: tuple[int, int, int]) -> None:
    """Raises ValueError for anything but numbers (B, C, h, w) for a picture's (C, h, w)."""
    expected = f"expected (B, {str(shape)[1:]}"
    if not isinstance(latents, Tensor):
        raise UserError(f"latents is a {type(latents).__name__}; {expected}, a tensor")
    if tuple(latents.shape[1:]) != shape:
        raise UserError(f"latents are {tuple(latents.shape)}; {expected}")
    if not latents.is_floating_point():
        raise UserError(f"latents are {latents.dtype}; {expected} floats")


def check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} {value!r}: expected a whole number of at least 1")


_LAST = 0  # no thread's number: the state that is read and set while no call runs
# the calls' states of each pipeline, by the calling thread; kept apart from the pipeline, which can then be pickled
_STATES: WeakKeyDictionary[Any, dict[int, dict[str, Any]]] = WeakKeyDictionary()


class CallState:
    """An attribute of a pipeline that belongs to the call which runs in this thread.

    Set in a thread in which no call runs (a page's stop button), it is set for every running call.
    """

    def __init__(self, default: Any):
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipeline: Any, owner: type | None = None) -> Any:
        if pipeline is None:
            return self
        states = _STATES.get(pipeline, {})
        return states.get(get_ident(), states.get(_LAST, {})).get(self.name, self.default)

    def __set__(self, pipeline: Any, value: Any) -> None:
        states = _STATES.setdefault(pipeline, {_LAST: {}})
        this_call = states.get(get_ident())
        for state in list(states.values()) if this_call is None else [this_call]:
            state[self.name] = value


def one_call(method: Callable) -> Callable:
    """A pipeline's method in which `CallState` attributes are this call's; the last call's stay readable after it."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        states, thread = _STATES.setdefault(self, {_LAST: {}}), get_ident()
        outer = states.get(thread)  # where a callback calls its own pipeline
        states[thread] = {}
        try:
            return method(self, *args, **kwargs)
        finally:
            states[_LAST] = states.pop(thread)
            if outer is not None:
                states[thread] = outer

    return call
