"""What is measured on live traffic beside answering it: the realised risk, and a candidate version.

Both look at a random share of the images that came without parameters, probes left out. Nothing
here makes a client wait, or an answer fail: what is needed is copied, and a thread of its own does
the rest.

The audit is about decisions, so an image that the threshold escalates counts as escalated whether
or not it got the full rung's answer: pressure, a failing full rung or a client that hung up take
escalated images only, and leaving those out would make the risk look larger than it is. What does
leave an image out must know nothing of its decision or its neighbours'. So every image drawn takes
its place in one queue, in random order, and costs the same there: the full rung is asked about
each, although only the answers to kept ones are compared. And it takes its place as soon as it is
decided, before its own request waits for the full rung: while that one waits the queue gets
shorter, as the audit asks the same rung. Images escalated and kept are thus dropped alike where the
queue is full because asking takes long, and where asking fails. (Only where more is drawn than
there is time for, and runs of images that all escalate or all do not are longer than the queue, do
the kept ones count for less, as they come faster.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .metrics import Metrics
from .routing import (
    REFERENCE_MODEL,
    Calibration,
    Decision,
    Overrides,
    RiskTest,
    RungError,
    RungOutputs,
    fidelity_loss,
)
from .routing.audit import compare_decisions
from .settings import RouterSettings

_WAITING = 32  # images or batches; more are dropped, and counted
_POLL_S = 0.5


@dataclass(frozen=True)
class _Drawn:
    """An image to audit, as a batch of one."""

    image: Any  # FP32 (1, 3, H, W)
    low: RungOutputs
    escalated: bool


@dataclass(frozen=True)
class _Scored:
    """Cheap answers of n images, and which of them the live artifact wants to escalate."""

    low: RungOutputs
    live: Any  # BOOL (n,)


class LiveAudit:
    """The audit and the shadow of one instance.

    Args:
        settings: how much to look at.
        calibration: the live artifact.
        candidate: the artifact in the shadow, if there is one.
        high: asks the full rung; called from this object's thread.
        metrics: where the findings go.
        reference: asks the full model, where it is not the full rung that losses are about; None:
            it is, or the full model is not deployed, and then nothing is audited.
    """

    def __init__(
        self,
        settings: RouterSettings,
        calibration: Calibration,
        candidate: Calibration | None,
        high: Callable[[Any], RungOutputs],
        metrics: Metrics,
        reference: Callable[[Any], RungOutputs] | None = None,
    ) -> None:
        audited = calibration.threshold is not None and calibration.chosen_by.get("fidelity")
        askable = calibration.is_about_full_rung or reference is not None
        if settings.audit_fraction and audited and not askable:
            pb_utils.Logger.log_warn(
                "router: no audit: the artifact is about the full model, which is not deployed as "
                f"{REFERENCE_MODEL}; calibrate again if this artifact is of an earlier release, "
                "and assemble again with --audit-fraction"
            )
        self._audit_fraction = settings.audit_fraction if audited and askable else 0.0
        self._shadow_fraction = settings.shadow_fraction if candidate is not None else 0.0
        self._shadow_version = str(settings.shadow_version)
        self._calibration = calibration
        self._candidate = candidate
        self._high = high
        self._reference = None if calibration.is_about_full_rung else reference
        self._metrics = metrics
        self._test = _risk_test(calibration)  # only this object's thread touches it
        self._random = np.random.default_rng()
        self._waiting: Queue[_Drawn | _Scored] = Queue(_WAITING)
        self._last_failure = ""
        self._stopping = threading.Event()
        if self._audit_fraction or self._shadow_fraction:
            threading.Thread(target=self._run, name="live-audit", daemon=True).start()

    def look(self, decision: Decision) -> None:
        """Take note of what was decided about a request; returns at once, and never raises."""
        try:
            self._look(decision)
        except Exception as error:  # its client has an answer all the same
            self._failed(error)

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._stopping.set()

    def _look(self, decision: Decision) -> None:
        if decision.request.is_probe or decision.request.overrides != Overrides():
            return
        images = len(decision.wanted)
        if self._audit_fraction:
            chosen = np.flatnonzero(self._random.random(images) < self._audit_fraction)
            for row in self._random.permutation(chosen):  # a client may sort what it sends
                self._draw(decision, row)
        if self._shadow_fraction:
            chosen = self._random.random(images) < self._shadow_fraction
            if chosen.any():
                self._queue(_Scored(_copy(decision.low, chosen), decision.wanted[chosen]))

    def _draw(self, decision: Decision, row: int) -> None:
        if self._waiting.full():  # before anything is copied
            self._metrics.count("audit_dropped_total")
            return
        rows = slice(row, row + 1)
        low = _copy(replace(decision.low, cls_layers=None), rows)
        self._queue(_Drawn(decision.request.image[rows].copy(), low, bool(decision.wanted[row])))

    def _queue(self, item: _Drawn | _Scored) -> None:
        try:
            self._waiting.put_nowait(item)
        except Full:
            if isinstance(item, _Drawn):
                self._metrics.count("audit_dropped_total")

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                item = self._waiting.get(timeout=_POLL_S)
            except Empty:
                continue
            self._work(item)

    def _work(self, item: _Drawn | _Scored) -> None:
        try:
            if isinstance(item, _Scored):
                self._compare(item)
            else:
                self._audit(item)
        except Exception as error:  # one image must not end the audit of all others
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._metrics.count("audit_dropped_total")
        if str(error) != self._last_failure:  # it may be every image's
            self._last_failure = str(error)
            pb_utils.Logger.log_warn(f"router: an image was not watched: {error!r}")

    def _compare(self, item: _Scored) -> None:
        assert self._candidate is not None
        for outcome, images in compare_decisions(self._candidate, item.low, item.live).items():
            self._metrics.count(
                "shadow_images_total", images, candidate=self._shadow_version, outcome=outcome
            )

    def _audit(self, item: _Drawn) -> None:
        try:
            high = self._high(item.image)
            truth = high if self._reference is None else self._reference(item.image)
        except RungError:
            self._metrics.count("audit_dropped_total")
            return
        answer = high if item.escalated else item.low
        lost = answer is not truth and self._is_lost(answer, truth)
        outcome = ("escalated", "escalated_lost") if item.escalated else ("kept_ok", "kept_lost")
        self._metrics.count("audited_images_total", outcome=outcome[lost])
        self._observe(lost)

    def _is_lost(self, answer: RungOutputs, truth: RungOutputs) -> bool:
        return bool(fidelity_loss(self._calibration.chosen_by, answer, truth)[0])

    def _observe(self, lost: bool) -> None:
        if self._test is None:
            return
        self._test.observe(lost)
        if not (lost and self._test.is_contradicted):  # an image without a loss only calms it
            return
        test, self._test = self._test, None  # said once
        self._metrics.count("certificate_contradicted_total")
        pb_utils.Logger.log_warn(
            f"router: live traffic contradicts the certificate: {test.losses} of {test.images} "
            f"audited images get an unacceptable answer, the certificate allows a share of "
            f"{test.epsilon:.3g}; the images are not as they were when it was calibrated: "
            "calibrate again"
        )


def _risk_test(calibration: Calibration) -> RiskTest | None:
    """None where nothing is certified."""
    certificate = calibration.certificate
    if certificate is None or not certificate.get("certified"):
        return None
    return RiskTest.of(certificate)


def _copy(outputs: RungOutputs, rows: Any) -> RungOutputs:
    """Rows of outputs whose memory goes back to Triton with the answer."""
    return RungOutputs(
        outputs.embedding[rows].copy(),
        None if outputs.cls_layers is None else outputs.cls_layers[rows].copy(),
        None if outputs.logits is None else outputs.logits[rows].copy(),
    )
