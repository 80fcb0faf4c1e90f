"""The gRPC clients: blocking and for asyncio, over one connection each.

It survives idle hours, dead peers and restarts, and is used for every request until an answer shows
that it is not to be trusted.
"""

from __future__ import annotations

import asyncio
import threading
from abc import abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from .core import DEFAULT_TIMEOUT_S, BlockingCore, ClientCore, Found
from .errors import AnswerMismatchError, ClientError, RequestCancelledError, closed_client
from .forks import channel_closed, forget_after_fork, grpc_call, notice_fork
from .images import ImageLike
from .messages import Prediction, Request, own_answer
from .proxies import grpc_options
from .stream import in_order

DEFAULT_GRPC_URL = "127.0.0.1:8001"
ADMIN_HEADER = "triton-grpc-protocol-admin-key"

CHANNEL_ARGUMENTS = [
    ("grpc.max_send_message_length", -1),  # the server sets the limits
    ("grpc.max_receive_message_length", -1),
    # Triton, as gRPC servers do, ends a connection (GOAWAY, too_many_pings) after the third ping
    # that comes within 5 minutes of the last one without data, or, where no request is open,
    # within 2 hours. So: a ping after 5 minutes and a margin, and only while a request is open.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # Also how long sent bytes may stay unacknowledged (TCP_USER_TIMEOUT): a peer that has
    # vanished is noticed after this long instead of the kernel's quarter of an hour.
    ("grpc.keepalive_timeout_ms", 10_000),
    # By default gRPC waits 1 s before it connects again and, later, up to 2 minutes: no retry
    # would find a server that has come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # By default channels to one address share a connection: a forked child's new channel would
    # get its parent's, and a connection that is not to be trusted would go on in another client.
    ("grpc.use_local_subchannel_pool", 1),
]


