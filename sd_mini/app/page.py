"""The page's layout, and which action follows which press."""

from __future__ import annotations

import html
from collections.abc import Callable, Generator
from typing import Any

import gradio as gr

from sd_mini.app import side_by_side
from sd_mini.app.handlers import NO_PICTURE, Handlers, status
from sd_mini.app.inputs import MAX_PICTURES, MAX_SIDE, MAX_STEPS
from sd_mini.stages.contract import KINDS

REFRESH = 5  # seconds between two looks at a training's metrics
AT_ONCE = 32  # requests that wait for the studio; more wait in gradio's own queue
QUIET: Any = {"show_progress": "hidden", "api_visibility": "private"}

CSS = """
h1 { font-size: 1.4rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.drawn { display: flex; justify-content: center; align-items: center; min-height: 256px; text-align: center; }
.drawn img { width: min(100%, 320px); image-rendering: pixelated; }
.gallery img { image-rendering: pixelated; }
.gallery .grid-wrap { max-height: none; min-height: 0; }
.gallery .thumbnail-item { aspect-ratio: auto; height: auto; }
.gallery .caption-label { position: static; max-width: 100%; white-space: normal; border: 0; }
.status, .note, .stages { margin: 0; min-height: 1.5em; overflow-wrap: anywhere; }
button[role=tab].selected { color: var(--primary-700); }
.dark button[role=tab].selected { color: var(--primary-300); }
.card pre { white-space: pre-wrap; overflow-wrap: anywhere; overflow: hidden; }
.card .token { color: inherit !important; }
iframe.report { width: 100%; height: 80vh; border: 1px solid var(--border-color-primary); background: white; }
"""

# marks of a plot that follow the pointer have no name to be read out, and add nothing to the plot's own
JS = """
() => new MutationObserver(() => {
  document.querySelectorAll('[role=graphics-symbol]:not([aria-hidden])').forEach(
    mark => mark.setAttribute('aria-hidden', 'true'));
}).observe(document.body, {subtree: true, childList: true})
"""


def theme() -> Any:
    """gradio's default, with the system's own fonts, as nothing is fetched from elsewhere, and with colours that
    contrast by 4.5 to 1."""
    fonts: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    fill = dict.fromkeys(("button_primary_background_fill", "button_primary_background_fill_dark"), "*primary_700")
    return gr.themes.Default(primary_hue="blue", neutral_hue="gray", **fonts).set(
        **fill, button_primary_background_fill_hover="*primary_800", body_text_color_subdued="*neutral_600"
    )


