"""The HTTP client: a bounded number of connections, shared by all threads of one process.

The standard library's `http.client` with what it lacks: one deadline over a whole exchange, and an
account of every open socket, so that `close` and a forked child can let go of all of them.
"""

from __future__ import annotations

import functools
import http.client
import io
import json
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

from tritonclient.http import InferenceServerClient, InferResult
from tritonclient.utils import InferenceServerException

from .core import BlockingCore
from .errors import InvalidRequestError, RequestCancelledError, closed_client, wrong_protocol
from .forks import forget_after_fork, notice_fork
from .messages import Request, own_answer
from .proxies import Proxy, proxy_of
from .retry import Tries

DEFAULT_HTTP_URL = "127.0.0.1:8000"
ADMIN_HEADER = "admin-key"

_PIECE_BYTES = 1 << 18  # of a body; in one piece 4 MB take twice as long on loopback
LeftS = Callable[[], float | None]  # seconds until a deadline; raises TimeoutError after it


class HttpClient(BlockingCore):
    """Blocking client over HTTP: a bounded number of connections, which all threads share.

    Use as a context manager, or call `close()`. `tls` is for a proxy in front of Triton, which
    speaks no HTTPS itself. Where greenlets are to share it, let gevent replace the standard
    library's sockets first, as Locust does. A process that is forked off opens connections of its
    own.

    Args:
        url: HOST:PORT, without a scheme.
        concurrency: connections at most, each for one request at a time. Requests beyond it wait
            for one, within their own time.
        options: as in `ClientCore`.

    Raises:
        InvalidRequestError: `concurrency` is less than 1, or the environment names a proxy that is
            not an HTTP one.
    """

    def __init__(
        self, url: str = DEFAULT_HTTP_URL, *, concurrency: int = 64, **options: Any
    ) -> None:
        super().__init__(url, **options)
        if concurrency < 1:
            raise InvalidRequestError(f"concurrency must be at least 1; got {concurrency}")
        self._context = None if self._tls is None else self._tls.http_context()
        self._headers = {} if self._admin_key is None else {ADMIN_HEADER: self._admin_key}
        self._proxy = proxy_of(self.url, "http" if self._tls is None else "https")
        self._limit = concurrency
        self._closed = False
        self._start()
        forget_after_fork(self)

    def _start(self) -> None:
        self._changed = threading.Condition()
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    def close(self) -> None:
        """Close all connections; requests that use one end with `RequestCancelledError`."""
        notice_fork()
        with self._changed:
            self._closed = True
            for connection in self._idle:
                connection.let_go()
            self._idle.clear()
            # The thread that uses it closes it: its number could be another file's meanwhile.
            for connection in self._busy:
                connection.interrupt()
            self._changed.notify_all()

    def forget(self) -> None:
        """In a forked child: close its copies of the parent's sockets, which go on there."""
        inherited = [*self._idle, *self._busy]
        self._start()  # with a lock that no thread of the parent holds
        for connection in inherited:
            connection.forget()
        _forgotten.extend(inherited)

    async def _send(self, request: Request, left_s: float | None) -> Any:
        asked = request.arguments(left_s)
        body, json_bytes = InferenceServerClient.generate_request_body(**asked)
        headers = {"Content-Type": "application/octet-stream"}
        if json_bytes is not None:
            headers["Inference-Header-Content-Length"] = str(json_bytes)
        version = "" if request.version is None else f"/versions/{request.version}"
        path = f"/v2/models/{quote(request.model, safe='')}{version}/infer"
        with (
            self._answer("POST", path, body, headers, left_s) as (answer, content),
            own_answer(asked["request_id"], self.url) as check,
        ):
            _refuse(answer.status, content)
            length = answer.headers.get("Inference-Header-Content-Length")
            result = InferResult.from_response_body(content, header_length=length and int(length))
            check(result.get_response().get("id"))
        return result

    async def _describe(self, what: str, model: str, left_s: float | None) -> dict[str, Any]:
        path = f"/v2/models/{quote(model, safe='')}" if model else "/v2"
        path += "/config" if what == "config" else ""
        with self._answer("GET", path, None, {}, left_s) as (answer, content):
            _refuse(answer.status, content)
            return dict(json.loads(content))

    @contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        left_s: float | None,
    ) -> Iterator[tuple[http.client.HTTPResponse, bytes]]:
        """Around reading the answer to one request, which came in the time that is left.

        What is raised inside closes the connection, but for a refusal: that was an answer.
        """
        notice_fork()
        left = Tries(None, left_s).left_s
        connection = self._borrow(left)
        is_reusable = False
        try:
            connection.open(left)
            if self._closed:
                raise ConnectionAbortedError
            connection.ask(method, path, body, {**self._headers, **headers})
            with connection.getresponse() as answer:
                content = answer.read()
            if self._closed:  # where its end is the connection's, only a part may have come
                raise ConnectionAbortedError
            try:
                yield answer, content
                is_reusable = connection.sock is not None
            except InferenceServerException:
                is_reusable = connection.sock is not None
                raise
            except (AttributeError, KeyError, TypeError, ValueError):  # no JSON, or not Triton's
                raise wrong_protocol(self.url) from None
        except (OSError, http.client.HTTPException) as error:
            if self._closed:
                raise RequestCancelledError("the client was closed before the answer") from None
            if isinstance(error, http.client.IncompleteRead):
                raise ConnectionResetError("closed before the answer") from None
            if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
                raise wrong_protocol(self.url) from None
            raise
        finally:
            with self._changed:
                self._busy.discard(connection)
                if is_reusable and not self._closed:
                    self._idle.append(connection)
                else:
                    connection.let_go()
                self._changed.notify()

    def _borrow(self, left: LeftS) -> _Connection:
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._closed or len(self._busy) < self._limit, left()
            ):
                raise TimeoutError
            if self._closed:
                raise closed_client()
            while self._idle and self._idle[-1].is_stale():
                self._idle.pop().let_go()
            connection = self._idle.pop() if self._idle else self._connection()
            self._busy.add(connection)
        return connection

    def _connection(self) -> _Connection:
        return _Connection(self.url, self._context, self._proxy)


