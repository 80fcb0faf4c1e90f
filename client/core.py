"""What every client does, whatever carries its questions: options, batches, tries, deadlines.

All of it is written once, as coroutines, which is what `AsyncGrpcClient` offers. A blocking client
offers them through `blocking`: what they await there blocks, and never waits for an event loop.
"""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

from numpy.typing import NDArray

from .errors import (
    AccessDeniedError,
    ClientError,
    InvalidRequestError,
    NotServedError,
    check_url,
    server_errors,
)
from .images import ImageLike, as_rows
from .messages import (
    ENSEMBLE,
    ROUTER,
    TENSOR_ENSEMBLE,
    Prediction,
    Request,
    Task,
    as_batch,
    predictions,
    request_parameters,
)
from .retry import DEFAULT_RETRY, Retry, Tries
from .tls import LOOK_S, Tls, wants_tls

DEFAULT_TIMEOUT_S = 60.0

Options = ParamSpec("Options")
ClientT = TypeVar("ClientT")
Found = TypeVar("Found")


def blocking(
    method: Callable[Concatenate[ClientT, Options], Coroutine[Any, Any, Found]],
) -> Callable[Concatenate[ClientT, Options], Found]:
    """The same method for callers without an event loop: run to its end on the spot."""

    @functools.wraps(method)
    def call(client: ClientT, /, *arguments: Options.args, **options: Options.kwargs) -> Found:
        running = method(client, *arguments, **options)
        try:
            running.send(None)
        except StopIteration as end:
            found: Found = end.value
            return found
        running.close()
        raise AssertionError("a blocking client waited for an event loop")

    call.__name__ = method.__name__.lstrip("_")
    return call