class Page:
    """The components by name, and the page itself as `blocks`."""

    def __init__(self, handlers: Handlers):
        self.handlers, self.names = handlers, list(handlers.runs)
        self.fields: dict[str, Any] = {}
        with gr.Blocks(title=f"sd_mini: {', '.join(self.names)}", analytics_enabled=False) as self.blocks:
            gr.HTML(f"<h1>sd_mini: {html.escape(', '.join(self.names))}</h1>")
            # files, the newest first, and which of them is selected; not within Tabs, whose children are counted
            self.history, self.selected = gr.State([]), gr.State(0)
            self.grid_files, self.grid_selected = gr.State([]), gr.State(0)
            self.timer = gr.Timer(REFRESH, active=False)
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._inputs()
                with gr.Column(scale=3, min_width=320), gr.Tabs(overflow_behavior="wrap"):
                    self._pictures()
                    self._side_by_side()
                    self._about()
            self._wire()

    def _inputs(self) -> None:
        fields = self.fields
        run, own = self.names[0], self.handlers.defaults(self.names[0])
        fields["run"] = gr.Dropdown(self.names, value=run, label="Run", visible=len(self.names) > 1)
        fields["prompt"] = gr.Textbox(label="Prompt", lines=2, max_lines=6, autofocus=True)
        fields["negative"] = gr.Textbox(label="Negative prompt", lines=1, max_lines=4)
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", min_width=120)
            self.cancel = gr.Button("Cancel", min_width=120)
        with gr.Row():
            fields["seed"] = gr.Number(0, label="Seed", precision=0, min_width=120)
            fields["count"] = gr.Number(1, label="Count", precision=0, minimum=1, maximum=MAX_PICTURES, min_width=80)
            self.dice = gr.Button("\N{GAME DIE} Random seed", size="sm", min_width=120)
        with gr.Row():
            fields["steps"] = gr.Slider(
                1, max(100, own.get("steps", 1)), own.get("steps", 20), step=1, label="Steps", min_width=140
            )
            fields["guidance"] = gr.Slider(
                0, 15, own.get("guidance", 3), step=0.1, label="Guidance scale", min_width=140
            )
        with gr.Row():
            fields["low"] = gr.Slider(0, 1, own.get("low", 0), step=0.01, label="Guide from noise level", min_width=140)
            fields["high"] = gr.Slider(
                0, 1, own.get("high", 1), step=0.01, label="Guide up to noise level", min_width=140
            )
        with gr.Row():
            for side in ("width", "height"):
                label, pixels = f"{side.capitalize()}, px", own.get(side, 64)
                fields[side] = gr.Number(pixels, label=label, precision=0, step=own.get("cell", 1), min_width=100)
            samplers, sampler = own.get("sampler", ([], None))
            fields["sampler"] = gr.Dropdown(samplers, value=sampler, label="Sampler", min_width=140)
        with gr.Accordion("Start from a picture", open=False):
            fields["editor"] = gr.ImageEditor(
                label="Picture; paint what is to be repainted",
                type="pil",
                image_mode="RGBA",
                sources=["upload", "clipboard"],
                transforms=[],
                layers=False,
                brush=gr.Brush(colors=["#ff00ff"], color_mode="fixed"),
                buttons=[],
                format="png",
            )
            fields["mask"] = gr.Image(
                label="Mask file (instead of painting): white is repainted",
                type="filepath",
                image_mode=None,
                sources=["upload"],
                buttons=[],
                format="png",
            )
            fields["strength"] = gr.Slider(0, 1, 0.8, step=0.01, label="Strength: how much may change")
        self.file = gr.UploadButton("Take the settings of a PNG", file_types=[".png"])

    def _pictures(self) -> None:
        with gr.Tab("Pictures"):
            self.status = gr.HTML(status("Ready"))
            self.preview = gr.HTML(NO_PICTURE)
            self.gallery = _gallery("Pictures")
            self.parameters, self.reuse, self.download = _of_selected()
            self.start_from = gr.Button("Start from this picture")

    def _side_by_side(self) -> None:
        with gr.Tab("Side by side"):
            kinds = [kind for kind in side_by_side.KINDS if kind != side_by_side.RUNS or len(self.names) > 1]
            self.fields["kind"] = gr.Radio(kinds, value=kinds[0], label="Compare")
            self.fields["numbers"] = gr.Textbox("1, 2, 3, 5", label="Values, such as 1, 2, 4 or 0 to 15")
            self.fields["runs"] = gr.CheckboxGroup(self.names, value=self.names, label="Runs", visible=False)
            steps, chosen = self.handlers.defaults(self.names[0])["checkpoints"]
            self.fields["checkpoints"] = gr.CheckboxGroup(
                steps, value=chosen, label="Steps of the training", visible=False
            )
            self.compare = gr.Button("Draw the grid", variant="primary")
            self.grid_status = gr.HTML(status("A column for each value, a row for each seed (Count)"))
            self.grid_preview = gr.HTML("")
            self.grid = _gallery("Grid")
            self.grid_parameters, self.grid_reuse, self.grid_download = _of_selected()

    def _about(self) -> None:
        with gr.Tab("Report") as self.report_tab:
            self.report = gr.HTML("")
            with gr.Accordion("report.json", open=False):
                self.scores = gr.JSON(label="report.json", show_label=False, max_height=480)
        with gr.Tab("Model card") as self.card_tab:
            self.card = gr.Markdown("", elem_classes="card")
        with gr.Tab("Loss curves") as self.curves_tab:
            self.stages = gr.HTML("")
            self.measure = gr.Dropdown(["loss"], value="loss", label="Measure")
            self.plots = [
                gr.LinePlot(x="step", y="value", color="measure", label=kind.replace("_", " "), height=240)
                for kind in KINDS
            ]

    def _wire(self) -> None:
        on, fields = self.handlers, self.fields
        drawn = [self.status, self.preview, self.gallery, self.history, self.parameters, self.download]
        drawing: Any = {"concurrency_limit": AT_ONCE, "concurrency_id": "drawing", **QUIET}
        everything = {*fields.values(), self.history}
        gr.on(
            [self.generate.click, fields["prompt"].submit],
            self._with_fields(lambda values, session: on.draw(values, values["history"], session)),
            everything,
            drawn,
            **drawing,
        ).then(lambda: 0, None, self.selected, queue=False, **QUIET)
        compared = [self.grid_status, self.grid_preview, self.grid, self.grid_files]
        self.compare.click(self._with_fields(on.compare), everything, compared, **drawing)
        self.cancel.click(_of_session(on.cancel), None, self.status, queue=False, **QUIET)
        rolled = self.dice.click(on.dice, None, fields["seed"], queue=False, **QUIET)
        self.number_of_dice = int(rolled["id"])  # of the event, among those of the page
        of_kind = [fields[name] for name in ("numbers", "runs", "checkpoints")]
        fields["kind"].change(self._for_kind, [fields["kind"], fields["run"]], of_kind, **QUIET)

        chosen = [self.selected, self.preview, self.parameters, self.download]
        self._wire_gallery(self.gallery, self.history, chosen, self.reuse)
        chosen = [self.grid_selected, self.grid_preview, self.grid_parameters, self.grid_download]
        self._wire_gallery(self.grid, self.grid_files, chosen, self.grid_reuse)
        self.start_from.click(
            lambda files, i: on.start_from(files, i), [self.history, self.selected], fields["editor"], **QUIET
        )
        self.file.upload(self._as_updates(on.reuse_file), self.file, list(fields.values()), **QUIET)
        defaults = self._as_updates(on.defaults)
        fields["run"].change(defaults, fields["run"], list(fields.values()), **QUIET)
        if fields["sampler"].value is None:  # the run was not finished when the page was made, and may be now
            self.blocks.load(defaults, fields["run"], list(fields.values()), **QUIET)
        self._wire_about()

    def _wire_about(self) -> None:
        on, run = self.handlers, self.fields["run"]
        gr.on([self.report_tab.select, run.change], on.report, run, self.report, **QUIET)
        gr.on([self.report_tab.select, run.change], on.scores, run, self.scores, **QUIET)
        gr.on([self.card_tab.select, run.change], on.card, run, self.card, **QUIET)
        curves = [self.stages, self.measure, *self.plots]
        triggers = [self.curves_tab.select, run.change, self.timer.tick, self.measure.input]
        gr.on(triggers, on.curves, [run, self.measure], curves, **QUIET)
        self.curves_tab.select(lambda: gr.Timer(active=True), None, self.timer, queue=False, **QUIET)

    def _wire_gallery(self, gallery: Any, files: Any, chosen: list[Any], reuse: Any) -> None:
        """`chosen`: which one is selected, and where it, its settings and its file are shown."""

        def select(files: list[str], event: gr.SelectData) -> tuple[Any, ...]:
            return event.index, *self.handlers.select(files, event.index)

        gallery.select(select, files, chosen, queue=False, **QUIET)
        reuse.click(self._as_updates(self.handlers.reuse), [files, chosen[0]], list(self.fields.values()), **QUIET)

    def _for_kind(self, kind: str, run: str) -> list[Any]:
        """The fields of a grid's kind: numbers, runs, checkpoints, of which the run has more while it trains."""
        numbers = {side_by_side.GUIDANCE: {"value": "1, 2, 3, 5"}, side_by_side.SEEDS: {"value": "0 to 15"}}
        steps, chosen = self.handlers.defaults(run)["checkpoints"]
        return [
            gr.update(visible=kind in numbers, **numbers.get(kind, {})),
            gr.update(visible=kind == side_by_side.RUNS),
            gr.update(visible=kind == side_by_side.CHECKPOINTS, choices=steps, value=chosen),
        ]

    def _with_fields(self, action: Callable[[dict[str, Any], str], Generator]) -> Callable:
        """An action on the fields by name => gradio's, whose values come by component."""

        def act(data: dict[Any, Any], request: gr.Request) -> Generator:
            values = {name: data[field] for name, field in self.fields.items()}
            yield from action({**values, "history": data[self.history]}, str(request.session_hash))

        return act

    def _as_updates(self, values_of: Callable[..., dict[str, Any]]) -> Callable:
        """An action whose result are some fields' values => gradio's, with an update for every field."""

        def act(*args: Any) -> list[Any]:
            values = values_of(*args)
            return [_update(name, values) for name in self.fields]

        return act


