"""Ramp: steps up to `--users` over `--run-time`, to see where latency leaves the ground."""

from __future__ import annotations

import math

from locust import LoadTestShape

STEPS = 4
DEFAULT_SECONDS = 60


class Ramp(LoadTestShape):
    """Equal steps of users, equally long."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Users, and users started per second; None at the end."""
        options = self.runner.environment.parsed_options
        peak, seconds = options.num_users or 1, options.run_time or DEFAULT_SECONDS
        step = int(STEPS * self.get_run_time() / seconds)
        if step >= STEPS:
            return None
        return math.ceil(peak * (step + 1) / STEPS), peak
