"""The service level objective: what a run has to keep to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slo:
    """Limits over all requests of a run.

    Attributes:
        p95_ms: the 95th percentile may not be above; 0 for no limit.
        failures: no larger share of the requests may fail, 0..1.
    """

    p95_ms: float
    failures: float = 0.0

    def missed(self, requests: int, failures: int, p95_ms: float) -> str | None:
        """Judge a run.

        Args:
            requests: all of them, the failed ones too.
            failures: how many of them failed.
            p95_ms: their 95th percentile.

        Returns:
            One line that says what is above its limit; None where the objective was met.
        """
        if not requests:
            return "not a single request was sent; allow more time, or more users"
        reasons = []
        if failures > self.failures * requests:
            reasons.append(
                f"{failures} of {requests} requests failed ({failures / requests:.2%}), "
                f"{self.failures:.2%} allowed"
            )
        if 0 < self.p95_ms < p95_ms:
            reasons.append(f"p95 is {p95_ms:g} ms, {self.p95_ms:g} ms allowed")
        return f"SLO missed: {'; '.join(reasons)}" if reasons else None
