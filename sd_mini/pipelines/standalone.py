"""A pipeline as a folder that stock diffusers loads without sd_mini: `DiffusionPipeline.from_pretrained(FOLDER,
trust_remote_code=True)`.

diffusers loads a pipeline's class from `pipeline.py` in its folder, and a component's from a file beside its weights.
`pipeline.py` carries the text of the library's modules, and offers them to Python's import where sd_mini is not
installed. The weights, settings and pictures are those of `Pipeline`, which loads such a folder, too, without its code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

import sd_mini
from sd_mini.files import (
    MANIFEST,
    PIPELINE_MARK,
    atomic_folder,
    file_hash,
    forget_origins,
    read_json,
    written,
    written_to,
)
from sd_mini.pipelines.joining import JoinedPipeline
from sd_mini.weights import COMPONENT_FILE, LIBRARIES, upload

CARD, GRID, CODE = "README.md", "grid.png", "pipeline.py"
NEEDS = "torch diffusers transformers accelerate safetensors pydantic pyyaml psutil pillow numpy tqdm"
_LEFT_OUT = {
    "app",
    "cli",
    "data",
    "shapes",
    "vision",
    "__main__.py",
    "matcher.py",
    "standalone.py",
    "stock.py",
}  # no pipeline's
_IMPORTER = '''"""The pipeline of this folder, for DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True).

Written by sd_mini {version}. SOURCES holds the text of its modules, each line after a bar; where the package sd_mini is
installed, that is used instead.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

SOURCES = {{
{sources}}}


