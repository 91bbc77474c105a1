"""The optimizer: AdamW, and by config Muon for the matrices of the repeated blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from diffusers.optimization import get_scheduler
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

from sd_mini.config import Config
from sd_mini.cpu.threads import cores, in_threads
from sd_mini.errors import UserError
from training.distributed.sharding import joined, own_part, part_like

# the quintic of the Newton-Schulz iteration that drives every singular value towards 1: Jordan et al. 2024
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95  # Nesterov's

Groups = list[tuple[dict[str, Any], list[nn.Parameter]]]


def orthogonalise(matrices: Tensor, half: bool = False) -> Tensor:
    """(N, m, n) => the nearest semi-orthogonal matrices up to singular values within about [0.7, 1.2], in their dtype.

    The zeroth power of each matrix by Newton-Schulz, Jordan et al. 2024 ("Muon"); all N in one product. `half`: by
    products in bfloat16, as there.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = _levelled(x.bfloat16()).to(x.dtype) if half else _levelled_by_squares(x)
    return x.mT if tall else x


def _levelled(x: Tensor) -> Tensor:
    """Each step from the matrices themselves, so that the next one mends what it is rounded by."""
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _levelled_by_squares(x: Tensor) -> Tensor:
    """Every step is a polynomial of x x^T from the left, so it is the small square matrices that are iterated: a third
    less work, and too much of small singular values lost in any coarser precision."""
    a, b, c = _QUINTIC
    square = x @ x.mT
    unit = torch.eye(square.shape[-1], dtype=x.dtype, device=x.device)
    left = None
    for iteration in range(_ITERATIONS):
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c).add_(unit, alpha=a)
        left = polynomial if left is None else polynomial @ left
        if iteration < _ITERATIONS - 1:
            square = polynomial @ square @ polynomial
    return left @ x


class OptimizerConfig(Config):
    """How fast a player learns."""

    lr: float = Field(1e-3, gt=0)
    """peak learning rate"""
    muon_lr: float | None = Field(None, gt=0)
    """peak learning rate of Muon, which then trains the matrices of the blocks; null: AdamW trains everything"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """how the learning rate goes down to 0 after the warm-up ("constant" does not)"""
    warmup_steps: int = Field(50, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    """gradients are scaled down to this L2 norm"""


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups that say `muon=True`, fused AdamW for the others, under one learning rate schedule.

    The matrices of a Muon group are of one shape and are orthogonalised together; `half`: by products in bfloat16, as
    `torch.optim.Muon` does one by one.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], weight_decay: float, half: bool = False
    ):
        shared = {"lr": 1e-3, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8}
        # "fused" tells Optimizer.load_state_dict that AdamW's step count lives on the parameter's device
        super().__init__(groups, {**shared, "fused": True, "muon": False})
        self.half = half

    def create_state(self) -> None:
        """Give every parameter its state. Once, when the parameters are where and how they will be trained."""
        for group in self.param_groups:
            for parameter in group["params"]:
                names = ("momentum",) if group["muon"] else ("exp_avg", "exp_avg_sq")
                state = {name: torch.zeros_like(parameter, requires_grad=False) for name in names}
                if not group["muon"]:
                    state["step"] = torch.zeros((), device=own_part(parameter).device)
                self.state[parameter] = state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        parts = _parts([p for _, trained in groups for p in trained])
        in_threads([partial(self._step, share) for share in _shares(groups, parts)])
        return loss

    def _step(self, groups: Groups) -> None:
        for group, trained in groups:
            if trained and group["muon"]:
                self._muon(group, trained)
            elif trained:
                self._adamw(group, trained)

    def _muon(self, group: dict[str, Any], trained: list[nn.Parameter]) -> None:
        momenta = [own_part(self.state[p]["momentum"]) for p in trained]
        gradients = [own_part(p.grad) for p in trained]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, _MOMENTUM)
        # a matrix is orthogonalised whole, so what FSDP2 has split is joined for it
        matrices = torch.stack([joined(a, p).flatten(1) for a, p in zip(ahead, trained, strict=True)])
        updates = orthogonalise(matrices, self.half)
        rows, columns = updates.shape[1:]
        # so that a tall matrix changes its outputs as much as a wide one: Jordan et al. 2024
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        weights = [own_part(p) for p in trained]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        parts = [part_like(update.reshape(p.shape), p) for update, p in zip(updates, trained, strict=True)]
        torch._foreach_add_(weights, parts, alpha=-rate)

    def _adamw(self, group: dict[str, Any], trained: list[nn.Parameter]) -> None:
        states = [self.state[p] for p in trained]
        beta1, beta2 = group["betas"]
        adamw(
            [own_part(p) for p in trained],
            [own_part(p.grad) for p in trained],
            [own_part(s["exp_avg"]) for s in states],
            [own_part(s["exp_avg_sq"]) for s in states],
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


def _parts(trained: list[nn.Parameter]) -> int:
    """In how many parts an update is made side by side: as many as there are cores, where the work is on the CPU and no
    process waits for another in it."""
    plain = all(p.device.type == "cpu" and own_part(p) is p for p in trained)
    return cores() if plain else 1


def _shares(groups: Groups, parts: int) -> list[Groups]:
    """Each group's parameters in so many parts of about the same work, the largest given out first."""
    shares: list[Groups] = [[(group, []) for group, _ in groups] for _ in range(parts)]
    work = [0] * parts
    costs = [(_cost(group, p), number, p) for number, (group, trained) in enumerate(groups) for p in trained]
    for cost, number, parameter in sorted(costs, key=lambda each: -each[0]):
        least = work.index(min(work))
        work[least] += cost
        shares[least][number][1].append(parameter)
    return shares


