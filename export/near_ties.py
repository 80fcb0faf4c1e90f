"""Images that a merging of tokens may answer in another way in another runtime, and how many.

Which tokens merge is a choice between numbers. Where the two best are the same to within rounding,
torch and ONNX Runtime may choose another one each; both answers are then right, and they differ by
more than rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What an image keeps whose tokens merged in another way. That is for a token or two, while a graph
# that merges the wrong ones loses far more, for every image.
LEAST_COSINE = 0.9

# One batch: output name -> (B, ...) as ONNX Runtime answers (None: it failed) and as torch does.
Answers = tuple[Mapping[str, NDArray[Any] | None], Mapping[str, NDArray[Any]]]


def left_out(batches: Sequence[Answers], rtol: float, atol: float, most: float) -> set[int]:
    """Rows to leave out of an exact comparison.

    Args:
        batches: each with the first B of the same images.
        rtol: accepted difference relative to torch's value.
        atol: accepted absolute difference, added to the relative one.
        most: share of the images that may be left out.

    Returns:
        The rows that differ in any batch; none where they are more than `most` of the images, or
        one's embedding keeps no cosine of `LEAST_COSINE`: then that is no matter of ties.
    """
    rows: set[int] = set()
    images = 0
    for answers, truths in batches:
        for name, truth in truths.items():
            answer = answers[name]
            if answer is None or answer.shape != truth.shape:
                return set()
            images = max(images, len(truth))
            beyond = ~(np.abs(answer - truth) <= atol + rtol * np.abs(truth))  # NaN is beyond
            found = np.flatnonzero(beyond.reshape(len(truth), -1).any(axis=1)).tolist()
            if any(not _cosine(answers, truths, row) >= LEAST_COSINE for row in found):
                return set()
            rows.update(found)
    return rows if len(rows) <= most * images else set()


def _cosine(
    answers: Mapping[str, NDArray[Any] | None], truths: Mapping[str, NDArray[Any]], row: int
) -> float:
    """Between an image's embeddings; NaN where one is not finite or not there."""
    answer, truth = answers["embedding"], truths["embedding"][row]
    if answer is None or answer.shape[1:] != truth.shape:
        return float("nan")
    return float(answer[row] @ truth / (np.linalg.norm(answer[row]) * np.linalg.norm(truth)))
