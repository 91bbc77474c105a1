"""The terms of stage 2 against closed forms and reference libraries, and whom each of them teaches."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from sd_mini.autoencoder.model import Autoencoder
from tests.autoencoder.test_autoencoder import DC, KL, VQ
from training.autoencoder.adversarial import (
    Discriminator,
    DiscriminatorObjective,
    balance,
    generator_losses,
    gradient_penalties,
    hinge_losses,
)
from training.autoencoder.losses import (
    OF_ERROR,
    AutoencoderLossConfig,
    AutoencoderObjective,
    Change,
    drawn_change,
    focal_frequency,
    kl_term,
    ssim,
)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_use_of_codes_is_exact_in_any_precision(precision):
    """Perplexity and count by numpy from the codes' numbers; in bfloat16 counts end at 256."""
    torch.manual_seed(0)
    autoencoder = Autoencoder("vq", VQ)
    pixels = torch.rand(32, 3, 32, 32) * 2 - 1
    objective = AutoencoderObjective(autoencoder)
    noise = torch.zeros(32, *autoencoder.latent_shape(32, 32))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        autoencoder.start_codebook(autoencoder.raw_latents(pixels)[0].float(), torch.Generator().manual_seed(0))
        _, metrics = objective(pixels, noise, noise, weight_commitment=torch.tensor(0.25))
        indices = autoencoder.codes(autoencoder.raw_latents(pixels)[0].float()).indices.flatten().numpy()
    codes = VQ["num_vq_embeddings"]
    share = np.bincount(indices, minlength=codes) / len(indices)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert metrics["code_perplexity"].item() == pytest.approx(math.exp(entropy) / min(codes, len(indices)), rel=1e-5)
    assert metrics["codes_used"].item() == pytest.approx((share > 0).sum() / min(codes, len(indices)), rel=1e-6)


def test_terms_of_the_error_against_closed_forms():
    flat = torch.zeros(2, 3, 4, 4) + torch.tensor([0.5, -1.0]).view(2, 1, 1, 1)
    found = {name: of(flat).tolist() for name, of in OF_ERROR.items()}
    assert found["l1"] == [0.5, 1.0] and found["l2"] == [0.25, 1.0] and found["gradient"] == [0.0, 0.0]
    assert found["log_l2"] == pytest.approx([math.log(0.25), 0], abs=1e-4)
    assert found["charbonnier"] == pytest.approx([math.hypot(0.5, 1e-3), math.hypot(1, 1e-3)])
    assert OF_ERROR["gradient"](flat * 0 + torch.arange(4.0)).tolist() == [1.0, 1.0]


def test_kl_against_torch():
    normal = torch.distributions.Normal(torch.full((1, 1, 2, 2), 0.3), torch.full((1, 1, 2, 2), 2.0))
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    assert kl_term(normal.mean, normal.variance.log()).item() == pytest.approx(expected.item(), rel=1e-6)


def test_ssim_of_flat_pictures_in_closed_form():
    """Two flat pictures: only the luminance term is left, (2ab + C1) / (a^2 + b^2 + C1) with C1 = (0.01 * 2)^2."""
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.25)
    c1 = (0.01 * 2) ** 2
    expected = 1 - (2 * 0.5 * 0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-4)
    assert ssim(a, a).item() == pytest.approx(0, abs=1e-6)


def test_focal_frequency_against_numpy():
    """Each squared distance of the spectra weighs as much as its root, over the largest of the channel."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 2, 3, 8, 8))
    distance = np.abs(np.fft.fft2(a - b, norm="ortho"))
    weight = distance / distance.max(axis=(2, 3), keepdims=True)
    expected = (weight * distance**2).mean(axis=(1, 2, 3))
    found = focal_frequency(torch.tensor(a).float(), torch.tensor(b).float())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_a_change_makes_latents_and_pixels_the_same_way():
    """A picture whose every cell is flat, and the cells' colours as latents: after any change they still fit."""
    cells = torch.rand(2, 3, 8, 8)
    pixels = cells.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for size, turn in ((0.0, 0.0), (0.3, 0.3), (0.3, 0.6), (0.999, 0.999)):  # 2, 4 and 8 cells, which divide 8
        change = drawn_change(8, size, turn)
        small = nn.functional.interpolate(cells, size=(change.side, change.side), mode="area")
        turned = small.flatten(2)[..., change.places()].unflatten(2, (change.side, change.side))
        assert torch.equal(turned, small.rot90(change.turns, (-2, -1)))
        shown = nn.functional.avg_pool2d(change.of_pixels(pixels, 4), 4)
        torch.testing.assert_close(shown, turned)
    assert drawn_change(8, 0.0, 0.0) == Change(2, 0) and drawn_change(8, 0.999, 0.999) == Change(8, 3)


