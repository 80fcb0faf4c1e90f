"""From what the demo measured to the figures it reports. Pure functions, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perf import derive

from .systems import ADAPTIVE, HIGH, LOW, RUNG

CERTIFICATE = (
    *("epsilon", "confidence", "method", "n", "errors", "allowed", "certified", "signal"),
    "statement",
)


@dataclass(frozen=True)
class Pass:
    """One perf_analyzer pass of one system over one share of the test crops.

    Attributes:
        requests: how many crops were sent, one at a time.
        latency_ms_p50: median request latency.
        throughput_per_s: images per second.
    """

    requests: int
    latency_ms_p50: float
    throughput_per_s: float


@dataclass(frozen=True)
class Served:
    """The server's answers for the N test crops.

    Attributes:
        low: top-1 class with policy=low, (N,).
        high: top-1 class of the full FP32 model, (N,): static high.
        adaptive: top-1 class with policy=auto, (N,).
        escalated: (N,).
        score: oracle units, (N,).
        truth: class index of the photograph each crop was cut from, (N,).
        beside: top-1 class of each graph beside those, (N,), by system.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    adaptive: NDArray[np.int64]
    escalated: NDArray[np.bool_]
    score: NDArray[np.float32]
    truth: NDArray[np.int64]
    beside: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def answers(self) -> dict[str, NDArray[np.int64]]:
        """Top-1 classes by system."""
        return {LOW: self.low, HIGH: self.high, ADAPTIVE: self.adaptive, **self.beside}

    def agreement(self) -> dict[str, float]:
        """Share of crops that each system answers as the full model does."""
        return {
            system: float((answer == self.high).mean()) for system, answer in self.answers().items()
        }


def summarise(
    backbone: str,
    resolutions_px: tuple[int, int],
    served: Served,
    passes: Mapping[str, Sequence[Pass]],
    overhead: Sequence[tuple[float, float]],
    certificate: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of summary.json.

    Every system has sent every crop once, a share of them at a time and in turn with the others,
    so that a machine whose speed drifts slows all of them alike. Throughput is all requests over
    all time; the median latency is the median of the shares' medians.

    Args:
        backbone: name of the model.
        resolutions_px: (low, high).
        served: the server's answers.
        passes: one pass per share for each of `systems.CORE`, and for `vit_high` where that is not
            the full FP32 model.
        overhead: for each crop the latency of static low and, right beside it, of the router told
            never to escalate, in ms.
        certificate: of the calibration.
        environment: `triton_version` and whatever else describes the machine.
    """
    escalation_rate = float(served.escalated.mean())
    throughput = {
        system: sum(p.requests for p in taken) / sum(p.requests / p.throughput_per_s for p in taken)
        for system, taken in passes.items()
    }
    cost = {system: 1 / throughput[system] for system in passes}
    speedup = derive.speedup(cost[ADAPTIVE], cost[HIGH])
    rung = cost.get(RUNG, cost[HIGH])  # what an escalation costs
    bound = derive.cascade_bound(cost[LOW], rung, escalation_rate)
    bound *= derive.speedup(rung, cost[HIGH])
    answers, agreement = served.answers(), served.agreement()[ADAPTIVE]
    others = {name: value for name, value in environment.items() if name != "triton_version"}
    return {
        "backbone": backbone,
        "low_px": resolutions_px[0],
        "high_px": resolutions_px[1],
        "images": len(served.truth),
        "escalation_rate": escalation_rate,
        "certificate": {name: certificate[name] for name in CERTIFICATE},
        "realised_risk": float((served.adaptive != served.high).mean()),
        "agreement_with_high": agreement,
        "accuracy": {system: float((answers[system] == served.truth).mean()) for system in passes},
        "latency_ms_p50": {
            system: median(p.latency_ms_p50 for p in taken) for system, taken in passes.items()
        },
        "throughput_per_s": throughput,
        "speedup_vs_high": speedup,
        "cascade_bound": bound,
        "cascade_efficiency": speedup / bound,
        "router_overhead": median(derive.router_overhead(router, low) for low, router in overhead),
        "protocols": ["grpc", "http"],
        "triton_version": environment["triton_version"],
        "environment": others,
    }
