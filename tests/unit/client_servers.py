"""Servers that speak just enough of Triton's protocols, on loopback, and do as they are told."""

import asyncio
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from client import AsyncGrpcClient, ClientError, GrpcClient, HttpClient

PAUSE_S = 1.0  # in the middle of an answer


class AwaitedClient:
    """An `AsyncGrpcClient` with the blocking clients' methods: an event loop for each call."""

    def __init__(self, *arguments, **options):
        self.client = AsyncGrpcClient(*arguments, **options)

    def __getattr__(self, method):
        async def call(*arguments, **options):
            return await getattr(self.client, method)(*arguments, **options)

        return lambda *arguments, **options: asyncio.run(call(*arguments, **options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@dataclass
class Asked:
    """One request as it arrived: an image is scored with its own number, see `image`."""

    peer: str
    headers: dict
    images: list = field(default_factory=list)
    parameters: dict = field(default_factory=dict)
    left_s: float | None = None
    id: str = ""  # `answer` may change it

    def outputs(self, port):
        """Rows in the order of the images; the embeddings tell the client's port."""
        numbers = [int.from_bytes(image, "big") for image in self.images] or [0]
        rows = len(numbers)
        return (
            ("embedding", "FP32", np.full((rows, 4), port, np.float32)),
            ("escalated", "BOOL", np.zeros((rows, 1), np.bool_)),
            ("score", "FP32", np.array(numbers, np.float32).reshape(rows, 1)),
            ("degraded", "BOOL", np.zeros((rows, 1), np.bool_)),
        )


def image(number):
    """Bytes that the servers answer with the score `number`."""
    return number.to_bytes(4, "big")


class TritonService(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Does what `answer(number of the request, Asked, context)` says, then answers.

    `answer` returns a (grpc.StatusCode, text) to fail with, or None.
    """

    def __init__(self, answer):
        self.answer = answer
        self.asked = []
        self._lock = threading.Lock()

    def _note(self, context, **fields):
        headers, left_s = dict(context.invocation_metadata()), context.time_remaining()
        asked = Asked(context.peer(), headers=headers, left_s=left_s, **fields)
        with self._lock:
            self.asked.append(asked)
            number = len(self.asked)
        failure = self.answer(number, asked, context)
        if failure:
            context.abort(*failure)
        return asked

    def ServerMetadata(self, request, context):  # noqa: N802 (the service's names)
        self._note(context)
        return service_pb2.ServerMetadataResponse(name="triton", version="2.51.0")

    def ModelMetadata(self, request, context):  # noqa: N802
        self._note(context)
        return service_pb2.ModelMetadataResponse(name=request.name, versions=["1"])

    def ModelConfig(self, request, context):  # noqa: N802
        answer = service_pb2.ModelConfigResponse()
        answer.config.max_batch_size = 32
        return answer

    def ModelInfer(self, request, context):  # noqa: N802
        parameters = {
            name: getattr(value, value.WhichOneof("parameter_choice"))
            for name, value in request.parameters.items()
        }
        images = encoded_images(request.inputs[0].datatype, request.raw_input_contents[0])
        asked = self._note(context, images=images, parameters=parameters, id=request.id)
        answer = service_pb2.ModelInferResponse(model_name="adaptive_vit", id=asked.id)
        for name, datatype, values in asked.outputs(int(asked.peer.rpartition(":")[2])):
            answer.outputs.add(name=name, datatype=datatype, shape=values.shape)
            answer.raw_output_contents.append(values.tobytes())
        return answer


def encoded_images(datatype, raw):
    """The elements of a BYTES tensor."""
    images = []
    while raw and datatype == "BYTES":
        size = int.from_bytes(raw[:4], "little")
        images.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return images


@contextmanager
def grpc_server(answer=lambda number, asked, context: None, *, credentials=None, address=None):
    """A `TritonService` and its HOST:PORT."""
    service = TritonService(answer)
    server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    where = address or "127.0.0.1:0"
    if credentials is None:
        port = server.add_insecure_port(where)
    else:
        port = server.add_secure_port(where, credentials)
    server.start()
    try:
        yield service, f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def http_server(answer=lambda number, asked: None, *, context=None):
    """The requests that it was asked, and its HOST:PORT.

    `answer(number of the request, Asked)` returns None, a (status, text) to fail with, "drop"
    to close the connection instead of answering, bytes to send instead of any HTTP, or "in halves"
    to pause in the middle of the answer's body, which "in halves to the end" leaves open where it
    ends but for the connection's end. `context` is for HTTPS.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):  # noqa: N802
            body = self.rfile.read(int(self.headers["Content-Length"]))
            length = int(self.headers["Inference-Header-Content-Length"])
            head = json.loads(body[:length])
            found = Asked(
                str(self.client_address),
                dict(self.headers),
                encoded_images(head["inputs"][0]["datatype"], body[length:]),
                head["parameters"],
                id=head["id"],
            )
            asked.append(found)
            failure = answer(len(asked), found)
            if failure == "drop" or isinstance(failure, bytes):
                self.close_connection = True
                self.wfile.write(b"" if failure == "drop" else failure)
                return
            self.halves = failure if failure in ("in halves", "in halves to the end") else None
            status, text = (None if self.halves else failure) or (200, None)
            parts = [
                {"name": n, "datatype": d, "shape": list(v.shape), "data": v.ravel().tolist()}
                for n, d, v in found.outputs(self.client_address[1])
            ]
            self._send(status, {"error": text} if text else {"id": found.id, "outputs": parts})

        halves = None

        def do_GET(self):  # noqa: N802
            self._send(200, {"name": "triton", "version": "2.51.0", "max_batch_size": 32})

        def _send(self, status, answer):
            data = json.dumps(answer).encode()
            self.send_response(status)
            if self.halves == "in halves to the end":
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            half = len(data) // 2
            self.wfile.write(data[:half])
            if self.halves:
                time.sleep(PAUSE_S)
            self.wfile.write(data[half:])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield asked, f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


every = pytest.mark.parametrize("kind", [GrpcClient, AwaitedClient, HttpClient])
both = pytest.mark.parametrize("kind", [GrpcClient, AwaitedClient])


@contextmanager
def served(kind, answer=lambda *_: None):
    """What the server of that client's protocol was asked, and its address."""
    with (http_server if kind is HttpClient else grpc_server)(answer) as (found, url):
        yield getattr(found, "asked", found), url


def told(client, *numbers, timeout_s=20.0):
    """What `infer` gave about these images, as scores, or its error."""
    try:
        images = [image(number) for number in numbers]
        return [answer.score for answer in client.infer(images, timeout_s=timeout_s)]
    except ClientError as error:
        assert "\n" not in str(error)
        return error


@contextmanager
def listening(backlog=8):
    """A socket that takes connections, and its HOST:PORT."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(backlog)
        yield listener, f"127.0.0.1:{listener.getsockname()[1]}"


# Images that `python -m tests.unit.client_servers` takes longer for, in seconds.
SLOW, HELD = 9_999, 9_998
# And whose answers pause in the middle, over HTTP.
HALVES, HALVES_TO_THE_END = 9_997, 9_996
_HOW = {image(HALVES): "in halves", image(HALVES_TO_THE_END): "in halves to the end"}
_TAKES_S = {image(SLOW): 1.0, image(HELD): 0.2}


def _at_its_own_pace(number, asked, *_):
    """Answers overtake each other."""
    time.sleep(max(_TAKES_S.get(one, 0.002 * (number % 4)) for one in asked.images))
    return next((_HOW[one] for one in asked.images if one in _HOW), None)


if __name__ == "__main__":  # both until stdin ends, in a process that nobody forks
    with grpc_server(_at_its_own_pace) as (_, grpc_url), http_server(_at_its_own_pace) as (_, url):
        sys.stdout.write(f"{grpc_url} {url}\n")
        sys.stdout.flush()
        sys.stdin.read()