def given(autoencoder, *names, **more):
    """Inputs in which exactly these terms have begun, at weight 1."""
    side, change = 16, Change(autoencoder.latent_shape(16, 16)[1] // 2, 1)
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = torch.zeros(3, *autoencoder.latent_shape(side, side))
    weights = {f"weight_{name}": torch.tensor(1.0) for name in names}
    turned = {"turned": change.of_pixels(pixels, autoencoder.stride), "places": change.places()}
    return {"pixels": pixels, "noise": noise, "posterior_noise": noise, **turned, **weights, **more}


class Features(nn.Module):
    """Stands where LPIPS does: some distance of two pictures, by a network that is not trained."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, a, b):
        return (self.layer(a) - self.layer(b)).square().mean((1, 2, 3), keepdim=True)


def game(kind, fields, teacher=False):
    torch.manual_seed(0)
    autoencoder, discriminator = Autoencoder(kind, fields), Discriminator(8, 1)
    other = Autoencoder(kind, fields).requires_grad_(False) if teacher else None
    objective = AutoencoderObjective(
        autoencoder, Features().requires_grad_(False), other, discriminator, adaptive=False
    )
    return objective, discriminator


def taught(objective, discriminator, *names):
    """The gradients of these terms together, by parameter, and which parts got one."""
    objective.zero_grad()
    objective(**given(objective.autoencoder, *names))[0].mean().backward()
    assert all(p.grad is None for p in discriminator.parameters())
    found = {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    return found, {part_of(name) for name in found}


def part_of(name):
    within = name.removeprefix("autoencoder.network.")
    if within.startswith("quantize"):
        return "codebook"
    return "encoder" if within.startswith(("encoder", "quant_conv")) else "decoder"


BOTH = {"encoder", "decoder"}
WHOM = {
    **dict.fromkeys(("l1", "l2", "log_l2", "charbonnier", "gradient", "ssim", "focal_frequency", "lpips"), BOTH),
    "kl": {"encoder"},
    "commitment": {"encoder", "codebook"},
    "adversarial": {"decoder"},
}


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_every_pair_of_terms_teaches_whom_it_should(kind):
    """Each term reaches its own parts and no other, and two together teach what each teaches alone, added."""
    objective, discriminator = game(kind, KL if kind == "kl" else VQ)
    terms = [name for name in WHOM if kind == "vq" or name != "commitment"]
    alone = {}
    for name in terms:
        alone[name], parts = taught(objective, discriminator, name)
        assert parts == WHOM[name], name
    for one, other in combinations(terms, 2):
        together, parts = taught(objective, discriminator, one, other)
        assert parts == WHOM[one] | WHOM[other], (one, other)
        for name in alone[one].keys() | alone[other].keys():
            expected = sum(found[name] for found in (alone[one], alone[other]) if name in found)
            torch.testing.assert_close(together[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_weighed_by_the_balance_the_verdict_still_teaches_the_decoder_alone(kind):
    """Its gradient is that of the verdict alone, times a weight by which both are as long at the last layer."""
    objective, discriminator = game(kind, KL if kind == "kl" else VQ)
    others, _ = taught(objective, discriminator, "l2", "ssim")
    verdict, parts = taught(objective, discriminator, "adversarial")
    assert parts == {"decoder"}
    objective.adaptive = True
    together, _ = taught(objective, discriminator, "l2", "ssim", "adversarial")
    last = next(n for n, p in objective.named_parameters() if p is objective.autoencoder.last_layer)
    weight = others[last].norm() / (verdict[last].norm() + 1e-4)
    for name, found in together.items():
        torch.testing.assert_close(found, others[name] + weight * verdict.get(name, 0), rtol=2e-3, atol=1e-5)


def test_the_discriminator_judges_what_the_decoder_learns_on():
    """The same noise on the same latents, a teacher's where there is one."""
    for teacher in (False, True):
        objective, _ = game("kl", KL, teacher)
        inputs = given(objective.autoencoder, "l2", "latent_noise", "adversarial")
        shape = inputs["noise"].shape
        inputs |= {"noise": torch.randn(shape), "posterior_noise": torch.randn(shape)}
        error = objective.reconstructions(**inputs) - inputs["pixels"]
        alone = {n: v for n, v in inputs.items() if n != "weight_adversarial"}
        torch.testing.assert_close(objective(**alone)[0], error.square().mean((1, 2, 3)))


def test_with_a_teacher_each_half_learns_by_its_own_terms():
    objective, discriminator = game("kl", KL, teacher=True)
    # of the encoder's mean; the pictures are decoded from the teacher's latents
    assert taught(objective, discriminator, "distillation")[1] == {"encoder"}
    assert taught(objective, discriminator, "l1", "lpips")[1] == {"decoder"}


def test_equivariance_teaches_both_halves_by_the_other_terms():
    objective, discriminator = game("kl", KL)
    plain, _ = taught(objective, discriminator, "l1")
    more, parts = taught(objective, discriminator, "l1", "equivariance")
    assert parts == BOTH and any(not torch.equal(more[name], plain[name]) for name in plain)


def test_a_frozen_encoder_learns_nothing():
    objective, discriminator = game("vq", VQ)
    for part in objective.autoencoder.encoder_parts:
        part.requires_grad_(False)
    objective = AutoencoderObjective(objective.autoencoder, *objective.others, adaptive=False)
    names = [name for name in WHOM if name not in ("kl", "commitment")]
    assert taught(objective, discriminator, *names)[1] == {"decoder"}


def test_the_discriminator_learns_by_its_own_loss_alone():
    objective, discriminator = game("dc", {"latent_channels": 4, **DC})
    judge = DiscriminatorObjective(discriminator, objective, r1=0.5)
    losses, metrics = judge(**given(objective.autoencoder, "l1", "adversarial"))
    losses.mean().backward()
    assert all(p.grad is not None for p in discriminator.parameters())
    assert all(p.grad is None for p in objective.parameters())
    expected = losses.mean() - 0.5 * metrics["r1"]
    assert 0.5 < expected < 2  # a hinge loss of logits near 0


def test_adversarial_losses_against_closed_forms():
    real, made = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[-3.0, 1.0]]]])
    # real: (0 + 1) / 2; made: (0 + 2) / 2; their mean
    assert hinge_losses(real, made).tolist() == [0.75]
    assert generator_losses(nn.Identity(), made).tolist() == [1.0]
    # a linear verdict, 3 * the sum over 4 values / 1 patch: its slope is 3 everywhere, 9 * 4 / 2
    pixels = torch.rand(2, 1, 2, 2, requires_grad=True)
    logits = (3 * pixels).sum((1, 2, 3)).view(2, 1, 1, 1)
    assert gradient_penalties(logits, pixels).tolist() == pytest.approx([18.0, 18.0])


