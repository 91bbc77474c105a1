"""The studio: one thread that draws every picture of the page, one after the other, whoever asks.

A request of several pictures hands them in one at a time, and the thread takes them in the order in which they came:
two people who draw at once get a picture each in turn.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event as Flag
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sd_mini import png
from sd_mini.remarks import collected

if TYPE_CHECKING:
    from PIL import Image

    from sd_mini.pipelines.text_to_image import Pipeline
    from sd_mini.png import Settings

PATIENCE = 0.2  # seconds after which a request that waits looks whether it was cancelled
OFTEN, SELDOM = 0.1, 0.5  # seconds between two previews: of a picture one waits for, of many in a row
_NAMED = 60  # characters of a prompt in a file's name


@dataclass(frozen=True)
class Task:
    """One picture to draw. `open` returns its pipeline, in the studio's thread; `label` stands below the picture."""

    open: Callable[[], Pipeline]
    settings: Settings
    label: str
    image: Image.Image | None = None
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Waiting:
    """Nothing new of the picture `number`, which is drawn or, unless `is_begun`, waits for others."""

    number: int
    is_begun: bool


@dataclass(frozen=True)
class Preview:
    """The picture `number` as it is after `step` of `steps`."""

    number: int
    step: int
    steps: int
    picture: Image.Image


@dataclass(frozen=True)
class Drawn:
    """A finished picture, the PNG file with its settings, and what its maker should know, as of a prompt cut short."""

    number: int
    path: Path
    label: str
    settings: Settings
    remarks: list[str]


@dataclass(frozen=True)
class Stopped:
    """The drawing was stopped before the picture `number` was finished."""

    number: int


Event = Waiting | Preview | Drawn | Stopped


class Pace:
    """Lets something happen at once, and then again after `pause` seconds each."""

    def __init__(self, pause: float):
        self.pause, self._last = pause, -math.inf

    def is_due(self) -> bool:
        now = monotonic()
        if now - self._last < self.pause:
            return False
        self._last = now
        return True


class Studio:
    """Draws tasks into PNG files below `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="studio")
        self._stops: dict[str, set[Flag]] = defaultdict(set)
        self._previews: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by autoencoder
        self._numbers = count()

    def draw(self, tasks: Sequence[Task], session: str, pause: float = OFTEN) -> Generator[Event, None, None]:
        """Draw the tasks in order: what happens on the way. Previews come at least `pause` seconds after each other.

        Closing the generator, as gradio does when a browser has gone, ends the drawing after the step that runs, as
        `stop` does from another thread. Raises UserError for settings from which no picture can be drawn.
        """
        stop, pace = Flag(), Pace(pause)
        self._stops[session].add(stop)
        try:
            for number, task in enumerate(tasks):
                drawn = yield from self._one(number, task, stop, pace)
                if drawn is None:
                    yield Stopped(number)
                    return
                yield drawn
        finally:
            stop.set()
            self._stops[session].discard(stop)
            if not self._stops[session]:
                del self._stops[session]

    def stop(self, session: str) -> bool:
        """End all that a session draws or waits for; whether there was anything."""
        stops = list(self._stops.get(session, ()))
        for stop in stops:
            stop.set()
        return bool(stops)

    def warm(self, pipeline: Pipeline) -> None:
        """Draw a first picture and preview, in the thread that draws the others: a library's first calls are slow."""
        task = Task(
            lambda: pipeline, png.Settings(prompt="a first picture", num_inference_steps=4), ""
        )  # guided ones among them
        self._thread.submit(self._picture, 0, task, Flag(), Pace(0.0), lambda event: None, is_kept=False).result()

    def close(self) -> None:
        """End all drawing."""
        for session in list(self._stops):
            self.stop(session)
        self._thread.shutdown(cancel_futures=True)

    def _one(self, number: int, task: Task, stop: Flag, pace: Pace) -> Generator[Waiting | Preview, None, Drawn | None]:
        news: SimpleQueue[Waiting | Preview | None] = SimpleQueue()
        future: Future[Drawn | None] = self._thread.submit(self._picture, number, task, stop, pace, news.put)
        future.add_done_callback(lambda _: news.put(None))
        try:
            while True:
                try:
                    event = news.get(timeout=PATIENCE)
                except Empty:
                    if stop.is_set():
                        future.cancel()  # if it has not been begun; else it ends after its step
                    yield Waiting(number, future.running())  # where gradio can close this, too
                    continue
                if event is None:
                    break
                yield event
        except GeneratorExit:
            stop.set()
            future.cancel()
            raise
        return None if future.cancelled() else future.result()

    def _picture(
        self,
        number: int,
        task: Task,
        stop: Flag,
        pace: Pace,
        tell: Callable[[Preview], None],
        is_kept: bool = True,
    ) -> Drawn | None:
        """One picture, in the studio's thread; none if it was stopped."""
        if stop.is_set():
            return None
        from sd_mini.pipelines.generation import generate

        pipeline = task.open()
        previews = self._previews_of(pipeline)

        def on_step(pipeline: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if stop.is_set():
                pipeline._interrupt = True
            elif pace.is_due():
                tell(Preview(number, i + 1, pipeline.num_timesteps, previews(tensors["latents"])))
            return {}

        with collected() as remarks:
            picture, settings = generate(pipeline, task.settings, task.image, task.mask, callback_on_step_end=on_step)
        if stop.is_set() or not is_kept:
            return None
        folder = self.folder / f"{next(self._numbers):06d}"
        folder.mkdir(parents=True)
        path = folder / file_name(settings)
        png.save(picture, path, settings)
        return Drawn(number, path, task.label, settings, remarks)

    def _previews_of(self, pipeline: Pipeline) -> Any:
        from sd_mini.app.previews import Previews

        if pipeline.autoencoder not in self._previews:
            self._previews[pipeline.autoencoder] = Previews(pipeline)
        return self._previews[pipeline.autoencoder]


def file_name(settings: Settings) -> str:
    """The name under which a picture is downloaded: words of its prompt, in any script, and its seed."""
    words = re.sub(r"[\W_]+", "-", settings.prompt[: 4 * _NAMED])[:_NAMED].strip("-") or "picture"
    return f"{words}-{settings.seed}.png"
