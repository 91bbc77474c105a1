"""What happens when something on the page is pressed: the fields' values in, the components' new values out."""

from __future__ import annotations

import base64
import html
import io
import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sd_mini import png
from sd_mini.app import curves, side_by_side
from sd_mini.app.drawing import OFTEN, SELDOM, Drawn, Event, Pace, Preview, Stopped, Studio, Task, Waiting
from sd_mini.app.inputs import Values, fields_of, messages
from sd_mini.app.runs import Run
from sd_mini.errors import UserError
from sd_mini.sampling.samplers import DISCRETE, FLOW, name_of
from sd_mini.stages.contract import KINDS

KEPT = 200  # pictures that a session's gallery holds
_LAST_RANDOM = 2**32 - 1
NO_PICTURE = '<div class="drawn">The picture appears here while it is drawn.</div>'


class Handlers:
    """The page's actions over its runs and their studio. Raises gradio.Error, one line, for a user's mistake."""

    def __init__(self, runs: Mapping[str, Run], studio: Studio):
        self.runs, self.studio = runs, studio

    def draw(self, values: Values, history: list[str], session: str) -> Generator[tuple[Any, ...]]:
        """Pictures => status, preview, gallery, history (files, the newest first), settings and file of the newest."""
        with messages():
            tasks = side_by_side.pictures(values, self.runs)
            history = list(history)
            for event, line in self._drawn(tasks, session):
                if not isinstance(event, Drawn):
                    yield status(line), preview(event), *[gr.skip()] * 4
                    continue
                history = [str(event.path), *history][:KEPT]
                shown, *chosen = self.select(history, 0)
                yield status(line), shown, gallery(history), history, *chosen

    def compare(self, values: Values, session: str) -> Generator[tuple[Any, ...]]:
        """A grid => status, preview, gallery in columns, its files, row by row."""
        with messages():
            tasks, columns = side_by_side.grid(values, self.runs)
            drawn: list[Drawn] = []
            pace = Pace(SELDOM)  # the browser, which may share the cores with the studio, lays the whole grid out anew
            for event, line in self._drawn(tasks, session, SELDOM):
                if isinstance(event, Drawn):
                    drawn.append(event)
                if isinstance(event, Waiting | Preview):
                    yield status(line), preview(event), gr.skip(), gr.skip()
                elif pace.is_due() or isinstance(event, Stopped) or len(drawn) == len(tasks):
                    shown = gr.Gallery([(str(one.path), one.label) for one in drawn], columns=columns)
                    yield status(line), gr.skip(), shown, [str(one.path) for one in drawn]

    def _drawn(self, tasks: Sequence[Task], session: str, pause: float = OFTEN) -> Generator[tuple[Event, str]]:
        """What happens to the tasks, each with a line for the page."""
        finished, count = 0, len(tasks)
        with closing(self.studio.draw(tasks, session, pause)) as events:
            for event in events:
                of = f"picture {event.number + 1} of {count}"
                if isinstance(event, Drawn):
                    finished += 1
                    for line in event.remarks if finished == 1 else ():  # the others' are the same
                        gr.Warning(html.escape(line), title="Please note")
                    yield event, f"{finished} of {count} drawn" if finished < count else f"Done: {_count(finished)}"
                elif isinstance(event, Preview):
                    yield event, f"Drawing {of}, step {event.step} of {event.steps}"
                elif isinstance(event, Stopped):
                    yield event, f"Cancelled: {finished} of {_count(count)} drawn"
                else:
                    yield event, f"Drawing {of} ..." if event.is_begun else f"Waiting: others draw first ({of})"

    def cancel(self, session: str) -> Any:
        """=> status, where nothing is drawn; else the drawing's own last line says it, which this could come after."""
        return gr.skip() if self.studio.stop(session) else status("Nothing is being drawn")

    def dice(self) -> int:
        return random.SystemRandom().randint(0, _LAST_RANDOM)

    def select(self, files: list[str], index: int) -> tuple[Any, ...]:
        """The picture at `index` of a gallery => itself, its settings as text, and its file to download."""
        with messages():
            path = _at(files, index)
            lines = [f"{name}: {value}" for name, value in png.described(png.read(path)).items()]
            return picture_of(Path(path)), "\n".join(lines), gr.DownloadButton(value=path, interactive=True)

    def reuse(self, history: list[str], index: int) -> dict[str, Any]:
        """The fields' values with which a picture of a gallery was drawn."""
        with messages():
            return fields_of(png.read(_at(history, index)))

    def reuse_file(self, file: str | None) -> dict[str, Any]:
        """The same of a PNG file that was made here or by `sd-mini generate`."""
        with messages():
            if file is None:
                return {}
            try:
                return fields_of(png.read(file))
            except UserError as error:  # where an upload lies is nobody's business
                raise UserError(str(error).replace(str(file), Path(file).name)) from None

    def start_from(self, history: list[str], index: int) -> dict[str, Any]:
        """A picture of a gallery => the editor's value, nothing painted on it."""
        with messages():
            path = _at(history, index)
            return {"background": path, "layers": [], "composite": path}

    def defaults(self, run: str) -> dict[str, Any]:
        """The fields' values that a run's recipe has, and its choices; those of an unfinished run are general."""
        steps = sorted(self.runs[run].checkpoints())
        try:
            pipeline = self.runs[run].pipeline()
        except UserError:  # the message is for whoever draws with it
            return {"checkpoints": (steps, side_by_side.spread(steps))}
        config = pipeline.config
        low, high = config.default_interval
        known = FLOW if pipeline.process.is_flow else DISCRETE
        return {
            "steps": config.default_steps,
            "guidance": config.default_guidance,
            "low": low,
            "high": high,
            "width": config.resolution,
            "height": config.resolution,
            "cell": pipeline.cell,
            "sampler": (list(known), name_of(pipeline.scheduler)),
            "checkpoints": (steps, side_by_side.spread(steps)),
        }

    def report(self, run: str) -> str:
        """The report's page in a frame in which no script runs."""
        with messages():
            text = self.runs[run].report()
        if text is None:
            return note(f"No report yet. Make one: python -m eval {self.runs[run].folder}")
        return f'<iframe class="report" title="Report" sandbox="" srcdoc="{html.escape(text)}"></iframe>'

    def scores(self, run: str) -> dict[str, Any]:
        with messages():
            return self.runs[run].scores() or {}

    def card(self, run: str) -> str:
        with messages():
            text = self.runs[run].card()
        return text or "No model card yet. `python -m eval` writes one into the pipeline's folder."

    def curves(self, run: str, measure: str | None) -> tuple[Any, ...]:
        """=> a line about each stage, the choice of measures, a table for each stage's plot."""
        with messages():
            chosen, names = self.runs[run], curves.measures(self.runs[run])
            measure = measure if measure in names else names[0]
            rows = [
                f"<li><b>{one.kind}</b>: {one.state}{f', step {one.step:,}' if one.step else ''}</li>"
                for one in chosen.stages()
            ]
            tables = [curves.table(chosen.metrics(kind), measure) for kind in KINDS]
        return f'<ul class="stages">{"".join(rows)}</ul>', gr.Dropdown(choices=names, value=measure), *tables


def status(line: str) -> str:
    return f'<p class="status" role="status">{html.escape(line)}</p>'


def note(line: str) -> str:
    return f'<p class="note">{html.escape(line)}</p>'


def preview(event: Event) -> Any:
    """HTML of a preview; nothing new of another event."""
    return _shown(event.picture, "Preview") if isinstance(event, Preview) else gr.skip()


def picture_of(path: Path) -> str:
    with Image.open(path) as picture:
        return _shown(picture, "The picture")


def gallery(history: Sequence[str]) -> list[tuple[str, str]]:
    return [(path, f"seed {Path(path).stem.rpartition('-')[2]}") for path in history]


def _shown(picture: Image.Image, what: str) -> str:
    """HTML with the picture in it: one message to the browser, and no file to be fetched for it."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<div class="drawn"><img alt="{what}" src="data:image/png;base64,{data}"></div>'


def _at(history: Sequence[str], index: int) -> str:
    if not 0 <= index < len(history):
        raise UserError("gallery: no picture is selected; draw one first, or choose one")
    return history[index]


def _count(number: int) -> str:
    return f"{number} picture{'' if number == 1 else 's'}"