def _cost(group: dict[str, Any], parameter: nn.Parameter) -> int:
    """About how many multiplications an update of it takes."""
    if not group["muon"]:
        return 10 * parameter.numel()
    small, large = sorted((len(parameter), parameter.numel() // len(parameter)))
    return small**2 * (4 * _ITERATIONS * small + 2 * large)


def build(module: nn.Module, config: OptimizerConfig, half: bool = False) -> MuonAdamW:
    """The optimizer of what `module` trains; with `muon_lr` the matrices of its blocks go by Muon at that rate, `half`:
    in bfloat16.

    Raises ValueError for a `muon_lr` without any such matrix.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    muon_lr = config.muon_lr
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in block_matrices(module) if muon_lr is not None else []:
        by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
    if muon_lr is not None and not by_shape:
        raise UserError(
            f"train.muon_lr {muon_lr:g}: expected a network with linear layers or convolutions in its blocks, and here "
            "are none to train by Muon; leave it out"
        )
    taken = {id(p) for group in by_shape.values() for p in group}
    groups = [{"params": [p for p in trained if id(p) not in taken], "lr": config.lr}]
    groups += [{"params": group, "lr": muon_lr, "muon": True} for group in by_shape.values()]
    return MuonAdamW([group for group in groups if group["params"]], config.betas, config.weight_decay, half)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, steps: int) -> LambdaLR:
    """diffusers' schedule over so many updates. Accelerate would step it once a process, so it is not prepared."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)


def block_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon is meant for: of linear layers and convolutions inside repeated blocks (`nn.ModuleList`).
    A kernel is one matrix, its rows the outputs: Jordan et al. 2024.

    Not what turns time into modulation, and neither embeddings nor the layers before and behind the blocks, whose rows
    are no directions in the blocks' space.
    """
    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    found: dict[int, nn.Parameter] = {}
    for name, layer in module.named_modules():
        around = [blocks for blocks in lists if name.startswith(f"{blocks}.")]
        if not around or not isinstance(layer, nn.Linear | nn.Conv2d) or not layer.weight.requires_grad:
            continue
        within = name.removeprefix(min(around, key=len))  # its name from the outermost list on
        if not any(word in within for word in ("modulation", "emb", "norm")):
            found[id(layer.weight)] = layer.weight
    return list(found.values())
