"""LPIPS against the reference package on the same weights, from torchvision's kind of file."""

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import alexnet

from sd_mini.vision.lpips import load_lpips
from tests.support.launching import launch


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return alexnet(weights=None)


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    """What torchvision offers for download, but for the classifier, which is large and not used."""
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save({name: value for name, value in network.state_dict().items() if name.startswith("features")}, path)
    return path


def pixels(seed):
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def by_hand(network, heads, a, b):
    """Zhang et al. 2018, eq. 1: unit-normalised features after each ReLU, their squared difference by calibrated
    weights, averaged over the picture."""
    mean = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    std = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    total, level = 0, 0
    a, b = (a - mean) / std, (b - mean) / std
    for layer in network.features:
        a, b = layer(a), layer(b)
        if isinstance(layer, torch.nn.ReLU):
            unit = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b)]
            total = total + (heads[level] * (unit[0] - unit[1]).square()).sum(1).mean((1, 2))
            level += 1
    return total


def test_it_is_the_paper_s_distance(network, weights):
    module = load_lpips("alex", weights)
    heads = [layer.model[-1].weight.detach() for layer in module.lins]
    with torch.no_grad():
        found = module(pixels(0), pixels(1)).view(-1)
        torch.testing.assert_close(found, by_hand(network, heads, pixels(0), pixels(1)), rtol=1e-4, atol=1e-6)
        assert module(pixels(0), pixels(0)).abs().max() == 0
    assert not any(p.requires_grad for p in module.parameters()) and not module.training


def test_safetensors_are_read_too(network, weights, tmp_path):
    save_file(torch.load(weights, weights_only=True), tmp_path / "alexnet.safetensors")
    with torch.no_grad():
        again = load_lpips("alex", tmp_path / "alexnet.safetensors")(pixels(0), pixels(1))
        assert torch.equal(again, load_lpips("alex", weights)(pixels(0), pixels(1)))


def test_what_is_no_such_weights_file_is_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="not torchvision's weights of vgg"):
        load_lpips("vgg", weights)
    with pytest.raises(ValueError, match="network 'squeeze': expected one of vgg, alex"):
        load_lpips("squeeze", weights)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"broken\.pth: not readable"):
        load_lpips("alex", broken)


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"

    class Planted:
        def __reduce__(self):
            return canary.touch, ()

    torch.save({"features.0.weight": Planted()}, tmp_path / "planted.pth")
    with pytest.raises(ValueError, match="not readable"):
        load_lpips("alex", tmp_path / "planted.pth")
    assert not canary.exists()


def test_offline_the_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth cannot be downloaded .* give its path"):
        load_lpips("vgg")


def test_it_trains_an_autoencoder(weights, tmp_path):
    more = ["--loss.lpips", "0.5", "--loss.lpips_network", "alex", "--loss.lpips_weights", str(weights)]
    more += ["--data.resolution", "64", "--valid.resolution", "64"]
    assert launch("autoencoder", tmp_path / "run", *more) == 0
    logged = (tmp_path / "run" / "autoencoder" / "metrics.jsonl").read_text()
    assert '"lpips": 0.' in logged
