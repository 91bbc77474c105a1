"""Files that we write: by which names a folder of ours is known, and who may read them."""

from __future__ import annotations

import json
import stat
import tempfile
from pathlib import Path
from typing import Any

from sd_mini.errors import UserError

CONTRACT = "stage.json"  # of an exported stage
PIPELINE_MARK = "model_index.json"  # by which diffusers knows a pipeline's folder
MANIFEST = "manifest.json"  # of a pipeline's files
GENERATED = "<!-- written by python -m eval -->"  # in a model card: nobody wrote it by hand


def read_json(path: Path) -> dict[str, Any] | None:
    """The fields of a JSON file; none where it is not there. Raises UserError for one that is not readable as such."""
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); write it again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds a {type(fields).__name__}, expected an object with fields; write it again")
    return fields


def usual_modes(path: Path) -> None:
    """Give a file, or every file below a folder, the permissions that a new file has there: by the umask.

    safetensors writes its files for their owner alone, whatever the umask.
    """
    folder = path if path.is_dir() else path.parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=".mode-") as probes:
        probe = Path(probes, "probe")
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)
