"""An answer is its own request's, or an error; an HTTP answer is whole, in time and Triton's."""

import asyncio
import gc
import re
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest

from client import (
    AnswerMismatchError,
    AsyncGrpcClient,
    DeadlineError,
    GrpcClient,
    HttpClient,
    InvalidRequestError,
    NotServedError,
    RequestCancelledError,
    Retry,
    ServerError,
    Tls,
    UnavailableError,
)
from tests.unit.client_servers import (
    AwaitedClient,
    both,
    every,
    grpc_server,
    http_server,
    image,
    listening,
    served,
    told,
)

FAST = Retry(attempts=3, first_backoff_s=0.001)


def ask_all(kind, url, *calls, **options):
    """What one client was told about each list of numbers in turn."""
    with kind(url, **options) as client:
        return [told(client, *numbers) for numbers in calls]


def failing(kind, code, status, text):
    """What a server of the client's protocol fails with."""
    return (status, text) if kind is HttpClient else (getattr(grpc.StatusCode, code), text)


def connections(asked):
    """Of three requests: the first two had one, which the third had no more."""
    before, during, after = (request.peer for request in asked)
    return before == during != after


# --- whose answer ------------------------------------------------------------------------------


def answering_as(another, to=2):
    """The `to`-th request is answered under that id."""

    def answer(number, asked, *_):
        if number == to:
            asked.id = another

    return answer


@every
@pytest.mark.parametrize("another", ["somebody-elses", ""])
def test_anothers_answer_is_an_error_and_ends_its_connection(kind, another):
    with served(kind, answering_as(another)) as (asked, url):
        first, second, third = ask_all(kind, url, [1], [2], [3], retry=FAST)
    said = "belongs to request somebody-elses" if another else "names no request"
    assert type(second) is AnswerMismatchError and said in str(second)
    assert (first, third) == ([1], [3])
    assert connections(asked)  # nor was it asked again


@every
def test_a_refusal_that_names_another_request_is_an_error_too(kind):
    def answer(number, asked, *_):
        whose = "x" if number == 2 else asked.id
        return failing(kind, "INVALID_ARGUMENT", 400, f"[request id: {whose}] no such image")

    with served(kind, answer) as (asked, url):
        found = ask_all(kind, url, [1], [2], [3])
    kinds = [InvalidRequestError, AnswerMismatchError, InvalidRequestError]
    assert [type(error) for error in found] == kinds and str(found[0]) == "no such image"
    assert connections(asked)


@every
def test_a_batch_is_answered_in_its_order_and_each_part_held_against_its_request(kind):
    numbers = [*range(500, 535), *range(100, 135)]
    with served(kind) as (asked, url):
        assert ask_all(kind, url, numbers) == [numbers]
    assert [len(request.images) for request in asked if request.images] == [32, 32, 6]
    with served(kind, answering_as("x")) as (asked, url):
        (found,) = ask_all(kind, url, numbers)
    assert len(asked) == 2  # the third piece is not asked about any more
    assert type(found) is AnswerMismatchError


@every
def test_every_try_has_an_id_of_its_own(kind):
    away = failing(kind, "UNAVAILABLE", 503, "away")
    with served(kind, lambda number, *_: away if number <= 2 else None) as (asked, url):
        assert ask_all(kind, url, [7], retry=FAST) == [[7]]
    ids = {request.id for request in asked}
    assert len(ids) == 3 and all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_stream_loses_only_what_was_anothers_and_goes_on(concurrency):
    def answer(number, asked, *_):
        time.sleep(0.01 * (number % 3))
        if asked.images in ([image(5)], [image(8)]):
            asked.id = "x"

    async def main(url):
        async with AsyncGrpcClient(url, retry=None) as client:
            images = (image(number) for number in range(24))
            return [found async for found in client.stream(images, concurrency=concurrency)]

    with grpc_server(answer) as (_, url):
        found = asyncio.run(main(url))
    assert [type(found.pop(n)) for n in (8, 5)] == [AnswerMismatchError] * 2
    assert [one.score for one in found] == [n for n in range(24) if n not in (5, 8)]


