"""The gRPC client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import Any, TypeVar

import tritonclient.grpc as grpc_protocol
import tritonclient.grpc.aio as grpc_aio
from grpc.aio import UsageError
from numpy.typing import NDArray

from .base import DEFAULT_GRPC_URL, DEFAULT_TIMEOUT_S, ClientBase
from .channel import Channels, open_channel
from .errors import (
    AnswerMismatchError,
    ClientError,
    RequestCancelledError,
    closed_client,
    server_errors,
)
from .forks import asyncio_closed, check_grpc
from .messages import (
    Prediction,
    Request,
    Result,
    Task,
    metadata_as_dict,
    own_answer,
    parameters_as_dict,
    predictions,
)
from .retry import Tries
from .stream import in_order

AnswerT = TypeVar("AnswerT")


class AsyncGrpcClient(ClientBase):
    """gRPC client for asyncio: the methods of `GrpcClient`, awaited, and `stream`.

    Make it inside the running event loop; use as `async with`, or await `close()`. It belongs to
    that loop: threads share a `GrpcClient` instead. What is forked off while one is open cannot use
    gRPC, see `client.forks`.

    Args:
        url: HOST:PORT, without a scheme.
        options: as in `ClientBase`.
    """

    def __init__(self, url: str = DEFAULT_GRPC_URL, **options: Any) -> None:
        super().__init__(url, **options)
        self._closed = False
        self._channels = Channels(self._open())

    def _open(self) -> Any:
        return open_channel(grpc_aio, self.url, self._tls, self._admin_key, self)

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[Any]:
        """Around one call: the channel for it."""
        check_grpc()
        if self._closed:
            raise closed_client()
        channel = self._channels.enter(self._open)
        try:
            yield channel
        except AnswerMismatchError:
            self._channels.give_up(channel)
            raise
        except UsageError:  # gRPC's, where the client was closed just before
            if not self._closed:
                raise
            raise RequestCancelledError("the client was closed before the answer") from None
        finally:
            for one in self._channels.leave(channel):
                await one.close()

    async def infer(
        self,
        images: Sequence[bytes],
        *,
        policy: str = "auto",
        threshold: float | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> list[Prediction]:
        """Ask about encoded images; arguments, result and errors as `GrpcClient.infer`."""
        return await self._run(self._about_images(images, policy, threshold), timeout_s)

    async def infer_tensor(
        self,
        image: NDArray[Any],
        *,
        policy: str = "auto",
        threshold: float | None = None,
        version: int | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> list[Prediction]:
        """Ask about preprocessed images; as `GrpcClient.infer_tensor`."""
        return await self._run(self._about_tensor(image, policy, threshold, version), timeout_s)

    async def stream(
        self,
        images: Iterable[bytes] | AsyncIterable[bytes],
        *,
        concurrency: int = 8,
        policy: str = "auto",
        threshold: float | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> AsyncIterator[Prediction | ClientError]:
        """Ask about any number of encoded images, one image per request.

        An image that gets no answer yields its error and the stream goes on: an image that
        nobody can decode among a million is no reason to stop. Raise it where it is one.

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
            For every image, in their order, its prediction or the error that `infer` would raise.

        Raises:
            InvalidRequestError: `concurrency` is less than 1.
        """

        async def ask(image: bytes) -> Prediction | ClientError:
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

    async def _run(self, request: Request, timeout_s: float | None) -> list[Prediction]:
        answers: list[Prediction] = []
        several = len(request.rows) > 1
        max_batch = await self._batch_limit(request.model, timeout_s) if several else 1
        for piece in request.split(max_batch):

            def send(left_s: float | None, piece: Request = piece) -> Awaitable[Any]:
                return self._send(piece, left_s)

            result = await self._ask(send, timeout_s, timeout_s)
            answers.extend(predictions(result, len(piece.rows)))
        return answers

    async def _send(self, request: Request, left_s: float | None) -> Result:
        arguments = request.arguments(grpc_protocol, left_s)
        async with self._calling() as channel:
            with own_answer(arguments["request_id"], self.url) as check:
                result = await _uncancelled(channel.infer(**arguments, client_timeout=left_s))
                check(result.get_response().id)
        return result

    async def _batch_limit(self, model: str, timeout_s: float | None) -> int:
        if model not in self._max_batch:
            answer = await self._ask(
                lambda left_s: self._call("get_model_config", left_s, model),
                timeout_s,
                timeout_s,
            )
            self._max_batch[model] = max(1, int(answer.config.max_batch_size))
        return self._max_batch[model]

    async def _call(self, method: str, left_s: float | None, *names: str) -> Any:
        async with self._calling() as channel:
            return await _uncancelled(getattr(channel, method)(*names, client_timeout=left_s))

    async def _question(self, method: str, *names: str) -> Any:
        return await self._ask(
            lambda left_s: self._call(method, left_s, *names), self._question_timeout_s, None
        )

    async def _ask(
        self,
        call: Callable[[float | None], Awaitable[AnswerT]],
        timeout_s: float | None,
        named_s: float | None,
    ) -> AnswerT:
        """As `SyncClient._ask`."""
        tries = Tries(self.retry, timeout_s)
        while True:
            try:
                with server_errors(self.url, named_s):
                    return await call(tries.left_s())
            except ClientError as error:
                pause_s = tries.pause_s(error)
                if pause_s is None:
                    raise
            await asyncio.sleep(pause_s)

    async def metadata(self, model: str | None = None) -> dict[str, Any]:
        """A model's name, versions, inputs and outputs; as `GrpcClient.metadata`."""
        answer = await self._question("get_model_metadata", model or self.model)
        return metadata_as_dict(answer)

    async def task(self) -> Task:
        """What the served model's logits mean; as `GrpcClient.task`."""
        answer = await self._question("get_model_config", self.tensor_model)
        return Task.of(parameters_as_dict(answer))

    async def server_version(self) -> str:
        """Triton's version; as `GrpcClient.server_version`."""
        return str((await self._question("get_server_metadata")).version)

    async def close(self) -> None:
        """Close the channel; a closed client answers nothing any more."""
        self._closed = True
        for channel in self._channels.forget():
            await channel.close()
        asyncio_closed(self)

    async def __aenter__(self) -> AsyncGrpcClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


async def _uncancelled(call: Coroutine[Any, Any, AnswerT]) -> AnswerT:
    """What a call gives.

    A channel that is closed cancels the calls in it, and then says so as asyncio says that whoever
    awaits them was cancelled, who was not. In a task of its own the two can be told apart.

    Raises:
        RequestCancelledError: the call was cancelled, but not its caller.
    """
    running = asyncio.create_task(call)
    try:
        await asyncio.wait([running])
    except asyncio.CancelledError:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        raise
    if running.cancelled():
        raise RequestCancelledError("the client was closed before the answer")
    return running.result()
