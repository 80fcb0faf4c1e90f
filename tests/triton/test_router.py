"""The deployed router on a real server: how often it calls, and what it refuses."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from client import GrpcClient, InvalidRequestError
from tests.triton.test_keystone import statistics

NEVER, ALWAYS = 1e9, -1e9


SETTLE_S = 0.3  # a model counts its executions after it has answered


@pytest.fixture(scope="module")
def client(server):
    with GrpcClient(server.grpc_url) as open_client:
        yield open_client


def calls(server, run):
    """Executions of (vit_low, vit_high) that `run` caused."""
    time.sleep(SETTLE_S)
    before = [statistics(server, name)[1] for name in ("vit_low", "vit_high")]
    run()
    time.sleep(SETTLE_S)
    after = [statistics(server, name)[1] for name in ("vit_low", "vit_high")]
    return tuple(np.subtract(after, before))


def test_an_all_easy_batch_makes_no_high_call(server, client, images):
    assert calls(server, lambda: client.infer_tensor(images[:8], threshold=NEVER)) == (1, 0)


def test_a_mixed_batch_makes_exactly_one_high_call(server, client, images):
    scores = [p.score for p in client.infer_tensor(images[:8])]
    median = float(np.median(scores))
    assert calls(server, lambda: client.infer_tensor(images[:8], threshold=median)) == (1, 1)


def test_policies_call_only_the_rung_they_name(server, client, images):
    assert calls(server, lambda: client.infer_tensor(images[:4], policy="low")) == (1, 0)
    assert calls(server, lambda: client.infer_tensor(images[:4], policy="high")) == (0, 1)


def test_policies_answer_with_the_rung_they_name(server, client, images):
    live = triton.InferenceServerClient(server.grpc_url)
    tensor = triton.InferInput("image", list(images[:4].shape), "FP32")
    tensor.set_data_from_numpy(images[:4])
    for policy in ("low", "high"):
        embedding = live.infer(f"vit_{policy}", [tensor]).as_numpy("embedding")
        predictions = client.infer_tensor(images[:4], policy=policy)
        np.testing.assert_allclose([p.embedding for p in predictions], embedding, rtol=1e-4)
        assert all(p.escalated == (policy == "high") for p in predictions)


def test_parameters_reach_the_router_through_the_ensemble(client, crops):
    assert all(p.escalated for p in client.infer(crops[:3], threshold=ALWAYS))
    assert not any(p.escalated for p in client.infer(crops[:3], threshold=NEVER))
    assert all(np.isnan(p.score) for p in client.infer(crops[:3], policy="high"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_request_fails_alone(client, images, value):
    broken = images[:1].copy()
    broken[0, 1, 2, 3] = value

    def ask(i):
        try:
            return client.infer_tensor(broken if i % 4 == 0 else images[i : i + 1])
        except InvalidRequestError as error:
            return str(error)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(32)))
    for i, answer in enumerate(answers):
        if i % 4 == 0:
            assert "holds NaN or Inf" in answer
        else:
            assert len(answer) == 1


def raw_request(server, image, datatype="FP32", parameters=None, http=False):
    module = triton_http if http else triton
    live = module.InferenceServerClient(server.http_url if http else server.grpc_url)
    tensor = module.InferInput("image", list(image.shape), datatype)
    tensor.set_data_from_numpy(image)
    return live.infer("router", [tensor], parameters=parameters)


def test_a_threshold_arrives_as_text_too(server, images):
    for http in (False, True):
        for threshold in (NEVER, ALWAYS):
            answer = raw_request(
                server, images[:4], parameters={"threshold": str(threshold)}, http=http
            )
            assert (answer.as_numpy("escalated") == (threshold == ALWAYS)).all()
            assert np.isfinite(answer.as_numpy("score")).all()  # the policy was auto


BAD = {
    "rank": (np.zeros((3, 64, 64), np.float32), "FP32", None, "INVALID_ARGUMENT"),
    "size": (np.zeros((1, 3, 32, 32), np.float32), "FP32", None, "INVALID_ARGUMENT"),
    "dtype": (np.zeros((1, 3, 64, 64), np.int32), "INT32", None, "INVALID_ARGUMENT"),
    "batch": (np.zeros((33, 3, 64, 64), np.float32), "FP32", None, "INVALID_ARGUMENT"),
    "policy": (
        np.zeros((1, 3, 64, 64), np.float32),
        "FP32",
        {"policy": "medium"},
        "INVALID_ARGUMENT",
    ),
    "threshold": (
        np.zeros((1, 3, 64, 64), np.float32),
        "FP32",
        {"threshold": "high"},
        "INVALID_ARGUMENT",
    ),
    "typo": (np.zeros((1, 3, 64, 64), np.float32), "FP32", {"treshold": 1}, "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_and_that_the_server_goes_on(server, client, images, name):
    image, datatype, parameters, status = BAD[name]
    with pytest.raises(InferenceServerException) as error:
        raw_request(server, image, datatype, parameters)
    assert status in error.value.status()
    assert "\n" not in error.value.message()
    with pytest.raises(InferenceServerException) as error:
        raw_request(server, image, datatype, parameters, http=True)
    assert error.value.status() == "400"
    assert len(client.infer_tensor(images[:2])) == 2


def test_the_outputs_have_the_contracts_names_types_and_shapes(server, images):
    answer = raw_request(server, images[:2])
    shapes = {
        tensor.name: (tensor.datatype, list(tensor.shape))
        for tensor in answer.get_response().outputs
    }
    assert shapes == {
        "embedding": ("FP32", [2, 192]),
        "logits": ("FP32", [2, 200]),
        "escalated": ("BOOL", [2, 1]),
        "score": ("FP32", [2, 1]),
        "degraded": ("BOOL", [2, 1]),
    }
