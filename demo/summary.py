"""From what the demo measured to the figures it reports. Pure functions, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perf.cascade import Measured
from perf.systems import ADAPTIVE, ESCALATION, HIGH, LOW

from .serve import Asked, classes
from .systems import CORE, NEVER

CERTIFICATE = (
    *("epsilon", "confidence", "method", "n", "errors", "allowed", "certified", "signal"),
    "statement",
)


@dataclass(frozen=True)
class Served:
    """The server's answers for the N test crops.

    Attributes:
        low: top-1 class of the cheap rung, (N,).
        high: top-1 class of the full FP32 model, (N,): static high.
        adaptive: top-1 class of the cascade, asked with image bytes, (N,).
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

    @classmethod
    def of(
        cls,
        own: Asked,
        truth: NDArray[np.int64],
        alone: Measured,
        saturated: Measured | None,
        systems: Iterable[str],
    ) -> Served:
        """From what was asked and measured.

        Args:
            own: the cascade's answers.
            truth: class index of each crop.
            alone: of the systems of `systems.CORE` and what escalations go to.
            saturated: of every system, where that was measured.
            systems: names of all that are served.
        """
        measured = {name: alone if name == ESCALATION else saturated for name in systems}
        beside = {
            name: classes(found, name)
            for name, found in measured.items()
            if name not in (*CORE, NEVER) and found is not None
        }
        return cls(
            low=classes(alone, LOW),
            high=classes(alone, HIGH),
            adaptive=own.classes,
            escalated=own.escalated,
            score=own.score,
            truth=truth,
            beside=beside,
        )

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
    alone: Measured,
    certificate: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of summary.json.

    All figures are of one request in flight, the systems taking turns crop by crop.

    Args:
        backbone: name of the model.
        resolutions_px: (low, high).
        served: the server's answers.
        alone: what `serve.measure` returned.
        certificate: of the calibration.
        environment: `triton_version` and whatever else describes the machine.
    """
    paired, answers = alone.paired, served.answers()
    systems = [name for name in (*CORE, ESCALATION) if name in paired.shares[0]]
    latencies = {
        name: [a.latency_ms for share in paired.shares for a in share[name]] for name in systems
    }
    cpu = {name: paired.cpu_cost(name) for name in systems}
    cpu_speedup = paired.cpu_speedup()
    others = {name: value for name, value in environment.items() if name != "triton_version"}
    return {
        "backbone": backbone,
        "low_px": resolutions_px[0],
        "high_px": resolutions_px[1],
        "images": len(served.truth),
        "disturbed": bool(alone.doubts),
        "doubts": list(alone.doubts),
        "escalation_rate": float(served.escalated.mean()),
        "certificate": {name: certificate[name] for name in CERTIFICATE},
        "realised_risk": float((served.adaptive != served.high).mean()),
        "agreement_with_high": served.agreement()[ADAPTIVE],
        "accuracy": {system: float((answers[system] == served.truth).mean()) for system in systems},
        "latency_ms_p50": {system: median(taken) for system, taken in latencies.items()},
        "throughput_per_s": {system: 1e3 / mean(taken) for system, taken in latencies.items()},
        "cpu_ms": {
            system: None if spread is None else spread.median for system, spread in cpu.items()
        },
        "speedup_vs_high": paired.speedup().median,
        "cpu_speedup_vs_high": None if cpu_speedup is None else cpu_speedup.median,
        "cascade_bound": paired.bound().median,
        "cascade_efficiency": paired.efficiency().median,  # the figure that `doubts` judged
        "router_overhead": paired.router_overhead().median,
        "protocols": ["grpc", "http"],
        "triton_version": environment["triton_version"],
        "environment": others,
    }
