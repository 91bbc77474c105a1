"""The kinds of data sources, and the one that a config means."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sd_mini.data import folder, hub, mixture, parquet, path_table, saved, tars
from sd_mini.data.splits import FieldError, Part
from sd_mini.data.table import SourceRows, Table
from sd_mini.data.template import Template
from sd_mini.errors import UserError

if TYPE_CHECKING:
    from sd_mini.data.captioned import DataConfig


class SourceKind(NamedTuple):
    """`detect(source, config)` tells whether a source is of this kind; `open(source, config, part)` gives the rows of
    the asked split."""

    detect: Callable[[str, DataConfig], bool]
    open: Callable[[str, DataConfig, Part], SourceRows]


KINDS = (  # the first that fits opens the source
    SourceKind(saved.is_saved, saved.open_saved),
    SourceKind(tars.is_tars, tars.open_tars),
    SourceKind(parquet.is_parquet, parquet.open_parquet),
    SourceKind(path_table.is_path_table, path_table.open_path_table),
    SourceKind(folder.is_folder, folder.open_folder),
    SourceKind(hub.is_hub_name, hub.open_hub),
)
STREAMED = (parquet.open_parquet, hub.open_hub)


def source_name(config: DataConfig) -> str:
    """The source's own name and the split, "emoji:test"; the name alone where it is the split's, too."""
    if not isinstance(config.source, str):
        return " + ".join(source_name(source.config(config)) for source in config.source)
    if not os.path.exists(config.source):
        return f"{config.source}:{config.split}"
    own = Path(config.source).resolve()
    stem = own.stem if own.is_file() else own.name
    return own.name if stem == config.split else f"{stem}:{config.split}"


def open_source(config: DataConfig, part: Part) -> Table:
    """The rows of the asked split, of one source or of a mixture.

    Raises UserError that begins with the field that is meant.
    """
    if not isinstance(config.source, str):
        return mixture.open_mixture(config, config.source, part, open_source)
    try:
        rows = _open(config.source, config, part)
    except FieldError:
        raise
    except UserError as error:
        raise FieldError(f"{part}.source: {error}") from error
    return Table(rows, _template(rows, config, part))


def _open(source: str, config: DataConfig, part: Part) -> SourceRows:
    kind = next((kind for kind in KINDS if kind.detect(source, config)), None)
    if kind is None:
        raise UserError(
            f"{source!r} is neither a folder nor a .parquet, .csv, .tsv or .tar file; give one of these, or a name of "
            "the Hugging Face hub"
        )
    if config.streaming and kind.open not in STREAMED:
        raise FieldError(
            f"{part}.streaming: {source!r} lies here and is read row by row, as only parquet files and sets of the hub "
            "can be streamed; give {part}.streaming false, or, in a mixture, the source its own"
        )
    return kind.open(source, config, part)


def _template(rows: SourceRows, config: DataConfig, part: Part) -> Template | None:
    """The template on the column of captions; where that is left at `text` and not there, on `label`."""
    if config.template is None or config.text_column is None:
        return None
    labels = config.text_column
    if labels == folder.TEXT and labels not in rows.columns:
        labels = folder.LABEL
    if labels not in rows.columns:
        raise FieldError(
            f"{part}.template: {config.source!r} has no column {config.text_column!r} of labels; there are "
            f"{', '.join(rows.columns)}: name it by {part}.text_column"
        )
    return Template(config.template, config.text_column, labels)
