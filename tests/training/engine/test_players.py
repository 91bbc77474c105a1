"""A generator against a discriminator in the one loop: each learns by its own loss and optimizer, and by no other."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from training.engine import loop
from training.engine.learner import Player, fixed
from training.engine.task import Origin, TrainConfig
from training.optim.optimizer import OptimizerConfig
from training.storage import checkpoint

TRAIN = {
    "steps": 12,
    "batch_size": 8,
    "warmup_steps": 0,
    "ema_width": 0.1,
    "ema_every": 3,
    "ema_snapshots": 2,
    "log_every": 4,
    "checkpoint_every": 5,
}


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 1))
        self.critic: list[nn.Module] = []  # in a list: read, but not a part of the module

    def forward(self, noise, real):
        made = self.network(noise)
        return -fixed(self.critic[0], made)[:, 0], {"made": made.mean()}


class Discriminator(nn.Module):
    def __init__(self, leaks=False):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, 1))
        self.maker: list[nn.Module] = []
        self.leaks = leaks

    def forward(self, noise, real):
        made = self.maker[0](noise) if self.leaks else fixed(self.maker[0], noise)
        hinge = nn.functional.relu(1 - self.network(real)) + nn.functional.relu(1 + self.network(made))
        return hinge[:, 0], {"real": self.network(real).mean()}


class Game:
    """Noise becomes a number that is to look as if drawn from N(3, 1)."""

    valid_count = 64
    evaluate_every = weights = valid_sources = None

    def __init__(self, leaks=False, dtype=torch.float32):
        torch.manual_seed(0)
        self.dtype, self.identity, self.bucket_counts = dtype, {"data": "numbers"}, [64]
        generator, discriminator = Generator().to(dtype), Discriminator(leaks).to(dtype)
        generator.critic.append(discriminator.network)
        discriminator.maker.append(generator.network)
        self.players = {
            "generator": Player(generator, OptimizerConfig(lr=1e-2, warmup_steps=0)),
            "discriminator": Player(discriminator, OptimizerConfig(lr=2e-2, warmup_steps=0, schedule="constant")),
        }

    def inputs(self, batch):
        return {"noise": batch.normal("noise", 2).to(self.dtype), "real": batch.normal("real", 1).to(self.dtype) + 3}

    def validate(self, objective, rows):
        return {"rows": np.arange(rows.start, rows.stop, dtype=float)}

    def preview(self, objective):
        return Image.new("RGB", (8, 8))

    def export(self, objective, folder, record):
        folder.mkdir()


def made_loop(folder, task, **train):
    folder.mkdir(exist_ok=True)
    config = TrainConfig(**(TRAIN | train))
    return loop.Loop(task, config, folder, Origin(0.0, {}), [])


def gradients(learner):
    return [None if p.grad is None else p.grad.clone() for p in learner.trained.values()]


def test_no_players_gradient_reaches_the_other(tmp_path):
    """After a backward pass its own gradients are its loss's, taken by hand, and the other has none at all."""
    game = made_loop(tmp_path / "run", Game())
    inputs = game.steps[0]
    for learner, other in (game.learners, game.learners[::-1]):
        game.accumulate(learner, inputs)
        assert all(g is not None for g in gradients(learner)) and any(g.any() for g in gradients(learner))
        assert all(g is None for g in gradients(other))
        # alone: the same loss by hand, with the other's network an ordinary frozen one
        objective = learner.module
        reader = objective.critic if hasattr(objective, "critic") else objective.maker
        reader[0].requires_grad_(False)
        losses, _ = objective(**inputs.passes[0])
        expected = torch.autograd.grad(losses.mean(), list(learner.trained.values()))
        reader[0].requires_grad_(True)
        for found, by_hand in zip(gradients(learner), expected, strict=True):
            torch.testing.assert_close(found, by_hand)
        learner.optimizer.zero_grad()


def test_a_leak_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match=r"another player's gradient reached network\.0\.weight"):
        made_loop(tmp_path / "run", Game(leaks=True)).run()


