"""Rewards by name, and what is refused."""

import numpy as np
import pytest
import torch

from eval.judge.judge import judge
from sd_mini import images, shapes, stages
from sd_mini.config import read
from sd_mini.errors import UserError
from tests.support.launching import SMOKE
from tests.text_encoder.test_open_clip import save_model
from training.reward.config import RewardConfig, check_reward
from training.reward.rewards import Made, open_reward, scores


@pytest.fixture(scope="module")
def made():
    scenes = shapes.sample_scenes(6, "test", 5)
    captions = [shapes.caption(scene, 0) for scene in scenes]
    return Made(shapes.draw_batch([*scenes[:3], *scenes[:3]], 48), captions, scenes)


@pytest.fixture(scope="module")
def text(tiny_run):
    return stages.load_stage(tiny_run / "text_encoder" / "final", "text_encoder")


def test_the_judge_s_reward_is_its_verdict(made, text):
    found = open_reward("judge", text, "cpu", True)(made)
    assert found.tolist() == [judge(p, s).exact for p, s in zip(made.pictures, made.scenes, strict=True)]
    assert found[:3].all() and not found[3:].all()
    with pytest.raises(UserError, match="reward judge: reads scene graphs"):
        open_reward("judge", text, "cpu", False)


def test_the_matcher_s_reward_is_its_own_similarity_whatever_the_pictures_size(made, text):
    reward = open_reward("matcher", text, "cpu", True)
    small = Made(shapes.draw_batch([*made.scenes[:3]] * 2, 32), made.prompts)
    found = reward(small)
    assert found.shape == (6,) and (np.abs(found) <= 1 + 1e-6).all() and reward(made).shape == (6,)
    # one picture alone, its prompt alone
    alone = reward(Made(small.pictures[4:5], made.prompts[4:5]))
    assert alone == pytest.approx(found[4:5], abs=1e-5)


def test_clip_s_reward_is_the_cosine(made, text, tmp_path):
    import open_clip

    name = save_model(tmp_path / "clip")
    found = open_reward(f"clip:{name}", text, "cpu", True)(made)
    architecture, _, weights = name.partition("=")
    model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=weights or None)
    with torch.no_grad():
        pixels = torch.stack([transform(one) for one in images.to_pil(made.pictures)])
        seen = model.eval().encode_image(pixels, normalize=True)
        said = model.encode_text(open_clip.get_tokenizer(architecture)(list(made.prompts)), normalize=True)
    assert found == pytest.approx((seen * said).sum(1).numpy(), abs=1e-5)


def test_a_reward_of_one_s_own(made, text, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def red(pictures, prompts): return pictures[:, 0].mean((1, 2)) / 255\n"
        "def broken(pictures, prompts): return np.full(len(prompts), np.nan)\n"
        "def short(pictures, prompts): return np.zeros(2)\n"
        "def other(pictures, prompts): raise RuntimeError('expected input of 224 px')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rewards = {
        name: open_reward(f"module:mine:{name}", text, "cpu", False) for name in ("red", "broken", "short", "other")
    }
    assert scores({"red": rewards["red"]}, made)["red"] == pytest.approx(made.pictures[:, 0].mean((1, 2)) / 255)
    for name, says in (
        ("broken", "6 of 6 values are not finite"),
        ("short", r"got shape \(2,\), expected \(6,\)"),
        ("other", "expected input of 224 px"),
    ):
        with pytest.raises(UserError, match=f"reward {name}: .*{says}"):
            scores({name: rewards[name]}, made)
    with pytest.raises(UserError, match="reward module:mine:none: cannot be imported"):
        open_reward("module:mine:none", text, "cpu", False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rewards", "{luck: 1}"], "reward 'luck': expected judge, matcher"),
        (["--rewards", "{novelty: 1}"], "expected at least one beside novelty"),
        (["--guards.judge", "matcher"], "guards.judge matcher: is trained for"),
        (["--train.batch_size", "5"], "train.batch_size 5: expected a divisor of a round's 16 pictures times 2"),
        (["--train.workers", "1"], "train.workers 1"),
        (["--rollouts.kinds", "[many]"], "rollouts.kinds 'many'"),
        (["--rollouts.interval", "[0.9, 0.2]"], "guidance_interval"),
        (["--evaluate.every", "3"], "set guards.every"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        read(RewardConfig, SMOKE / "reward.yaml", options)


@pytest.mark.parametrize("name", ["clip:", "module:", "clip", "judges"])
def test_names_that_are_no_rewards(name):
    with pytest.raises(UserError, match="expected judge, matcher, novelty"):
        check_reward(name)
