"""Retries: what is tried again, how long is waited, one deadline over all tries."""

import time

import grpc
import pytest

from client import (
    ClientError,
    DeadlineError,
    GrpcClient,
    HttpClient,
    InvalidRequestError,
    OverloadedError,
    Retry,
    ServerError,
    UnavailableError,
)
from client.retry import Tries
from server.ports import pick_free_ports
from tests.unit.client_servers import AwaitedClient, grpc_server, http_server, image

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "try again")
FAST = Retry(attempts=3, first_backoff_s=0.001)


def failing(times, failure):
    return lambda number, *_: failure if number <= times else None


def ask(kind, url, timeout_s=20.0, **options):
    """One image's score, or the error."""
    try:
        with kind(url, **options) as client:
            return client.infer([image(7)], timeout_s=timeout_s)[0].score
    except ClientError as error:
        return error


both = pytest.mark.parametrize("kind", [GrpcClient, AwaitedClient])

# --- how often ---------------------------------------------------------------------------------


@both
def test_a_server_that_is_away_for_a_moment_is_asked_again(kind):
    with grpc_server(failing(2, UNAVAILABLE)) as (service, url):
        assert ask(kind, url, retry=FAST) == 7
    assert len(service.asked) == 3


@both
def test_by_default_there_are_three_tries(kind):
    with grpc_server(failing(9, UNAVAILABLE)) as (service, url):
        found = ask(kind, url)
    assert isinstance(found, UnavailableError) and str(found) == "try again"
    assert len(service.asked) == 3


@both
def test_without_retries_each_request_is_sent_once(kind):
    with grpc_server(failing(9, UNAVAILABLE)) as (service, url):
        assert isinstance(ask(kind, url, retry=None), UnavailableError)
    assert len(service.asked) == 1


@both
@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ],
)
def test_what_cannot_go_better_is_not_tried_again(kind, code):
    with grpc_server(failing(9, (code, "no"))) as (service, url):
        assert isinstance(ask(kind, url, retry=FAST), ClientError)
    assert len(service.asked) == 1


@pytest.mark.parametrize("failure", [(503, "busy"), (429, "slow down"), "drop"])
def test_over_http_a_busy_server_and_a_dropped_connection_are_tried_again(failure):
    with http_server(failing(2, failure)) as (asked, url):
        assert ask(HttpClient, url, retry=FAST) == 7
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("status", "kind"), [(400, InvalidRequestError), (500, ServerError), (504, DeadlineError)]
)
def test_over_http_other_failures_are_not(status, kind):
    with http_server(failing(9, (status, "no"))) as (asked, url):
        assert type(ask(HttpClient, url, retry=FAST)) is kind
    assert len(asked) == 1


def test_an_overloaded_server_is_told_from_one_that_is_away():
    full = (grpc.StatusCode.UNAVAILABLE, "in ensemble 'm', Exceeds maximum queue size")
    with grpc_server(failing(9, full)) as (service, url):
        assert type(ask(GrpcClient, url, retry=FAST)) is OverloadedError
    assert len(service.asked) == 3


@both
def test_a_client_finds_a_server_that_comes_later(kind):
    port = pick_free_ports("127.0.0.1").grpc
    url = f"127.0.0.1:{port}"
    assert isinstance(ask(kind, url, retry=FAST), UnavailableError)
    with GrpcClient(url, retry=Retry(60, first_backoff_s=0.2, max_backoff_s=0.2)) as client:
        with pytest.raises(ClientError):
            client.infer([image(1)], timeout_s=0.05)
        with grpc_server(address=url):  # gRPC by itself would wait for seconds to connect again
            assert client.infer([image(7)], timeout_s=20)[0].score == 7


# --- how long ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "longest"), [(1, 0.05), (2, 0.1), (3, 0.2), (6, 1), (9999, 1)]
)
def test_waits_are_random_up_to_a_limit_that_doubles(failures, longest):
    waits = [Retry().backoff_s(failures) for _ in range(2000)]
    assert 0 <= min(waits) < 0.05 * longest
    assert 0.95 * longest < max(waits) <= longest


def test_the_waits_of_two_clients_differ():
    assert Retry().backoff_s(1) != Retry().backoff_s(1)


@both
def test_all_tries_share_one_deadline(kind):
    slow = lambda number, asked, context: time.sleep(0.2) or UNAVAILABLE  # noqa: E731
    retry = Retry(attempts=1000, first_backoff_s=0.05, max_backoff_s=0.05)
    with grpc_server(slow) as (service, url):
        started = time.monotonic()
        found = ask(kind, url, timeout_s=1.5, retry=retry)
        took = time.monotonic() - started
    assert isinstance(found, UnavailableError | DeadlineError)
    assert 0.2 <= took < 10  # one deadline for each try would allow 1500 s
    left = [asked.left_s for asked in service.asked]
    assert len(left) >= 2 and left == sorted(left, reverse=True)
    assert left[1] < left[0] - 0.15
    told = [asked.parameters["timeout"] / 1e6 for asked in service.asked]
    assert told == sorted(told, reverse=True) and told[0] <= 1.5


def test_a_wait_that_would_outlast_the_deadline_is_not_begun():
    retry = Retry(attempts=99, first_backoff_s=3600, max_backoff_s=3600)
    with grpc_server(failing(99, UNAVAILABLE)) as (service, url):
        started = time.monotonic()
        assert isinstance(ask(GrpcClient, url, timeout_s=2, retry=retry), UnavailableError)
        assert time.monotonic() - started < 60
    assert len(service.asked) < 5


@pytest.mark.parametrize("kind", [GrpcClient, AwaitedClient, HttpClient])
def test_a_deadline_is_not_tried_again(kind):
    slow = lambda number, *_: time.sleep(1)  # noqa: E731
    with (http_server if kind is HttpClient else grpc_server)(slow) as (found, url):
        error = ask(kind, url, timeout_s=0.3, retry=FAST)
        assert isinstance(error, DeadlineError) and "within 0.3 s" in str(error)
        assert len(getattr(found, "asked", found)) <= 1


def test_no_try_starts_after_the_deadline():
    tries = Tries(FAST, 0.01)
    time.sleep(0.02)
    with pytest.raises(TimeoutError):
        tries.left_s()
    assert tries.pause_s(UnavailableError("x")) is None


def test_without_a_deadline_there_is_no_limit_but_the_attempts():
    tries = Tries(Retry(attempts=2), None)
    assert tries.left_s() is None
    assert tries.pause_s(UnavailableError("x")) is not None
    assert tries.pause_s(UnavailableError("x")) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"attempts": 0}, "attempts must be at least 1; got 0"),
        ({"first_backoff_s": -1}, "first_backoff_s must be a number of seconds"),
        ({"max_backoff_s": float("nan")}, "max_backoff_s must be a number of seconds"),
    ],
)
def test_a_retry_out_of_range_is_refused(values, said):
    with pytest.raises(InvalidRequestError, match=said):
        Retry(**values)
