"""Cards of collected images: a thumbnail, and what the rungs say of the image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.files import shown
from imaging import decode, pixels_sha256
from report.page import thumbnail
from routing.fidelity import LABEL_THRESHOLD, label_sets

from .fidelity import oracle_cosine, oracle_l2
from .images import ImageSource
from .outputs import Outputs

VALUES = 4  # of a value's numbers in a caption at most


class Cards:
    """Makes the cards of collected images.

    Without a `source` the images are not shown; without `class_names` classes, labels and values
    are numbered. A label is named from the probability `label_threshold` on.
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

    def __call__(self, row: int, *lines: str) -> dict[str, Any]:
        """The card of image `row`: `lines`, then what the rungs' outputs say of the image."""
        image, problem = self._thumbnail(row)
        change = [f"L2 {self._l2[row]:.3g}", f"cosine {self._cosine[row]:.3f}"]
        return {
            "name": shown(self._outputs.names[row]),
            "image": image,
            "problem": problem,
            "lines": [*lines, *change, *self._answers(row)],
        }

    def _answers(self, row: int) -> tuple[str, ...]:
        low, high = self._outputs.low.logits, self._outputs.high.logits
        if low is None or high is None:
            return ()
        first, second = self._answer(low[row]), self._answer(high[row])
        return (f"both: {first}",) if first == second else (f"low: {first}", f"full: {second}")

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
            image = decode(self._source[self._where[name]].data)
            if pixels_sha256(image) != self._outputs.hashes[row]:
                return None, "image has changed since collect"
            return thumbnail(image), ""
        except (OSError, ValueError) as error:  # ImageError and ImagesError are ValueErrors
            return None, f"image not readable: {error}"
