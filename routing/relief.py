"""Relief under pressure: a raised threshold while too many images wait, where the operator asked.

Off unless configured. An answer that it changed is marked `degraded`; the certificate is about the
others only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relief:
    """How far the threshold rises with the number of images that had to wait.

    Attributes:
        depth: images of one batch that had to wait from which on the threshold rises.
        full: images in a full batch; where all have waited the threshold is `highest`.
        highest: the limit, oracle units.
    """

    depth: int
    full: int
    highest: float

    def threshold(self, calibrated: float, waiting: int) -> float:
        """The threshold for a batch.

        Args:
            calibrated: the certified threshold, oracle units.
            waiting: images in the batch that had to wait.

        Returns:
            `calibrated` below `depth`; from there in equal steps up to `highest` at `full`. Never
            below `calibrated`.
        """
        if waiting < self.depth or self.highest <= calibrated:
            return calibrated
        steps = self.full - self.depth + 1
        share = min(1.0, (waiting - self.depth + 1) / steps)
        return calibrated + share * (self.highest - calibrated)
