"""The router's own metrics, on Triton's metrics endpoint.

An update of a metric is a message to the server (some 15 microseconds), so `execute` only counts;
a thread hands the sums on twice a second. Instances of the router share their series.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .routing import Calibration
from .routing.audit import SHADOW_OUTCOMES
from .routing.reference import OUTCOMES as REFERENCE_OUTCOMES

_FLUSH_S = 0.5
_HASH_LENGTH = 12  # as much as tells files from each other, and fits a table
_DURATION_BOUNDS_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
_SCORE_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)

# name without prefix: (help, label, its values); every series exists from the start, with 0.
_COUNTERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "requests_total": (
        "Requests by outcome. Those that a full queue refused are Triton's own to count.",
        "outcome",
        ("ok", "invalid", "cancelled", "expired", "unavailable", "failed"),
    ),
    "images_total": (
        "Images answered, by path; audited: the threshold keeps it low, and it was drawn.",
        "path",
        ("low", "high", "degraded", "audited"),
    ),
    "answered_twice_images_total": (
        "Images that both rungs answered, by reason: the score, or the audit alone.",
        "reason",
        ("score", "audit"),
    ),
    "degraded_images_total": (
        "Images that were to escalate and got the cheap answer.",
        "cause",
        ("high_failed", "pressure"),
    ),
    "high_failures_total": (
        "Failed calls of the full rung.",
        "reason",
        ("error", "timeout", "open"),
    ),
    "audited_images_total": (
        "Images whose realised loss was looked at.",
        "outcome",
        ("kept_ok", "kept_lost", "escalated", "escalated_lost"),
    ),
    "audit_dropped_total": (
        "Images not looked at, for want of time or an answer, or by an error.",
        "",
        (),
    ),
    "certificate_contradicted_total": (
        "Instances of the router whose audit contradicts the certificate.",
        "",
        (),
    ),
}
_Key = tuple[str, tuple[tuple[str, str], ...]]


class Metrics:
    """The metrics of one instance.

    Args:
        version: of the router, the label `version` of every series.
        calibration: for the identity, the threshold and the buckets of the score.
        artifact: SHA-256 of calibration.json.
        candidate: version that runs in the shadow; 0: none.
        queue_limit: requests that may wait for the router.
    """

    def __init__(
        self,
        version: str,
        calibration: Calibration,
        artifact: str,
        candidate: int,
        queue_limit: int,
    ) -> None:
        self._version = version
        self._lock = threading.Lock()
        self._counts: Counter[_Key] = Counter()
        self._values: defaultdict[_Key, list[float]] = defaultdict(list)
        self._families: dict[str, Any] = {}  # a metric ends with its family
        self._metrics: dict[_Key, Any] = {}
        self._is_told = False
        self._add_counters()
        if candidate:
            self._add_shadow(candidate)
        self._add_gauges(calibration, artifact, queue_limit)
        self._add_histograms(calibration)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter or a gauge."""
        with self._lock:
            self._counts[_key(name, labels)] += amount  # type: ignore[assignment]

    def observe(self, name: str, values: Iterable[float], **labels: str) -> None:
        """Add values to a histogram, where the server has histograms."""
        key = _key(name, labels)
        if key in self._metrics:
            with self._lock:
                self._values[key].extend(values)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._metrics[_key(name, {})].set(value)

    def forget(self, name: str) -> None:
        """End a gauge whose figure is no longer true: a scrape no longer finds its series."""
        self._metrics.pop(_key(name, {}), None)
        self._families.pop(name, None)

    def set_reference_outcome(self, found: str) -> None:
        """Say how the answers compare with the reference answers; one of `OUTCOMES`."""
        for outcome in REFERENCE_OUTCOMES:
            metric = self._metrics[_key("reference_answers", {"outcome": outcome})]
            metric.set(float(outcome == found))

    def stop(self) -> None:
        """Hand on what is left and end the thread."""
        self._stopping.set()
        self._thread.join(2 * _FLUSH_S)

    def flush(self) -> None:
        """Hand on what was counted since the last time."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            values, self._values = self._values, defaultdict(list)
        for key, amount in counts.items():
            if amount:
                self._hand_on(self._metrics[key].increment, amount)
        for key, observed in values.items():
            for value in observed:
                self._hand_on(self._metrics[key].observe, value)

    def _hand_on(self, call: Callable[[float], object], value: float) -> None:
        try:
            call(value)
        except Exception as error:  # the server does not take this one; the others it may
            if not self._is_told:  # it may be every flush's
                self._is_told = True
                pb_utils.Logger.log_warn(f"router: some metrics are not handed on: {error!r}")

    def _run(self) -> None:
        while not self._stopping.wait(_FLUSH_S):
            self.flush()
        self.flush()

    def _add(
        self,
        name: str,
        text: str,
        kind: Any,
        labels: Mapping[str, str],
        buckets: list[float] | None = None,
    ) -> Any:
        if name not in self._families:
            self._families[name] = pb_utils.MetricFamily(
                name=f"adaptive_vit_{name}", description=text, kind=kind
            )
        everything = {"version": self._version, **labels}
        options = {} if buckets is None else {"buckets": buckets}
        metric = self._families[name].Metric(labels=everything, **options)
        self._metrics[_key(name, labels)] = metric
        return metric

    def _add_counters(self) -> None:
        counter = pb_utils.MetricFamily.COUNTER
        for name, (text, label, allowed) in _COUNTERS.items():
            for labels in [{label: value} for value in allowed] or [{}]:
                self._add(name, text, counter, labels)

    def _add_shadow(self, candidate: int) -> None:
        counter = pb_utils.MetricFamily.COUNTER
        text = "Images scored by a candidate version too, by which of the two escalate."
        for outcome in SHADOW_OUTCOMES:
            labels = {"candidate": str(candidate), "outcome": outcome}
            self._add("shadow_images_total", text, counter, labels)

    def _add_gauges(self, calibration: Calibration, artifact: str, queue_limit: int) -> None:
        gauge = pb_utils.MetricFamily.GAUGE
        text = "Requests that may wait for the router; more are refused."
        self._add("queue_limit", text, gauge, {}).set(queue_limit)
        self._add("images_in_flight", "Images that the router is working on.", gauge, {})
        # Hashes of files, so that `sha256sum` in the repository shows the same.
        low, high = calibration.rungs["vit_low"], calibration.rungs["vit_high"]
        shared = low.weights_sha256 or high.weights_sha256 or ""  # there is one such file, or none
        identity = {
            "artifact": artifact[:_HASH_LENGTH],
            "signal": calibration.signal,
            "low": low.sha256[:_HASH_LENGTH],
            "high": high.sha256[:_HASH_LENGTH],
            "weights": shared[:_HASH_LENGTH],
        }
        self._add("router_info", "1, with what is served as labels.", gauge, identity).set(1)
        text = "1 for how the answers compare with the calibration's; all 0: not compared."
        for outcome in REFERENCE_OUTCOMES:
            self._add("reference_answers", text, gauge, {"outcome": outcome})
        if calibration.threshold is not None:
            text = "Calibrated threshold, in oracle units."
            self._add("threshold", text, gauge, {}).set(calibration.threshold)
        if calibration.is_live:
            text = "Share of images that both rungs answer, to certify from live traffic."
            self._add("audit_share", text, gauge, {})
        if "escalation_rate" in calibration.metrics:
            text = "Share of images that escalated when the threshold was calibrated."
            rate = calibration.metrics["escalation_rate"]
            self._add("calibrated_escalation_rate", text, gauge, {}).set(rate)
        certificate = calibration.certificate
        if certificate is not None and certificate.get("certified"):
            text = "Certified share of images with another answer than the reference's."
            self._add("certified_risk", text, gauge, {}).set(certificate["epsilon"])

    def _add_histograms(self, calibration: Calibration) -> None:
        histogram = getattr(pb_utils.MetricFamily, "HISTOGRAM", None)
        if histogram is None:
            pb_utils.Logger.log_warn(
                "router: this Triton is too old for histograms: request_duration_seconds and score "
                "are left out of the metrics"
            )
            return
        for path in ("low", "high"):
            self._add(
                "request_duration_seconds",
                "From the router's start on a request to its answer, without the queue.",
                histogram,
                {"path": path},
                _DURATION_BOUNDS_S,
            )
        text = "Scores of images, in oracle units."
        self._add("score", text, histogram, {}, _score_bounds(calibration))


def _score_bounds(calibration: Calibration) -> list[float]:
    """Bounds at quantiles of the scores that calibration saw, and at the threshold."""
    bounds = set()
    if len(calibration.reference_scores):
        bounds.update(np.quantile(calibration.reference_scores, _SCORE_QUANTILES).tolist())
    if calibration.threshold is not None:
        bounds.add(calibration.threshold)
    return sorted(bounds) or [0.0]


def _key(name: str, labels: Mapping[str, str]) -> _Key:
    return name, tuple(sorted(labels.items()))