class _Connection(http.client.HTTPConnection):
    """One connection, for one request at a time, each with a deadline of its own."""

    def __init__(self, url: str, context: ssl.SSLContext | None, proxy: Proxy | None) -> None:
        super().__init__(url)
        self._url = url
        self._context = context
        self._proxy = proxy
        self._left: LeftS = lambda: None
        # From before it is connected until it is closed; `http.client` lets go of its own earlier,
        # where a body is to be read up to the connection's end.
        self._held: socket.socket | None = None

    def is_stale(self) -> bool:
        """Whether the other side has closed it, or sent what nobody asked for."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    def open(self, left: LeftS) -> None:
        """Connect, if it is not; what follows is to be done in the time that is left."""
        self._left = left
        self.response_class = functools.partial(_response, left)  # type: ignore[assignment]
        if self.sock is None:
            self.connect()

    def connect(self) -> None:
        """Connect to the first of the host's addresses, or its proxy's, that answers."""
        # `socket.create_connection` would give every address the whole time.
        peer = self._proxy or self
        failure = OSError(f"{peer.host} has no address")
        found = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            try:
                self._held = held = socket.socket(family, kind, protocol)
                held.settimeout(self._left())
                held.connect(address)
                held.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                break
            except OSError as error:
                self.let_go()
                failure = error
        else:
            raise failure
        if self._context is not None:
            if self._proxy is not None:
                self._tunnel_through(held, self._proxy)
            self._held = held = self._context.wrap_socket(
                held, server_hostname=self.host, do_handshake_on_connect=False
            )
            held.settimeout(self._left())
            held.do_handshake()
        self.sock = held

    def _tunnel_through(self, held: socket.socket, proxy: Proxy) -> None:
        """Have a proxy pass on whatever comes."""
        lines = [f"CONNECT {self._url} HTTP/1.1", f"Host: {self._url}"]
        lines += [f"{name}: {value}" for name, value in _shown(proxy).items()]
        held.settimeout(self._left())
        held.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        answer = _response(self._left, held, method="CONNECT")
        answer.begin()
        if answer.status != 200:
            raise InferenceServerException(
                f"the proxy {proxy.host}:{proxy.port} refuses {self._url}: {answer.reason}",
                status=str(answer.status),
            )

    def ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> None:
        """Send a request; a proxy of one in the clear is told whom it is for."""
        if self._proxy is not None and self._context is None:
            path, headers = f"http://{self._url}{path}", {**headers, **_shown(self._proxy)}
        self.request(method, path, body, dict(headers))

    def send(self, data: Any) -> None:
        """Send bytes, all of them in the time that is left."""
        whole = memoryview(data)
        for start in range(0, len(whole), _PIECE_BYTES):
            self.sock.settimeout(self._left())
            super().send(whole[start : start + _PIECE_BYTES])

    def interrupt(self) -> None:
        """Make whoever waits for this connection stop; it stays theirs to close."""
        held = self._held
        if held is not None:
            with suppress(OSError):  # the other side was quicker
                # The plain one: TLS would drop its state under the thread that reads.
                socket.socket.shutdown(held, socket.SHUT_RDWR)

    def let_go(self) -> None:
        """Close the descriptor, without a word to the other side."""
        self.close()
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def forget(self) -> None:
        """In a forked child: close the descriptor and touch nothing else.

        A thread of the parent's may have been reading. Its reader's lock was copied locked, and
        nobody here would ever unlock it for who closes the reader.
        """
        held, self._held, self.sock = self._held, None, None
        descriptor = -1 if held is None else held.detach()
        if descriptor >= 0:
            os.close(descriptor)


# For ever: the last one to let go of a reader closes it.
_forgotten: list[_Connection] = []


class _Clocked(io.RawIOBase):
    """A socket's bytes until a deadline: a timeout of the socket's would begin anew at each read.

    `http.client.HTTPResponse` takes it for a socket, of which it only wants the file.
    """

    def __init__(self, sock: socket.socket, left: LeftS) -> None:
        self._sock = sock
        self._left = left
        self._file: Any = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._left())
        return int(self._file.readinto(buffer))

    def close(self) -> None:
        self._file.close()
        super().close()


def _response(left: LeftS, sock: socket.socket, **options: Any) -> http.client.HTTPResponse:
    return http.client.HTTPResponse(_Clocked(sock, left), **options)  # type: ignore[arg-type]


def _shown(proxy: Proxy) -> dict[str, str]:
    return {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}


def _refuse(status: int, body: bytes) -> None:
    """Raise Triton's reason, or a proxy's page, where that is the answer."""
    if status == 200:
        return
    text = body.decode("utf-8", "replace")
    with suppress(KeyError, TypeError, ValueError):
        text = str(json.loads(text)["error"])
    raise InferenceServerException(text, status=str(status))