def all_three_at_once():
    """Three requests arrive; 5 is answered at once, as another's, and the others later."""
    arrived = threading.Barrier(3)

    def answer(number, asked, *_):
        if asked.images == [image(9)]:
            return
        arrived.wait(10)
        if asked.images == [image(5)]:
            asked.id = "x"
        else:
            time.sleep(0.3)

    return answer


@both
def test_anothers_answer_ends_no_request_but_its_own(kind):
    with served(kind, all_three_at_once()) as (asked, url):
        with kind(url, retry=None) as client, ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda n: told(client, n), (4, 5, 6)))
            assert told(client, 9) == [9]
    assert type(found.pop(1)) is AnswerMismatchError and found == [[4], [6]]
    peers = [request.peer for request in asked]
    assert len(set(peers[:3])) == 1 and peers[3] not in peers[:3]


@both
def test_a_channel_that_was_given_up_is_closed_with_its_last_call_also_if_errors_are_kept(kind):
    with served(kind, answering_as("x")) as (_, url), kind(url, retry=None) as client:
        line = client.client if kind is AwaitedClient else client
        told(client, 1)
        first = line._line.channel
        kept = told(client, 2)
        with pytest.raises(ValueError, match="closed channel"):
            first.unary_unary("/any")(b"")
        told(client, 3)
        assert line._line.channel is not first and "belongs to" in str(kept)


@pytest.mark.parametrize("kind", [GrpcClient, AsyncGrpcClient])
def test_who_lets_go_of_a_client_has_let_go_of_its_channel(kind):
    """Not when cycles are collected: one that lives on to the end of Python may hang it."""
    client = kind("127.0.0.1:9")
    channel = weakref.ref(client._line)
    gc.disable()
    try:
        del client
        assert channel() is None
    finally:
        gc.enable()


# --- closed clients ----------------------------------------------------------------------------


@every
def test_a_closed_client_says_so(kind):
    with served(kind) as (_, url):
        client = kind(url)
        assert told(client, 1) == [1]
        client.close()
        found = told(client, 1)
    assert type(found) is InvalidRequestError and "client is closed" in str(found)


@every
def test_closing_ends_the_requests_of_other_threads(kind):
    arrived, found = threading.Event(), []

    def answer(*_):
        arrived.set()
        time.sleep(0.5)

    with served(kind, answer) as (_, url):
        client = kind(url, **({"concurrency": 1} if kind is HttpClient else {}))
        asking = threading.Thread(target=lambda: found.append(type(told(client, 1))))
        asking.start()
        assert arrived.wait(10)
        client.close()
        asking.join(10)
    assert found == [RequestCancelledError]


def test_closing_an_asyncio_client_ends_its_requests_as_cancelled_and_nobodys_task():
    arrived = threading.Semaphore(0)

    def answer(*_):
        arrived.release()
        time.sleep(0.5)

    async def main(url):
        client = AsyncGrpcClient(url)
        asking = [asyncio.create_task(client.infer([image(n)])) for n in range(3)]
        for _ in asking:
            assert await asyncio.to_thread(arrived.acquire, timeout=10)
        asking[0].cancel()  # this one is the caller's doing
        await client.close()
        return await asyncio.gather(*asking, return_exceptions=True)

    with grpc_server(answer) as (_, url):
        found = asyncio.run(main(url))
    assert [type(one) for one in found] == [asyncio.CancelledError, *[RequestCancelledError] * 2]


@pytest.mark.parametrize("steps", range(8))
def test_closing_an_asyncio_client_at_any_moment_is_one_of_our_errors(steps):
    async def main(url):
        client = AsyncGrpcClient(url)
        asking = asyncio.create_task(client.infer([image(1)]))
        for _ in range(steps):
            await asyncio.sleep(0)
        await client.close()
        return await asyncio.gather(asking, return_exceptions=True)

    with grpc_server(lambda *_: time.sleep(0.2)) as (_, url):
        (found,) = asyncio.run(main(url))
    # It closed before the request began, or while it was under way.
    assert type(found) is (InvalidRequestError if steps == 0 else RequestCancelledError)


