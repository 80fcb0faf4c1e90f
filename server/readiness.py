"""Decide that a server is ready: every model by name, and a real answer."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Sequence

import grpc
import numpy as np
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from routing import PROBE_ID

from .channel import PLAIN, Channel
from .comparing import wait_out

ENTRY_MODEL = "adaptive_vit"
# Triton's words, which its other statuses may wrap.
QUEUE_FULL = re.compile(r"exceeds maximum queue size", re.IGNORECASE)
_POLL_S = 0.1
_CALL_TIMEOUT_S = 5.0
_CANARY_TIMEOUT_S = 60.0
_CANARY_SIDE_PX = 64

Canary = Callable[[str], None]


def wait_until_ready(
    grpc_url: str,
    server_id: str,
    models: Sequence[str],
    timeout_s: float,
    watch: Callable[[], None],
    channel: Channel = PLAIN,
) -> list[str]:
    """Wait until the server answers and each model is ready.

    A server can report itself ready while a model is missing, so each is asked for by name. And
    another server may have taken the port while ours was loading, so the server is, too.

    Args:
        grpc_url: `host:port`.
        server_id: the `--id` that the server was started with.
        models: names of the models.
        timeout_s: seconds to wait at most.
        watch: called between attempts; what it raises ends the wait.
        channel: how to connect there.

    Returns:
        The models that are not ready in the end: empty unless the time ran out.
    """
    deadline = time.monotonic() + timeout_s
    waiting = list(models)
    with channel.open(grpc_url) as client:
        while True:
            if _answers(client, server_id):
                waiting = [model for model in waiting if not _is_ready(client, model)]
            if not waiting or time.monotonic() > deadline:
                return waiting
            watch()
            time.sleep(_POLL_S)


def server_version(grpc_url: str, channel: Channel = PLAIN) -> str:
    """The version that the server reports, such as `2.51.0`."""
    with channel.open(grpc_url) as client:
        return str(client.get_server_metadata(client_timeout=_CALL_TIMEOUT_S).version)


def adaptive_vit_canary(
    grpc_url: str,
    channel: Channel = PLAIN,
    answers: int = 1,
    timeout_s: float = _CANARY_TIMEOUT_S,
) -> None:
    """Send one small generated PNG through the whole ensemble.

    A queue that clients have filled already, as they do where a server is restarted under load, is
    no error: their requests are being answered. A router that is still comparing its answers with
    the calibration's, and refuses requests until it knows, is waited for.

    Args:
        grpc_url: `host:port`.
        channel: how to connect there.
        answers: in a row; more than one where each instance of the router has to know.
        timeout_s: seconds that comparing may take.

    Raises:
        InferenceServerException: no answer, or an error.
    """
    ramp = np.linspace(0, 255, _CANARY_SIDE_PX, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(127)), axis=-1)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    image = triton.InferInput("image_bytes", [1, 1], "BYTES")
    image.set_data_from_numpy(np.array([[encoded.getvalue()]], dtype=np.object_))
    with channel.open(grpc_url) as client:

        def ask() -> None:
            try:
                client.infer(
                    ENTRY_MODEL, [image], request_id=PROBE_ID, client_timeout=_CANARY_TIMEOUT_S
                )
            except InferenceServerException as error:
                if not QUEUE_FULL.search(error.message()):
                    raise

        wait_out(ask, answers, timeout_s)


def _answers(client: triton.InferenceServerClient, server_id: str) -> bool:
    try:
        name = client.get_server_metadata(client_timeout=_CALL_TIMEOUT_S).name
    except (InferenceServerException, grpc.RpcError):  # Nobody listens yet.
        return False
    return bool(name == server_id)


def _is_ready(client: triton.InferenceServerClient, model: str) -> bool:
    try:
        return bool(client.is_model_ready(model, client_timeout=_CALL_TIMEOUT_S))
    except (InferenceServerException, grpc.RpcError):
        return False
