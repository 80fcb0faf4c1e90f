"""The gRPC client for asyncio."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import tritonclient.grpc as grpc_protocol
import tritonclient.grpc.aio as grpc_aio
from numpy.typing import NDArray

from .errors import check_url, server_errors
from .messages import (
    ENSEMBLE,
    ROUTER,
    Prediction,
    as_batch,
    build_input,
    encode_images,
    predictions,
    request_parameters,
    split,
)
from .sync import DEFAULT_GRPC_URL, DEFAULT_TIMEOUT_S, QUESTION_TIMEOUT_S, metadata_as_dict


class AsyncGrpcClient:
    """gRPC client for asyncio: the methods of `GrpcClient`, awaited.

    Make it inside the running event loop; use as `async with`, or await `close()`.

    Args:
        url: HOST:PORT, without a scheme.
        model: the model that takes `image_bytes`.
        tensor_model: the model that takes `image`.

    Raises:
        InvalidRequestError: `url` is not HOST:PORT.
    """

    def __init__(
        self, url: str = DEFAULT_GRPC_URL, *, model: str = ENSEMBLE, tensor_model: str = ROUTER
    ) -> None:
        self.url = check_url(url)
        self.model = model
        self.tensor_model = tensor_model
        self._client = grpc_aio.InferenceServerClient(url)
        self._max_batch: dict[str, int] = {}

    async def infer(
        self,
        images: Sequence[bytes],
        *,
        policy: str = "auto",
        threshold: float | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> list[Prediction]:
        """Ask about encoded images; arguments, result and errors as `GrpcClient.infer`."""
        rows = encode_images(images)
        return await self._run(self.model, "image_bytes", rows, policy, threshold, timeout_s)

    async def infer_tensor(
        self,
        image: NDArray[Any],
        *,
        policy: str = "auto",
        threshold: float | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> list[Prediction]:
        """Ask about preprocessed images; as `GrpcClient.infer_tensor`."""
        rows = as_batch(image)
        return await self._run(self.tensor_model, "image", rows, policy, threshold, timeout_s)

    async def _run(
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
            max_batch = await self._batch_limit(model, timeout_s) if len(rows) > 1 else 1
            for piece in split(rows, max_batch):
                tensor = build_input(grpc_protocol, name, piece)
                result = await self._client.infer(
                    model, [tensor], parameters=parameters, client_timeout=timeout_s
                )
                answers.extend(predictions(result, len(piece)))
        return answers

    async def _batch_limit(self, model: str, timeout_s: float | None) -> int:
        if model not in self._max_batch:
            answer = await self._client.get_model_config(model, client_timeout=timeout_s)
            self._max_batch[model] = max(1, int(answer.config.max_batch_size))
        return self._max_batch[model]

    async def metadata(self, model: str | None = None) -> dict[str, Any]:
        """A model's name, versions, inputs and outputs; as `GrpcClient.metadata`."""
        with server_errors(self.url):
            answer = await self._client.get_model_metadata(
                model or self.model, client_timeout=QUESTION_TIMEOUT_S
            )
        return metadata_as_dict(answer)

    async def server_version(self) -> str:
        """Triton's version.

        Raises:
            ClientError: as `GrpcClient.infer`.
        """
        with server_errors(self.url):
            answer = await self._client.get_server_metadata(client_timeout=QUESTION_TIMEOUT_S)
        return str(answer.version)

    async def close(self) -> None:
        """Close the channel."""
        await self._client.close()

    async def __aenter__(self) -> AsyncGrpcClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
