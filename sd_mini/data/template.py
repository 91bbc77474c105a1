"""Labels => captions: "cat" and "a photo of {article} {label}" => "a photo of a cat"."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from sd_mini.errors import UserError

PLACEHOLDERS = ("label", "article")


def check_template(template: str | None) -> str | None:
    """Raises UserError for a template without {label}, with other placeholders than {label} and {article}, or with
    braces that do not match."""
    if template is None:
        return None
    try:
        fields = [parts[1:] for parts in string.Formatter().parse(template) if parts[1] is not None]
    except ValueError as error:
        raise UserError(f"its braces do not match ({error}); expected a text such as 'a photo of {{label}}'") from None
    unknown = [f"{{{name}}}" for name, form, conversion in fields if name not in PLACEHOLDERS or form or conversion]
    if unknown:
        raise UserError(f"unknown placeholder {', '.join(unknown)}; expected {{label}} and, if wanted, {{article}}")
    if not any(name == "label" for name, _, _ in fields):
        raise UserError(
            "has no {label}, so that every picture would have one caption; put {label} where the label goes"
        )
    return template


@dataclass(frozen=True)
class Template:
    """Captions of the column `column`, made of the labels of `label_column`."""

    text: str
    column: str
    label_column: str

    def captions(self, cell: Any) -> Any:
        """A label, or a list of labels => caption or captions. What is no text stays, to be refused as a caption."""
        if isinstance(cell, list):
            return [self.captions(label) for label in cell]
        if not isinstance(cell, str) or not cell.strip():
            return cell
        label = " ".join(cell.replace("_", " ").split())
        return self.text.format(label=label, article="an" if label[0].lower() in "aeiou" else "a")
