"""What the report and the analysis share: templates, thumbnails, how figures are written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps

from imaging import decode, pixels_sha256
from report.page import data_uri
from report.words import count_of, percent, setting
from routing.fidelity import LABEL_THRESHOLD, label_sets

from ..fidelity import oracle_cosine, oracle_l2
from ..outputs import Outputs
from ..source import ImageSource

GALLERY = 24  # images at most: more are not looked at
THUMBNAIL_PX = 96
VALUES = 4  # of a caption at most
LOW_COLOUR, HIGH_COLOUR = "#2a7f62", "#c8553d"


@dataclass(frozen=True)
class Card:
    """One image of a gallery.

    Attributes:
        name: of the image.
        image: a data URI, or None.
        problem: why there is no image; empty where there is one.
        lines: of the caption.
    """

    name: str
    image: str | None
    problem: str
    lines: tuple[str, ...]


class Cards:
    """Makes the cards of collected images.

    Args:
        outputs: of N images.
        source: where to read the images again; None where it is no longer there.
        class_names: of the C classes, labels or values; without them they are numbered.
        label_threshold: of labels: one is named from this probability on.
    """

    def __init__(
        self,
        outputs: Outputs,
        source: ImageSource | None,
        class_names: tuple[str, ...] | None,
        label_threshold: float = LABEL_THRESHOLD,
    ) -> None:
        self._outputs = outputs
        self._source = source
        self._where = {} if source is None else {name: i for i, name in enumerate(source.names)}
        self._class_names = class_names
        self._label_threshold = label_threshold
        self._l2, self._cosine = oracle_l2(outputs), oracle_cosine(outputs)

    def __call__(self, row: int, *lines: str) -> Card:
        """The card of image `row`: `lines`, then what the rungs' outputs say of it."""
        name = self._outputs.names[row]
        image, problem = self._thumbnail(row)
        change = (f"L2 {self._l2[row]:.3g}", f"cosine {self._cosine[row]:.3f}")
        return Card(name, image, problem, (*lines, *change, *self._answers(row)))

    def _answers(self, row: int) -> tuple[str, ...]:
        low, high = self._outputs.low.logits, self._outputs.high.logits
        if low is None or high is None:
            return ()
        first, second = self._answer(low[row]), self._answer(high[row])
        if first == second:
            return (f"both: {first}",)
        return (f"low: {first}", f"full: {second}")

    def _answer(self, logits: NDArray[np.float32]) -> str:
        """A class, a set of labels, or the first values, in words."""
        task = self._outputs.task
        if task == "labels":
            inside = np.flatnonzero(label_sets(logits, self._label_threshold)).tolist()
            return ", ".join(self._name("label", index) for index in inside) or "no label"
        if task == "value":
            more = ", …" if len(logits) > VALUES else ""
            return ", ".join(f"{value:.4g}" for value in logits[:VALUES]) + more
        return self._name("class", int(logits.argmax()))

    def _name(self, noun: str, index: int) -> str:
        return f"{noun} {index}" if self._class_names is None else self._class_names[index]

    def _thumbnail(self, row: int) -> tuple[str | None, str]:
        name = self._outputs.names[row]
        if self._source is None or name not in self._where:
            return None, "image not found"
        try:
            data = self._source[self._where[name]].data
            image = decode(data)
            if pixels_sha256(image) != self._outputs.hashes[row]:
                return None, "image has changed since collect"
            square = ImageOps.fit(image, (THUMBNAIL_PX, THUMBNAIL_PX))
        except (OSError, ValueError) as error:  # ImageError and ImagesError are ValueErrors
            return None, f"image not readable: {error}"
        buffer = io.BytesIO()
        square.save(buffer, "JPEG", quality=80)
        return data_uri("image/jpeg", buffer.getvalue()), ""


def missing_reading(cards: Sequence[Card]) -> str:
    """What to know about images that are not shown; empty where all are."""
    missing = [card for card in cards if card.image is None]
    if not missing:
        return ""
    return (
        f"{len(missing)} of the {count_of(len(cards), 'image')} in the galleries cannot be shown "
        f"({missing[0].name}: {missing[0].problem}); every number on this page comes from the "
        "stored outputs and does not depend on them."
    )


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
