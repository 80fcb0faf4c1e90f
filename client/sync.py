"""Blocking clients: gRPC and HTTP, with the same methods."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import gevent
import tritonclient.grpc as grpc_protocol
import tritonclient.http as http_protocol
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError
from numpy.typing import NDArray

from .base import DEFAULT_GRPC_URL, DEFAULT_HTTP_URL, DEFAULT_TIMEOUT_S, ClientBase
from .channel import HTTP_ADMIN_HEADER, add_admin_key, open_channel
from .errors import ClientError, server_errors, wrong_protocol
from .messages import (
    Prediction,
    Request,
    Result,
    Task,
    metadata_as_dict,
    parameters_as_dict,
    predictions,
)
from .retry import Tries

ClientT = TypeVar("ClientT", bound="SyncClient")
AnswerT = TypeVar("AnswerT")


class SyncClient(ClientBase, ABC):
    """What the blocking clients share: everything but the transport.

    Use as a context manager, or call `close()`. Options and errors are those of `ClientBase`.
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
            ServerError: the server failed.
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
            self._sleep(pause_s)

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)

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
        """Close the connections."""

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
    """Blocking client over gRPC. Safe to share between threads, which share its connection.

    Args:
        url: HOST:PORT, without a scheme.
        options: as in `ClientBase`.
    """

    def __init__(self, url: str = DEFAULT_GRPC_URL, **options: Any) -> None:
        super().__init__(url, **options)
        self._client = open_channel(grpc_protocol, url, self._tls, self._admin_key)

    def close(self) -> None:
        """Close the channel."""
        self._client.close()

    def _send(self, request: Request, left_s: float | None) -> Result:
        arguments = request.arguments(grpc_protocol, left_s)
        return self._client.infer(**arguments, client_timeout=left_s)

    def _max_batch_size(self, model: str, left_s: float | None) -> int:
        answer = self._client.get_model_config(model, client_timeout=left_s)
        return int(answer.config.max_batch_size)

    def _parameters(self, model: str, left_s: float | None) -> dict[str, str]:
        return parameters_as_dict(self._client.get_model_config(model, client_timeout=left_s))

    def _metadata(self, model: str, left_s: float | None) -> dict[str, Any]:
        return metadata_as_dict(self._client.get_model_metadata(model, client_timeout=left_s))

    def _server_version(self, left_s: float | None) -> str:
        return str(self._client.get_server_metadata(client_timeout=left_s).version)


class HttpClient(SyncClient):
    """Blocking client over HTTP. Safe to share between threads.

    tritonclient's connections belong to the thread that made them (gevent), so each thread gets
    its own, on first use. `tls` is for a proxy in front of Triton, which speaks no HTTPS itself.

    Args:
        url: HOST:PORT, without a scheme.
        concurrency: connections per thread. 1 is right for threads; set it to the number of
            greenlets where several share this client, because they would queue behind one.
        options: as in `ClientBase`.
    """

    def __init__(
        self, url: str = DEFAULT_HTTP_URL, *, concurrency: int = 1, **options: Any
    ) -> None:
        super().__init__(url, **options)
        self._concurrency = concurrency
        self._context = None if self._tls is None else self._tls.http_context()
        self._thread = threading.local()

    @property
    def _client(self) -> http_protocol.InferenceServerClient:
        client = getattr(self._thread, "client", None)
        if client is None:
            client = self._thread.client = http_protocol.InferenceServerClient(
                self.url,
                concurrency=self._concurrency,
                # No limit here: `_within` limits the whole request, where these limit single reads.
                network_timeout=None,
                ssl=self._context is not None,
                # Its own well-known certificates are offered to it: ours are in the context.
                ssl_context_factory=lambda cafile=None: self._context,
            )
            add_admin_key(client, HTTP_ADMIN_HEADER, self._admin_key)
        return client

    def close(self) -> None:
        """Close this thread's connections. Those of other threads close when the threads end."""
        client = getattr(self._thread, "client", None)
        if client is not None:
            client.close()
            del self._thread.client

    def _within(self, left_s: float | None, call: Any, *arguments: Any, **options: Any) -> Any:
        try:
            with gevent.Timeout(left_s, TimeoutError()):
                return call(*arguments, **options)
        except HTTPConnectionClosed:
            raise ConnectionResetError("closed before the answer") from None
        except HTTPParseError:
            raise wrong_protocol(self.url) from None

    def _sleep(self, seconds: float) -> None:
        gevent.sleep(seconds)  # other greenlets of this thread go on meanwhile

    def _send(self, request: Request, left_s: float | None) -> Result:
        arguments = request.arguments(http_protocol, left_s)
        return self._within(left_s, self._client.infer, **arguments)

    def _max_batch_size(self, model: str, left_s: float | None) -> int:
        config = self._within(left_s, self._client.get_model_config, model)
        return int(config["max_batch_size"])

    def _parameters(self, model: str, left_s: float | None) -> dict[str, str]:
        config = self._within(left_s, self._client.get_model_config, model)
        given = config.get("parameters", {})
        return {name: value["string_value"] for name, value in given.items()}

    def _metadata(self, model: str, left_s: float | None) -> dict[str, Any]:
        return dict(self._within(left_s, self._client.get_model_metadata, model))

    def _server_version(self, left_s: float | None) -> str:
        return str(self._within(left_s, self._client.get_server_metadata)["version"])
