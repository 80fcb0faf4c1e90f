"""Triton's HTTP protocol without any client: what is sent byte for byte."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from server import TritonServer


def framed(*elements: bytes) -> bytes:
    """Elements of a BYTES tensor as the binary extension wants them: each after its length."""
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def bytes_input(elements: Sequence[bytes]) -> dict[str, Any]:
    """The JSON of `image_bytes` whose elements follow it as `framed`."""
    return {
        "name": "image_bytes",
        "shape": [len(elements), 1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(framed(*elements))},
    }


def post(
    server: TritonServer,
    model: str,
    head: Mapping[str, Any] | None,
    binary: bytes | None = None,
    **headers: str,
) -> tuple[int, bytes]:
    """Ask a model over HTTP.

    Args:
        server: it.
        model: its name.
        head: the JSON; None where the body is one image and nothing else.
        binary: what follows the JSON; None: nothing, and no header that tells them apart.
        headers: further ones.

    Returns:
        The status and the answer's body, also of a refusal.
    """
    text = b"" if head is None else json.dumps(head).encode()
    if binary is not None:
        headers["Inference-Header-Content-Length"] = str(len(text))
    url = f"http://{server.http_url}/v2/models/{model}/infer"
    request = urllib.request.Request(url, text + (binary or b""), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.read()
