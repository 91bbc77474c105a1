"""Data parallelism over the cores of one process: parts of a batch in a thread each, as one step of autograd.

Many short operations use two cores badly: each is over before the second thread has begun. Two halves of the batch, a
thread each, meet once a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd_mini.cpu.threads import cores, in_threads

Named = dict[str, Tensor]


def parts_of(module: nn.Module, rows: int) -> int:
    """The number of parts that a batch of `rows` may be split into without changing the result of `module`.

    1 unless the weights are plain float32 tensors on the CPU, and nothing in the module is compiled, hooked,
    checkpointed, random (dropout) or dependent on the whole batch (batch norm).
    """
    is_plain = all(
        type(p) in (nn.Parameter, Tensor) and p.device.type == "cpu" and p.dtype == torch.float32
        for p in module.parameters()
    )
    can_split = is_plain and not torch.is_autocast_enabled("cpu") and not any(map(_needs_whole_batch, module.modules()))
    return max(1, min(cores(), rows)) if can_split else 1


def _needs_whole_batch(module: nn.Module) -> bool:
    rates = [value for name, value in vars(module).items() if "drop" in name or name == "p"]
    drops = module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)
    drops |= module.training and isinstance(module, nn.modules.batchnorm._BatchNorm)
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(drops or hooked or module._compiled_call_impl or getattr(module, "gradient_checkpointing", False))


def side_by_side(
    call: Callable[..., Named], parts: Sequence[Named], common: Named, weights: Sequence[Tensor]
) -> list[Named]:
    """`call(**common, **part)` for each part, each in a thread of its own; a single part is a plain call.

    Gradients reach `parts`, `common` and `weights`: all trained tensors that `call` reads beside its arguments.
    """
    if len(parts) == 1:
        return [call(**common, **parts[0])]
    output_names: list[str] = []
    part_tensors = [value for part in parts for value in part.values()]
    layout = len(parts), list(common), list(parts[0]), output_names
    outputs = _Parts.apply(call, *layout, *common.values(), *part_tensors, *weights)
    n = len(output_names)
    return [dict(zip(output_names, outputs[i * n : (i + 1) * n], strict=True)) for i in range(len(parts))]


_PLAIN = 5  # leading arguments of `_Parts.forward` that are no tensors


class _Parts(torch.autograd.Function):
    """Tensors: `common`, then the inputs of each part, then the weights. Outputs: those of each part in turn."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Callable,
        count: int,
        common: list[str],
        inputs: list[str],
        output_names: list[str],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        needs_grad = ctx.needs_input_grad[_PLAIN:]
        edges = [len(common) + number * len(inputs) for number in range(count + 1)]

        def run(number: int) -> tuple[list[Tensor], list[int], Named]:
            """One part, with a graph of its own: its leaves, their indices among `tensors`, its outputs."""
            places = [*range(edges[0]), *range(edges[number], edges[number + 1])]
            arguments = [tensors[i].detach().requires_grad_(needs_grad[i]) for i in places]
            with torch.set_grad_enabled(any(needs_grad)):
                outputs = call(**dict(zip([*common, *inputs], arguments, strict=True)))
            weights = range(edges[-1], len(tensors))
            read = [*zip(places, arguments, strict=True), *((i, tensors[i]) for i in weights)]
            leaves = [(i, x) for i, x in read if needs_grad[i]]
            return [x for _, x in leaves], [i for i, _ in leaves], outputs

        runs = in_threads([partial(run, number) for number in range(count)])
        output_names += runs[0][2]
        ctx.runs = [(leaves, places, [outputs[name] for name in output_names]) for leaves, places, outputs in runs]
        ctx.set_materialize_grads(False)
        flat = [x for *_, outputs in ctx.runs for x in outputs]
        detached = tuple(x.detach() for x in flat)
        ctx.mark_non_differentiable(*(y for x, y in zip(flat, detached, strict=True) if not x.requires_grad))
        return detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        runs, ctx.runs = ctx.runs, None
        if runs is None:
            raise RuntimeError("nothing is kept for a second backward pass through the same forward")
        n = len(gradients) // len(runs)
        calls = [
            partial(_part_gradients, leaves, outputs, gradients[i * n : (i + 1) * n])
            for i, (leaves, _, outputs) in enumerate(runs)
        ]
        total: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        # Sum over the parts, always in this order: the same rounding.
        for (_, places, _), part_gradients in zip(runs, in_threads(calls), strict=True):
            for place, gradient in zip(places, part_gradients, strict=True):
                before = total[_PLAIN + place]
                if gradient is not None:
                    total[_PLAIN + place] = gradient if before is None else before + gradient
        return tuple(total)


def _part_gradients(
    leaves: list[Tensor], outputs: list[Tensor], gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of one part's leaves; None where an output's gradient does not reach."""
    reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
    if not reached:
        return (None,) * len(leaves)
    return torch.autograd.grad(
        [outputs[i] for i in reached], leaves, [gradients[i] for i in reached], allow_unused=True
    )
