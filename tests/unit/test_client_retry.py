"""Retries: what is tried again, how long is waited, one deadline over all tries."""

import time

import grpc
import pytest

from client import (
    AccessDeniedError,
    ClientError,
    DeadlineError,
    GrpcClient,
    HttpClient,
    InvalidRequestError,
    NotServedError,
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
FULL = "in ensemble 'm', Exceeds maximum queue size"


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
every = pytest.mark.parametrize("kind", [GrpcClient, AwaitedClient, HttpClient])

# --- how often ---------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    ("code", "status", "times", "retry", "found", "tries"),
    [
        ("UNAVAILABLE", 503, 2, FAST, 7, 3),
        ("RESOURCE_EXHAUSTED", 429, 2, FAST, 7, 3),
        ("UNAVAILABLE", "drop", 2, FAST, 7, 3),
        ("UNAVAILABLE", 503, 9, Retry(), UnavailableError, 3),  # by default
        ("UNAVAILABLE", 503, 9, None, UnavailableError, 1),
        ("INVALID_ARGUMENT", 400, 9, FAST, InvalidRequestError, 1),
        ("NOT_FOUND", 404, 9, FAST, NotServedError, 1),
        ("INTERNAL", 500, 9, FAST, ServerError, 1),
        ("CANCELLED", 499, 9, FAST, ClientError, 1),
        ("PERMISSION_DENIED", 403, 9, FAST, AccessDeniedError, 1),
        ("DEADLINE_EXCEEDED", 504, 9, FAST, DeadlineError, 1),
    ],
)
def test_what_may_go_better_is_tried_again_and_nothing_else(
    kind, code, status, times, retry, found, tries
):
    serve, failure = grpc_server, (getattr(grpc.StatusCode, code), "no")
    if kind is HttpClient:
        serve, failure = http_server, status if status == "drop" else (status, "no")
    options = {} if retry == Retry() else {"retry": retry}
    with serve(failing(times, failure)) as (service, url):
        got = ask(kind, url, **options)
    assert got == found if found == 7 else isinstance(got, found)
    assert len(getattr(service, "asked", service)) == tries


def test_an_overloaded_server_is_told_from_one_that_is_away():
    with grpc_server(failing(9, (grpc.StatusCode.UNAVAILABLE, FULL))) as (service, url):
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
    assert 0.95 * longest < max(waits) <= longest and len(set(waits)) > 1000


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


@every
def test_a_deadline_is_not_tried_again(kind):
    slow = lambda number, *_: time.sleep(1)  # noqa: E731
    with (http_server if kind is HttpClient else grpc_server)(slow) as (found, url):
        error = ask(kind, url, timeout_s=0.3, retry=FAST)
        assert isinstance(error, DeadlineError) and "within 0.3 s" in str(error)
        assert len(getattr(found, "asked", found)) <= 1


def test_no_try_starts_after_the_deadline_and_without_one_the_attempts_are_the_limit():
    tries = Tries(FAST, 0.01)
    time.sleep(0.02)
    with pytest.raises(TimeoutError):
        tries.left_s()
    assert tries.pause_s(UnavailableError("x")) is None
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
