"""A pass in parts of its batch, one a core: a step of autograd made of several, whose gradients are added up."""

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
    """In how many parts a batch of so many rows may go through `module` at the same time and come out as it would in
    one: 1 unless it lies on the CPU, in float32 and not compiled, and nothing in it draws random numbers or computes
    its forward pass a second time."""
    plain = all(
        type(p) in (nn.Parameter, Tensor) and p.device.type == "cpu" and p.dtype == torch.float32
        for p in module.parameters()
    )
    simple = plain and not torch.is_autocast_enabled("cpu") and not any(map(_is_bound, module.modules()))
    return max(1, min(cores(), rows)) if simple else 1


def _is_bound(module: nn.Module) -> bool:
    """By random numbers, statistics of the batch, hooks or a compiler to see the whole batch at once."""
    rates = [value for name, value in vars(module).items() if "drop" in name or name == "p"]
    drops = module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)
    drops |= module.training and isinstance(module, nn.modules.batchnorm._BatchNorm)
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(drops or hooked or module._compiled_call_impl or getattr(module, "gradient_checkpointing", False))


def side_by_side(
    call: Callable[..., Named], parts: Sequence[Named], common: Named, weights: Sequence[Tensor]
) -> list[Named]:
    """`call(**common, **part)` for each part, in a thread of its own. Gradients go to both, and to `weights`: all that
    is trained of what `call` reads beside its arguments. One part is a plain call."""
    if len(parts) == 1:
        return [call(**common, **parts[0])]
    names: list[str] = []
    of_parts = [value for part in parts for value in part.values()]
    given = len(parts), list(common), list(parts[0]), names
    flat = _Parts.apply(call, *given, *common.values(), *of_parts, *weights)
    count = len(names)
    return [dict(zip(names, flat[i * count : (i + 1) * count], strict=True)) for i in range(len(parts))]


_PLAIN = 5  # arguments that are no tensors


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Callable, count: int, common: list[str], own: list[str], names: list[str], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[_PLAIN:]
        edges = [len(common) + number * len(own) for number in range(count + 1)]

        def run(number: int) -> tuple[list[Tensor], list[int], Named]:
            places = [*range(edges[0]), *range(edges[number], edges[number + 1])]
            given = [tensors[i].detach().requires_grad_(needed[i]) for i in places]
            with torch.set_grad_enabled(any(needed)):
                made = call(**dict(zip([*common, *own], given, strict=True)))
            weights = range(edges[-1], len(tensors))
            read = [*zip(places, given, strict=True), *((i, tensors[i]) for i in weights)]
            wanted = [(i, x) for i, x in read if needed[i]]
            return [x for _, x in wanted], [i for i, _ in wanted], made

        runs = in_threads([partial(run, number) for number in range(count)])
        names += runs[0][2]
        ctx.runs = [(wanted, places, [made[name] for name in names]) for wanted, places, made in runs]
        ctx.set_materialize_grads(False)
        flat = [x for *_, made in ctx.runs for x in made]
        outputs = tuple(x.detach() for x in flat)
        ctx.mark_non_differentiable(*(y for x, y in zip(flat, outputs, strict=True) if not x.requires_grad))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        runs, ctx.runs = ctx.runs, None
        if runs is None:
            raise RuntimeError("nothing is kept for a second backward pass through the same forward")
        count = len(gradients) // len(runs)
        calls = [
            partial(_back, wanted, made, gradients[i * count : (i + 1) * count])
            for i, (wanted, _, made) in enumerate(runs)
        ]
        total: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for (_, places, _), found in zip(runs, in_threads(calls), strict=True):  # always in this order: the same sums
            for place, gradient in zip(places, found, strict=True):
                before = total[_PLAIN + place]
                if gradient is not None:
                    total[_PLAIN + place] = gradient if before is None else before + gradient
        return tuple(total)


def _back(wanted: list[Tensor], made: list[Tensor], gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
    if not reached:
        return (None,) * len(wanted)
    outputs, given = [made[i] for i in reached], [gradients[i] for i in reached]
    return torch.autograd.grad(outputs, wanted, given, allow_unused=True)
