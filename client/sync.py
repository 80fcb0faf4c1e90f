"""Blocking clients: gRPC and HTTP, with the same methods."""

from __future__ import annotations

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import tritonclient.grpc as grpc_protocol
import tritonclient.http as http_protocol
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from .base import DEFAULT_GRPC_URL, DEFAULT_HTTP_URL, DEFAULT_TIMEOUT_S, ClientBase
from .channel import HTTP_ADMIN_HEADER, Channels, open_channel
from .connections import Answer, Connections
from .errors import (
    AnswerMismatchError,
    ClientError,
    RequestCancelledError,
    closed_client,
    server_errors,
    wrong_protocol,
)
from .forks import forget_after_fork, grpc_call, notice_fork
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

ClientT = TypeVar("ClientT", bound="SyncClient")
AnswerT = TypeVar("AnswerT")


class SyncClient(ClientBase, ABC):
    """What the blocking clients share: everything but the transport.

    Use as a context manager, or call `close()`. Options and errors are those of `ClientBase`.
    Safe to share between threads. In a forked process a client opens connections of its own.
    """

    def infer(
        self,
        images: Sequence[bytes],
        *,
        policy: str = "auto",
        threshold: float | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> list[Prediction]:
        """Ask about encoded images.

        Args:
            images: N JPEG, PNG or WebP files as bytes. More than the model's maximum batch are
                sent in several requests, one after the other.
            policy: `auto` lets the score decide, `low` and `high` force a rung.
            threshold: replaces the calibrated threshold, in oracle units.
            timeout_s: allowed per request with all its tries, in seconds; None waits for ever.
                The server does not begin on a request that has waited that long in a queue.

        Returns:
            N predictions in the order of the images.

        Raises:
            InvalidRequestError: the server refused an image or a parameter.
            UnavailableError: no server there, or not now; `OverloadedError` where it has too much
                to do, `NotServedError` where it does not serve the model.
            AccessDeniedError: a certificate or key is missing or wrong.
            DeadlineError: no answer in time.
            RequestCancelledError: somebody cancelled it.
            ServerError: the server failed; `AnswerMismatchError` where it answered another request.
            ForkedError: gRPC cannot be used in this process; see `client.forks`.
        """
        return self._run(self._about_images(images, policy, threshold), timeout_s)

    def infer_tensor(
        self,
        image: NDArray[Any],
        *,
        policy: str = "auto",
        threshold: float | None = None,
        version: int | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> list[Prediction]:
        """Ask about preprocessed images.

        Args:
            image: normalised, FP32, shape (N, 3, H, W) or (3, H, W).
            policy: as in `infer`.
            threshold: as in `infer`.
            version: of `tensor_model`, to stay with one while others come and go; None lets the
                server choose. (The ensemble has one version, which names its router's.)
            timeout_s: as in `infer`.

        Returns:
            N predictions in the order of the images.

        Raises:
            ClientError: as in `infer`.
        """
        return self._run(self._about_tensor(image, policy, threshold, version), timeout_s)

    def _run(self, request: Request, timeout_s: float | None) -> list[Prediction]:
        answers: list[Prediction] = []
        # A single image always fits: no question about the maximum on the common path.
        max_batch = self._batch_limit(request.model, timeout_s) if len(request.rows) > 1 else 1
        for piece in request.split(max_batch):
            result = self._ask(lambda left_s, p=piece: self._send(p, left_s), timeout_s, timeout_s)
            answers.extend(predictions(result, len(piece.rows)))
        return answers

    def _batch_limit(self, model: str, timeout_s: float | None) -> int:
        if model not in self._max_batch:
            found = self._ask(lambda s: self._max_batch_size(model, s), timeout_s, timeout_s)
            # 0 is Triton's word for a model that does not batch.
            self._max_batch[model] = max(1, found)
        return self._max_batch[model]

    def _question(self, call: Callable[[float | None], AnswerT]) -> AnswerT:
        return self._ask(call, self._question_timeout_s, None)

    def _ask(
        self,
        call: Callable[[float | None], AnswerT],
        timeout_s: float | None,
        named_s: float | None,
    ) -> AnswerT:
        """Call, with the seconds that are left, until it answers or must not be tried again."""
        tries = Tries(self.retry, timeout_s)
        while True:
            try:
                with server_errors(self.url, named_s):
                    return call(tries.left_s())
            except ClientError as error:
                pause_s = tries.pause_s(error)
                if pause_s is None:
                    raise
            time.sleep(pause_s)

    def metadata(self, model: str | None = None) -> dict[str, Any]:
        """A model's name, versions, inputs and outputs (each with name, datatype and shape).

        Args:
            model: the model's name; this client's ensemble if not given.

        Raises:
            ClientError: as in `infer`.
        """
        return self._question(lambda left_s: self._metadata(model or self.model, left_s))

    def task(self) -> Task:
        """What the served model's logits mean.

        Raises:
            ClientError: as in `infer`.
        """
        return Task.of(self._question(lambda left_s: self._parameters(self.tensor_model, left_s)))

    def server_version(self) -> str:
        """Triton's version.

        Raises:
            ClientError: as in `infer`.
        """
        return self._question(self._server_version)

    def __enter__(self: ClientT) -> ClientT:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the connections; a closed client answers nothing any more."""

    @abstractmethod
    def _send(self, request: Request, left_s: float | None) -> Result: ...

    @abstractmethod
    def _max_batch_size(self, model: str, left_s: float | None) -> int: ...

    @abstractmethod
    def _parameters(self, model: str, left_s: float | None) -> dict[str, str]: ...

    @abstractmethod
    def _metadata(self, model: str, left_s: float | None) -> dict[str, Any]: ...

    @abstractmethod
    def _server_version(self, left_s: float | None) -> str: ...


class GrpcClient(SyncClient):
    """Blocking client over gRPC: one connection, which all threads share.

    A fork waits for requests in flight, and they for it; see `client.forks`.

    Args:
        url: HOST:PORT, without a scheme.
        options: as in `ClientBase`.
    """

    def __init__(self, url: str = DEFAULT_GRPC_URL, **options: Any) -> None:
        super().__init__(url, **options)
        self._lock = threading.Lock()
        self._closed = False
        self._channels = Channels(self._open())
        forget_after_fork(self)

    def close(self) -> None:
        """Close the channel; a closed client answers nothing any more."""
        notice_fork()
        with self._lock:
            self._closed = True
            channels = self._channels.forget()
        for channel in channels:
            channel.close()

    def forget(self) -> None:
        """In a forked child: open another channel at the next request."""
        self._lock = threading.Lock()
        self._channels.forget()

    def _open(self) -> Any:
        return open_channel(grpc_protocol, self.url, self._tls, self._admin_key)

    @contextmanager
    def _calling(self, left_s: float | None) -> Iterator[tuple[Any, float | None]]:
        """Around one call: the channel for it, and the seconds that are left of its time."""
        with grpc_call(left_s) as still_s:
            with self._lock:
                if self._closed:
                    raise closed_client()
                channel = self._channels.enter(self._open)
            try:
                yield channel, still_s
            except AnswerMismatchError:
                with self._lock:
                    self._channels.give_up(channel)
                raise
            except ValueError:  # gRPC's, where another thread closed the client just before
                if not self._closed:
                    raise
                raise RequestCancelledError("the client was closed before the answer") from None
            finally:
                with self._lock:
                    unused = self._channels.leave(channel)
                for one in unused:
                    one.close()

    def _send(self, request: Request, left_s: float | None) -> Result:
        arguments = request.arguments(grpc_protocol, left_s)
        with self._calling(left_s) as (channel, still_s):
            with own_answer(arguments["request_id"], self.url) as check:
                result = channel.infer(**arguments, client_timeout=still_s)
                check(result.get_response().id)
        return result

    def _max_batch_size(self, model: str, left_s: float | None) -> int:
        with self._calling(left_s) as (channel, still_s):
            answer = channel.get_model_config(model, client_timeout=still_s)
        return int(answer.config.max_batch_size)

    def _parameters(self, model: str, left_s: float | None) -> dict[str, str]:
        with self._calling(left_s) as (channel, still_s):
            return parameters_as_dict(channel.get_model_config(model, client_timeout=still_s))

    def _metadata(self, model: str, left_s: float | None) -> dict[str, Any]:
        with self._calling(left_s) as (channel, still_s):
            return metadata_as_dict(channel.get_model_metadata(model, client_timeout=still_s))

    def _server_version(self, left_s: float | None) -> str:
        with self._calling(left_s) as (channel, still_s):
            return str(channel.get_server_metadata(client_timeout=still_s).version)


class HttpClient(SyncClient):
    """Blocking client over HTTP: a bounded number of connections, which all threads share.

    `tls` is for a proxy in front of Triton, which speaks no HTTPS itself. Where greenlets are to
    share it, let gevent replace the standard library's sockets first, as Locust does.

    Args:
        url: HOST:PORT, without a scheme.
        concurrency: connections at most, each for one request at a time. Requests beyond it wait
            for one, within their own time.
        options: as in `ClientBase`.
    """

    def __init__(
        self, url: str = DEFAULT_HTTP_URL, *, concurrency: int = 64, **options: Any
    ) -> None:
        super().__init__(url, **options)
        context = None if self._tls is None else self._tls.http_context()
        self._connections = Connections(url, context, concurrency)
        self._headers = {} if self._admin_key is None else {HTTP_ADMIN_HEADER: self._admin_key}

    def close(self) -> None:
        """Close the connections; a closed client answers nothing any more."""
        self._connections.close()

    def _send(self, request: Request, left_s: float | None) -> Result:
        arguments = request.arguments(http_protocol, left_s)
        model, version = arguments.pop("model_name"), arguments.pop("model_version")
        asked = arguments["request_id"]
        body, json_bytes = http_protocol.InferenceServerClient.generate_request_body(**arguments)
        headers = {**self._headers, "Content-Type": "application/octet-stream"}
        if json_bytes is not None:
            headers["Inference-Header-Content-Length"] = str(json_bytes)

        def read(answer: Answer) -> Result:
            length = answer.headers.get("Inference-Header-Content-Length")
            with own_answer(asked, self.url) as check:
                _raise_refusal(answer)
                result = http_protocol.InferResult.from_response_body(
                    answer.body, header_length=None if length is None else int(length)
                )
                check(result.get_response().get("id"))
            return result

        of_version = f"/versions/{version}" if version else ""
        path = f"/v2/models/{quote(model, safe='')}{of_version}/infer"
        return self._exchange("POST", path, body, headers, left_s, read)

    def _get(self, path: str, left_s: float | None) -> dict[str, Any]:
        def read(answer: Answer) -> dict[str, Any]:
            _raise_refusal(answer)
            return dict(json.loads(answer.body))

        return self._exchange("GET", path, None, self._headers, left_s, read)

    def _exchange(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        left_s: float | None,
        read: Callable[[Answer], AnswerT],
    ) -> AnswerT:
        def read_it(answer: Answer) -> AnswerT | InferenceServerException:
            try:
                return read(answer)
            except InferenceServerException as refusal:
                return refusal  # is no reason to close the connection
            except (AttributeError, KeyError, TypeError, ValueError):  # no JSON, or not Triton's
                raise wrong_protocol(self.url) from None

        found = self._connections.exchange(method, path, body, headers, left_s, read_it)
        if isinstance(found, InferenceServerException):
            raise found
        return found

    def _max_batch_size(self, model: str, left_s: float | None) -> int:
        config = self._get(f"/v2/models/{quote(model, safe='')}/config", left_s)
        return int(config["max_batch_size"])

    def _parameters(self, model: str, left_s: float | None) -> dict[str, str]:
        config = self._get(f"/v2/models/{quote(model, safe='')}/config", left_s)
        given = config.get("parameters", {})
        return {name: value["string_value"] for name, value in given.items()}

    def _metadata(self, model: str, left_s: float | None) -> dict[str, Any]:
        return self._get(f"/v2/models/{quote(model, safe='')}", left_s)

    def _server_version(self, left_s: float | None) -> str:
        return str(self._get("/v2", left_s)["version"])


def _raise_refusal(answer: Answer) -> None:
    """Raise Triton's reason, or a proxy's page, where that is the answer."""
    if answer.status == 200:
        return
    text = answer.body.decode("utf-8", "replace")
    try:
        text = str(json.loads(text)["error"])
    except (KeyError, TypeError, ValueError):
        pass
    raise InferenceServerException(text, status=str(answer.status))
