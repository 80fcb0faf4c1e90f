"""The blocking clients' common part, over a transport that only remembers."""

import numpy as np
import pytest
import tritonclient.http as http_protocol

from client import GrpcClient, HttpClient, InvalidRequestError, UnavailableError
from client.sync import SyncClient


class FakeResult:
    """An answer for N images, whatever they were."""

    def __init__(self, count):
        self.count = count

    def as_numpy(self, name):
        width = 4 if name == "embedding" else 1
        return None if name == "logits" else np.zeros((self.count, width), np.float32)


class FakeClient(SyncClient):
    _protocol = http_protocol

    def __init__(self, max_batch=32):
        super().__init__("127.0.0.1:1")
        self.sent = []
        self.asked_for_maximum = 0
        self.max_batch = max_batch
        self.closed = False

    def close(self):
        self.closed = True

    def _send(self, model, inputs, parameters, timeout_s):
        (tensor,) = inputs
        self.sent.append((model, tensor.name(), tensor.shape(), parameters, timeout_s))
        return FakeResult(tensor.shape()[0])

    def _max_batch_size(self, model):
        self.asked_for_maximum += 1
        return self.max_batch

    def _metadata(self, model):
        return {"name": model}

    def _server_version(self):
        return "2.51.0"


def test_a_batch_over_the_maximum_is_split_and_answered_in_order():
    client = FakeClient(max_batch=32)
    found = client.infer([b"x"] * 70)
    assert [shape for _, _, shape, _, _ in client.sent] == [[32, 1], [32, 1], [6, 1]]
    assert len(found) == 70
    client.infer([b"x"] * 2)
    assert client.asked_for_maximum == 1  # remembered


def test_a_single_image_asks_nothing_first():
    client = FakeClient()
    client.infer([b"x"])
    assert client.asked_for_maximum == 0


def test_a_model_that_does_not_batch_gets_one_image_at_a_time():
    client = FakeClient(max_batch=0)
    client.infer([b"x"] * 3)
    assert [shape for _, _, shape, _, _ in client.sent] == [[1, 1]] * 3


def test_no_images_are_no_request():
    client = FakeClient()
    assert client.infer([]) == []
    assert client.sent == []


def test_options_reach_the_transport():
    client = FakeClient()
    client.infer([b"x"], policy="auto", threshold=0.25, timeout_s=3)
    client.infer_tensor(np.zeros((3, 4, 4), np.float32), policy="low")
    assert client.sent == [
        ("adaptive_vit", "image_bytes", [1, 1], {"policy": "auto", "threshold": 0.25}, 3),
        ("router", "image", [1, 3, 4, 4], {"policy": "low"}, 60.0),
    ]


def test_metadata_is_of_the_ensemble_unless_named():
    client = FakeClient()
    assert client.metadata() == {"name": "adaptive_vit"}
    assert client.metadata("router") == {"name": "router"}
    assert client.server_version() == "2.51.0"


def test_the_context_manager_closes():
    with FakeClient() as client:
        assert not client.closed
    assert client.closed


@pytest.mark.parametrize("kind", [GrpcClient, HttpClient])
def test_without_a_server_there_is_one_clear_error(kind):
    with kind("127.0.0.1:1") as client, pytest.raises(UnavailableError) as caught:
        client.infer([b"x"])
    assert str(caught.value) == "no server answers at 127.0.0.1:1; start one with python -m server"


def test_a_dtype_that_triton_lacks_is_an_invalid_request():
    with pytest.raises(InvalidRequestError, match="datetime64"):
        FakeClient().infer_tensor(np.zeros((1, 3, 2, 2), dtype="datetime64[s]"))