class _Line:
    """One channel, and how many calls are in it; closed by who lets go of it last."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.calls = 0

    def close(self) -> None:
        """Once: under gevent, gRPC counts its channels by what is closed."""
        channel = self.__dict__.pop("channel", None)
        if channel is not None:
            channel.close()
            channel_closed()

    def __del__(self) -> None:
        # Calls are in it only in a forked child, where closing might wait for them for ever.
        if not self.calls:
            try:
                self.close()
            except AttributeError:
                pass  # Python ends, and has taken gRPC's modules to pieces


class _GrpcCore(ClientCore):
    """What both clients are: one channel for all threads, and every question as a message."""

    def __init__(self, url: str = DEFAULT_GRPC_URL, **options: Any) -> None:
        super().__init__(url, **options)
        self._headers = () if self._admin_key is None else ((ADMIN_HEADER, self._admin_key),)
        self._lock = threading.Lock()
        self._closed = False
        self._lines: set[_Line] = set()  # with those given up that calls are still in
        with grpc_call(None):  # a child that is forked off forgets the line that was opened
            self._line: _Line | None = self._open()  # for new calls
            forget_after_fork(self)

    def forget(self) -> None:
        """In a forked child: open another channel at the next request."""
        self._lock = threading.Lock()
        self._line = None
        self._lines = set()

    def _open(self) -> _Line:
        scheme = "http" if self._tls is None else "https"
        arguments = [*CHANNEL_ARGUMENTS, *grpc_options(self.url, scheme)]
        if self._tls is None:
            channel = grpc.insecure_channel(self.url, arguments)
        else:
            credentials = self._tls.grpc_credentials()
            channel = grpc.secure_channel(self.url, credentials, arguments)
        line = _Line(channel)
        self._lines.add(line)
        return line

    def _close(self) -> None:
        notice_fork()
        with self._lock:
            self._closed = True
            lines = list(self._lines)
        for line in lines:
            with grpc_call(None):
                line.close()

    @contextmanager
    def _line_for_a_call(self, left_s: float | None) -> Iterator[tuple[_Line, float | None]]:
        """Around one call: the line that it goes over, and the seconds that are still left.

        A fork waits for the call itself in `_call`, and here while the line opens or closes.
        """
        with grpc_call(left_s) as still_s, self._lock:
            if self._closed:
                raise closed_client()
            line = self._line = self._line or self._open()
            line.calls += 1
        try:
            yield line, still_s
        except AnswerMismatchError:
            with self._lock:
                if self._line is line:
                    self._line = None
            raise
        except (ValueError, InferenceServerException) as error:
            ended = isinstance(error, ValueError) or error.status() == "StatusCode.CANCELLED"
            if ended and self._closed:  # by another thread or task
                raise RequestCancelledError("the client was closed before the answer") from None
            raise
        finally:
            with self._lock:
                line.calls -= 1
                is_unused = line is not self._line and not line.calls
                if is_unused:
                    self._lines.discard(line)
            if is_unused:  # not before: closing it cancels the calls in it
                with grpc_call(None):
                    line.close()

    async def _send(self, request: Request, left_s: float | None) -> Any:
        message = request.message(left_s)
        with (
            self._line_for_a_call(left_s) as (line, still_s),
            own_answer(message.id, self.url) as check,
        ):
            answer = await self._call(line.stub.ModelInfer, message, still_s)
            check(answer.id)
        return InferResult(answer)

    async def _describe(self, what: str, model: str, left_s: float | None) -> dict[str, Any]:
        method, question = {
            "server": ("ServerMetadata", service_pb2.ServerMetadataRequest()),
            "metadata": ("ModelMetadata", service_pb2.ModelMetadataRequest(name=model)),
            "config": ("ModelConfig", service_pb2.ModelConfigRequest(name=model)),
        }[what]
        with self._line_for_a_call(left_s) as (line, still_s):
            answer = await self._call(getattr(line.stub, method), question, still_s)
        found: dict[str, Any] = MessageToDict(answer, preserving_proto_field_name=True)
        return dict(found["config"]) if what == "config" else found

    @abstractmethod
    async def _call(self, method: Any, message: Any, left_s: float | None) -> Any:
        """What a method of the stub answers; ValueError where its channel was closed before."""


class GrpcClient(BlockingCore, _GrpcCore):
    """Blocking client over gRPC: one connection, which all threads share.

    Use as a context manager, or call `close()`. In a forked process it opens a connection of its
    own; a fork waits for requests in flight, and they for it, see `client.forks`.

    Args:
        url: HOST:PORT, without a scheme.
        options: as in `ClientCore`.
    """

    async def _call(self, method: Any, message: Any, left_s: float | None) -> Any:
        with grpc_call(left_s) as still_s:
            try:
                return method(message, timeout=still_s, metadata=self._headers)
            except grpc.RpcError as failure:
                raise _told(failure) from None

    def close(self) -> None:
        """Close the channel; a closed client answers nothing any more."""
        self._close()


class AsyncGrpcClient(_GrpcCore):
    """gRPC client for asyncio: the methods of `GrpcClient`, awaited, and `stream`.

    Use as `async with`, or await `close()`. It belongs to no event loop: it may be made where none
    runs, used in one after another, and shared by those of several threads. A fork is as for
    `GrpcClient`: one that an event loop's own thread makes waits for its requests too.

    Args:
        url: HOST:PORT, without a scheme.
        options: as in `ClientCore`.
    """

    infer = ClientCore._infer
    infer_tensor = ClientCore._infer_tensor
    metadata = ClientCore._metadata
    task = ClientCore._task
    server_version = ClientCore._server_version

    async def stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        concurrency: int = 8,
        policy: str = "auto",
        threshold: float | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> AsyncIterator[Prediction | ClientError]:
        """Ask about any number of encoded images, one image per request.

        To leave before the end, use `async with contextlib.aclosing(client.stream(...))`: what
        is in flight is then cancelled on the spot, else once Python drops the generator.

        Args:
            images: read as answers are taken, at most twice `concurrency` ahead of them. A plain
                iterable holds up the event loop while it makes the next one.
            concurrency: requests in flight, at least 1.
            policy: as in `infer`.
            threshold: as in `infer`.
            timeout_s: as in `infer`, for each image from when its request is sent.

        Yields:
            For every image, in their order, its prediction or the error that `infer` would raise,
            after which the stream goes on.

        Raises:
            InvalidRequestError: `concurrency` is less than 1.
        """

        async def ask(image: ImageLike) -> Prediction | ClientError:
            try:
                (answer,) = await self.infer(
                    [image], policy=policy, threshold=threshold, timeout_s=timeout_s
                )
            except ClientError as error:
                return error
            return answer

        async with aclosing(in_order(images, ask, concurrency)) as answers:
            async for answer in answers:
                yield answer

    async def _call(self, method: Any, message: Any, left_s: float | None) -> Any:
        loop, answered = asyncio.get_running_loop(), asyncio.Event()
        with ExitStack() as stack:
            still_s = stack.enter_context(grpc_call(left_s))
            call = method.future(message, timeout=still_s, metadata=self._headers)
            in_flight = stack.pop_all()

        def done(_: grpc.Future) -> None:
            # In a thread of gRPC's: the loop may stand still, in a fork that waits for this call.
            in_flight.close()
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(answered.set)

        call.add_done_callback(done)
        try:
            await answered.wait()
        except asyncio.CancelledError:
            call.cancel()
            raise
        if call.code() is not grpc.StatusCode.OK:
            raise _told(call)
        return call.result()

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _aside(self, call: Callable[[], Found]) -> Found:
        return await asyncio.to_thread(call)

    async def close(self) -> None:
        """Close the channel; a closed client answers nothing any more."""
        self._close()

    async def __aenter__(self) -> AsyncGrpcClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


def _told(failure: grpc.Call) -> InferenceServerException:
    return InferenceServerException(failure.details(), status=str(failure.code()))
