"""The report of a run: one self-contained page, made from its records alone."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from secateur.report.view import view
from secateur.types import Record, SecateurError


def percent(value: float) -> str:
    """Return a fraction as percent.

    >>> percent(0.4286)
    '42.9 %'
    """
    return f"{value * 100:.1f} %"


def render(records: Sequence[Record]) -> str:
    """Return the page: what was asked, what was cut, what it cost and what it bought.

    Raises ``SecateurError`` when there are no records.
    """
    if not records:
        raise SecateurError("there are no records to report; is this the folder of a run?")
    return template("page.html").render(view(records))


def template(name: str) -> Template:
    """Return a page of this folder, ready to render: text is escaped, a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("secateur", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["json"] = lambda value: json.dumps(value, indent=1)
    return environment.get_template(name)