class ClientCore(ABC):
    """Options of every client, and its questions.

    Args:
        url: HOST:PORT, without a scheme.
        model: the model that takes `image_bytes`.
        tensor_model: the model that takes `image`.
        retry: when to send a request again; None never does, so that each try can be counted.
        tls: files for an encrypted connection; None for a plain one.
        admin_key: the key of the server's restricted APIs, sent with every request. Without `tls`
            whoever sees the traffic sees the key.

    Raises:
        InvalidRequestError: `url` is not HOST:PORT, or a TLS file or the key cannot be used.
    """

    _look_up_timeout_s = 10.0  # for what a server knows without running a model

    def __init__(
        self,
        url: str,
        *,
        model: str = ENSEMBLE,
        tensor_model: str = TENSOR_ENSEMBLE,
        retry: Retry | None = DEFAULT_RETRY,
        tls: Tls | None = None,
        admin_key: str | None = None,
    ) -> None:
        self.url = check_url(url)
        self.model = model
        self.tensor_model = tensor_model
        self.retry = retry
        self._tls = tls
        self._admin_key = _fit_for_a_header(admin_key)
        self._max_batch: dict[str, int] = {}

    @property
    def router(self) -> str:
        """The model whose versions can be pinned, and whose configuration says what is answered."""
        return ROUTER if self.tensor_model == TENSOR_ENSEMBLE else self.tensor_model

    async def _infer(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        policy: str = "auto",
        threshold: float | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> list[Prediction]:
        """Ask about encoded images.

        Args:
            images: N image files (`docs/guide.md` lists the formats), each as bytes or as a path;
                one of them stands for a list of one. More than the model's maximum batch are sent
                in several requests, one after the other; files are read as their request comes.
            policy: `auto` lets the score decide, `low` and `high` force a rung.
            threshold: replaces the calibrated threshold, in oracle units.
            timeout_s: allowed per request with all its tries, in seconds; None waits for ever.
                The server does not begin on a request that has waited that long in a queue.

        Returns:
            N predictions in the order of the images.

        Raises:
            InvalidRequestError: the server refused an image or a parameter, or a file cannot be
                read. The image is named by its place among the N, from 1, and by its path.
            UnavailableError: no server there, or not now; `OverloadedError` where it has too much
                to do, `NotServedError` where it does not serve the model.
            AccessDeniedError: a certificate or key is missing or wrong.
            DeadlineError: no answer in time.
            RequestCancelledError: somebody cancelled it.
            ServerError: the server failed; `AnswerMismatchError` where it answered another request.
            ForkedError: gRPC cannot be used in this process; see `client.forks`.

        Each of them keeps the answers to the images before those of the failed request, in
        `answers`.
        """
        rows, parameters = as_rows(images), request_parameters(policy, threshold)
        return await self._run(Request(self.model, "image_bytes", rows, parameters), timeout_s)

    async def _infer_tensor(
        self,
        image: NDArray[Any],
        *,
        policy: str = "auto",
        threshold: float | None = None,
        version: int | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> list[Prediction]:
        """Ask about preprocessed images; result and errors as `infer`.

        Args:
            image: normalised, FP32, shape (N, 3, H, W) or (3, H, W).
            policy: as in `infer`.
            threshold: as in `infer`.
            version: of the router (of `tensor_model`, where that is another than the default), to
                stay with one while others come and go; None takes the one that answers.
            timeout_s: as in `infer`.
        """
        parameters = request_parameters(policy, threshold)
        model = self.tensor_model if version is None else self.router
        request = Request(model, "image", as_batch(image), parameters, version)
        return await self._run(request, timeout_s)

    async def _metadata(self, model: str | None = None) -> dict[str, Any]:
        """A model's name, versions, inputs and outputs (each with name, datatype and shape).

        Args:
            model: this client's ensemble if not given. Errors as `infer`.
        """
        found = await self._look_up("metadata", model or self.model)
        for side in ("inputs", "outputs"):  # gRPC's JSON leaves out empty lists, and quotes numbers
            found[side] = [
                {**tensor, "shape": [int(size) for size in tensor.get("shape", ())]}
                for tensor in found.get(side, ())
            ]
        return found

    async def _task(self) -> Task:
        """What the served model's logits mean; errors as `infer`."""
        config = await self._look_up("config", self.router)
        given = config.get("parameters", {})
        return Task.of({name: value.get("string_value", "") for name, value in given.items()})

    async def _server_version(self) -> str:
        """Triton's version; errors as `infer`."""
        return str((await self._look_up("server", ""))["version"])

    async def _run(self, request: Request, timeout_s: float | None) -> list[Prediction]:
        answers: list[Prediction] = []
        # A single image always fits: no question about the maximum on the common path.
        several = len(request.rows) > 1
        max_batch = await self._batch_limit(request.model, timeout_s) if several else 1
        for piece in request.split(max_batch):
            try:
                sent = await self._aside(piece.read) if piece.has_files else piece.read()
                call = functools.partial(self._send, sent)
                result = await self._tried(call, timeout_s, timeout_s)
                answers.extend(predictions(result, len(piece.rows)))
            except ClientError as error:
                said, total = str(error), len(request.rows)
                if isinstance(error, InvalidRequestError):
                    said = piece.about(said, len(answers), total)
                if answers:
                    said += f" (answers to the {len(answers)} before: this error's `answers`)"
                error.args, error.answers = (said,), tuple(answers)
                raise
        return answers

    async def _batch_limit(self, model: str, timeout_s: float | None) -> int:
        if model not in self._max_batch:
            ask = functools.partial(self._describe, "config", model)
            config = await self._tried(ask, timeout_s, timeout_s)
            # 0, or nothing, is Triton's word for a model that does not batch.
            self._max_batch[model] = max(1, int(config.get("max_batch_size", 0)))
        return self._max_batch[model]

    async def _look_up(self, what: str, model: str) -> dict[str, Any]:
        ask = functools.partial(self._describe, what, model)
        return await self._tried(ask, self._look_up_timeout_s, None)

    async def _tried(
        self,
        call: Callable[[float | None], Awaitable[Found]],
        timeout_s: float | None,
        named_s: float | None,
    ) -> Found:
        """Call, with the seconds that are left, until it answers or must not be tried again."""
        tries = Tries(self.retry, timeout_s)
        while True:
            try:
                with server_errors(self.url, named_s):
                    return await call(tries.left_s())
            except ClientError as error:
                pause_s = tries.pause_s(error)
                if pause_s is None:
                    if error.is_connecting:
                        await self._explain(error, tries)
                    raise
            await self._sleep(pause_s)

    async def _explain(self, error: ClientError, tries: Tries) -> None:
        """Raise what a TLS handshake tells more exactly than a failed connection."""
        with suppress(TimeoutError):  # no time is left to find out
            left_s = tries.left_s()
            timeout_s = LOOK_S if left_s is None else min(left_s, LOOK_S)
            look = wants_tls if self._tls is None else self._tls.why_refused
            why = await self._aside(functools.partial(look, self.url, timeout_s))
            if why is not None:
                raise (NotServedError if self._tls is None else AccessDeniedError)(why) from None

    @abstractmethod
    async def _send(self, request: Request, left_s: float | None) -> Any:
        """Ask a model, and hold the answer against the request; a result of tritonclient's."""

    @abstractmethod
    async def _describe(self, what: str, model: str, left_s: float | None) -> dict[str, Any]:
        """What the server says of itself (`server`), or of a model (`metadata`, `config`)."""

    @abstractmethod
    async def _sleep(self, seconds: float) -> None: ...

    @abstractmethod
    async def _aside(self, call: Callable[[], Found]) -> Found:
        """What a call returns that blocks for a moment."""


class BlockingCore(ClientCore):
    """The questions for callers without an event loop; a context manager that closes the client.

    Safe to share between threads. In a forked process a client opens connections of its own.
    """

    infer = blocking(ClientCore._infer)
    infer_tensor = blocking(ClientCore._infer_tensor)
    metadata = blocking(ClientCore._metadata)
    task = blocking(ClientCore._task)
    server_version = blocking(ClientCore._server_version)

    async def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def _aside(self, call: Callable[[], Found]) -> Found:
        return call()

    @abstractmethod
    def close(self) -> None:
        """Close the connections; a closed client answers nothing any more."""

    def __enter__(self: ClientT) -> ClientT:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _fit_for_a_header(key: str | None) -> str | None:
    if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
        raise InvalidRequestError(
            "the admin key must be one line of ASCII characters, without spaces around it"
        )
    return key
