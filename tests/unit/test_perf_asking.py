"""One request of a system, and the scores of a pool, with servers that remember what they got."""

import contextlib
import time
from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor

from client import ClientError
from perf import images
from perf.harness import Asker, Load
from perf.images import SCORED_TOGETHER as BATCH
from perf.images import Pool, score_pool
from perf.systems import NEVER
from routing import UNSCORED
from tests.unit.perf_measured import make_system

RNG = np.random.default_rng(0)
POOL = Pool(
    "made up",
    [b"first", b"second"],
    RNG.normal(size=(2, 3, 4, 4)).astype(np.float32),
    [None, None],
    [],
)
OUTPUTS = {
    "embedding": np.array([[1.0, 2.0]], np.float32),
    "logits": np.array([[0.0, 1.0, 0.0]], np.float32),
    "escalated": np.array([[True]]),
    "score": np.array([[0.75]], np.float32),
}


class FakeClient:
    """Answers every request with the outputs that it asks for."""

    def __init__(self, fails=False, takes_s=0.0):
        self.fails, self.takes_s, self.requests = fails, takes_s, []

    def infer(self, model, inputs, outputs, parameters, client_timeout):
        (tensor,) = inputs
        names = [output.name() for output in outputs]
        self.requests.append((model, tensor, names, parameters))
        time.sleep(self.takes_s)
        if self.fails:
            raise InferenceServerException("went away", "StatusCode.UNAVAILABLE")
        count = tensor.shape()[0]
        return SimpleNamespace(as_numpy=lambda name: np.repeat(OUTPUTS[name], count, axis=0))


@pytest.fixture
def client():
    return FakeClient()


def ask(client, system, row=0, has_head=True):
    target = SimpleNamespace(client=client, grpc_url="host:1")
    (answer,) = Asker(target, POOL, has_head).ask(system, [row])
    return answer


def test_a_static_system_is_sent_the_tensor_and_says_nothing_of_escalation(client):
    answer = ask(client, make_system("static-high"), row=1)
    ((model, tensor, names, parameters),) = client.requests
    assert (model, names, parameters) == ("vit_high", ["embedding", "logits"], {})
    assert (tensor.name(), tensor.shape(), tensor.datatype()) == ("image", [1, 3, 4, 4], "FP32")
    assert tensor._get_content() == POOL.tensors[1].tobytes()
    assert answer.embedding.tolist() == [1.0, 2.0]
    assert answer.logits.tolist() == [0.0, 1.0, 0.0]
    assert answer.escalated is False and np.isnan(answer.score)


def test_the_router_is_asked_for_its_decision_with_the_threshold_as_a_number(client):
    system = make_system("adaptive-30", parameters={"threshold": "0.25", "policy": "auto"})
    answer = ask(client, system)
    ((model, _, names, parameters),) = client.requests
    assert (model, names) == ("router", ["embedding", "logits", "escalated", "score"])
    assert parameters == {"threshold": 0.25, "policy": "auto"}
    assert answer.escalated is True and answer.score == 0.75


def test_an_image_that_was_not_scored_has_no_score(client, monkeypatch):
    monkeypatch.setitem(OUTPUTS, "score", np.array([[UNSCORED]], np.float32))
    assert np.isnan(ask(client, make_system("adaptive")).score)


def test_the_ensemble_is_sent_the_file_as_it_is(client):
    ask(client, make_system("ensemble"), row=1)
    ((model, tensor, _, _),) = client.requests
    assert (model, tensor.name(), tensor.shape()) == ("adaptive_vit", "image_bytes", [1, 1])
    sent = deserialize_bytes_tensor(tensor._get_content())
    assert sent.tolist() == [b"second"]


def test_a_model_without_a_head_is_not_asked_for_logits(client):
    answer = ask(client, make_system("adaptive"), has_head=False)
    assert client.requests[0][2] == ["embedding", "escalated", "score"]
    assert answer.logits is None


