"""How the plan's page is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from report.page import HIGH_COLOUR, LOW_COLOUR
from report.words import percent, setting


def write(path: Path, template: str, **context: Any) -> None:
    """Fill a template and write the page, creating its folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(percent=percent, setting=setting)
    environment.globals.update(low_colour=LOW_COLOUR, high_colour=HIGH_COLOUR)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(template).render(context), encoding="utf-8")