def _update(name: str, values: dict[str, Any]) -> Any:
    if name in ("width", "height") and "cell" in values:
        return gr.Number(value=values[name], step=values["cell"], minimum=values["cell"], maximum=MAX_SIDE)
    if name == "steps" and name in values:
        most = max(100, values[name])
        return gr.Slider(value=values[name], maximum=min(most, MAX_STEPS))
    if name not in values:
        return gr.skip()
    value = values[name]
    if isinstance(value, tuple):  # choices and the chosen
        return gr.update(choices=value[0], value=value[1])
    return value


def _gallery(label: str) -> Any:
    return gr.Gallery(
        label=label,
        columns=4,
        fit_columns=False,
        height="auto",
        object_fit="contain",
        interactive=False,
        format="png",
        allow_preview=False,
        buttons=[],
        elem_classes="gallery",
    )


def _of_selected() -> tuple[Any, Any, Any]:
    """The selected picture's settings, the button that takes them, and its file."""
    parameters = gr.Textbox(label="Settings of the selected picture", lines=4, max_lines=12, interactive=False)
    with gr.Row():
        reuse = gr.Button("Use these settings", min_width=140)
        download = gr.DownloadButton("Download PNG", interactive=False, min_width=140)
    return parameters, reuse, download


def _of_session(action: Callable[[str], Any]) -> Callable:
    def act(request: gr.Request) -> Any:
        return action(str(request.session_hash))

    return act
