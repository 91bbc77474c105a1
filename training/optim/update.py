"""One update of the weights, by Muon and AdamW, and of their averages.

Under FSDP2 a tensor is a DTensor, of which each process holds a part: `local_part`, `full_tensor`, `part_like` and
`full_of_parts` are all that treats it otherwise than a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

from sd_mini.cpu.threads import cores, in_threads
from training.optim.ema import WIDTHS, gamma_of_width

# the quintic of the Newton-Schulz iteration that drives every singular value towards 1: Jordan et al. 2024
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95  # Nesterov's

Groups = list[tuple[dict[str, Any], list[nn.Parameter]]]


def local_part(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this process, a view of its memory. A plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on every process; a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """The part of a full tensor that this process would hold were it split as `like` is."""
    if not isinstance(like, DTensor):
        return full
    # every process has the same full tensor, so nothing needs to be sent
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def full_of_parts(part: Tensor, like: Tensor) -> Tensor:
    """The full tensor whose part on each process is `part`, split as `like` is; a collective."""
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()


def orthogonalise(matrices: Tensor, half: bool = False) -> Tensor:
    """(N, m, n) => the nearest semi-orthogonal matrices up to singular values within about [0.7, 1.2], in their dtype.

    The zeroth power of each matrix by Newton-Schulz, Jordan et al. 2024 ("Muon"); all N in one product. `half`: by
    products in bfloat16, as there.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]  # x x^T is to be the smaller of the two squares
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = _newton_schulz_bfloat16(x.bfloat16()).to(x.dtype) if half else _newton_schulz_float32(x)
    return x.mT if tall else x


def _newton_schulz_bfloat16(x: Tensor) -> Tensor:
    """Each iteration starts from the matrices themselves, so the next one corrects its rounding."""
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_float32(x: Tensor) -> Tensor:
    """Every iteration multiplies by a polynomial of x x^T from the left, so the small square matrices are iterated and
    x is multiplied once: a third less work. Needs float32: bfloat16 would lose the small singular values."""
    a, b, c = _QUINTIC
    square = x @ x.mT
    unit = torch.eye(square.shape[-1], dtype=x.dtype, device=x.device)
    left = None
    for iteration in range(_ITERATIONS):
        # p(x x^T) = a I + b x x^T + c (x x^T)^2
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c).add_(unit, alpha=a)
        left = polynomial if left is None else polynomial @ left
        if iteration < _ITERATIONS - 1:
            square = polynomial @ square @ polynomial
    return left @ x


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups that say `muon=True`, fused AdamW for the others, under one learning rate schedule.

    The matrices of a Muon group are of one shape and are orthogonalised together; `half`: by products in bfloat16, as
    `torch.optim.Muon` does one by one.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], weight_decay: float, half: bool = False
    ):
        defaults = {"lr": 1e-3, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8}
        # "fused" makes Optimizer.load_state_dict keep AdamW's step count on the parameter's device
        super().__init__(groups, {**defaults, "fused": True, "muon": False})
        self.half = half

    def create_state(self) -> None:
        """Zero state for every parameter; to be called once, after they were moved and sharded."""
        for group in self.param_groups:
            for parameter in group["params"]:
                names = ("momentum",) if group["muon"] else ("exp_avg", "exp_avg_sq")
                state = {name: torch.zeros_like(parameter, requires_grad=False) for name in names}
                if not group["muon"]:
                    state["step"] = torch.zeros((), device=local_part(parameter).device)
                self.state[parameter] = state

    @torch.no_grad()
    def step(  # ty: ignore[incompatible-method-override]
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        # on a CPU each thread updates its own parameters
        count = _thread_count([p for _, trained in groups for p in trained])
        in_threads([partial(self._step, batch) for batch in split_by_work(groups, count)])
        return loss

    def _step(self, groups: Groups) -> None:
        for group, trained in groups:
            if trained and group["muon"]:
                self._muon(group, trained)
            elif trained:
                self._adamw(group, trained)

    def _muon(self, group: dict[str, Any], trained: list[nn.Parameter]) -> None:
        # Nesterov momentum.
        momenta = [local_part(self.state[p]["momentum"]) for p in trained]
        gradients = [local_part(p.grad) for p in trained if p.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, _MOMENTUM)
        # Orthogonalise; a sharded matrix is gathered first, as its zeroth power is no function of its parts.
        matrices = torch.stack([full_of_parts(a, p).flatten(1) for a, p in zip(ahead, trained, strict=True)])
        updates = orthogonalise(matrices, self.half)
        rows, columns = updates.shape[1:]

        # Decoupled weight decay, then the step; a tall matrix takes a longer one, so that its outputs change as much
        # as a wide one's (Jordan et al. 2024).
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        weights = [local_part(p) for p in trained]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        parts = [part_like(update.reshape(p.shape), p) for update, p in zip(updates, trained, strict=True)]
        torch._foreach_add_(weights, parts, alpha=-rate)

    def _adamw(self, group: dict[str, Any], trained: list[nn.Parameter]) -> None:
        states = [self.state[p] for p in trained]
        beta1, beta2 = group["betas"]
        adamw(
            [local_part(p) for p in trained],
            [local_part(p.grad) for p in trained if p.grad is not None],
            [local_part(s["exp_avg"]) for s in states],
            [local_part(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _thread_count(trained: list[nn.Parameter]) -> int:
    """As many as there are cores, for plain tensors on a CPU; else 1, as a GPU or a collective needs one order."""
    plain = all(p.device.type == "cpu" and local_part(p) is p for p in trained)
    return cores() if plain else 1


def split_by_work(groups: Groups, count: int) -> list[Groups]:
    """Each group's parameters in `count` batches of about the same work: the most expensive first, each to the batch
    with the least work so far."""
    batches: list[Groups] = [[(group, []) for group, _ in groups] for _ in range(count)]
    work = [0] * count
    costs = [(_cost(group, p), number, p) for number, (group, trained) in enumerate(groups) for p in trained]
    for cost, number, parameter in sorted(costs, key=lambda each: -each[0]):
        least = work.index(min(work))
        work[least] += cost
        batches[least][number][1].append(parameter)
    return batches


def _cost(group: dict[str, Any], parameter: nn.Parameter) -> int:
    """Multiplications of one update of `parameter`, roughly."""
    if not group["muon"]:
        return 10 * parameter.numel()
    small, large = sorted((len(parameter), parameter.numel() // len(parameter)))
    return small**2 * (4 * _ITERATIONS * small + 2 * large)


class PowerEMA:
    """Averages of one set of tensors, one for each of WIDTHS; the trained tensors themselves are never touched.

    An average is as wide, relative to the steps so far, as its width says (its standard deviation over the step): it
    forgets the random start by itself and needs no warm-up. EDM2, sec. 3.1.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.averages = {width: [t.detach().clone() for t in tensors] for width in WIDTHS}
        self._gammas = {width: gamma_of_width(width) for width in WIDTHS}

    @torch.no_grad()
    def update(self, tensors: Sequence[Tensor], step: int, before: int) -> None:
        """Fold in the tensors after optimizer update number `step`, from 1; the last fold was after update `before`.

        The tensors stand for all updates in between: an average updated every fourth step keeps its profile, in steps
        of four.
        """
        weights = [local_part(t.detach()) for t in tensors]
        for width, average in self.averages.items():
            # beta(t) = (1 - 1/t)^(gamma + 1) an update, EDM2, eq. 127; the product over those since `before`
            beta = (before / step) ** (self._gammas[width] + 1)
            torch._foreach_lerp_([local_part(t) for t in average], weights, 1 - beta)