class Bundled(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Offers the modules in SOURCES to `import`."""

    def find_spec(self, name, path=None, target=None):
        file = name.replace(".", "/")
        for key, is_package in ((f"{{file}}/__init__.py", True), (f"{{file}}.py", False)):
            if key in SOURCES:
                spec = importlib.util.spec_from_loader(name, self, origin=key, is_package=is_package)
                spec.has_location = True  # __file__ is the key
                return spec
        return None

    def get_filename(self, name):
        return self.find_spec(name).origin

    def get_source(self, name):
        text = SOURCES[self.get_filename(name)]
        return "\\n".join(line[1:] for line in text.strip("\\n").split("\\n")) + "\\n"

    def is_package(self, name):
        return self.get_filename(name).endswith("__init__.py")


FOUND = importlib.util.find_spec("sd_mini")
if FOUND is None or FOUND.origin is None:  # of a folder that only happens to have the name
    sys.meta_path.insert(0, Bundled())
if (INSTALLED := importlib.import_module("sd_mini").__version__) != "{version}":
    warnings.warn(f"this folder was written by sd_mini {version}, and sd_mini {{INSTALLED}} runs it", stacklevel=2)

Pipeline = importlib.import_module("sd_mini.pipelines.text_to_image").Pipeline
ImageToImagePipeline = importlib.import_module("sd_mini.pipelines.image_to_image").ImageToImagePipeline
InpaintingPipeline = importlib.import_module("sd_mini.pipelines.inpainting").InpaintingPipeline
'''
_COMPONENT = '''"""A component of this folder's pipeline; its class is in pipeline.py, or in sd_mini if installed."""

import importlib

{name} = importlib.import_module("{library}").{name}
'''


def write(pipeline: JoinedPipeline, folder: Path, run: Path | None = None, license_name: str | None = None) -> None:
    """Write `pipeline` as a standalone folder, all or nothing, with a model card.

    `run`: the run that it was joined from, of which the card has the report, a grid of pictures and the recipes.
    `license_name`: as the hub spells it (apache-2.0, cc-by-4.0, ...). Raises UserError if it cannot be written.
    """
    with written_to(folder), atomic_folder(folder, keep=True) as partial:
        pipeline.save_pretrained(partial)
        forget_origins(partial)
        _name_code(partial)
        describe(pipeline, partial, _usage(pipeline), run, license_name)


def describe(
    pipeline: JoinedPipeline, folder: Path, usage: list[str], run: Path | None, license_name: str | None
) -> None:
    """Put the recipes, the report's grid, the model card and the manifest beside a pipeline's files.

    `usage`: the card's lines on how the folder is loaded.
    """
    recipes = _recipes(run) if run is not None else {}
    for stage, text in recipes.items():
        (folder / "training").mkdir(exist_ok=True)
        (folder / "training" / f"{stage}.yaml").write_text(text, encoding="utf-8")
    report = _report(pipeline, run)
    if run is not None and report is not None and (run / "report" / GRID).is_file():
        (folder / GRID).write_bytes((run / "report" / GRID).read_bytes())
    (folder / CARD).write_text(_card(pipeline, folder, usage, run, report, license_name), encoding="utf-8")
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    digests = {name: file_hash(folder / name) for name in sorted(files)}
    (folder / MANIFEST).write_text(json.dumps({"files": digests}, indent=2) + "\n", encoding="utf-8")


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload what `write` has written into the folder, and nothing else in it, to the hub => its address.

    Raises UserError, as `weights.upload`.
    """
    return upload(folder, [*written(folder)], repository, private)


def _name_code(folder: Path) -> None:
    """Put the code beside the weights, and name it in the pipeline's index."""
    index = json.loads((folder / PIPELINE_MARK).read_text(encoding="utf-8"))
    index["_class_name"] = [Path(CODE).stem, index["_class_name"]]
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[1] in LIBRARIES:
            code = _COMPONENT.format(name=entry[1], library=LIBRARIES[entry[1]])
            (folder / name / f"{COMPONENT_FILE}.py").write_text(code, encoding="utf-8")
            index[name] = [COMPONENT_FILE, entry[1]]
    (folder / PIPELINE_MARK).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / CODE).write_text(bundle(), encoding="utf-8")


def bundle() -> str:
    """The text of `pipeline.py`."""
    library = Path(sd_mini.__file__).parent
    parts = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if _LEFT_OUT & set(name.parts):
            continue
        # a bar before each line: diffusers takes whatever begins like an import for a package that is needed
        barred = "".join(f"|{line}\n" for line in path.read_text(encoding="utf-8").split("\n")[:-1])
        if "'''" in barred:
            raise RuntimeError(f"{path}: holds three single quotes, which end the text of a module in {CODE}")
        parts.append(f"    \"{(Path(library.name) / name).as_posix()}\": r'''\n{barred}''',\n")
    return _IMPORTER.format(version=sd_mini.__version__, sources="".join(parts))


def _recipes(run: Path) -> dict[str, str]:
    """Each stage's resolved config, by its name; the folders of whoever trained it are cut to their last name."""
    found = {}
    for path in sorted(run.glob("*/config.yaml")):
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        found[path.parent.name] = yaml.safe_dump(_without_folders(fields), sort_keys=False, allow_unicode=True)
    return found


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_folders(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if not isinstance(value, str) or " " in value.strip():  # a text, as a caption's template, is no folder
        return value
    # user/name of the hub stays
    is_path = "\\" in value or value.count("/") > 1 or value.startswith(("/", "~", ".", "file:"))
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if is_path else value


def _report(pipeline: JoinedPipeline, run: Path | None) -> dict[str, Any] | None:
    """The run's report, if it is of these very stages."""
    report = None if run is None else read_json(run / "report" / "report.json")
    is_theirs = report is not None and report.get("protocol", {}).get("stages") == dict(pipeline.config.stages)
    return report if is_theirs else None


def _usage(pipeline: JoinedPipeline) -> list[str]:
    config = pipeline.config
    return [
        f"{config.default_steps} steps, guidance {config.default_guidance:g}. Needs `pip install {NEEDS}`; the code is "
        f"`{CODE}` in this folder.",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)',
        'picture = pipeline("a prompt").images[0]',
        "```",
        "",
        f'With sd_mini installed, `sd_mini.Pipeline.from_pretrained("FOLDER")` loads it without running `{CODE}`.',
    ]


def _card(
    pipeline: JoinedPipeline,
    folder: Path,
    usage: list[str],
    run: Path | None,
    report: dict[str, Any] | None,
    license_name: str | None,
) -> str:
    from sd_mini.stages.contract import drawer_of

    config = pipeline.config
    stages = {} if run is None else _contracts(run, drawer_of(config.stages))
    front = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["text-to-image", "sd_mini"]}
    if license_name is not None:
        front["license"] = license_name
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# Text to image at {config.resolution} x {config.resolution} px",
        "",
        *usage,
        "",
    ]
    if (folder / GRID).is_file():
        lines += ["The first prompts of the report, one seed each, nothing selected:", "", f"![grid]({GRID})", ""]
    lines += [
        *_metrics(report, run),
        *_data(stages),
        *_limits(pipeline, stages, report, license_name),
        *_steps(folder, stages),
    ]
    return "\n".join(lines)


