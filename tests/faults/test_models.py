"""The full rung taken away, a full queue, and requests that nobody waits for any more."""

import asyncio
import socket
import time
import urllib.request

import grpc
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from server import TritonServer
from tests.faults import inject
from tests.faults.asking import CHANNEL, METHOD, mixed_questions, question
from tests.faults.experiment import lasting, measure, reasons
from tests.faults.load import Load, event_loop, percentile_ms
from tests.faults.processes import ServerCommand
from tests.servers import wait_for

MODEL_CONTROL = ["--model-control-mode=explicit", "--load-model=*"]  # lets a test unload a model
FAULT_S = 4.0


@pytest.fixture(scope="module")
def server(assembled):
    with TritonServer(assembled(), free_ports=True, extra_args=MODEL_CONTROL) as running:
        yield running


@pytest.fixture(scope="module")
def degrading(assembled):
    repository = assembled("--on-high-failure", "low")
    with TritonServer(repository, free_ports=True, extra_args=MODEL_CONTROL) as running:
        yield running


def images_of(server, model):
    """Images that a model has answered so far."""
    with triton.InferenceServerClient(server.grpc_url) as control:
        return int(control.get_inference_statistics(model).model_stats[0].inference_count)


# --- no full rung ------------------------------------------------------------------------------


def test_without_the_full_rung_hard_images_are_refused_and_easy_ones_answered(
    server, truth, record
):
    gone = lasting(inject.without_model(server, "vit_high"), FAULT_S)
    found, after = measure(server, truth, "vit_high unloaded, on_high_failure=error", gone)
    record(found)
    assert found.wrong == 0, reasons(after, "wrong")
    assert (found.failed, found.timed_out) == (0, 0), reasons(after, "failed")
    assert found.refused > 0 and found.ok > 0
    refused = [request for request in after if request.outcome == "refused"]
    assert all(truth.escalated[list(request.question.rows)].any() for request in refused)
    assert found.recovery_s is not None


def test_without_the_full_rung_no_request_fails_where_that_was_chosen(degrading, truth, record):
    gone = lasting(inject.without_model(degrading, "vit_high"), FAULT_S)
    found, after = measure(degrading, truth, "vit_high unloaded, on_high_failure=low", gone)
    record(found)
    assert found.wrong == 0, reasons(after, "wrong")
    assert found.ok == found.requests, reasons(after, "failed") + reasons(after, "refused")
    assert found.degraded > 0


# --- full queue --------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once_and_is_forgotten(assembled, truth, record):
    many = [mixed_questions(truth, "grpc", "router", [8]) for _ in range(12)]
    many += [mixed_questions(truth, "http", "adaptive_vit", [8]) for _ in range(12)]
    with TritonServer(assembled("--max-queue", "4"), free_ports=True) as small:

        def burst():
            with Load(small, truth, many) as load:
                time.sleep(FAULT_S)
            crowd.extend(load.requests)

        crowd = []
        found, after = measure(small, truth, "24 workers on queues of 4", burst)
    refused = [request for request in [*crowd, *after] if request.outcome == "refused"]
    note = f"{len(refused)} refused, the burst's own too, p99 {percentile_ms(refused, 99):.0f} ms"
    record(found.noting(note))
    assert found.wrong == 0 and not reasons(crowd, "wrong")
    assert (found.failed, found.timed_out) == (0, 0), reasons(after, "failed")
    assert not reasons(crowd, "failed") and not reasons(crowd, "timeout")
    assert len(refused) > 20
    assert found.recovery_s is not None and found.recovery_s < FAULT_S + 5
    assert any("maximum queue size" in detail for detail in reasons(crowd, "refused"))


# --- requests that nobody waits for ------------------------------------------------------------


def easy_workers(truth):
    """Load that never needs the full rung."""
    rows = truth.easy()
    return [
        [question(truth, protocol, model, [row]) for row in rows]
        for protocol, model in (("grpc", "adaptive_vit"), ("http", "router"))
    ]


def counted_calls(server, truth, fault, ask):
    """The row of a fault made of requests about hard images, and what vit_high did for them."""
    before = images_of(server, "vit_high")
    found, after = measure(server, truth, fault, ask, workers=easy_workers(truth))
    assert wait_for(lambda: is_idle(server))
    spent = images_of(server, "vit_high") - before
    assert (found.wrong, found.failed, found.timed_out) == (0, 0, 0), reasons(after, "failed")
    assert found.refused == 0, reasons(after, "refused")
    return found, spent


