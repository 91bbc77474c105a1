import pytest
import torch
from torch import nn

from training import optimizer
from training.optimizer import OptimizerConfig


def gradients(parameters, step):
    draws = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draws)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = optimizer.orthogonalise(matrices)
    for before, after in zip(matrices, result, strict=True):
        u, _, vh = torch.linalg.svd(before, full_matrices=False)
        in_its_basis = u.mT @ after @ vh.mT
        off_diagonal = in_its_basis - in_its_basis.diagonal().diag()
        assert off_diagonal.abs().max() < 1e-4
        # 24 x 24 noise has singular values close to 0, which five iterations do not all lift to 0.7
        assert in_its_basis.diagonal().max() < 1.25 and in_its_basis.diagonal().median() > 0.6


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_muon_takes_the_steps_of_torchs_own(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = optimizer.MuonAdamW([{"params": [ours], "lr": 0.02, "muon": True}], (0.9, 0.95), 0.1)
    a.create_state()
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5)
    for step in range(5):
        gradients([ours, theirs], step)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # theirs iterates in bfloat16


def test_the_rest_goes_by_adamw_bit_for_bit():
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = optimizer.MuonAdamW([{"params": [ours], "lr": 0.01}], (0.9, 0.95), 0.1)
    a.create_state()
    b = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(5):
        gradients([ours], step)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    assert torch.equal(ours, theirs)


def test_muon_gets_the_blocks_matrices_and_nothing_else():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.modulation, self.norm = nn.Linear(8, 24), nn.Linear(8, 16), nn.LayerNorm(8)
            self.frozen = nn.Linear(8, 8).requires_grad_(False)
            self.time_emb = nn.ModuleList([nn.Linear(8, 8)])

    network = nn.Module()
    network.embedding, network.head = nn.Embedding(9, 8), nn.Linear(8, 3)
    network.blocks = nn.ModuleList(Block() for _ in range(2))
    wanted = {id(block.qkv.weight) for block in network.blocks}
    assert {id(p) for p in optimizer.block_matrices(network)} == wanted
    groups = optimizer.build(network, OptimizerConfig(lr=1e-3, muon_lr=0.02)).param_groups
    assert [(group["muon"], group["lr"]) for group in groups] == [(False, 1e-3), (True, 0.02)]
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == sum(p.requires_grad for p in network.parameters())
    assert not any(group["muon"] for group in optimizer.build(network, OptimizerConfig()).param_groups)
