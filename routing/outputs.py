"""What one rung returns for a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

# What logits mean. `classes`: one of C, by softmax; `labels`: each of C independently, by sigmoid;
# `value`: C numbers, as of a regression. None stands for a model without a head.
TASKS = ("classes", "labels", "value")


def default_task(count: int | None) -> str | None:
    """The task of a head of `count` outputs that does not say it; None: there is no head.

    It is as `transformers` takes it: one output is a value.
    """
    if count is None:
        return None
    return "value" if count == 1 else "classes"


@dataclass(frozen=True)
class RungOutputs:
    """A rung's outputs for B images, FP32.

    Attributes:
        embedding: (B, D), the final normalised CLS token.
        cls_layers: (B, L + 1, D), the CLS token after the embedding layer and after each of the
            L blocks. None where it was not asked for: only the cheap rung's is ever read.
        logits: (B, C), or None for a model without a head.
    """

    embedding: FloatArray
    cls_layers: FloatArray | None
    logits: FloatArray | None

    def __len__(self) -> int:
        return int(self.embedding.shape[0])

    def finite(self) -> NDArray[np.bool_]:
        """Which images' outputs hold neither NaN nor Inf, BOOL (B,)."""
        sound = np.ones(len(self), dtype=np.bool_)
        for values in (self.embedding, self.cls_layers, self.logits):
            if values is not None:
                sound &= np.isfinite(values).reshape(len(values), -1).all(axis=1)
        return sound

    def rows(self, index: slice | Sequence[int] | NDArray[np.intp]) -> RungOutputs:
        """The outputs of some of the images, in the order of `index`; a slice copies nothing."""
        return RungOutputs(
            embedding=self.embedding[index],
            cls_layers=None if self.cls_layers is None else self.cls_layers[index],
            logits=None if self.logits is None else self.logits[index],
        )
