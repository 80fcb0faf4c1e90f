"""How a page is made: one file from a template, with everything in it that it shows."""

from __future__ import annotations

import base64
import io
import os
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageOps

from . import words

GALLERY = 24  # images of a gallery at most: more are not looked at
THUMBNAIL_PX = 96
LOW_COLOUR, HIGH_COLOUR, RED = "#2a7f62", "#c8553d", "#b3261e"
_FILTERS = (
    words.percent,
    words.setting,
    words.count_of,
    words.amount,
    words.milliseconds,
    words.ratio,
    words.fine,
    words.times,
    words.interval,
    words.by_image,
    words.recipe_words,
    words.moment,
)


def render(path: Path, template: str, **data: Any) -> None:
    """Fill a template of the folder `templates` and write the page, creating its folder.

    A name that the template uses and that is not given is an error. The page is written whole or
    not at all: whoever looks meanwhile, or after an error, finds the one from before.
    """
    page = filled(template, **data)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # What is no Unicode in a name is no reason to lose a page.
        fresh.write_text(page.lstrip(), encoding="utf-8", errors="backslashreplace")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def filled(template: str, **data: Any) -> str:
    """What a template of the folder `templates` makes of the data: HTML, escaped where it must."""
    return _environment().get_template(template).render(data)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update({name.__name__: name for name in _FILTERS})
    environment.globals.update(low_colour=LOW_COLOUR, high_colour=HIGH_COLOUR, red=RED)
    return environment


def thumbnail(image: Image.Image) -> str:
    """The middle of a picture, square and small, as the address of an embedded file."""
    buffer = io.BytesIO()
    square = ImageOps.fit(image.convert("RGB"), (THUMBNAIL_PX, THUMBNAIL_PX))
    square.save(buffer, "JPEG", quality=80)
    return data_uri("image/jpeg", buffer.getvalue())


def data_uri(media_type: str, data: bytes) -> str:
    """`data` as the address of an embedded file."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
