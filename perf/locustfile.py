"""Locust users of a served adaptive ViT: `locust -f perf/locustfile.py`, see docs/load-testing.md.

Users of the ensemble, closed and open loop, over either protocol; without a name on the command
line only `GrpcUser` runs. The exit code of a run is 0 where it met its objective, 1 where it missed
it, 2 where it could not be measured. Locust replaces Python's own threads and sockets by gevent's,
so nothing of ours imports this file.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import gevent
import grpc.experimental.gevent
from gevent import GreenletExit
from gevent.lock import BoundedSemaphore
from gevent.pool import Pool
from locust import User, events, stats, task
from locust.env import Environment
from locust.runners import LocalRunner, Runner, WorkerRunner

from calibration.images import ImagesError
from client import DEFAULT_GRPC_URL, DEFAULT_HTTP_URL, ClientError, GrpcClient, HttpClient
from perf.figures import PerfError
from perf.locust_settings import Settings, add_options, arrivals, blocks_hub, image_round

# Before any channel: without it a gRPC request stops every other user of this process.
grpc.experimental.gevent.init_gevent()

CLIENTS = {"grpc": GrpcClient, "http": HttpClient}
MAX_OUTSTANDING = 200  # of one open user: seconds of work for any server that keeps up

EXIT_MISSED = 1
EXIT_CANNOT = 2
STOP_TIMEOUT_S = 10.0
_MESSAGE = "cannot_measure"

logger = logging.getLogger(__name__)
_starting = BoundedSemaphore()  # one user at a time: the first proves it for all
_proven: set[tuple[str, str]] = set()  # (protocol, address)


class UnansweredError(Exception):
    """The run ended before the answer came."""


class NotSentError(Exception):
    """An open user had too many requests without an answer to send another."""


class VitUser(User):
    """Asks about one image at a time.

    A request is recorded under its protocol and the path it took: `low` or `high`, or `failed`.
    """

    abstract = True
    protocol: str
    client: Any = None  # a GrpcClient or HttpClient from start to stop

    def on_start(self) -> None:
        """Open a connection; the first user of a process proves that requests overlap."""
        with _starting:
            if gave_up(self.environment):
                raise GreenletExit
            try:
                self._open()
                return
            except (ClientError, ImagesError, PerfError) as error:
                reason = str(error)
            # Outside the handler: an exception would keep the client alive, see `on_stop`.
            cannot_measure(self.environment, reason)
            raise GreenletExit

    def on_stop(self) -> None:
        """Let go of the client, which closes it.

        gRPC counts its open channels under gevent. One that closes while Python shuts down hangs
        it, and one that is closed and then let go of counts twice, which stops the others.
        """
        self.client = None

    def _open(self) -> None:
        self.settings = Settings.of(self.environment.parsed_options)
        self.images = image_round(self.settings.images, self.settings.image_limit)
        connections = {"concurrency": MAX_OUTSTANDING} if self.protocol == "http" else {}
        self.client = CLIENTS[self.protocol](self.host, retry=None, **connections)
        self._prove()

    def _prove(self) -> None:
        if (self.protocol, self.host) in _proven:
            return
        image = next(self.images)
        self.client.infer([image])  # opens the connection
        if blocks_hub(lambda: self.client.infer([image])):
            raise PerfError(
                f"a {self.protocol} request stops all other users while it waits; "
                "grpc.experimental.gevent.init_gevent() has to come before the first channel"
            )
        _proven.add((self.protocol, self.host))
        if isinstance(self.environment.runner, LocalRunner):
            self.environment.stats.reset_all()  # the time it took is not the run's

    def ask(self, planned: float) -> None:
        """Send the next image and record what came of it.

        Args:
            planned: when the request was due, by `time.perf_counter`; latency counts from there.
        """
        name = "failed"
        error: Exception | None = UnansweredError("no answer when the run ended")
        try:
            (answer,) = self.client.infer([next(self.images)])
            name, error = "high" if answer.escalated else "low", None
        except ClientError as failure:
            # A new one: Locust keeps it, and this one's traceback would keep the client alive.
            error = type(failure)(str(failure))
        finally:  # where the user is killed meanwhile, too: slow answers must not go missing
            self._record(name, 1e3 * (time.perf_counter() - planned), error)

    def _record(self, name: str, latency_ms: float | None, error: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type=self.protocol,
            name=name,
            response_time=latency_ms,
            response_length=0,
            exception=error,
            context=self.context(),
        )


class ClosedUser(VitUser):
    """Sends the next request as soon as the last is answered."""

    abstract = True

    @task
    def infer(self) -> None:
        """One request."""
        self.ask(time.perf_counter())


class OpenUser(VitUser):
    """Sends at a planned rate, whatever the server does: a Poisson process.

    Latency counts from the planned time, so that waiting for a slow server is in it. A request
    that is due while `MAX_OUTSTANDING` have no answer is not sent, and recorded as `not sent`.
    """

    abstract = True

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._senders = Pool(MAX_OUTSTANDING)
        self._planned: Iterator[float] = iter(())
        self._next = 0.0

    def on_start(self) -> None:
        """Connect, and plan from now on."""
        super().on_start()
        start = time.perf_counter()
        offsets = arrivals(self.settings.rate, random.Random())
        self._planned = (start + offset for offset in offsets)
        self._next = next(self._planned)

    def wait_time(self) -> float:
        """Seconds until the next request is due."""
        return max(0.0, self._next - time.perf_counter())

    @task
    def send_what_is_due(self) -> None:
        """Start every request whose time has come."""
        while self._next <= time.perf_counter():
            if self._senders.free_count():
                self._senders.spawn(self.ask, self._next)
            else:
                said = f"{MAX_OUTSTANDING} requests of this user had no answer yet"
                self._record("not sent", None, NotSentError(said))
            self._next = next(self._planned)

    def on_stop(self) -> None:
        """Wait for the answers that are due, then close."""
        try:
            self._senders.join(timeout=self.environment.stop_timeout)
        finally:
            self._senders.kill()
            super().on_stop()


class GrpcUser(ClosedUser):
    """One request after the other, over gRPC."""

    protocol = "grpc"
    host = DEFAULT_GRPC_URL


class HttpUser(ClosedUser):
    """One request after the other, over HTTP, on a connection of its own."""

    protocol = "http"
    host = DEFAULT_HTTP_URL


class GrpcOpenUser(OpenUser):
    """Requests at `--rate` per second, over gRPC."""

    protocol = "grpc"
    host = DEFAULT_GRPC_URL


class HttpOpenUser(OpenUser):
    """Requests at `--rate` per second, over HTTP."""

    protocol = "http"
    host = DEFAULT_HTTP_URL


UNLESS_NAMED = (HttpUser, GrpcOpenUser, HttpOpenUser)


# --- a run -------------------------------------------------------------------------------------


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
    return bool(environment.process_exit_code == EXIT_CANNOT)


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
    p95_ms = total.get_response_time_percentile(0.95)
    missed = settings.missed(total.num_requests, total.num_failures, p95_ms)
    if missed:
        logger.error("%s", missed)
        environment.process_exit_code = EXIT_MISSED
    elif total.num_failures and not environment.runner.exceptions:
        environment.process_exit_code = 0  # Locust's own is 1 after any failure


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    add_options(parser)


@events.init.add_listener
def _choose_users(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    # A worker has to know all of them: its master says by name which ones run.
    worker = isinstance(environment.runner, WorkerRunner)
    if not (worker or options.user_classes or options.class_picker):
        environment.user_classes[:] = [
            user for user in environment.user_classes if user not in UNLESS_NAMED
        ]


events.init.add_listener(prepare)
events.test_start.add_listener(start)
events.quitting.add_listener(finish)
