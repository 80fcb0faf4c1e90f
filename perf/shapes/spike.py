"""Spike: a third of `--run-time` few users, a third all of `--users`, a third few again.

The last third shows whether, and how fast, the server recovers.
"""

from __future__ import annotations

from locust import LoadTestShape

BASE_SHARE = 4  # a spike of 4 times the base
DEFAULT_SECONDS = 60


class Spike(LoadTestShape):
    """Base, spike, base."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Users, and users started per second; None at the end."""
        options = self.runner.environment.parsed_options
        peak, seconds = options.num_users or 1, options.run_time or DEFAULT_SECONDS
        third = int(3 * self.get_run_time() / seconds)
        if third >= 3:
            return None
        return (peak if third == 1 else max(1, peak // BASE_SHARE)), peak
