"""A discriminator that any autoencoder can be given: a GAN attached to another kind of model.

It classifies patches of pictures and of reconstructions; its logits train the decoder alone (Esser et al. 2021,
"VQGAN", section 3.1). The README's chapter on stage 2 gives the ranges of a healthy training.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sd_mini.processes import is_distributed
from training.engine.learner import Others, fixed
from training.optim.optimizer import OptimizerConfig


class AdversaryConfig(OptimizerConfig):
    """The discriminator and how it learns; it begins with `loss.adversarial`."""

    width: int = Field(64, ge=8, multiple_of=4)
    """channels of its first layer"""
    layers: int = Field(3, ge=1)
    """convolutions that halve the picture; with 3 a logit is of a patch of 70 px (Isola et al. 2017)"""
    r1: float = Field(0.1, ge=0)
    """weight of the penalty on its gradient at real pictures; 0 leaves it out"""
    adaptive: bool = True
    """scale the adversarial term so that its gradient at the decoder's last layer is as long as the other terms'"""


class Discriminator(nn.Module):
    """pixels (B, 3, H, W) => logits of patches (B, 1, h, w), above 0 for real ones.

    PatchGAN, Isola et al. 2017, section 3.2.2, with group norm, so that a picture's logits do not depend on its batch.
    """

    def __init__(self, width: int, layers: int):
        super().__init__()
        widths = [min(2**i, 8) * width for i in range(layers + 1)]
        steps: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (narrow, wide) in enumerate(pairwise(widths)):
            stride = 2 if i < layers - 1 else 1
            steps += [nn.Conv2d(narrow, wide, 4, stride, 1, bias=False), nn.GroupNorm(8, wide), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*steps, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels).float()  # the losses are means over many logits, whatever the passes' precision


def generator_losses(discriminator: nn.Module, decoded: Tensor) -> Tensor:
    """Reconstructions => (B,): minus the mean logit of their patches, without a gradient to the discriminator."""
    return -fixed(discriminator, decoded).mean((1, 2, 3))


# hinge loss, Lim & Ye 2017
def hinge_losses(real: Tensor, decoded: Tensor) -> Tensor:
    """Logits of B pictures and of their reconstructions => (B,)."""
    return ((1 - real).relu().mean((1, 2, 3)) + (1 + decoded).relu().mean((1, 2, 3))) / 2


# Mescheder et al. 2018, eq. 9, of the mean logit
def gradient_penalties(logits: Tensor, pixels: Tensor) -> Tensor:
    """Logits of `pixels` (which require a gradient) => (B,): half the squared norm of the mean logit's gradient."""
    (slope,) = torch.autograd.grad(logits.mean((1, 2, 3)).sum(), pixels, create_graph=True)
    return slope.square().sum((1, 2, 3)) / 2


def balance(others: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Losses (b,) of the other terms and of the adversarial one => the ratio of their gradients' norms at the last
    layer, at most 10,000.

    Esser et al. 2021, eq. 7, with the constants of its authors' code. The means are over all processes' pictures.
    """
    if isinstance(others, FakeTensor):  # FLOPs are counted on one process, without collectives
        return others.new_ones(())
    pulls = [torch.autograd.grad(part.sum(), last_layer, retain_graph=True)[0] for part in (others, adversarial)]
    count = others.new_tensor(float(len(others)))
    if is_distributed():
        for summed in (*pulls, count):
            dist.all_reduce(summed)
    long, short = (pull.norm() / count for pull in pulls)
    return (long / (short + 1e-4)).clamp(max=1e4).detach()


class DiscriminatorObjective(nn.Module):
    """pixels => hinge losses (b,) of the pictures and of their reconstructions, plus the R1 penalty.

    It takes the inputs of the autoencoder's objective, whose reconstructions it is trained on.
    """

    def __init__(self, discriminator: Discriminator, autoencoder_objective: nn.Module, r1: float):
        super().__init__()
        self.discriminator, self.r1 = discriminator, r1
        self.others = Others([autoencoder_objective])

    def forward(self, pixels: Tensor, **more: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        decoded = self.others[0].reconstructions(pixels, **more)
        pixels = pixels.detach().requires_grad_(self.r1 > 0)
        real, false = self.discriminator(pixels), self.discriminator(decoded)
        losses = hinge_losses(real, false)
        metrics = {"real_logits": real.mean(), "fake_logits": false.mean()}
        if self.r1:
            penalties = gradient_penalties(real, pixels)
            losses, metrics["r1"] = losses + self.r1 * penalties, penalties.mean()
        return losses, metrics
