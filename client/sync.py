"""Blocking clients: gRPC and HTTP, with the same methods."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import gevent
import tritonclient.grpc as grpc_protocol
import tritonclient.http as http_protocol
from geventhttpclient.response import HTTPParseError
from numpy.typing import NDArray

from .errors import check_url, server_errors, wrong_protocol
from .messages import (
    ENSEMBLE,
    ROUTER,
    Prediction,
    Result,
    as_batch,
    build_input,
    encode_images,
    predictions,
    request_parameters,
    split,
)

ClientT = TypeVar("ClientT", bound="SyncClient")

DEFAULT_TIMEOUT_S = 60.0
QUESTION_TIMEOUT_S = 10.0  # for what a server knows without running a model
DEFAULT_GRPC_URL = "127.0.0.1:8001"
DEFAULT_HTTP_URL = "127.0.0.1:8000"


class SyncClient(ABC):
    """What the blocking clients share: everything but the transport.

    Use as a context manager, or call `close()`.

    Args:
        url: HOST:PORT, without a scheme.
        model: the model that takes `image_bytes`.
        tensor_model: the model that takes `image`.

    Raises:
        InvalidRequestError: `url` is not HOST:PORT.
    """

    _protocol: ModuleType

    def __init__(self, url: str, *, model: str = ENSEMBLE, tensor_model: str = ROUTER) -> None:
        self.url = check_url(url)
        self.model = model
        self.tensor_model = tensor_model
        self._max_batch: dict[str, int] = {}

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
            timeout_s: allowed per request, in seconds; None waits for ever.

        Returns:
            N predictions in the order of the images.

        Raises:
            InvalidRequestError: the server refused an image or a parameter.
            UnavailableError: no server there, or it does not serve the model.
            DeadlineError: no answer in time.
            ServerError: the server failed.
        """
        rows = encode_images(images)
        return self._run(self.model, "image_bytes", rows, policy, threshold, timeout_s)

    def infer_tensor(
        self,
        image: NDArray[Any],
        *,
        policy: str = "auto",
        threshold: float | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> list[Prediction]:
        """Ask about preprocessed images.

        Args:
            image: normalised, FP32, shape (N, 3, H, W) or (3, H, W).
            policy: as in `infer`.
            threshold: as in `infer`.
            timeout_s: as in `infer`.

        Returns:
            N predictions in the order of the images.

        Raises:
            ClientError: as in `infer`.
        """
        rows = as_batch(image)
        return self._run(self.tensor_model, "image", rows, policy, threshold, timeout_s)

    def _run(
        self,
        model: str,
        name: str,
        rows: NDArray[Any],
        policy: str,
        threshold: float | None,
        timeout_s: float | None,
    ) -> list[Prediction]:
        answers: list[Prediction] = []
        parameters = request_parameters(policy, threshold)
        with server_errors(self.url, timeout_s):
            # A single image always fits: no question about the maximum on the common path.
            max_batch = self._batch_limit(model, timeout_s) if len(rows) > 1 else 1
            for piece in split(rows, max_batch):
                tensor = build_input(self._protocol, name, piece)
                result = self._send(model, [tensor], parameters, timeout_s)
                answers.extend(predictions(result, len(piece)))
        return answers

    def _batch_limit(self, model: str, timeout_s: float | None) -> int:
        if model not in self._max_batch:
            # 0 is Triton's word for a model that does not batch.
            self._max_batch[model] = max(1, self._max_batch_size(model, timeout_s))
        return self._max_batch[model]

    def metadata(self, model: str | None = None) -> dict[str, Any]:
        """A model's name, versions, inputs and outputs (each with name, datatype and shape).

        Args:
            model: the model's name; this client's ensemble if not given.

        Raises:
            ClientError: as in `infer`.
        """
        with server_errors(self.url):
            return self._metadata(model or self.model)

    def server_version(self) -> str:
        """Triton's version.

        Raises:
            ClientError: as in `infer`.
        """
        with server_errors(self.url):
            return self._server_version()

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
    def _send(
        self, model: str, inputs: list[Any], parameters: dict[str, Any], timeout_s: float | None
    ) -> Result: ...

    @abstractmethod
    def _max_batch_size(self, model: str, timeout_s: float | None) -> int: ...

    @abstractmethod
    def _metadata(self, model: str) -> dict[str, Any]: ...

    @abstractmethod
    def _server_version(self) -> str: ...


class GrpcClient(SyncClient):
    """Blocking client over gRPC. Safe to share between threads."""

    _protocol = grpc_protocol

    def __init__(self, url: str = DEFAULT_GRPC_URL, **models: str) -> None:
        super().__init__(url, **models)
        self._client = grpc_protocol.InferenceServerClient(url)

    def close(self) -> None:
        """Close the channel."""
        self._client.close()

    def _send(
        self, model: str, inputs: list[Any], parameters: dict[str, Any], timeout_s: float | None
    ) -> Result:
        return self._client.infer(model, inputs, parameters=parameters, client_timeout=timeout_s)

    def _max_batch_size(self, model: str, timeout_s: float | None) -> int:
        answer = self._client.get_model_config(model, client_timeout=timeout_s)
        return int(answer.config.max_batch_size)

    def _metadata(self, model: str) -> dict[str, Any]:
        answer = self._client.get_model_metadata(model, client_timeout=QUESTION_TIMEOUT_S)
        return metadata_as_dict(answer)

    def _server_version(self) -> str:
        answer = self._client.get_server_metadata(client_timeout=QUESTION_TIMEOUT_S)
        return str(answer.version)


class HttpClient(SyncClient):
    """Blocking client over HTTP. Safe to share between threads.

    tritonclient's connections belong to the thread that made them (gevent), so each thread gets
    its own, on first use.

    Args:
        url: HOST:PORT, without a scheme.
        concurrency: connections per thread. 1 is right for threads; set it to the number of
            greenlets where several share this client, because they would queue behind one.
        models: `model` and `tensor_model`, as in `SyncClient`.
    """

    _protocol = http_protocol

    def __init__(self, url: str = DEFAULT_HTTP_URL, *, concurrency: int = 1, **models: str) -> None:
        super().__init__(url, **models)
        self._concurrency = concurrency
        self._thread = threading.local()

    @property
    def _client(self) -> http_protocol.InferenceServerClient:
        client = getattr(self._thread, "client", None)
        if client is None:
            # No limit here: `_within` limits the whole request, where these limit single reads.
            client = self._thread.client = http_protocol.InferenceServerClient(
                self.url, concurrency=self._concurrency, network_timeout=None
            )
        return client

    def close(self) -> None:
        """Close this thread's connections. Those of other threads close when the threads end."""
        client = getattr(self._thread, "client", None)
        if client is not None:
            client.close()
            del self._thread.client

    def _within(self, timeout_s: float | None, call: Any, *arguments: Any, **options: Any) -> Any:
        try:
            with gevent.Timeout(timeout_s, TimeoutError()):
                return call(*arguments, **options)
        except HTTPParseError:
            raise wrong_protocol(self.url) from None

    def _send(
        self, model: str, inputs: list[Any], parameters: dict[str, Any], timeout_s: float | None
    ) -> Result:
        send = self._client.infer
        return self._within(timeout_s, send, model, inputs, parameters=parameters)

    def _max_batch_size(self, model: str, timeout_s: float | None) -> int:
        config = self._within(timeout_s, self._client.get_model_config, model)
        return int(config["max_batch_size"])

    def _metadata(self, model: str) -> dict[str, Any]:
        return dict(self._within(QUESTION_TIMEOUT_S, self._client.get_model_metadata, model))

    def _server_version(self) -> str:
        metadata = self._within(QUESTION_TIMEOUT_S, self._client.get_server_metadata)
        return str(metadata["version"])


def metadata_as_dict(message: Any) -> dict[str, Any]:
    """Model metadata from gRPC in the shape that HTTP's has."""

    def tensors(field: Any) -> list[dict[str, Any]]:
        return [
            {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
            for tensor in field
        ]

    return {
        "name": message.name,
        "versions": list(message.versions),
        "platform": message.platform,
        "inputs": tensors(message.inputs),
        "outputs": tensors(message.outputs),
    }
