"""The studio without a page: the same pictures as everywhere, one at a time, each person in turn; and previews."""

from itertools import islice
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from sd_mini import png
from sd_mini.app.drawing import Drawn, Preview, Studio, Task, file_name
from sd_mini.app.previews import Previews, apply_linear, fit_linear
from sd_mini.errors import UserError
from sd_mini.pipelines.generation import generate
from sd_mini.png import Settings
from tests.support.editing import HALF, picture

PROMPT = "a small red circle"


@pytest.fixture
def studio(tmp_path):
    studio = Studio(tmp_path)
    yield studio
    studio.close()


@pytest.fixture
def task(talking_pipeline):
    def task(seed=0, **changed):
        sources = {name: changed.pop(name) for name in ("image", "mask") if name in changed}
        settings = Settings(prompt=PROMPT, seed=seed, num_inference_steps=4).model_copy(update=changed)
        return Task(lambda: talking_pipeline, settings, f"seed {seed}", **sources)

    return task


def drawn_by(events):
    return [event for event in events if isinstance(event, Drawn)]


@pytest.mark.parametrize("sources", [{}, {"image": picture()}, {"image": picture(), "mask": HALF}])
def test_previews_change_no_bit(studio, task, talking_pipeline, sources):
    one = task(3, **sources)
    events = list(studio.draw([one], "me"))
    (drawn,) = drawn_by(events)
    alone, settings = generate(talking_pipeline, one.settings, *sources.values())
    assert any(isinstance(event, Preview) and event.picture is not None for event in events)
    assert np.array_equal(np.asarray(Image.open(drawn.path)), np.asarray(alone))
    assert png.read(drawn.path) == drawn.settings == settings
    assert (settings.seed, settings.num_inference_steps, settings.width) == (3, 4, 32)


def test_two_people_take_turns(studio, task):
    """Four pictures of one and two of another, who comes while the first of the four is drawn."""
    order = []

    def ask(name, count):
        order.extend(name for _ in drawn_by(studio.draw([task(i, num_inference_steps=8) for i in range(count)], name)))

    first = studio.draw([task(i, num_inference_steps=30) for i in range(4)], "a")
    next(first)
    order = []
    other = Thread(target=lambda: order.extend(("b", event) for event in drawn_by(studio.draw([task(), task(1)], "b"))))
    other.start()
    for event in first:
        if isinstance(event, Drawn):
            order.append(("a", event))
    other.join()
    # each has a directory by the order in which it was finished
    names = [name for name, event in sorted(order, key=lambda one: one[1].path.parent.name)]
    assert names == ["a", "b", "a", "b", "a", "a"]


def test_cancel_stops_after_the_step(studio, task):
    drawing = studio.draw([task(num_inference_steps=1000), task(1)], "me")
    event = next(event for event in drawing if isinstance(event, Preview))
    assert event.step < 100 and studio.stop("somebody else") is False and studio.stop("me") is True
    steps = [event.step for event in drawing if isinstance(event, Preview)]
    assert len(steps) < 100
    assert len(drawn_by(studio.draw([task()], "me"))) == 1  # the thread is free


def test_who_goes_away_stops_drawing(studio, task):
    drawing = studio.draw([task(num_inference_steps=1000)], "me")
    list(islice((event for event in drawing if isinstance(event, Preview)), 1))
    drawing.close()
    assert studio.stop("me") is False
    assert len(drawn_by(studio.draw([task()], "another"))) == 1


def test_who_waits_can_cancel(studio, task):
    first = studio.draw([task(num_inference_steps=1000)], "a")
    next(first)
    second = studio.draw([task()], "b")
    event = next(second)
    assert not event.is_begun and studio.stop("b")
    assert drawn_by(second) == []
    first.close()


def test_a_mistake_reaches_who_made_it(studio, task):
    with pytest.raises(UserError, match="multiple of"):
        list(studio.draw([task(height=33)], "me"))
    assert len(drawn_by(studio.draw([task()], "me"))) == 1


@pytest.mark.parametrize("prompt", ["a red/../circle", "ein Kreis, größer", "赤い丸", "/", "x" * 5000, "a\n\0b"])
def test_names_of_files(tmp_path, prompt):
    name = file_name(Settings(prompt=prompt, seed=7))
    assert name.endswith("-7.png") and "/" not in name and len(name.encode()) < 250
    (tmp_path / name).touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_linear_decoder_is_fitted_exactly():
    weights, bias = 0.2 * torch.randn(3, 5), 0.1 * torch.randn(3)

    def decode(latents):
        pixels = torch.einsum("dc,nchw->ndhw", weights, latents) + bias.view(1, 3, 1, 1)
        return pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)

    fitted = fit_linear(torch.randn(8, 5, 6, 6), decode)
    latents = torch.randn(2, 5, 3, 7)
    expected = decode(latents)[..., ::4, ::4].clamp(-1, 1)
    assert torch.allclose(apply_linear(fitted, latents), expected, atol=1e-5)


def test_previews_of_a_slow_decoder_are_its_colours(talking_pipeline):
    previews = Previews(talking_pipeline)
    latents = torch.randn(1, *talking_pipeline.latent_shape(32, 32))
    previews.decodes = True
    assert previews(latents).size == (32, 32)
    previews.decodes = False
    assert previews(latents).size == latents.shape[:1:-1]
