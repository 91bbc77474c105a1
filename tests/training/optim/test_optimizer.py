import pytest
import torch
from torch import nn

from training.optim import optimizer, update
from training.optim.optimizer import OptimizerConfig


def gradients(parameters, step):
    draws = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draws)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = update.orthogonalise(matrices)
    for before, after in zip(matrices, result, strict=True):
        u, _, vh = torch.linalg.svd(before, full_matrices=False)
        in_its_basis = u.mT @ after @ vh.mT
        off_diagonal = in_its_basis - in_its_basis.diagonal().diag()
        assert off_diagonal.abs().max() < 1e-4
        # 24 x 24 noise has singular values close to 0, which five iterations do not all lift to 0.7
        assert in_its_basis.diagonal().max() < 1.25 and in_its_basis.diagonal().median() > 0.6


def test_orthogonalise_is_the_iteration_on_the_whole_matrix():
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    x, (a, b, c) = matrix.double() / matrix.double().norm(), update._QUINTIC
    for _ in range(update._ITERATIONS):
        x = a * x + b * x @ x.mT @ x + c * x @ x.mT @ x @ x.mT @ x
    torch.testing.assert_close(update.orthogonalise(matrix[None])[0].double(), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_orthogonalise_in_bfloat16_levels_as_the_exact_one_does(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, half = update.orthogonalise(matrices), update.orthogonalise(matrices, half=True)
    assert half.dtype == torch.float32 and 0 < (half - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-8, 1e8])
def test_orthogonalise_of_the_smallest_and_largest_is_finite(scale, half):
    matrices = scale * torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(0))
    result = update.orthogonalise(matrices, half)
    assert result.isfinite().all() and result.abs().max() < 1


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_muon_takes_the_steps_of_torchs_own(shape, half):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = update.MuonAdamW([{"params": [ours], "lr": 0.02, "muon": True}], (0.9, 0.95), 0.1, half)
    a.create_state()
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5)
    for step in range(5):
        gradients([ours, theirs], step)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # theirs iterates in bfloat16


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_is_one_matrix_whatever_its_memory_order(memory):
    start = torch.randn(16, 5, 3, 2, generator=torch.Generator().manual_seed(1))
    kernel, matrix = nn.Parameter(start.clone().to(memory_format=memory)), nn.Parameter(start.clone().flatten(1))
    for parameter in (kernel, matrix):
        one = update.MuonAdamW([{"params": [parameter], "lr": 0.02, "muon": True}], (0.9, 0.95), 0.1)
        one.create_state()
        for step in range(3):
            gradients([matrix], step)
            parameter.grad = matrix.grad.view(parameter.shape).clone()
            one.step()
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=1e-6)


def test_the_rest_goes_by_adamw_bit_for_bit():
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = update.MuonAdamW([{"params": [ours], "lr": 0.01}], (0.9, 0.95), 0.1)
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
            self.conv = nn.Conv2d(8, 8, 3)
            self.time_emb = nn.ModuleList([nn.Linear(8, 8)])

    network = nn.Module()
    network.embedding, network.head = nn.Embedding(9, 8), nn.Linear(8, 3)
    network.blocks = nn.ModuleList(Block() for _ in range(2))
    wanted = {id(weight) for block in network.blocks for weight in (block.qkv.weight, block.conv.weight)}
    assert {id(p) for p in optimizer.block_matrices(network)} == wanted
    groups = optimizer.build(network, OptimizerConfig(lr=1e-3, muon_lr=0.02)).param_groups
    assert [(group["muon"], group["lr"]) for group in groups] == [(False, 1e-3), (True, 0.02), (True, 0.02)]
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == sum(p.requires_grad for p in network.parameters())
    assert not any(group["muon"] for group in optimizer.build(network, OptimizerConfig()).param_groups)


def test_muon_without_a_matrix_to_train_is_refused():
    with pytest.raises(ValueError, match=r"train.muon_lr 0\.02: expected a network with linear layers or convolutions"):
        optimizer.build(nn.Sequential(nn.Linear(4, 4)), OptimizerConfig(muon_lr=0.02))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_parts_of_an_update_hold_each_parameter_once_and_about_as_much_work(parts):
    """Groups of one matrix, as stage 1 has many, do not all go to the first part."""
    shapes = [(32, 16), (16, 16), (48, 16), (16, 48), (64, 16), (16, 64), (20, 16), (16, 20)]
    groups = [({"muon": True}, [nn.Parameter(torch.zeros(shape))]) for shape in shapes]
    groups.append(({"muon": False}, [nn.Parameter(torch.zeros(16)) for _ in range(5)]))
    shares = update.split_by_work(groups, parts)
    found = [id(p) for share in shares for _, trained in share for p in trained]
    assert sorted(found) == sorted(id(p) for _, trained in groups for p in trained)
    work = [sum(update._cost(group, p) for group, trained in share for p in trained) for share in shares]
    dearest = max(update._cost(group, p) for group, trained in groups for p in trained)
    assert max(work) - min(work) <= dearest