def test_the_balance_makes_both_pulls_alike():
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    assert balance(3 * layer, 0.5 * layer, layer).item() == pytest.approx(3 / 0.5, rel=1e-3)
    assert balance(3e3 * layer, 0 * layer, layer).item() == pytest.approx(1e4)


def test_each_weight_turns_its_own_term():
    objective, _ = game("kl", KL)
    for name in ("l1", "l2", "charbonnier", "gradient", "ssim", "focal_frequency", "lpips", "kl"):
        inputs = given(objective.autoencoder, name) | {f"weight_{name}": torch.tensor(2.0)}
        losses, metrics = objective(**inputs)
        assert losses.mean().item() == pytest.approx(2 * metrics[name].item(), rel=1e-5)


def test_noise_is_on_the_latents():
    objective, _ = game("dc", {"latent_channels": 4, **DC})
    inputs = given(objective.autoencoder, "l2", "latent_noise")
    noise = torch.randn(inputs["noise"].shape)
    losses, _ = objective(**inputs | {"noise": noise, "weight_latent_noise": torch.tensor(0.3)})
    raw, _ = objective.autoencoder.raw_latents(inputs["pixels"])
    error = objective.autoencoder.decode_raw(raw + 0.3 * noise) - inputs["pixels"]
    torch.testing.assert_close(losses, error.square().mean((1, 2, 3)))


def test_terms_begin_at_their_update():
    config = AutoencoderLossConfig(l1=0.5, ssim={"weight": 2, "start": 10}, kl=0)
    assert config.l1.weight == 0.5 and config.l1.start == 0
    assert {"l1"} == config.begun(9).keys() - {"commitment", "distillation"}
    assert {"l1", "ssim"} == config.begun(10).keys() - {"commitment", "distillation"}
    assert AutoencoderLossConfig(**config.model_dump()) == config
    assert AutoencoderLossConfig(kl="1e-4").kl.weight == 1e-4  # as YAML reads it
