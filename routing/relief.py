"""Relief under pressure: a raised threshold while too many images wait, where the operator asked.

Off unless configured. An answer that it changed is marked `degraded`; the certificate is about the
others only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relief:
    """How far the threshold rises with the number of images that wait together.

    Attributes:
        depth: images in one batch of the router from which on the threshold rises. A batch holds
            what had queued up when the router became free.
        full: images in a full batch; there the threshold is `highest`.
        highest: the limit, oracle units.
    """

    depth: int
    full: int
    highest: float

    def threshold(self, calibrated: float, waiting: int) -> float:
        """The threshold for a batch.

        Args:
            calibrated: the certified threshold, oracle units.
            waiting: images in the batch.

        Returns:
            `calibrated` below `depth`; from there in equal steps up to `highest` at `full`. Never
            below `calibrated`.
        """
        if waiting < self.depth or self.highest <= calibrated:
            return calibrated
        steps = self.full - self.depth + 1
        share = min(1.0, (waiting - self.depth + 1) / steps)
        return calibrated + share * (self.highest - calibrated)