def test_an_update_moves_each_player_by_its_own_optimizer(tmp_path):
    """Three updates of the loop against the game written out by hand."""
    game, hand = made_loop(tmp_path / "run", Game(), ema_width=None), Game()
    sides = list(hand.players.values())
    optimizers = [
        torch.optim.AdamW(side.objective.parameters(), side.config.lr, (0.9, 0.95), weight_decay=0.0) for side in sides
    ]
    for step in range(3):
        inputs = game.steps[step]
        game.update(inputs)
        for number, (side, optimizer) in enumerate(zip(sides, optimizers, strict=True)):
            losses, _ = side.objective(**inputs.passes[0])
            losses.mean().backward()
            nn.utils.clip_grad_norm_(side.objective.parameters(), 1.0)
            if number == 0:  # a cosine over 12 steps, as diffusers has it
                optimizer.param_groups[0]["lr"] = side.config.lr * 0.5 * (1 + np.cos(np.pi * step / 12))
            optimizer.step()
            optimizer.zero_grad()
    for learner, side in zip(game.learners, sides, strict=True):
        for found, expected in zip(learner.module.parameters(), side.objective.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_both_resume_bit_for_bit(tmp_path, monkeypatch):
    made_loop(tmp_path / "straight", Game()).run()
    update = loop.Loop.update

    def dies_in_step_8(self, inputs):
        if inputs.step == 8:
            raise KeyboardInterrupt
        update(self, inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Loop, "update", dies_in_step_8)
        made_loop(tmp_path / "killed", Game()).run()
    made_loop(tmp_path / "killed", Game()).run()
    loaded = [checkpoint.load(checkpoint.newest(tmp_path / run / "checkpoints")[0]) for run in ("straight", "killed")]
    (straight, at), (again, then) = loaded
    names = {"model", "optimizer", "ema-0.05", "ema-0.1", "discriminator.model", "discriminator.optimizer"}
    assert straight.keys() == again.keys() == names
    for name in names:
        assert all(torch.equal(again[name][key], value) for key, value in straight[name].items())
    assert at["learners"] == then["learners"] and set(at["learners"]) == {"", "discriminator."}
    texts = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("straight", "killed")]
    assert all('"discriminator.loss"' in text and '"discriminator.lr"' in text for text in texts)


@pytest.mark.parametrize(("accumulation", "batch"), [(1, 8), (8, 8), (5, 8), (3, 8)])
def test_the_gradient_does_not_depend_on_the_passes(tmp_path, accumulation, batch):
    """One pass of eight, eight of one, ragged ones: in float64 the same to 1e-10, and the mean loss's own."""
    whole = made_loop(tmp_path / "whole", Game(dtype=torch.float64))
    parts = made_loop(tmp_path / "parts", Game(dtype=torch.float64), accumulation=accumulation)
    for a, b in zip(whole.learners, parts.learners, strict=True):
        whole.accumulate(a, whole.steps[4])
        parts.accumulate(b, parts.steps[4])
        for left, right in zip(gradients(a), gradients(b), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("players", "options", "says"),
    [
        (1, {"gradient_checkpointing": True}, "expected a network that can do it"),
        (2, {"gradient_checkpointing": True}, "two cannot read each other's networks"),
        (1, {"compile": "aot_eager"}, "expected a network of repeated blocks"),
        (1, {"compile": "indctor"}, "train.compile 'indctor': expected one of"),
    ],
)
def test_what_a_network_cannot_do_is_refused(tmp_path, players, options, says):
    task = Game()
    task.players = dict(list(task.players.items())[:players])
    with pytest.raises(ValueError, match=says):
        made_loop(tmp_path / "run", task, **options)


def test_tied_weights_show_their_average(tmp_path):
    """One tensor under two names: the copy that is shown holds its average under both."""
    task = Game()
    generator = task.players["generator"]
    generator.objective.alias = generator.objective.network[0]
    task.players = {"generator": generator}
    generator.objective.critic = [nn.Linear(1, 1)]
    loop = made_loop(tmp_path / "run", task)
    for step in range(7):
        loop.update(loop.steps[step])
    (learner,) = loop.learners
    average = learner.ema.averages[0.1][list(learner.trained).index("network.0.weight")]
    with learner.showing(0.1) as shown:
        assert torch.equal(shown.network[0].weight, average) and shown.alias.weight is shown.network[0].weight
    assert not torch.equal(learner.module.network[0].weight, average)
