"""What is measured on live traffic beside answering it: the realised risk, and a candidate version.

Both look at a random share of the images that came without parameters. Nothing here makes a client
wait: what is needed is copied, and a thread of its own does the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .metrics import Metrics
from .routing import (
    Calibration,
    CascadeAnswer,
    CascadeRequest,
    Overrides,
    RiskTest,
    RungError,
    RungOutputs,
    fidelity_loss,
)
from .routing.shadow import compare
from .settings import Settings

_WAITING = 32  # images or batches; more are dropped, and counted
_POLL_S = 0.5


@dataclass(frozen=True)
class _Kept:
    """An image that was kept low, as a batch of one."""

    image: Any  # FP32 (1, 3, H, W)
    low: RungOutputs


@dataclass(frozen=True)
class _Scored:
    """Cheap answers of n images, and which of them the live artifact wants to escalate."""

    low: RungOutputs
    live: Any  # BOOL (n,)


class Watch:
    """The audit and the shadow of one instance.

    Args:
        settings: how much to look at.
        calibration: the live artifact.
        candidate: the artifact in the shadow, if there is one.
        high: asks the full rung; called from this object's thread.
        metrics: where the findings go.
    """

    def __init__(
        self,
        settings: Settings,
        calibration: Calibration,
        candidate: Calibration | None,
        high: Callable[[Any], RungOutputs],
        metrics: Metrics,
    ) -> None:
        audited = calibration.threshold is not None and calibration.chosen_by.get("fidelity")
        self._audit_fraction = settings.audit_fraction if audited else 0.0
        self._shadow_fraction = settings.shadow_fraction if candidate is not None else 0.0
        self._shadow_version = str(settings.shadow_version)
        self._calibration = calibration
        self._candidate = candidate
        self._high = high
        self._metrics = metrics
        self._test = _risk_test(calibration)
        self._lock = threading.Lock()  # of the test, which two threads feed
        self._random = np.random.default_rng()
        self._waiting: Queue[_Kept | _Scored] = Queue(_WAITING)
        self._stopping = threading.Event()
        if self._audit_fraction or self._shadow_fraction:
            threading.Thread(target=self._run, name="watch", daemon=True).start()

    def look(self, request: CascadeRequest, answer: CascadeAnswer) -> None:
        """Take note of an answer; returns at once.

        Args:
            request: what was asked.
            answer: what was answered.
        """
        if request.overrides != Overrides() or answer.low is None:
            return
        wanted = answer.escalated | answer.degraded
        if self._audit_fraction:
            chosen = self._random.random(len(wanted)) < self._audit_fraction
            for row in np.flatnonzero(chosen & ~answer.degraded):
                self._audit(request, answer, row)
        if self._shadow_fraction:
            chosen = self._random.random(len(wanted)) < self._shadow_fraction
            if chosen.any():
                self._queue(_Scored(_copy(answer.low, chosen), wanted[chosen]))

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._stopping.set()

    def _audit(self, request: CascadeRequest, answer: CascadeAnswer, row: int) -> None:
        # Dropped before it is known whether the image was kept: else only those would be missing,
        # and the risk would look smaller than it is.
        if self._waiting.full():
            self._metrics.count("audit_dropped_total")
        elif answer.escalated[row]:
            self._found("escalated", lost=False)
        else:
            assert answer.low is not None
            rows = slice(row, row + 1)
            self._queue(_Kept(request.image[rows].copy(), _copy(answer.low, rows)))

    def _queue(self, item: _Kept | _Scored) -> None:
        try:
            self._waiting.put_nowait(item)
        except Full:
            if isinstance(item, _Kept):
                self._metrics.count("audit_dropped_total")

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                item = self._waiting.get(timeout=_POLL_S)
            except Empty:
                continue
            try:
                if isinstance(item, _Scored):
                    self._compare(item)
                else:
                    self._ask_high(item)
            except Exception as error:  # one image must not end the watch over all others
                pb_utils.Logger.log_warn(f"router: an image was not audited: {error}")
                self._metrics.count("audit_dropped_total")

    def _compare(self, item: _Scored) -> None:
        assert self._candidate is not None
        for outcome, images in compare(self._candidate, item.low, item.live).items():
            self._metrics.count(
                "shadow_images_total", images, candidate=self._shadow_version, outcome=outcome
            )

    def _ask_high(self, item: _Kept) -> None:
        try:
            high = self._high(item.image)
        except RungError:
            self._metrics.count("audit_dropped_total")
            return
        lost = bool(fidelity_loss(self._calibration.chosen_by, item.low, high)[0])
        self._found("kept_lost" if lost else "kept_ok", lost)

    def _found(self, outcome: str, lost: bool) -> None:
        self._metrics.count("audited_images_total", outcome=outcome)
        if self._test is None:
            return
        with self._lock:
            self._test.observe(lost)
            if not self._test.is_contradicted:
                return
            test, self._test = self._test, None  # said once
        self._metrics.count("certificate_contradicted_total")
        pb_utils.Logger.log_warn(
            f"router: live traffic contradicts the certificate: {test.losses} of {test.images} "
            f"audited images were kept low and changed, at most {test.epsilon:g} are certified; "
            "the images are not as they were when it was calibrated: calibrate again"
        )


def _risk_test(calibration: Calibration) -> RiskTest | None:
    """None where nothing is certified, or with respect to a model that is not served."""
    certificate = calibration.certificate
    if certificate is None or not certificate.get("certified") or "reference" in certificate:
        return None
    return RiskTest(certificate["epsilon"])


def _copy(outputs: RungOutputs, rows: Any) -> RungOutputs:
    """Rows of outputs whose memory goes back to Triton with the answer."""
    return RungOutputs(
        outputs.embedding[rows].copy(),
        None if outputs.cls_layers is None else outputs.cls_layers[rows].copy(),
        None if outputs.logits is None else outputs.logits[rows].copy(),
    )
