"""An answer is its own request's, or an error; an HTTP answer is whole, in time and Triton's."""

import asyncio
import gc
import re
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import numpy as np
import pytest

from client import (
    AnswerMismatchError,
    AsyncGrpcClient,
    ClientError,
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
from client.messages import predictions
from tests.unit.client_servers import AwaitedClient, grpc_server, http_server, image

FAST = Retry(attempts=3, first_backoff_s=0.001)
every = pytest.mark.parametrize("kind", [GrpcClient, AwaitedClient, HttpClient])
blocking = pytest.mark.parametrize("kind", [GrpcClient, HttpClient])


@contextmanager
def served(kind, answer=lambda *_: None):
    """What the server of that protocol was asked, and its address."""
    serve = http_server if kind is HttpClient else grpc_server
    with serve(answer) as (found, url):
        yield getattr(found, "asked", found), url


def told(client, numbers):
    """What `infer` gave or raised."""
    try:
        return client.infer([image(number) for number in numbers], timeout_s=20)
    except ClientError as error:
        return error


def ask_all(kind, url, calls, **options):
    """What `infer` gave or raised for each list of numbers, one client asking in turn."""
    with kind(url, **options) as client:
        return [told(client, numbers) for numbers in calls]


def scores(predictions):
    return [prediction.score for prediction in predictions]


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
        first, second, third = ask_all(kind, url, [[1], [2], [3]], retry=FAST)
    said = "belongs to request somebody-elses" if another else "names no request"
    assert type(second) is AnswerMismatchError and said in str(second) and "\n" not in str(second)
    assert scores(first) + scores(third) == [1, 3]
    before, during, after = (request.peer for request in asked)  # nor was it asked again
    assert before == during != after


@every
def test_the_middle_of_a_batch_is_held_against_its_request_too(kind):
    with served(kind, answering_as("x")) as (asked, url):
        (found,) = ask_all(kind, url, [range(70)])
    assert len(asked) == 2  # the third piece is not asked about any more
    assert type(found) is AnswerMismatchError


@every
def test_a_refusal_that_names_another_request_is_an_error_too(kind):
    def answer(number, asked, *_):
        whose = "x" if number == 2 else asked.id
        text = f"[request id: {whose}] no such image"
        return (400, text) if kind is HttpClient else (grpc.StatusCode.INVALID_ARGUMENT, text)

    with served(kind, answer) as (asked, url):
        first, second, third = ask_all(kind, url, [[1], [2], [3]])
    assert [type(e) for e in (first, second, third)] == [
        InvalidRequestError,
        AnswerMismatchError,
        InvalidRequestError,
    ]
    assert str(first) == "no such image"
    before, during, after = (request.peer for request in asked)
    assert before == during != after


@every
def test_every_try_has_an_id_of_its_own(kind):
    def answer(number, *_):
        if number <= 2:
            return (503, "away") if kind is HttpClient else (grpc.StatusCode.UNAVAILABLE, "away")
        return None

    with served(kind, answer) as (asked, url):
        (found,) = ask_all(kind, url, [[7]], retry=FAST)
    assert scores(found) == [7]
    ids = {request.id for request in asked}
    assert len(ids) == 3 and all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


@every
def test_a_batch_is_answered_in_its_order(kind):
    numbers = [*range(500, 535), *range(100, 135)]
    with served(kind) as (asked, url):
        (found,) = ask_all(kind, url, [numbers])
    assert scores(found) == numbers
    assert [len(request.images) for request in asked if request.images] == [32, 32, 6]


def test_a_stream_yields_an_error_for_anothers_answer_and_goes_on():
    def answer(number, asked, *_):
        if asked.images == [image(5)]:
            asked.id = "x"

    async def main(url):
        async with AsyncGrpcClient(url, retry=Retry(20, 0.001)) as client:
            images = (image(number) for number in range(20))
            return [found async for found in client.stream(images, concurrency=1)]

    with grpc_server(answer) as (_, url):
        found = asyncio.run(main(url))
    assert type(found.pop(5)) is AnswerMismatchError
    assert scores(found) == [number for number in range(20) if number != 5]


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


@pytest.mark.parametrize("kind", [GrpcClient, AsyncGrpcClient])
def test_anothers_answer_ends_no_request_but_its_own(kind):
    async def at_once(url):
        async with AsyncGrpcClient(url, retry=None) as client:
            found = await asyncio.gather(
                *(client.infer([image(n)]) for n in (4, 5, 6)), return_exceptions=True
            )
            return [*found, await client.infer([image(9)])]

    def in_threads(url):
        with GrpcClient(url, retry=None) as client, ThreadPoolExecutor(3) as pool:
            return [*pool.map(lambda n: told(client, [n]), (4, 5, 6)), told(client, [9])]

    with served(kind, all_three_at_once()) as (asked, url):
        found = asyncio.run(at_once(url)) if kind is AsyncGrpcClient else in_threads(url)
    assert type(found.pop(1)) is AnswerMismatchError
    assert [scores(one) for one in found] == [[4], [6], [9]]
    peers = [request.peer for request in asked]
    assert len(set(peers[:3])) == 1 and peers[3] not in peers[:3]


def test_a_stream_of_several_at_once_loses_only_what_was_anothers():
    def answer(number, asked, *_):
        time.sleep(0.01 * (number % 3))
        if asked.images in ([image(5)], [image(8)]):
            asked.id = "x"

    async def main(url):
        async with AsyncGrpcClient(url, retry=None) as client:
            images = (image(number) for number in range(24))
            return [found async for found in client.stream(images, concurrency=4)]

    with grpc_server(answer) as (_, url):
        found = asyncio.run(main(url))
    assert [type(found.pop(n)) for n in (8, 5)] == [AnswerMismatchError] * 2
    assert scores(found) == [number for number in range(24) if number not in (5, 8)]


@pytest.mark.parametrize("kind", [GrpcClient, AwaitedClient])
def test_a_channel_that_was_given_up_is_closed_with_its_last_call_also_if_errors_are_kept(kind):
    with served(kind, answering_as("x")) as (_, url), kind(url, retry=None) as client:
        line = client.client if kind is AwaitedClient else client
        client.infer([image(1)])
        first = line._line.channel
        with pytest.raises(AnswerMismatchError) as kept:
            client.infer([image(2)])
        with pytest.raises(ValueError, match="closed channel"):
            first.unary_unary("/any")(b"")
        client.infer([image(3)])
        assert line._line.channel is not first and "belongs to" in str(kept.value)


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_who_lets_go_of_a_client_has_let_go_of_its_channel(kind):
    """Not when cycles are collected: one that lives on to the end of Python may hang it."""

    async def make():
        client = GrpcClient("127.0.0.1:9") if kind == "sync" else AsyncGrpcClient("127.0.0.1:9")
        channel = weakref.ref(client._line)
        gc.disable()
        try:
            del client
            assert channel() is None
        finally:
            gc.enable()

    asyncio.run(make())


def test_logits_of_another_number_of_rows_are_refused():
    class Result:
        def as_numpy(self, name):
            return np.zeros((3 if name == "logits" else 2, 1), np.float32)

    with pytest.raises(ServerError, match="'logits' has 3 rows for 2 images"):
        predictions(Result(), 2)


# --- closed clients ----------------------------------------------------------------------------


@every
def test_a_closed_client_says_so(kind):
    with served(kind) as (_, url):
        client = kind(url)
        client.infer([image(1)])
        client.close()
        with pytest.raises(InvalidRequestError, match="client is closed"):
            client.infer([image(1)])


@blocking
def test_closing_ends_the_requests_of_other_threads(kind):
    arrived, found = threading.Event(), []

    def answer(*_):
        arrived.set()
        time.sleep(0.5)

    with served(kind, answer) as (_, url):
        client = kind(url, **({"concurrency": 1} if kind is HttpClient else {}))

        asking = threading.Thread(target=lambda: found.append(type(told(client, [1]))))
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


@contextmanager
def listening(backlog=8):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(backlog)
        yield listener, f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("during", ["handshake", "body to the end"])
def test_closing_ends_an_http_request_wherever_it_stands(during):
    found = []
    with listening() as (listener, url):
        client = HttpClient(url, tls=Tls() if during == "handshake" else None)
        asking = threading.Thread(target=lambda: found.append(type(told(client, [1]))))
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


def test_who_waits_for_a_connection_does_so_within_the_deadline():
    arrived = threading.Event()

    def answer(*_):
        arrived.set()
        time.sleep(0.6)

    with http_server(answer) as (asked, url), HttpClient(url, concurrency=1) as client:
        holding = threading.Thread(target=client.infer, args=([image(1)],))
        holding.start()
        assert arrived.wait(10)
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="within 0.1 s"):
            client.infer([image(2)], timeout_s=0.1)
        assert time.monotonic() - started < 0.5
        holding.join()
        assert client.infer([image(3)], timeout_s=20)[0].score == 3
    assert [request.images for request in asked] == [[image(1)], [image(3)]]


