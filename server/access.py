"""Our own calls of a server: how to reach it, what to ask it, and what its refusals mean."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import grpc
import numpy as np
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from client import InvalidRequestError, Tls
from client.proxies import grpc_options, is_here
from client.tls import wants_tls
from routing.reference import COMPARING, OTHER, VERDICTS

from .admin_key import AdminKey
from .errors import ServerUsageError

ENTRY, TENSORS = "adaptive_vit", "adaptive_tensor"
PREPROCESS, ROUTER, LOW, HIGH = "preprocess", "router", "vit_low", "vit_high"
# What a router says that shall refuse other answers than calibrated: as long as it does not know
# yet whether it gives some, and once it knows that it does.
STILL_COMPARING, OTHER_ANSWERS = COMPARING, VERDICTS[OTHER]
# Triton's words, which its other statuses may wrap.
QUEUE_FULL = re.compile(r"exceeds maximum queue size", re.IGNORECASE)
# Each of the router's instances is a process and knows for itself; they take turns when idle.
ANSWERS = 8
WAY_OUT = (
    "to calibrate here, assemble with python -m export repository --reference-check warn and "
    "serve that, then collect --url, fit and assemble anew"
)
STOOD_STILL_S = 1.0  # A pause of ours took so much longer: the machine stood still.
_POLL_S = 0.5
_IMAGE_SIDE_PX = 64


@dataclass(frozen=True)
class Access:
    """How this program's own calls reach a server's gRPC port.

    Attributes:
        url: `host:port`.
        credentials: of TLS; None connects in the clear.
        name: the name that the server's certificate must hold, in place of the address: the
            certificate is for the name that clients use, and we call the loopback address.
        headers: what calls of restricted APIs carry.
        tls: the files of `credentials`, where they are a user's.
        is_ours: the server is one that this program started: no proxy is between the two, whatever
            address it binds.
    """

    url: str
    credentials: grpc.ChannelCredentials | None = None
    name: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    tls: Tls | None = None
    is_ours: bool = False

    @classmethod
    def of_files(
        cls,
        url: str,
        key_file: Path | None = None,
        ca: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> Access:
        """What the options of a command mean; without files of TLS the connection is in the clear.

        Raises:
            ServerUsageError: a file is missing or not what it should be, or its partner is missing.
        """
        headers = {} if key_file is None else AdminKey.read(key_file).grpc_headers
        if ca is certificate is key is None:
            return cls(url, headers=headers)
        try:
            tls = Tls(ca, certificate, key)
            return cls(url, tls.grpc_credentials(), headers=headers, tls=tls)
        except InvalidRequestError as error:
            raise ServerUsageError(str(error)) from error

    def why_refused(self) -> str | None:
        """Why no encrypted connection comes about; None where that is not what is wrong."""
        return wants_tls(self.url) if self.tls is None else self.tls.why_refused(self.url)

    @property
    def is_here(self) -> bool:
        """Whether the address is this machine's own."""
        return is_here(self.url)

    def open(self) -> triton.InferenceServerClient:
        """Open a connection; the caller closes it.

        Raises:
            ServerUsageError: the environment names a proxy that is not spoken here.
        """
        # Without a limit, as the client library's own options have it.
        options: list[tuple[str, int | str]] = [("grpc.max_receive_message_length", -1)]
        try:
            options += (
                [("grpc.enable_http_proxy", 0)]
                if self.is_ours
                else grpc_options(self.url, "http" if self.credentials is None else "https")
            )
        except InvalidRequestError as error:
            raise ServerUsageError(str(error)) from None
        if self.name is not None:
            options.append(("grpc.ssl_target_name_override", self.name))
        return _Client(self.url, creds=self.credentials, channel_args=options)


class _Client(triton.InferenceServerClient):  # type: ignore[misc]
    """A client that says nothing where Ctrl-C came while it was being made."""

    def __del__(self) -> None:
        with suppress(AttributeError):
            self.close()


def image_input() -> triton.InferInput:
    """A small generated picture as `image_bytes` [1, 1], for `adaptive_vit` and `preprocess`."""
    tensor = triton.InferInput("image_bytes", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[_encoded_image()]], dtype=np.object_))
    return tensor


def zeros_input(shape: list[int]) -> triton.InferInput:
    """An `image` tensor of zeros, FP32, as the rungs and the router take it.

    Args:
        shape: (N, 3, H, W).
    """
    tensor = triton.InferInput("image", shape, "FP32")
    tensor.set_data_from_numpy(np.zeros(shape, np.float32))
    return tensor


def wait_out(ask: Callable[[], None], answers: int, timeout_s: float) -> None:
    """Ask until so many answers in a row do not say that the router is still comparing.

    Args:
        ask: sends a request, raises what it is refused with.
        answers: 1 where the router does not refuse, else `ANSWERS`.
        timeout_s: seconds to wait for the comparison.

    Raises:
        InferenceServerException: it is still comparing, or another error of a request.
    """
    deadline = time.monotonic() + timeout_s
    in_a_row = 0
    while in_a_row < answers:
        try:
            ask()
            in_a_row += 1
        except InferenceServerException as error:
            if STILL_COMPARING not in error.message() or time.monotonic() > deadline:
                raise
            in_a_row = 0
            deadline = rest(_POLL_S, deadline)


def rest(seconds: float, deadline: float) -> float:
    """Sleep while something is waited for.

    Args:
        seconds: to sleep.
        deadline: until when it is waited for, by `time.monotonic`.

    Returns:
        The deadline, later by what the machine or its container stood still meanwhile.
    """
    before = time.monotonic()
    time.sleep(seconds)
    still_s = time.monotonic() - before - seconds
    return deadline + still_s if still_s > STOOD_STILL_S else deadline


@cache
def _encoded_image() -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (_IMAGE_SIDE_PX, _IMAGE_SIDE_PX), (124, 116, 104)).save(encoded, format="PNG")
    return encoded.getvalue()