def is_idle(server):
    """Whether no request waits or is being answered."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    names = ("nv_inference_pending_request_count", "adaptive_vit_images_in_flight")
    gauges = [float(line.split()[-1]) for line in lines if line.startswith(names)]
    assert len(gauges) > len(names)
    return not any(gauges)


ABANDONED = 100


def test_a_deadline_that_has_passed_costs_no_full_rung(server, truth, record):
    hard = [question(truth, "grpc", "router", [row]) for row in truth.hard()]
    codes = []

    def ask():
        with grpc.insecure_channel(server.grpc_url, CHANNEL) as channel:
            infer = channel.unary_unary(METHOD)
            for i in range(ABANDONED):
                try:
                    infer(hard[i % len(hard)].body, timeout=0.001)
                    codes.append("answered")
                except grpc.RpcError as error:
                    codes.append(error.code().name)

    found, spent = counted_calls(server, truth, f"{ABANDONED} gRPC deadlines of 1 ms", ask)
    record(found.noting(f"vit_high ran for {spent} of {ABANDONED} images"))
    # A connection that takes longer than the deadline may end either way; none may be answered.
    assert {*codes} <= {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
    assert spent == 0


def test_a_timeout_that_has_passed_in_the_queue_costs_no_full_rung(server, truth, record):
    hard = [question(truth, "http", "router", [row], timeout_us=1) for row in truth.hard()]
    refused = []

    def ask():
        with Load(server, truth, [hard]) as load:
            assert wait_for(lambda: len(load.requests) >= ABANDONED, 60)
        refused.extend(load.requests)

    found, spent = counted_calls(server, truth, "HTTP requests with timeout 1 µs", ask)
    answered = sum(request.outcome == "ok" for request in refused)
    record(found.noting(f"{answered} of {len(refused)} answered, vit_high ran for {spent} images"))
    assert not reasons(refused, "wrong") and not reasons(refused, "failed")
    assert spent == answered


def test_a_cancelled_call_costs_no_full_rung_and_holds_nothing(assembled, truth, record, tmp_path):
    """Supervised: this Triton now and then crashes on a cancel (it looks like its issue 7368)."""
    with ServerCommand(assembled(), tmp_path / "server.log", ["--supervise"]) as server:
        cancel_many(server, truth, record)


def cancel_many(server, truth, record):
    body = question(truth, "grpc", "adaptive_vit", truth.hard()[:8]).body

    async def cancel():
        async with grpc.aio.insecure_channel(server.grpc_url, CHANNEL) as channel:
            infer = channel.unary_unary(
                METHOD, response_deserializer=service_pb2.ModelInferResponse.FromString
            )
            for _ in range(ABANDONED // 4):
                calls = [infer(body) for _ in range(4)]
                await asyncio.sleep(0.005)
                for call in calls:
                    call.cancel()

    def cancel_all():
        asyncio.run_coroutine_threadsafe(cancel(), event_loop()).result()

    (before,) = server.tritonservers()
    spent = images_of(server, "vit_high")
    fault = f"{ABANDONED} gRPC calls cancelled after 5 ms"
    found, after = measure(server, truth, fault, cancel_all, workers=easy_workers(truth))
    assert wait_for(lambda: is_idle(server))
    if server.tritonservers() == [before]:
        spent = images_of(server, "vit_high") - spent
        record(found.noting(f"vit_high ran for {spent} of {8 * ABANDONED} images"))
        assert (found.failed, found.timed_out) == (0, 0), reasons(after, "failed")
        assert spent < 8 * ABANDONED / 4
    else:
        record(found.noting("Triton crashed on a cancel and was replaced"))
    assert found.wrong == 0, reasons(after, "wrong")
    assert found.recovery_s is not None and found.recovery_s < 30


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_client_that_hangs_up_over_http_holds_nothing(server, truth, record, share):
    # Triton does not see that an HTTP client is gone: each costs what an answer costs.
    asked = question(truth, "http", "adaptive_vit", truth.hard()[:1])
    head = (
        "POST /v2/models/adaptive_vit/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"Inference-Header-Content-Length: {asked.json_length}\r\n"
        f"Content-Length: {len(asked.body)}\r\n\r\n"
    )
    host, port = server.http_url.split(":")

    def hang_up():
        for _ in range(ABANDONED // 4):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode() + asked.body[: int(share * len(asked.body))])

    said = "half of" if share < 1 else "all of"
    found, spent = counted_calls(
        server, truth, f"{ABANDONED // 4} HTTP clients gone after {said} the body", hang_up
    )
    record(found.noting(f"vit_high ran for {spent} images"))
    assert spent <= (0 if share < 1 else ABANDONED // 4)
