"""A container's health check: ask tritonserver about an image; exit code 1 without an answer.

Triton's own readiness stays 200 when the process of a model has died. Runs in the image, beside the
server, which has Python and Pillow: `python3 healthcheck.py [http://127.0.0.1:8000]`.
"""

import io
import json
import struct
import sys
import urllib.error
import urllib.request

from PIL import Image

TIMEOUT_S = 8.0


def main(url: str = "http://127.0.0.1:8000") -> None:
    """Send a small picture through the ensemble; raises where no answer comes back."""
    encoded = io.BytesIO()
    Image.new("RGB", (64, 64), (124, 116, 104)).save(encoded, format="PNG")
    image = struct.pack("<I", len(encoded.getvalue())) + encoded.getvalue()
    tensor = {"name": "image_bytes", "shape": [1, 1], "datatype": "BYTES"}
    tensor["parameters"] = {"binary_data_size": len(image)}
    # The id tells the router that this is no traffic.
    head = json.dumps({"id": "adaptive-vit-probe", "inputs": [tensor]}).encode()
    request = urllib.request.Request(
        f"{url}/v2/models/adaptive_vit/infer",
        data=head + image,
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    own_machine = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with own_machine.open(request, timeout=TIMEOUT_S) as response:
        response.read()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except urllib.error.HTTPError as refusal:  # A server with a full queue is at work.
        if b"exceeds maximum queue size" not in refusal.read().lower():
            sys.exit(f"no answer: {refusal}")
    except OSError as error:
        sys.exit(f"no answer: {error}")
