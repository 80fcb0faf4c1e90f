"""What every client has, whatever its protocol and whether it blocks: options and requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from .channel import check_admin_key
from .errors import check_url
from .messages import ENSEMBLE, ROUTER, Request, as_batch, encode_images, request_parameters
from .retry import DEFAULT_RETRY, Retry
from .tls import Tls

DEFAULT_GRPC_URL = "127.0.0.1:8001"
DEFAULT_HTTP_URL = "127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0


class ClientBase:
    """The options of a client.

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

    _question_timeout_s = 10.0  # for what a server knows without running a model

    def __init__(
        self,
        url: str,
        *,
        model: str = ENSEMBLE,
        tensor_model: str = ROUTER,
        retry: Retry | None = DEFAULT_RETRY,
        tls: Tls | None = None,
        admin_key: str | None = None,
    ) -> None:
        self.url = check_url(url)
        self.model = model
        self.tensor_model = tensor_model
        self.retry = retry
        self._tls = tls
        self._admin_key = check_admin_key(admin_key)
        self._max_batch: dict[str, int] = {}

    def _about_images(
        self, images: Sequence[bytes], policy: str, threshold: float | None
    ) -> Request:
        parameters = request_parameters(policy, threshold)
        return Request(self.model, None, "image_bytes", encode_images(images), parameters)

    def _about_tensor(
        self, image: NDArray[Any], policy: str, threshold: float | None, version: int | None
    ) -> Request:
        parameters = request_parameters(policy, threshold)
        return Request(self.tensor_model, version, "image", as_batch(image), parameters)
