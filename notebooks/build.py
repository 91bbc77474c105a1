"""The percent sources of this folder => executed notebooks beside them.

RUN=runs/shapes python -m notebooks.build [NUMBER ...]

Notebooks 2 to 4 show the trained run in RUN. Each notebook is executed in an empty folder that links to this checkout:
what it writes there is gone afterwards. Its stderr (progress bars, notes with timings) is shown here and not kept.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from sd_mini.openmp import let_threads_sleep

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("[0-9]_*.py"))
LIMIT = 600_000  # bytes of an .ipynb
SECONDS = 120  # that one notebook may take on two cores
_OWN_FOLDERS = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|usr|var|opt)/\S*")


def execute(source: Path, folder: Path, run: Path) -> NotebookNode:
    """Run a percent source in the empty `folder`, on the trained `run` => the notebook with its outputs.

    Raises nbclient's CellExecutionError with the traceback of a cell that fails.
    """
    let_threads_sleep()  # in the kernel, which takes this environment over before it imports torch
    for name in ("sd_mini", "training", "eval"):
        (folder / name).symlink_to(FOLDER.parent / name)
    notebook = jupytext.read(source)
    client = NotebookClient(
        notebook, kernel_name="python3", record_timing=False, resources={"metadata": {"path": folder}}
    )
    client.execute(env={**os.environ, "RUN": str(run.resolve())})
    return notebook


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The same without stderr, with small pictures, and with ids and metadata that are the same in every build."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                _shrink(output.get("data", {}))
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def _shrink(data: dict[str, str]) -> None:
    """A picture in 256 colours of its own: a third of the bytes, and no difference that one sees."""
    data.pop("image/jpeg", None)  # a second copy of a PIL picture
    if "image/png" in data:
        small = io.BytesIO()
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        picture.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        data["image/png"] = base64.b64encode(small.getvalue()).decode("ascii")


def faults(notebook: NotebookNode) -> list[str]:
    """Folders of this machine that text in the outputs names."""
    found = []
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
        found += [match.group() for text in texts for match in _OWN_FOLDERS.finditer(text)]
    return found


def main(argv: Sequence[str]) -> None:
    run = Path(os.environ.get("RUN", FOLDER.parent / "runs" / "shapes"))
    for source in SOURCES:
        if argv and source.name[0] not in argv:
            continue
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(source, Path(folder), run)
        for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
            if output.get("name") == "stderr":
                print(output["text"], file=sys.stderr)
        if named := faults(cleaned(notebook)):
            sys.exit(f"{source.name}: its outputs name folders of this machine: {', '.join(named)}")
        text = nbformat.writes(notebook) + "\n"
        if len(text) > LIMIT:
            sys.exit(f"{source.name}: {len(text):,} bytes, expected at most {LIMIT:,}: fewer or smaller pictures")
        source.with_suffix(".ipynb").write_text(text, encoding="utf-8")
        print(f"{source.with_suffix('.ipynb').name}: {len(text):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
