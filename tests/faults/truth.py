"""The right answer to every image of the load, worked out before anything is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.graphs import GraphSet
from calibration.running import open_session, run_session
from imaging import Preprocessing, decode
from routing import Calibration, Overrides, RungOutputs, escalation_mask

# FP32 GEMMs sum in another order at another batch size.
RTOL, ATOL = 1e-4, 1e-3


@dataclass(frozen=True)
class Truth:
    """What both rungs answer to N images, and which of them escalate.

    Attributes:
        files: the encoded images.
        images: the `image` tensor, FP32 (N, 3, H, W).
        low: the cheap rung's answers.
        high: the full rung's answers.
        escalated: BOOL (N,), the offline decision.
    """

    files: Sequence[bytes]
    images: NDArray[np.float32]
    low: RungOutputs
    high: RungOutputs
    escalated: NDArray[np.bool_]

    def wrong(self, rows: Sequence[int], answer: Mapping[str, NDArray]) -> str | None:
        """Why an answer is wrong, or None.

        It is right if each image has the answer of the rung that its flags name, and the flags are
        those of the offline decision; only an image that should escalate may be `degraded`.

        Args:
            rows: the images that were asked about, in order.
            answer: the outputs by name.
        """
        index = np.asarray(rows)
        for name in ("embedding", "logits", "escalated", "degraded", "score"):
            if answer.get(name) is None or len(answer[name]) != len(index):
                return f"{name} does not have {len(index)} rows"
        escalated, degraded = (answer[name][:, 0] for name in ("escalated", "degraded"))
        if (escalated != (self.escalated[index] & ~degraded)).any():
            return "routing differs from the offline decision"
        if (degraded & ~self.escalated[index]).any():
            return "degraded where nothing should escalate"
        for name in ("embedding", "logits"):
            low, high = getattr(self.low, name)[index], getattr(self.high, name)[index]
            expected = np.where(escalated[:, None], high, low)
            if not np.allclose(answer[name], expected, rtol=RTOL, atol=ATOL):
                return f"{name} is not that of the rung that the flags name"
        return None

    def easy(self) -> list[int]:
        """Images that stay low."""
        return np.flatnonzero(~self.escalated).tolist()

    def hard(self) -> list[int]:
        """Images that escalate."""
        return np.flatnonzero(self.escalated).tolist()


def work_out(rungs: GraphSet, calibration_file: Path, files: Sequence[bytes]) -> Truth:
    """Run both rungs offline on every image, in one batch each."""
    calibration = Calibration.load(calibration_file)
    preprocessing = Preprocessing.from_dict(rungs.preprocessing)
    images = np.stack([preprocessing(decode(data)) for data in files])
    low = run_session(open_session(rungs.files["vit_low"]), images, layers=True)
    high = run_session(open_session(rungs.files["vit_high"]), images, layers=False)
    score = calibration.score(low)
    escalated = escalation_mask(score, calibration.threshold, Overrides())
    # No score may lie so close to the threshold that rounding could decide.
    assert np.abs(score - calibration.threshold).min() > RTOL * (score.max() - score.min())
    truth = Truth(files, images, low, high, escalated)
    assert len(truth.easy()) >= 5 and len(truth.hard()) >= 5, "the images must mix easy and hard"
    # Else a wrong rung would pass for the right one.
    apart = np.abs(low.embedding - high.embedding).max(axis=1)
    assert apart[escalated].min() > 10 * ATOL
    return truth
