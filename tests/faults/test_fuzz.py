"""More than ten thousand malformed requests: each gets an error or a sound answer, none harms."""

import http.client
import re
import time
from collections import Counter

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from server import TritonServer
from tests.faults.asking import CHANNEL, METHOD
from tests.faults.load import Load, counts, usual_workers
from tests.faults.malformed import as_grpc, as_http, drafts
from tests.faults.processes import segment_bytes

EXAMPLES = 1300  # times eight: four models, two protocols
TIMEOUT_S = 60
GRPC_ERRORS = {"INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE", "UNIMPLEMENTED"}
HTTP_ERRORS = {"400", "404", "503"}
# What Triton's own parsers call INTERNAL; of our models nothing may.
PARSERS = re.compile(r"parse|request params|access JSON|found in the JSON", re.IGNORECASE)
MODELS = ("preprocess", "adaptive_vit", "adaptive_tensor", "router")
# Each may grow with the largest batch it has seen, which the warm-up has not quite sent.
MEMORY_GROWTH, SEGMENT_GROWTH = 1.05, 1.05


@pytest.fixture(scope="module")
def server(assembled):
    with TritonServer(assembled(), free_ports=True) as running:
        yield running


def answers_right(server, truth, seconds, sizes=(1, 2, 4)):
    """Some seconds of sound requests; every one must be answered right."""
    with Load(server, truth, usual_workers(truth, sizes)) as load:
        time.sleep(seconds)
    found = counts(load.requests)
    assert found["ok"] == len(load.requests) > 0, found


def check_answer(result):
    """A sound answer, whatever was asked."""
    outputs = {
        name: result.as_numpy(name)
        for name in ("image", "embedding", "logits", "escalated", "score", "degraded")
    }
    given_back = {name: values for name, values in outputs.items() if values is not None}
    assert given_back
    # A batch of none that holds an image: Triton's ensemble takes it for one without a batch.
    if "escalated" in given_back and given_back["escalated"].ndim == 1:
        given_back = {name: values[None] for name, values in given_back.items()}
    assert len({len(values) for values in given_back.values()}) == 1
    for name in ("image", "embedding", "logits"):
        assert name not in given_back or np.isfinite(given_back[name]).all()
    if "escalated" in given_back and "degraded" in given_back:
        assert not (given_back["escalated"] & given_back["degraded"]).any()


def check_error(is_refusal, detail):
    """An error that says what is wrong with the request, in words."""
    assert detail and (is_refusal or PARSERS.search(detail)), detail[:300]


class Http:
    """One connection that is opened again when the server has closed it."""

    def __init__(self, url):
        self._url = url
        self._connection = None

    def post(self, path, body, headers):
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._url, timeout=TIMEOUT_S)
        try:
            self._connection.request("POST", path, body, headers)
            response = self._connection.getresponse()
            return response.status, response.headers, response.read()
        except (http.client.HTTPException, ConnectionError):
            self._connection.close()
            self._connection = None
            return 0, {}, b""


fuzzing = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def fuzz_grpc(server, truth, model, seen):
    with grpc.insecure_channel(server.grpc_url, CHANNEL) as channel:
        infer = channel.unary_unary(METHOD)

        @fuzzing
        @given(drafts(model, truth.files, truth.images), st.data())
        def send(draft, data):
            try:
                answer = infer(as_grpc(draft, data.draw), timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                seen[f"gRPC {error.code().name}"] += 1
                check_error(error.code().name in GRPC_ERRORS, error.details())
            else:
                seen["gRPC OK"] += 1
                message = service_pb2.ModelInferResponse.FromString(answer)
                check_answer(triton.InferResult(message))

        send()


def fuzz_http(server, truth, model, seen):
    connection = Http(server.http_url)

    @fuzzing
    @given(drafts(model, truth.files, truth.images), st.data())
    def send(draft, data):
        body, headers = as_http(draft, data.draw)
        status, told, answer = connection.post(f"/v2/models/{model}/infer", body, headers)
        seen[f"HTTP {status}"] += 1
        if status == 200:
            size = told.get("Inference-Header-Content-Length")
            parse = triton_http.InferenceServerClient.parse_response_body
            check_answer(parse(answer, header_length=int(size) if size else None))
        else:
            check_error(str(status) in HTTP_ERRORS, answer.decode(errors="replace"))

    send()


def test_ten_thousand_malformed_requests_leave_the_server_as_it_was(server, truth, record):
    answers_right(server, truth, 5)
    answers_right(server, truth, 5, sizes=[32])
    processes, began = server.process_ids(), time.monotonic()
    memory, segments = server.memory_mib(), segment_bytes(server.pid)
    seen = Counter()
    for model in MODELS:
        fuzz_grpc(server, truth, model, seen)
        fuzz_http(server, truth, model, seen)
    took_s = time.monotonic() - began
    memory_growth = server.memory_mib() / memory
    segment_growth = segment_bytes(server.pid) / segments
    figures = {
        "requests": seen.total(),
        "seconds": round(took_s),
        "answers": dict(seen.most_common()),
        "memory, after / before": round(memory_growth, 4),
        "shared memory, after / before": round(segment_growth, 4),
    }
    record("fuzz", figures)
    assert seen.total() >= 10_000
    assert server.process_ids() == processes
    answers_right(server, truth, 5)
    assert memory_growth <= MEMORY_GROWTH
    assert segment_growth <= SEGMENT_GROWTH
