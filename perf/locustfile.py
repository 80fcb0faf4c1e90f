"""Locust users of a served adaptive ViT: `locust -f perf/locustfile.py`, see docs/load-testing.md.

Without a name on the command line only `GrpcUser` runs.
"""

from __future__ import annotations

from typing import Any

import grpc.experimental.gevent
from locust import events
from locust.env import Environment
from locust.runners import WorkerRunner

from client import DEFAULT_GRPC_URL, DEFAULT_HTTP_URL
from perf.load import users
from perf.load.objective import add_options
from perf.load.users import ClosedUser, OpenUser

# Before any channel: without it a gRPC request stops every other user of this process.
grpc.experimental.gevent.init_gevent()


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


events.init.add_listener(users.prepare)
events.test_start.add_listener(users.start)
events.quitting.add_listener(users.finish)
