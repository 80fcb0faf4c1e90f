"""Good and bad requests for a long time: memory and shared memory stay where they are.

Fifteen minutes, or what the environment variable SOAK_MINUTES says, after a warm-up in which every
bad request is sent three times: the allocator keeps what the largest meeting of requests took, and
rises to that in a few steps which are no leak (measured: the last, of 2 %, after five minutes).
"""

import itertools
import logging
import os
import threading
import time
from collections import Counter

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server import TritonServer
from tests.faults.asking import CHANNEL, METHOD
from tests.faults.load import Load, counts, usual_workers
from tests.faults.malformed import as_grpc, drafts
from tests.faults.processes import segment_bytes
from tests.faults.truth import work_out
from tests.triton.conftest import build, crops, graph_set  # noqa: F401

MINUTES = float(os.environ.get("SOAK_MINUTES", "15"))
SAMPLE_EVERY_S = 2.0
BAD_REQUESTS, BAD_EVERY_S, WARM_ROUNDS = 1000, 0.05, 3
MOST_DRIFT = 0.01  # over the whole measurement


@pytest.fixture(scope="module")
def truth(build, graph_set, crops):  # noqa: F811
    return work_out(graph_set, build / "calibration.json", crops)


@pytest.fixture(scope="module")
def server(build):  # noqa: F811
    with TritonServer(build / "model_repository", free_ports=True) as running:
        yield running


def bad_requests(truth):
    """Malformed gRPC requests to each model, in turn."""
    found = []
    kinds = [
        drafts(model, truth.files, truth.images)
        for model in ("preprocess", "adaptive_vit", "router")
    ]

    @settings(
        max_examples=BAD_REQUESTS,
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(kinds), st.data())
    def collect(draft, data):
        found.append(as_grpc(draft, data.draw))

    collect()
    return found


def send_bad(server, requests, stop, answers):
    """Send them again and again; what was said to each is added to `answers`."""
    with grpc.insecure_channel(server.grpc_url, CHANNEL) as channel:
        infer = channel.unary_unary(METHOD)
        for request in itertools.cycle(requests):
            if stop.wait(BAD_EVERY_S):
                return
            try:
                infer(request, timeout=60)
                answers["OK"] += 1
            except grpc.RpcError as error:
                answers[error.code().name] += 1


def reach_the_largest_batch(server, truth):
    """Run a full batch through both rungs: ONNX Runtime keeps what its largest one took."""
    with triton.InferenceServerClient(server.grpc_url) as client:
        size = client.get_model_config("router").config.max_batch_size
        images = np.resize(truth.images, (size, *truth.images.shape[1:]))
        batch = triton.InferInput("image", images.shape, "FP32").set_data_from_numpy(images)
        answer = client.infer("router", [batch], parameters={"policy": "high"})
        assert answer.as_numpy("escalated").all()


def drift(seconds, values):
    """Share by which a line through the samples rises, robust against jumps (Theil-Sen)."""
    times, levels = np.asarray(seconds), np.asarray(values)
    first, second = np.triu_indices(len(times), k=1)
    slope = np.median((levels[second] - levels[first]) / (times[second] - times[first]))
    return float(slope * (times[-1] - times[0]) / np.median(levels))


def test_memory_stays_where_it_is_under_good_and_bad_requests(server, truth):
    bad, stop, answers = bad_requests(truth), threading.Event(), Counter()
    processes = server.process_ids()
    sender = threading.Thread(target=send_bad, args=(server, bad, stop, answers), daemon=True)
    samples = []
    reach_the_largest_batch(server, truth)
    with Load(server, truth, usual_workers(truth, [1, 2, 4, 16]), timeout_s=60) as load:
        sender.start()
        while answers.total() < WARM_ROUNDS * len(bad):
            assert sender.is_alive()
            time.sleep(SAMPLE_EVERY_S)
        began = time.monotonic()
        while (passed_s := time.monotonic() - began) < 60 * MINUTES:
            samples.append((passed_s, server.memory_mib(), segment_bytes(server.pid)))
            time.sleep(SAMPLE_EVERY_S)
        stop.set()
        sender.join()
    found = counts(load.requests)
    seconds, memory, segments = zip(*samples, strict=True)
    memory_drift, segment_drift = drift(seconds, memory), drift(seconds, segments)
    logging.getLogger("faults").info(
        "%.1f minutes: %s good, %s bad, memory %.1f to %.1f MiB, drift %.3f %%, "
        "shared memory %.1f MiB, drift %.3f %%",
        *(MINUTES, found, dict(answers), memory[0], memory[-1]),
        *(100 * memory_drift, segments[-1] / 2**20, 100 * segment_drift),
    )
    odd = Counter((request.outcome, request.detail) for request in load.requests)
    assert found["ok"] == len(load.requests), (found, odd.most_common(5))
    assert server.process_ids() == processes
    assert "DEADLINE_EXCEEDED" not in answers
    assert memory_drift < MOST_DRIFT  # what falls is no leak
    assert abs(segment_drift) < MOST_DRIFT
