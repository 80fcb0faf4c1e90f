"""What the full rung changes: the oracle, and whether a cheap answer could stand in for it.

All label-free: only the rungs' outputs are compared, with the reference: the full rung, or the full
model in FP32 where the full rung is a cheaper one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from routing import Calibration
from routing import fidelity as routing_fidelity
from routing.fidelity import KINDS

from .outputs import Outputs

FloatVector = NDArray[np.float64]
BoolVector = NDArray[np.bool_]


class FidelityError(ValueError):
    """The fidelity loss does not apply to these outputs. One line."""


@dataclass(frozen=True)
class Fidelity:
    """When a cheap answer is not acceptable in place of the full one.

    Attributes:
        kind: `top1`, the classes differ; or `cosine`, the embeddings' cosine is too small.
        tolerance: of `cosine`: a cosine below 1 - tolerance is a loss.
    """

    kind: str
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        """Refuse an unknown kind and a tolerance that no cosine or every cosine meets."""
        if self.kind not in KINDS:
            raise FidelityError(f"--fidelity {self.kind!r} is none of {', '.join(KINDS)}")
        if not 0 < self.tolerance < 2:
            raise FidelityError(f"--tolerance {self.tolerance} is not between 0 and 2")

    @classmethod
    def of(cls, calibration: Calibration) -> Fidelity:
        """The one an artifact was made for."""
        kind, tolerance = calibration.chosen_by["fidelity"], calibration.chosen_by["tolerance"]
        return cls(kind) if tolerance is None else cls(kind, tolerance)

    def loss(self, outputs: Outputs) -> BoolVector:
        """The fidelity loss of each image, BOOL (N,).

        Raises:
            FidelityError: `top1` for a model without a head.
        """
        if self.kind == "top1" and disagrees(outputs) is None:
            raise FidelityError("--fidelity top1 needs a head, the model has none; use cosine")
        return routing_fidelity.fidelity_loss(self.kind, self.tolerance, outputs.low, outputs.truth)

    def high_loss(self, outputs: Outputs) -> BoolVector | None:
        """The fidelity loss of the full rung's own answers, BOOL (N,).

        None where the full rung is the reference: it then loses none.
        """
        if outputs.reference is None:
            return None
        return self.loss(replace(outputs, low=outputs.high))

    def words(self, reference: str = "full rung") -> str:
        """What a loss is, to be read after "an answer that"."""
        if self.kind == "top1":
            return f"names another class than the {reference}"
        return f"has a cosine below {1 - self.tolerance:g} to the {reference}'s embedding"


def oracle_l2(outputs: Outputs) -> FloatVector:
    """L2 distance between the cheap rung's and the reference's embeddings, FP64 (N,)."""
    difference = outputs.low.embedding.astype(np.float64) - outputs.truth.embedding
    return np.asarray(np.linalg.norm(difference, axis=1))


def oracle_cosine(outputs: Outputs) -> FloatVector:
    """Cosine between the cheap rung's and the reference's embeddings, FP64 (N,)."""
    return routing_fidelity.cosine(outputs.low.embedding, outputs.truth.embedding)


def disagrees(outputs: Outputs) -> BoolVector | None:
    """Whether cheap rung and reference name different classes, BOOL (N,); None without a head."""
    return routing_fidelity.disagrees(outputs.low, outputs.truth)
