"""Start, end and exit code of a Locust run: 0 met its objective, 1 missed it, 2 could not be."""

from __future__ import annotations

import logging
import sys
from typing import Any

import gevent
from locust import stats
from locust.env import Environment
from locust.runners import LocalRunner, Runner, WorkerRunner

from calibration.source import ImagesError

from ..figures import PerfError
from .images import image_round
from .settings import Settings
from .slo import Slo

EXIT_MISSED = 1
EXIT_CANNOT = 2
STOP_TIMEOUT_S = 10.0
_MESSAGE = "cannot_measure"

logger = logging.getLogger(__name__)


def prepare(environment: Environment, runner: Runner, **_: Any) -> None:
    """Once, before any test: read the options, and the images where this process sends them.

    A worker gets its options from the master with the first users, and reads its images then.
    """
    if isinstance(runner, WorkerRunner):
        return
    runner.register_message(_MESSAGE, _on_cannot_measure, concurrent=True)
    # Locust's 0 breaks off the requests under way, which the slowest are most likely to be.
    environment.stop_timeout = environment.stop_timeout or STOP_TIMEOUT_S
    try:
        settings = Settings.of(environment.parsed_options)
        if isinstance(runner, LocalRunner):
            image_round(settings.images, settings.image_limit)
    except (ImagesError, PerfError) as error:
        logger.error("%s", error)
        sys.exit(EXIT_CANNOT)
    # --run-time counts from when gevent last looked at the clock, before the images were read.
    gevent.get_hub().loop.update_now()


def start(environment: Environment, **_: Any) -> None:
    """Each test has its own outcome: Locust's web page can start several."""
    environment.process_exit_code = None


def gave_up(environment: Environment) -> bool:
    """Whether this test was found to be impossible."""
    return environment.process_exit_code == EXIT_CANNOT


def cannot_measure(environment: Environment, reason: str) -> None:
    """End the test from a user, on whatever machine it runs.

    Args:
        environment: the user's.
        reason: one line for whoever started the test.
    """
    if isinstance(environment.runner, WorkerRunner):
        logger.error("%s", reason)
        environment.process_exit_code = EXIT_CANNOT
    environment.runner.send_message(_MESSAGE, {"reason": reason})


def _on_cannot_measure(environment: Environment, msg: Any, **_: Any) -> None:
    if gave_up(environment):
        return  # another worker said so
    environment.process_exit_code = EXIT_CANNOT
    logger.error("%s", msg.data["reason"])
    headless = environment.parsed_options.headless
    # Not from here, which is a greenlet of the test; and not before its users have ended, where
    # Locust would stumble over them.
    gevent.spawn_later(0.1, environment.runner.quit if headless else environment.runner.stop)


def finish(environment: Environment, **_: Any) -> None:
    """Judge the run, over all its requests, and set the exit code."""
    if isinstance(environment.runner, WorkerRunner):
        return
    if environment.parsed_options.csv_prefix:
        # Locust writes its CSV files once a second, and not at the end.
        gevent.sleep(1.1 * stats.CSV_STATS_INTERVAL_SEC)
    if gave_up(environment):
        return
    settings, total = Settings.of(environment.parsed_options), environment.stats.total
    slo = Slo(settings.slo_p95_ms, settings.slo_failures)
    p95_ms = total.get_response_time_percentile(0.95)
    missed = slo.missed(total.num_requests, total.num_failures, p95_ms)
    if missed:
        logger.error("%s", missed)
        environment.process_exit_code = EXIT_MISSED
    elif total.num_failures and not environment.runner.exceptions:
        environment.process_exit_code = 0  # Locust's own is 1 after any failure