class Meter:
    """Stands in for a `CpuMeter`: each reading is a second later, and idling takes nothing."""

    def __init__(self):
        self.now_s = 0.0

    def read_s(self):
        self.now_s += 1.0
        return self.now_s

    def used_s(self, before_s, seconds):
        return self.read_s() - before_s


def test_the_cpu_time_of_a_request_is_what_passed_meanwhile(client):
    target = SimpleNamespace(client=client, grpc_url="host:1")
    (answer,) = Asker(target, POOL, True, Meter()).ask(make_system("adaptive"), [0])
    assert answer.cpu_ms == 1000.0 and answer.latency_ms < 1000
    slow = ask(FakeClient(takes_s=0.02), make_system("adaptive"))
    assert slow.cpu_ms is None and 20 <= slow.latency_ms < 2000


def test_requests_of_a_span_are_in_flight_together_and_share_its_time():
    target = SimpleNamespace(client=FakeClient(takes_s=0.05), grpc_url="host:1")
    asker = Asker(target, POOL, True, Meter())
    answers = asker.ask(make_system("adaptive"), [0, 1] * 4, Load(in_flight=4))
    assert len(answers) == 8 and len({answer.latency_ms for answer in answers}) == 1
    assert 2 * 50 / 8 <= answers[0].latency_ms < 6 * 50 / 8  # two rounds of four
    assert {answer.cpu_ms for answer in answers} == {1000.0 / 8}


def test_images_of_a_batch_share_its_time_and_have_answers_of_their_own(client):
    target = SimpleNamespace(client=FakeClient(takes_s=0.05), grpc_url="host:1")
    asker = Asker(target, POOL, True, Meter())
    answers = asker.ask(make_system("adaptive"), [1, 0, 1], Load(batch=2))
    first, last = (request[1] for request in target.client.requests)
    assert (first.shape(), last.shape()) == ([2, 3, 4, 4], [1, 3, 4, 4])
    assert first._get_content() == POOL.tensors[::-1].tobytes()
    assert len(answers) == 3 and {answer.cpu_ms for answer in answers} == {1000.0 / 3}
    assert all(100 / 3 <= answer.latency_ms < 1000 for answer in answers)  # two requests in turn
    alone = asker.ask(make_system("adaptive"), [0, 1], Load(batch=2))
    assert all(25 <= answer.latency_ms < 500 for answer in alone)


def test_a_system_can_be_asked_for_more_than_its_answer(client):
    ask(client, make_system("static-high", outputs=("embedding", "score")))
    assert client.requests[0][2] == ["embedding", "score"]


def test_a_server_that_goes_away_is_an_error_of_ours():
    with pytest.raises(ClientError):
        ask(FakeClient(fails=True), make_system("adaptive"))


# --- scores ------------------------------------------------------------------------------------


class FakeGrpcClient:
    """Scores an image by its first pixel."""

    def __init__(self):
        self.calls = []

    @contextlib.contextmanager
    def __call__(self, url):
        self.url = url
        yield self

    def infer_tensor(self, batch, threshold):
        self.calls.append((len(batch), threshold))
        return [SimpleNamespace(score=float(image[0, 0, 0])) for image in batch]


def test_the_whole_pool_is_scored_in_batches_without_escalating(monkeypatch):
    client, advanced = FakeGrpcClient(), []
    monkeypatch.setattr(images, "GrpcClient", client)
    count = 2 * BATCH + 3
    tensors = RNG.normal(size=(count, 3, 4, 4)).astype(np.float32)
    pool = Pool("made up", [b""] * count, tensors, [None] * count, [])
    scores = score_pool("host:1", pool, advanced.append)
    np.testing.assert_array_equal(scores, tensors[:, 0, 0, 0])
    assert scores.dtype == np.float32 and client.url == "host:1"
    assert client.calls == [(BATCH, NEVER), (BATCH, NEVER), (3, NEVER)]
    assert advanced == [BATCH, BATCH, 3]
