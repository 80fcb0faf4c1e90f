"""A candidate artifact on live traffic: would it have decided otherwise?

Both artifacts belong to the same rungs, so what the cheap rung said of an image serves both and a
shadow costs no further call.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration
from .outputs import RungOutputs
from .policy import Overrides, escalation_mask

OUTCOMES = ("both_low", "both_high", "only_live_high", "only_candidate_high")


def compare(candidate: Calibration, low: RungOutputs, live: NDArray[np.bool_]) -> dict[str, int]:
    """Count how a candidate decides beside the live artifact.

    Args:
        candidate: scores the same cheap answers.
        low: the cheap rung's outputs for n images.
        live: BOOL (n,), which of them the live artifact wants to escalate.

    Returns:
        Images by outcome, one entry for each of `OUTCOMES`.
    """
    wanted = escalation_mask(candidate.score(low), candidate.threshold, Overrides())
    found = (~live & ~wanted, live & wanted, live & ~wanted, ~live & wanted)
    return {name: int(mask.sum()) for name, mask in zip(OUTCOMES, found, strict=True)}
