"""Evidence from live traffic: what certifies the threshold of a repository that starts with none.

Of the images that came without parameters each is drawn with the artifact's `audit_share`, before
anything is known of it, and whatever the load. Both rungs answer those, the client gets the full
rung's answer, and a journal gets the record, from which `python -m calibration live` certifies.

A certificate can turn out to be wrong, because the images have changed. Then the router does not
wait for anybody: once the test of "the risk is at most epsilon" fails it escalates every image,
and leaves a file beside the journals, by which the other instances, and this one after a restart,
know it too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from .metrics import Metrics
from .routing import Audit, Audited, Calibration, Overrides, RiskTest, fidelity_loss
from .routing.journal import Header, Journal, Record, retreat_file
from .routing.policy import escalation_mask

_LOOK_S = 0.2  # how often it is looked whether somebody else found that it must go back


class Evidence:
    """What one instance does about it.

    Args:
        calibration: the artifact.
        artifact: SHA-256 of its file.
        version: of the router.
        folder: where the journals lie.
        metrics: where the findings go.
        clock_s: monotonic, in seconds.

    Attributes:
        calibration: the artifact that decides: the given one, or, after a retreat, the same
            without a threshold.
        audit: for `run_cascade`; None where the artifact is not certified by live traffic.
    """

    def __init__(
        self,
        calibration: Calibration,
        artifact: str,
        version: int,
        folder: Path,
        metrics: Metrics,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.calibration = calibration
        self.audit = Audit(self._draw, self._seen) if calibration.is_live else None
        self._metrics, self._clock_s = metrics, clock_s
        self._retreat = retreat_file(folder, artifact)
        self._journal = Journal(folder, Header("", calibration.scoring_sha256, artifact, version))
        self._share = float(calibration.chosen_by.get("audit_share", 0))
        certificate = calibration.certificate
        self._test = RiskTest.of(certificate) if certificate and certificate["certified"] else None
        self._random = np.random.default_rng()
        self._fault, self._looked_s = "", -np.inf
        if self.audit:
            metrics.set("audit_share", self._share)
            self._look()

    def stop(self) -> None:
        """Let the journal go: what was read of it may be removed."""
        self._journal.close()

    def _draw(self, images: int) -> NDArray[np.bool_]:
        self._look()
        return np.asarray(self._random.random(images) < self._share)

    def _seen(self, audited: Audited) -> None:
        try:
            self._observe(audited)
        except Exception as error:  # its client has an answer all the same
            self._metrics.count("audit_dropped_total", len(audited.score))
            self._warn_once(repr(error))

    def _observe(self, audited: Audited) -> None:
        lost = fidelity_loss(self.calibration.chosen_by, audited.low, audited.high)
        escalated = escalation_mask(audited.score, self.calibration.threshold, Overrides())
        self._write(audited, lost)
        for is_escalated, is_lost in zip(escalated, lost, strict=True):
            kept = "kept_lost" if is_lost else "kept_ok"
            outcome = "escalated" if is_escalated else kept
            self._metrics.count("audited_images_total", outcome=outcome)
            if self._test is not None:
                self._test.observe(bool(is_lost and not is_escalated))
        is_worse = (lost & ~escalated).any()  # an image without a loss only calms the test
        if is_worse and self._test is not None and self._test.is_contradicted:
            test = self._test
            self._go_back(
                f"{test.losses} of {test.images} audited images got an unacceptable answer, the "
                f"certificate allows a share of {test.epsilon:.3g}"
            )
            self._leave_word()

    def _write(self, audited: Audited, lost: NDArray[np.bool_]) -> None:
        difference = audited.low.embedding.astype(np.float64) - audited.high.embedding
        changes = np.nan_to_num(np.linalg.norm(difference, axis=1))
        # What is not a number, or infinite, escalates; minus infinity is kept low, as the least.
        scores = [float(np.nan_to_num(s)) if s < np.inf else None for s in audited.score]
        records = [
            Record(*seen, self._share, time.time())
            for seen in zip(scores, lost.tolist(), changes.tolist(), strict=True)
        ]
        if not self._journal.append(records):
            self._metrics.count("audit_dropped_total", len(records))
            self._warn_once(self._journal.fault)

    def _warn_once(self, fault: str) -> None:
        if fault != self._fault:  # it may be every image's
            self._fault = fault
            pb_utils.Logger.log_warn(f"router: evidence is not written: {fault}")

    def _look(self) -> None:
        """Go back where somebody else found so, or this instance before it was loaded anew."""
        if self.calibration.threshold is None or self._clock_s() - self._looked_s < _LOOK_S:
            return
        self._looked_s = self._clock_s()
        if os.path.exists(self._retreat):  # of a folder that may not be looked at: no
            self._go_back("calibration live or another instance found so, or this one before")

    def _go_back(self, reason: str) -> None:
        certificate = {**(self.calibration.certificate or {}), "certified": False}
        self.calibration = replace(self.calibration, threshold=None, certificate=certificate)
        self._test, self._share = None, 1.0
        self._metrics.set("audit_share", self._share)
        for gauge in ("threshold", "certified_risk", "calibrated_escalation_rate"):
            self._metrics.forget(gauge)
        self._metrics.count("certificate_contradicted_total")
        pb_utils.Logger.log_warn(
            f"router: live traffic contradicts the certificate: {reason}; every image goes to the "
            "full rung until python -m calibration live has certified a threshold anew"
        )

    def _leave_word(self) -> None:
        try:
            self._retreat.parent.mkdir(parents=True, exist_ok=True)
            self._retreat.touch()
        except OSError as error:
            pb_utils.Logger.log_warn(
                f"router: the other instances are not told to go back: {error}"
            )
