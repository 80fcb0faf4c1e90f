"""What the full rung changes: the oracle, and whether a cheap answer could stand in for it.

All label-free: only the rungs' outputs are compared, with the reference: the full rung, or the full
model in FP32 where the full rung is a cheaper one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bundle.fidelity import APPLICABLE as APPLICABLE
from bundle.fidelity import COSINE_TOLERANCE as COSINE_TOLERANCE
from bundle.fidelity import FidelityError as FidelityError
from bundle.fidelity import FidelityLoss
from routing import fidelity as routing_fidelity

from .outputs import Outputs

FloatVector = NDArray[np.float64]
BoolVector = NDArray[np.bool_]


class Fidelity(FidelityLoss):
    """A loss that can be looked for in collected outputs."""

    def loss(self, outputs: Outputs) -> BoolVector:
        """The fidelity loss of each image, BOOL (N,).

        Raises:
            FidelityError: it means nothing for what the model answers.
        """
        self.check(outputs.task)
        return routing_fidelity.fidelity_loss(self.to_dict(), outputs.low, outputs.truth)

    def high_loss(self, outputs: Outputs) -> BoolVector | None:
        """The fidelity loss of the full rung's own answers, BOOL (N,).

        None where the full rung is the reference: it then loses none.
        """
        if outputs.reference is None:
            return None
        return self.loss(replace(outputs, low=outputs.high))

    def agrees(self, outputs: Outputs) -> tuple[BoolVector, BoolVector] | None:
        """Whether the cheap and the full rung answer as the reference, BOOL (N,) each.

        Of classes, of labels at the threshold, of values within the tolerance. None where nothing
        says it: without a head, and of values under another loss than `value`.
        """
        kind = APPLICABLE[outputs.task][0][0]
        if kind == "cosine" or (kind == "value" and self.kind != "value"):
            return None
        by = self if self.kind == kind else Fidelity(kind)
        high = by.high_loss(outputs)
        return ~by.loss(outputs), np.ones(len(outputs), np.bool_) if high is None else ~high


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
