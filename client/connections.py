"""HTTP connections to one server: a bounded number, shared by all threads of one process.

The standard library's `http.client` with what it lacks: one deadline over a whole exchange, and an
account of every open socket, so that `close` and a forked child can let go of all of them.
"""

from __future__ import annotations

import http.client
import io
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from .errors import InvalidRequestError, RequestCancelledError, closed_client, wrong_protocol
from .forks import forget_after_fork, notice_fork
from .retry import Tries

AnswerT = TypeVar("AnswerT")
LeftS = Callable[[], float | None]  # seconds until a deadline; raises TimeoutError after it

_PIECE_BYTES = 1 << 18  # of a body, sent under one look at the clock


class Answer(NamedTuple):
    """One HTTP response, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connections:
    """At most `limit` connections to one server, each for one request at a time.

    Who finds all of them in use waits for one. Safe to share between threads; a process that is
    forked off opens its own.

    Args:
        url: HOST:PORT.
        context: for TLS; None for plain connections.
        limit: of open connections, at least 1.

    Raises:
        InvalidRequestError: `limit` is less than 1.
    """

    def __init__(self, url: str, context: ssl.SSLContext | None, limit: int) -> None:
        if limit < 1:
            raise InvalidRequestError(f"concurrency must be at least 1; got {limit}")
        self._url = url
        self._context = context
        self._limit = limit
        self._closed = False
        self._start()
        forget_after_fork(self)

    def _start(self) -> None:
        self._changed = threading.Condition()
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    def exchange(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        left_s: float | None,
        read: Callable[[Answer], AnswerT],
    ) -> AnswerT:
        """Send one request and read its answer.

        Args:
            method: GET or POST.
            path: with its leading slash.
            body: None for none.
            headers: besides those that HTTP itself wants.
            left_s: for everything, waiting for a connection included, in seconds; None for ever.
            read: makes something of the answer. What it raises closes the connection.

        Raises:
            TimeoutError: it took longer.
            InvalidRequestError: these connections were closed before.
            RequestCancelledError: they were closed meanwhile.
            NotServedError: what answers does not speak HTTP.
            OSError: no connection, or it broke.
        """
        notice_fork()
        left = Tries(None, left_s).left_s
        connection = self._borrow(left)
        reusable = False
        try:
            connection.connect(left)
            if self._closed:
                raise ConnectionAbortedError
            answer = connection.exchange(method, path, body, headers, left)
            if self._closed:  # where its end is the connection's, only a part may have come
                raise ConnectionAbortedError
            found = read(answer)
            reusable = connection.is_open
        except (OSError, http.client.HTTPException) as error:
            if self._closed:
                raise RequestCancelledError("the client was closed before the answer") from None
            if isinstance(error, OSError):
                raise
            if isinstance(error, http.client.IncompleteRead):
                raise ConnectionResetError("closed before the answer") from None
            raise wrong_protocol(self._url) from None
        finally:
            self._give_back(connection, reusable)
        return found

    def _borrow(self, left: LeftS) -> _Connection:
        def is_free() -> bool:
            return self._closed or len(self._busy) < self._limit

        with self._changed:
            if not self._changed.wait_for(is_free, left()):
                raise TimeoutError
            if self._closed:
                raise closed_client()
            connection = self._idle_one() or _Connection(self._url, self._context)
            self._busy.add(connection)
        return connection

    def _idle_one(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_stale():
                return connection
            connection.close()
        return None

    def _give_back(self, connection: _Connection, reusable: bool) -> None:
        with self._changed:
            self._busy.discard(connection)
            if reusable and not self._closed:
                self._idle.append(connection)
            else:
                connection.close()
            self._changed.notify()

    def close(self) -> None:
        """Close all connections; requests that use one end with `RequestCancelledError`."""
        notice_fork()
        with self._changed:
            self._closed = True
            for connection in self._idle:
                connection.close()
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


class _Connection:
    """One connection, for one request at a time."""

    def __init__(self, url: str, context: ssl.SSLContext | None) -> None:
        self._context = context
        self._http: http.client.HTTPConnection = (
            http.client.HTTPConnection(url)
            if context is None
            else http.client.HTTPSConnection(url, context=context)
        )
        # From before it is connected until it is closed; `http.client` lets go of its own earlier,
        # where a body is to be read up to the connection's end.
        self._sock: socket.socket | None = None

    @property
    def is_open(self) -> bool:
        return self._http.sock is not None

    def is_stale(self) -> bool:
        """Whether the other side has closed it, or sent what nobody asked for."""
        poll = select.poll()
        poll.register(self._http.sock, select.POLLIN)
        return bool(poll.poll(0))

    def connect(self, left: LeftS) -> None:
        """Connect, if it is not: to the first of the host's addresses that answers."""
        if self._http.sock is not None:
            return
        sock = self._open(left)
        if self._context is not None:
            self._sock = encrypted = self._context.wrap_socket(
                sock, server_hostname=self._http.host, do_handshake_on_connect=False
            )
            encrypted.settimeout(left())
            encrypted.do_handshake()
            sock = encrypted
        self._http.sock = sock

    def _open(self, left: LeftS) -> socket.socket:
        # `socket.create_connection` would give every address the whole time.
        host = (self._http.host, self._http.port)
        failure = OSError(f"{host[0]} has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(
            *host, type=socket.SOCK_STREAM
        ):
            try:
                self._sock = sock = socket.socket(family, kind, protocol)
                sock.settimeout(left())
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                self._close_socket()
                failure = error
            else:
                return sock
        raise failure

    def exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], left: LeftS
    ) -> Answer:
        def respond(sock: socket.socket, **options: Any) -> http.client.HTTPResponse:
            return http.client.HTTPResponse(_Clocked(sock, left), **options)  # type: ignore[arg-type]

        def pieces(whole: bytes) -> Iterator[memoryview]:
            for start in range(0, len(whole), _PIECE_BYTES):
                self._http.sock.settimeout(left())
                yield memoryview(whole)[start : start + _PIECE_BYTES]

        self._http.response_class = respond  # type: ignore[assignment]
        self._http.sock.settimeout(left())
        if body is None:
            self._http.request(method, path, headers=dict(headers))
        else:
            length = {"Content-Length": str(len(body))}
            self._http.request(method, path, pieces(body), {**headers, **length})
        with self._http.getresponse() as response:
            return Answer(response.status, response.headers, response.read())

    def interrupt(self) -> None:
        """Make whoever waits for this connection stop; it stays theirs to close."""
        sock = self._sock
        if sock is not None:
            try:
                # The plain one: TLS would drop its state under the thread that reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass  # the other side was quicker

    def close(self) -> None:
        """Close the descriptor, without a word to the other side."""
        self._http.close()
        self._close_socket()

    def _close_socket(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def forget(self) -> None:
        """In a forked child: close the descriptor and touch nothing else.

        A thread of the parent's may have been reading. Its reader's lock was copied locked, and
        nobody here would ever unlock it for who closes the reader.
        """
        sock, self._sock, self._http.sock = self._sock, None, None
        if sock is not None:
            descriptor = sock.detach()
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