def _contracts(run: Path, predictor: str | None) -> dict[str, dict[str, Any]]:
    """By stage: the first two, and those that led to the noise predictor with the hash `predictor`."""
    from sd_mini.stages.contract import kind_of, lineage, read_contract

    stages = ["text_encoder", "autoencoder", *(lineage(run, predictor) or ["noise_predictor"])]
    return {stage: read_contract(run / stage / "final", kind_of(stage)) for stage in stages}


def _metrics(report: Mapping[str, Any] | None, run: Path | None) -> list[str]:
    """The headline of the report."""
    card = None if run is None else run / "pipeline" / CARD
    if report is None or card is None or not card.is_file():
        return ["## Metrics", "", "Not measured, or on other stages than these.", ""]
    table = [line for line in card.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return ["## Metrics", "", *table, "", f"{report['protocol'].get('device', '')}, by `python -m eval`.", ""]


def _data(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    facts = [
        f"- {kind.replace('_', ' ')}: {escape(stage['data']['name'])}, {stage['data']['count']:,} pictures"
        for kind, stage in stages.items()
        if "data" in stage
    ]
    return ["## Training data", "", *(facts or ["Not recorded."]), ""]


def _limits(
    pipeline: JoinedPipeline,
    stages: Mapping[str, Mapping[str, Any]],
    report: Mapping[str, Any] | None,
    license_name: str | None,
) -> list[str]:
    copies = "the table above says how many are close to one" if "memorisation" in (report or {}) else "not measured"
    seen = max((stage["data"]["count"] for stage in stages.values() if "data" in stage), default=None)
    length, _ = pipeline.embeds_shape
    return [
        "## Limits",
        "",
        f"- It knows what its {'' if seen is None else f'{seen:,} '}training pictures show, in their captions' words.",
        f"- Prompts longer than {length} tokens are cut, with a warning.",
        f"- Other sizes than {pipeline.config.resolution} x {pipeline.config.resolution} px were not trained.",
        f"- It may repeat training pictures ({copies}).",
        f"- Licence of the weights: {license_name or 'not stated by whoever exported them'}.",
        "",
    ]


def _steps(folder: Path, stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    recipes = sorted(path.name for path in (folder / "training").glob("*.yaml"))
    if not recipes:
        return []
    launches = [
        f"accelerate launch -m training.{kind} --config FOLDER/training/{kind}.yaml --run runs/again"
        for kind in dict.fromkeys(["autoencoder", *stages])
        if f"{kind}.yaml" in recipes
    ]
    spent = ", ".join(f"{k.replace('_', ' ')} {s['seconds']:,.0f} s" for k, s in stages.items() if "seconds" in s)
    return [
        "## How to reproduce",
        "",
        f"From a checkout of sd_mini {sd_mini.__version__}; FOLDER is this folder{f' ({spent})' if spent else ''}. "
        "Data that is read, not drawn: set `data.source` in the recipes to where it lies.",
        "",
        "```sh",
        *launches,
        "sd-mini export runs/again",
        "```",
        "",
    ]