def test_the_deadline_is_over_all_addresses_of_a_host(monkeypatch):
    with listening(0) as (listener, url), ExitStack() as full:
        for _ in range(4):  # after the first one or two the kernel answers nobody
            waiting = full.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        found = socket.getaddrinfo(*listener.getsockname(), type=socket.SOCK_STREAM)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found * 4)
        started = time.monotonic()
        with HttpClient(url) as client, pytest.raises(DeadlineError, match=r"within 0\.4 s"):
            client.infer([image(1)], timeout_s=0.4)
        assert 0.3 < time.monotonic() - started < 1.0


def test_of_several_addresses_the_first_that_answers_is_asked(monkeypatch):
    with http_server() as (asked, url):
        host, port = url.split(":")
        found = [
            *socket.getaddrinfo(host, 1, type=socket.SOCK_STREAM),  # nobody is there
            *socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM) * 2,
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with HttpClient(url, retry=None) as client:
            assert client.infer([image(7)], timeout_s=20)[0].score == 7
    assert len(asked) == 1


def test_no_connections_are_refused():
    with pytest.raises(InvalidRequestError, match="concurrency must be at least 1; got 0"):
        HttpClient("127.0.0.1:1", concurrency=0)


@contextmanager
def dripping(text):
    """A server that answers a byte at a time, each well before a reader's patience ends."""
    stop = threading.Event()

    def drip():
        peer, _ = listener.accept()
        with peer:
            for byte in text:
                if stop.wait(0.05):
                    return
                peer.send(bytes([byte]))

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=drip)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        stop.set()
        thread.join()


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_an_answer_that_drips_ends_at_the_deadline(head):
    with dripping(head + b"a" * 1000) as url, HttpClient(url) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineError, match=r"within 0\.4 s"):
            client.infer([image(1)], timeout_s=0.4)
        assert 0.3 < time.monotonic() - started < 5


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
        with pytest.raises(kind) as caught:
            client.infer([image(1)], timeout_s=20)
        assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_a_connection_that_was_closed_while_idle_is_not_used():
    with http_server(lambda number, _: None) as (asked, url), HttpClient(url, retry=None) as client:
        assert client.infer([image(1)])[0].score == 1
        (idle,) = client._idle
        socket.socket.shutdown(idle._held, socket.SHUT_RDWR)  # as the other side would
        assert client.infer([image(2)])[0].score == 2
    assert len({request.peer for request in asked}) == 2
