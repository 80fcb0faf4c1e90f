"""The blocking clients' common part, over a transport that only remembers; silent servers."""

import asyncio
import time

import numpy as np
import pytest

from client import (
    DeadlineError,
    InvalidRequestError,
    Task,
)
from client.core import BlockingCore, ClientCore
from tests.unit.client_servers import every, listening


class FakeResult:
    """An answer for N images, whatever they were."""

    def __init__(self, count):
        self.count = count

    def as_numpy(self, name):
        width = 4 if name == "embedding" else 1
        return None if name == "logits" else np.zeros((self.count, width), np.float32)


class FakeClient(BlockingCore):
    def __init__(self, max_batch=32):
        super().__init__("127.0.0.1:1")
        self.sent = []
        self.asked_for_maximum = []
        self.max_batch = max_batch
        self.closed = False
        self.parameters = {}

    def close(self):
        self.closed = True

    async def _send(self, request, left_s):
        tensor = request.arguments(left_s)["inputs"][0]
        self.sent.append((request.model, tensor.name(), tensor.shape(), request.parameters))
        self.sent_with = (request.version, left_s)
        return FakeResult(tensor.shape()[0])

    async def _describe(self, what, model, left_s):
        if what == "config" and model == "adaptive_vit":
            self.asked_for_maximum.append(model)
        return {
            "server": {"name": "triton", "version": "2.51.0"},
            "metadata": {"name": model, "inputs": [{"name": "image_bytes", "shape": ["-1", "1"]}]},
            "config": {"max_batch_size": self.max_batch, "parameters": self.parameters},
        }[what]


@pytest.mark.parametrize(
    ("max_batch", "images", "batches", "questions"),
    [
        (32, 70, [32, 32, 6], 1),
        (32, 1, [1], 0),  # a single image always fits
        (0, 3, [1, 1, 1], 1),  # a model that does not batch
        (32, 0, [], 0),
    ],
)
def test_images_are_sent_in_batches_that_the_model_takes(max_batch, images, batches, questions):
    client = FakeClient(max_batch)
    for _ in range(2):  # the maximum is remembered
        client.sent.clear()
        assert len(client.infer([b"x"] * images, timeout_s=3)) == images
        assert [shape for _, _, shape, _ in client.sent] == [[batch, 1] for batch in batches]
        assert client.asked_for_maximum == ["adaptive_vit"] * questions


def test_options_reach_the_transport():
    client = FakeClient()
    client.infer([b"x"], policy="auto", threshold=0.25, timeout_s=3)
    version, left_s = client.sent_with
    assert version is None and 2 < left_s <= 3
    image = np.zeros((3, 4, 4), np.float32)
    client.infer_tensor(image, policy="low")
    assert client.sent_with[0] is None
    client.infer_tensor(image, policy="low", version=2, timeout_s=None)
    assert client.sent_with == (2, None)
    # An ensemble has one version; who pins one of the router asks the router.
    assert client.sent == [
        ("adaptive_vit", "image_bytes", [1, 1], {"policy": "auto", "threshold": 0.25}),
        ("adaptive_tensor", "image", [1, 3, 4, 4], {"policy": "low"}),
        ("router", "image", [1, 3, 4, 4], {"policy": "low"}),
    ]


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(timeout_s):
    client = FakeClient()
    with pytest.raises(InvalidRequestError, match="timeout_s must be a positive number"):
        client.infer([b"x"], timeout_s=timeout_s)
    assert client.sent == []


@every
@pytest.mark.parametrize("key", ["", "two\nlines", "k\u00e9y", " padded"])
def test_an_admin_key_that_fits_no_header_is_refused_without_showing_it(kind, key):
    with pytest.raises(InvalidRequestError, match="admin key must be one line") as caught:
        kind("127.0.0.1:1", admin_key=key)
    assert "\n" not in str(caught.value) and (not key or key not in str(caught.value))


def test_metadata_is_of_the_ensemble_unless_named():
    client = FakeClient()
    inputs = [{"name": "image_bytes", "shape": [-1, 1]}]  # gRPC's JSON has numbers as text
    assert client.metadata() == {"name": "adaptive_vit", "inputs": inputs, "outputs": []}
    assert client.metadata("router")["name"] == "router"
    assert client.server_version() == "2.51.0"


def test_the_task_is_what_the_routers_configuration_says():
    client = FakeClient()
    assert client.task() == Task(None, 0.5)  # assembled before there was a task
    client.parameters = as_config({"task": "labels", "label_threshold": "0.3", "audited": "0"})
    assert client.task() == Task("labels", 0.3)
    client.parameters = as_config({"task": "", "label_threshold": "0.5"})
    assert client.task() == Task(None)


def as_config(parameters):
    return {name: {"string_value": value} if value else {} for name, value in parameters.items()}


def test_a_blocking_client_that_would_wait_for_an_event_loop_says_so():
    class Waiting(FakeClient):
        async def _send(self, request, left_s):
            await asyncio.sleep(0)

    with pytest.raises(AssertionError, match="waited for an event loop"):
        Waiting().infer([b"x"])


def test_the_context_manager_closes():
    with FakeClient() as client:
        assert not client.closed
    assert client.closed


def test_a_dtype_that_triton_lacks_is_an_invalid_request():
    with pytest.raises(InvalidRequestError, match="datetime64"):
        FakeClient().infer_tensor(np.zeros((1, 3, 2, 2), dtype="datetime64[s]"))


# --- a server that hangs -----------------------------------------------------------------------


@pytest.fixture
def silent_url(monkeypatch):
    """What a stopped server looks like: the kernel accepts connections, nobody answers."""
    monkeypatch.setattr(ClientCore, "_look_up_timeout_s", 0.3)
    with listening() as (_, url):
        yield url


@every
@pytest.mark.parametrize("method", ["server_version", "metadata"])
def test_a_question_to_a_silent_server_ends_and_says_so(silent_url, kind, method):
    started = time.monotonic()
    said = f"{silent_url} accepts .* but does not answer"
    with kind(silent_url) as client, pytest.raises(DeadlineError, match=said):
        getattr(client, method)()
    assert time.monotonic() - started < 5


@every
@pytest.mark.parametrize("images", [1, 2])  # two ask for the largest batch first
def test_a_request_to_a_silent_server_ends_at_the_callers_deadline(silent_url, kind, images):
    started = time.monotonic()
    with kind(silent_url) as client, pytest.raises(DeadlineError, match="within 0.2 s"):
        client.infer([b"x"] * images, timeout_s=0.2)
    assert time.monotonic() - started < 5