@pytest.mark.parametrize("during", ["handshake", "body to the end"])
def test_closing_ends_an_http_request_wherever_it_stands(during):
    found = []
    with listening() as (listener, url):
        client = HttpClient(url, tls=Tls() if during == "handshake" else None)
        asking = threading.Thread(target=lambda: found.append(type(told(client, 1))))
        asking.start()
        peer, _ = listener.accept()
        with peer:
            peer.recv(1 << 16)
            if during != "handshake":
                peer.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{")
                time.sleep(0.2)
            client.close()
            asking.join(5)
            assert found == [RequestCancelledError]


# --- HTTP: whole, in time, Triton's ------------------------------------------------------------


def late(client, within_s):
    """How long it took to be told that there is no answer in time."""
    started = time.monotonic()
    error = told(client, 2, timeout_s=within_s)
    assert type(error) is DeadlineError and f"within {within_s} s" in str(error)
    return time.monotonic() - started


def test_who_waits_for_a_connection_does_so_within_the_deadline():
    arrived = threading.Event()

    def answer(*_):
        arrived.set()
        time.sleep(0.6)

    with http_server(answer) as (asked, url), HttpClient(url, concurrency=1) as client:
        holding = threading.Thread(target=told, args=(client, 1))
        holding.start()
        assert arrived.wait(10)
        assert late(client, 0.1) < 0.5
        holding.join()
        assert told(client, 3) == [3]
    assert [request.images for request in asked] == [[image(1)], [image(3)]]


def test_the_deadline_is_over_all_addresses_of_a_host(monkeypatch):
    with listening(0) as (listener, url), ExitStack() as full:
        for _ in range(4):  # after the first one or two the kernel answers nobody
            waiting = full.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        found = socket.getaddrinfo(*listener.getsockname(), type=socket.SOCK_STREAM)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found * 4)
        with HttpClient(url) as client:
            assert 0.3 < late(client, 0.4) < 1.0


def test_of_several_addresses_the_first_that_answers_is_asked(monkeypatch):
    with http_server() as (asked, url):
        host, port = url.split(":")
        found = [
            *socket.getaddrinfo(host, 1, type=socket.SOCK_STREAM),  # nobody is there
            *socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM) * 2,
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with HttpClient(url, retry=None) as client:
            assert told(client, 7) == [7]
    assert len(asked) == 1


def test_no_connections_are_refused():
    with pytest.raises(InvalidRequestError, match="concurrency must be at least 1; got 0"):
        HttpClient("127.0.0.1:1", concurrency=0)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_an_answer_that_drips_ends_at_the_deadline(head):
    """A byte at a time, each well before a reader's patience ends."""
    stop = threading.Event()

    def drip():
        peer, _ = listener.accept()
        with peer:
            for byte in head + b"a" * 1000:
                if stop.wait(0.05):
                    return
                peer.send(bytes([byte]))

    with listening() as (listener, url), HttpClient(url) as client:
        dripping = threading.Thread(target=drip)
        dripping.start()
        assert 0.3 < late(client, 0.4) < 5
        stop.set()
        dripping.join()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", NotServedError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", NotServedError),
        (b"SSH-2.0-OpenSSH\r\n", NotServedError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", UnavailableError),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 4\r\n\r\n<p/>", ServerError),
    ],
    ids=["no JSON", "not Triton's", "no HTTP", "cut off", "a proxy's"],
)
def test_what_is_no_answer_of_tritons_is_one_clear_error(answer, kind):
    with http_server(lambda *_: answer) as (_, url), HttpClient(url, retry=None) as client:
        assert type(told(client, 1)) is kind


def test_a_connection_that_was_closed_while_idle_is_not_used():
    with http_server() as (asked, url), HttpClient(url, retry=None) as client:
        assert told(client, 1) == [1]
        (idle,) = client._idle
        socket.socket.shutdown(idle._held, socket.SHUT_RDWR)  # as the other side would
        assert told(client, 2) == [2]
    assert len({request.peer for request in asked}) == 2
