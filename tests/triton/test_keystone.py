"""The keystone: the live router and the offline policy decide alike, image by image."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton

from calibration.running import open_session, run_session
from client import GrpcClient
from routing import Overrides, RungOutputs, escalation_mask

COMPOSITIONS = {
    "one by one": [1] * 48,
    "uneven": [1, 2, 3, 5, 8, 13, 16],
    "full batches": [32, 16],
}
# FP32 GEMMs sum in another order at another batch size.
RTOL = 1e-4


@pytest.fixture(scope="module")
def offline(graph_set, calibration, images):
    """Offline scores, decisions and answers, computed in one batch."""
    low = run_session(open_session(graph_set.files["vit_low"]), images, layers=True)
    high = run_session(open_session(graph_set.files["vit_high"]), images, layers=False)
    score = calibration.score(low)
    escalated = escalation_mask(score, calibration.threshold, Overrides())
    embedding = np.where(escalated[:, None], high.embedding, low.embedding)
    logits = np.where(escalated[:, None], high.logits, low.logits)
    assert 5 <= escalated.sum() <= 30, "the crops must mix easy and hard"
    # No score may lie so close to the threshold that rounding could decide.
    spread = score.max() - score.min()
    assert np.abs(score - calibration.threshold).min() > RTOL * spread
    return score, escalated, embedding, logits


def check(predictions, offline):
    score, escalated, embedding, logits = offline
    assert [p.escalated for p in predictions] == escalated.tolist()
    np.testing.assert_allclose([p.score for p in predictions], score, rtol=RTOL)
    np.testing.assert_allclose([p.embedding for p in predictions], embedding, atol=1e-3, rtol=RTOL)
    np.testing.assert_allclose([p.logits for p in predictions], logits, atol=1e-3, rtol=RTOL)
    assert not any(p.degraded for p in predictions)


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_the_router_decides_as_offline(server, images, offline, composition):
    edges = np.cumsum([0, *COMPOSITIONS[composition]])
    with GrpcClient(server.grpc_url) as client:
        predictions = [
            prediction
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
            for prediction in client.infer_tensor(images[start:stop])
        ]
    check(predictions, offline)


def test_the_router_decides_as_offline_when_triton_batches_requests(server, images, offline):
    time.sleep(0.5)  # the requests of the test before this one are counted
    before = statistics(server, "router")
    with GrpcClient(server.grpc_url) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: client.infer_tensor(images[i : i + 1]), range(48)))
    check([answer[0] for answer in answers], offline)
    executions = statistics(server, "router", answered=before[0] + 48)[1] - before[1]
    assert executions < 48, "no execute held several requests, so this proved nothing"


def test_the_ensemble_answers_as_offline_from_bytes(server, crops, offline):
    with GrpcClient(server.grpc_url) as client:
        predictions = [p for start in (0, 16, 32) for p in client.infer(crops[start : start + 16])]
    check(predictions, offline)


def test_the_score_is_bit_for_bit_that_of_the_live_rungs_outputs(server, images, calibration):
    live = triton.InferenceServerClient(server.grpc_url)
    tensor = triton.InferInput("image", [1, *images.shape[1:]], "FP32")
    with GrpcClient(server.grpc_url) as client:
        for image in images[:12]:
            tensor.set_data_from_numpy(image[None])
            answer = live.infer("vit_low", [tensor])
            outputs = RungOutputs(
                *(answer.as_numpy(name) for name in ("embedding", "cls_layers", "logits"))
            )
            assert client.infer_tensor(image[None])[0].score == calibration.score(outputs)[0]


def statistics(server, model, answered=None):
    """(requests answered, executions) of a model so far; waits until `answered` are counted.

    A model counts its requests after it has answered them, so the count may come a moment late.
    """
    live = triton.InferenceServerClient(server.grpc_url)
    deadline = time.monotonic() + 10
    while True:
        stats = live.get_inference_statistics(model).model_stats[0]
        found = int(stats.inference_stats.success.count), int(stats.execution_count)
        if answered is None or found[0] >= answered:
            assert answered is None or found[0] == answered
            return found
        assert time.monotonic() < deadline, f"{model} counts {found[0]} of {answered} answers"
        time.sleep(0.02)
