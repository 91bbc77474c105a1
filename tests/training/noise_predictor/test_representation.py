"""REPA: the teacher's features, the projection, and that the network is moved by it."""

import numpy as np
import open_clip
import pytest
import timm
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from sd_mini import noise_predictor, shapes
from sd_mini.config import read
from sd_mini.cpu import accelerate
from sd_mini.stages.contract import read_contract
from sd_mini.vision.towers import load_tower, matcher_tower
from tests.support.launching import SMOKE, launch, lines, prepared
from tests.support.networks import NETWORKS
from training.noise_predictor.config import PredictorConfig
from training.noise_predictor.losses import ObjectiveConfig, PredictorObjective
from training.noise_predictor.representation import Alignment, RepaConfig, layers_of, outputs_of, weights_at
from training.noise_predictor.task import PredictorTask

DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(Dinov2Config(**DINO)).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 28}, crop_size=28, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    return folder


def pixels(count=3, side=32):
    drawn = shapes.draw_batch(shapes.sample_scenes(count, "train", seed=0), side)
    return torch.from_numpy(np.asarray(drawn)).float() / 127.5 - 1


def test_a_transformers_tower(dino):
    tower = load_tower(f"transformers:{dino}")
    made = tower.grid(pixels(side=28))
    assert made.shape == (3, 16, 4, 4)
    # patch (row 1, column 2) is token 1 * 4 + 2, behind the class token
    states = Dinov2Model.from_pretrained(dino)(pixel_values=pixels(side=28)).last_hidden_state
    torch.testing.assert_close(made[:, :, 1, 2], states[:, 1 + 6], rtol=0, atol=1e-5)
    assert tower.grid(pixels(side=64)).shape == (3, 16, 4, 4)  # resized to the tower's own side


def test_an_open_clip_tower(tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tower = load_tower(f"open_clip:ViT-S-32-alt={tmp_path / 'weights.pt'}")
    made = tower.grid(pixels(1, side=224))
    assert made.shape == (1, 384, 7, 7)


def test_a_timm_tower(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    tower = load_tower(f"timm:test_vit={tmp_path / 'weights.pth'}")
    side = tower.side
    made = tower.grid(pixels(1, side=side))
    x = (pixels(1, side=side) + 1) / 2
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = network.eval().forward_features((x - mean) / std)[:, network.num_prefix_tokens :]
    torch.testing.assert_close(made.flatten(2).mT, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no/such/folder", "expected transformers:FOLDER, timm:MODEL"),
        ("transformers:no/such/folder", "'no/such/folder' cannot be loaded"),
        ("timm:test_vit=none.pth", "no weights file none.pth"),
        ("open_clip:ViT-S-32-alt=none.pt", "no weights file none.pt"),
    ],
)
def test_a_tower_that_cannot_be_had(name, says):
    with pytest.raises(ValueError, match=says) as error:
        load_tower(name)
    assert "\n" not in str(error.value)


def test_the_matcher_s_own_tower(smoke_run):
    from sd_mini.stages.contract import load_stage

    matcher = load_stage(smoke_run / "text_encoder" / "final").parts["matcher"]
    made = matcher_tower(matcher).grid(pixels())
    pooled = torch.nn.functional.adaptive_avg_pool2d(made, 4).flatten(2).mT
    torch.testing.assert_close(pooled, matcher.tower(pixels())[0], rtol=0, atol=1e-6)


def test_a_training_with_stage_1_s_own_tower_as_its_teacher(smoke_run, tmp_path):
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    assert launch("noise_predictor", run, "--objective.repa.weight", "0.5", "--steps", "2") == 0
    assert all(line["alignment"] > 0 for line in lines(run / "noise_predictor") if "loss" in line)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("spatial", [True, False])
def test_alignment_is_the_cosine_of_each_patch_and_reaches_the_network(kind, spatial):
    torch.manual_seed(0)
    network = noise_predictor.build(kind, NETWORKS[kind], (4, 8, 8), 24)
    accelerate(network)  # which an accelerated PRX is not while its states are read
    config = ObjectiveConfig(repa=RepaConfig(weight=0.5, spatial=spatial))
    alignment = Alignment(network, 12, config.repa, (4, 4))
    objective, plain = PredictorObjective(network, config, alignment), PredictorObjective(network, config)
    draws = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=draws)
    features, tokens = torch.randn(2, 12, 4, 4, generator=draws), torch.randn(2, 6, 24, generator=draws)
    given = (latents, noise, torch.tensor([0.2, 0.8]), tokens, torch.ones(2, 6, dtype=torch.bool))
    losses, metrics = objective(*given, features, torch.full((2,), 0.5))
    with outputs_of(layers_of(network)[alignment.number]) as found:
        errors = plain(*given)[0]
    assert kind == "unet" or alignment.number == 0  # a third of three blocks
    projected = alignment.projection(found[0] if found[0].ndim == 4 else found[0].mT.unflatten(2, (4, 4)))
    wanted = features
    if spatial:
        wanted = (features - features.mean((2, 3), keepdim=True)) / features.std((2, 3), keepdim=True)
    expected = torch.stack(
        [1 - torch.cosine_similarity(p, w, dim=0).mean() for p, w in zip(projected, wanted, strict=True)]
    )
    torch.testing.assert_close(losses, errors + 0.5 * expected, rtol=1e-4, atol=1e-5)
    assert metrics["alignment"].item() == pytest.approx(expected.mean().item(), rel=1e-4)
    metrics["alignment"].backward()
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())


def test_the_term_ends_where_it_is_told():
    config = RepaConfig(weight=0.5, until=0.4)
    assert [weights_at(step, 10, 2, config).tolist() for step in (0, 3, 4, 9)] == [[0.5] * 2] * 2 + [[0.0] * 2] * 2


def test_a_training_with_a_teacher(smoke_run, dino, tmp_path):
    """Features are cached once, gathered with their pictures, and the projection is no part of what is exported."""
    run = prepared("noise_predictor", smoke_run, tmp_path / "run")
    more = [
        "--objective.repa.weight",
        "0.5",
        "--objective.repa.teacher",
        f"transformers:{dino}",
        "--objective.repa.until",
        "0.5",
    ]
    config = read(PredictorConfig, str(SMOKE / "noise_predictor.yaml"), more)
    task = PredictorTask(config, run)
    assert task.features[np.arange(64)].shape == (64, 16, 4, 4)
    from sd_mini.data.parts import load_captioned

    pictures, _ = load_captioned(config.data, config.valid)
    expected = load_tower(f"transformers:{dino}").grid(pictures.pixels([5, 9]))
    np.testing.assert_allclose(task.features[np.array([5, 9])], expected.numpy(), atol=5e-3)
    assert launch("noise_predictor", run, *more) == 0
    lines = (run / "noise_predictor" / "metrics.jsonl").read_text()
    assert '"alignment"' in lines
    final = smoke_run / "noise_predictor" / "final"
    counts = [read_contract(folder)["parameters"] for folder in (final, run / "noise_predictor" / "final")]
    assert counts[0] == counts[1]
    plain = final / "noise_predictor"
    names = {p.name for p in (run / "noise_predictor" / "final" / "noise_predictor").iterdir()}
    assert names == {p.name for p in plain.iterdir()}
