"""The server against a direct session: pairs, order and refusals, with a fake server's clock."""

from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.grpc.service_pb2 import ModelConfigResponse

from client import ClientError
from perf import backend
from perf.backend import measure_backend, open_direct
from perf.figures import PerfError
from tests.unit.onnx_files import SIZE, write_rung

IMAGES = np.zeros((4, 3, SIZE, SIZE), np.float32)


class FakeServer:
    """Takes one second longer per request than the one before; counts it two questions later.

    Stands in for `InferenceServerClient` of any URL.
    """

    def __init__(self, others=0, counts=True):
        self.others = others  # requests of somebody else beside each of ours
        self.counts = counts
        self.log = []
        self._done, self._ns, self._late = 0, 0, 0

    def __call__(self, url):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def get_model_config(self, model, client_timeout):
        return ModelConfigResponse(config=config("3"))

    def infer(self, model, inputs, outputs, client_timeout):
        self.log.append((model, inputs[0].shape()[0], [output.name() for output in outputs]))
        self._late = 2

    def get_inference_statistics(self, model, client_timeout):
        if self._late and self.counts:
            self._late -= 1
            if not self._late:
                self._done += 1 + self.others
                self._ns += len(self.log) * 10**9
        success = SimpleNamespace(count=self._done, ns=self._ns)
        stats = SimpleNamespace(inference_stats=SimpleNamespace(success=success))
        return SimpleNamespace(model_stats=[stats])


class FakeSession:
    """Takes two seconds by the fake clock."""

    def __init__(self, clock, log):
        self.clock, self.log = clock, log

    def get_outputs(self):
        return [SimpleNamespace(name=name) for name in ("embedding", "cls_layers", "logits")]

    def run(self, names, feed):
        self.log.append(("direct", len(feed["image"]), names))
        self.clock.now += 2.0


class FakeClock:
    """`time`, with a clock that only the session moves."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def monotonic(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def config(threads):
    found = ModelConfig(name="vit_high")
    found.instance_group.add(kind="KIND_CPU")
    found.parameters["intra_op_thread_count"].string_value = threads
    return found


@pytest.fixture
def server(monkeypatch):
    return install(monkeypatch, FakeServer())


def install(monkeypatch, server):
    clock = FakeClock()
    server.sessions = []

    def open_fake(onnx, config):
        server.sessions.append(config.parameters["intra_op_thread_count"].string_value)
        return FakeSession(clock, server.log)

    monkeypatch.setattr(backend.triton, "InferenceServerClient", server)
    monkeypatch.setattr(backend, "open_direct", open_fake)
    monkeypatch.setattr(backend, "time", clock)
    return server


def test_a_round_is_the_median_of_its_pairs_and_has_a_session_of_its_own(server):
    steps = []
    found = measure_backend("host:1", "file", IMAGES, 2, 2, 3, lambda: steps.append(1))
    assert len(steps) == 6 and server.sessions == ["3", "3"]
    # Requests take as many seconds as their number in the log, where runs are entries too: warm-up
    # 1; pairs (3, -), (-, 6), (7, -); warm-up 9; pairs (-, 12), (13, -), (-, 16). A run takes 2.
    assert found.values == (3.0, 6.5)


def test_both_sides_go_first_in_turn_with_the_same_batch_and_outputs(server):
    measure_backend("host:1", "file", IMAGES, 2, 1, 3, lambda: None)
    assert [entry[0] for entry in server.log[2:]] == [
        *("vit_high", "direct", "direct", "vit_high", "vit_high", "direct")
    ]
    assert {(batch, tuple(names)) for _, batch, names in server.log} == {
        (2, ("embedding", "logits"))
    }


def test_requests_of_somebody_else_are_noticed(monkeypatch):
    install(monkeypatch, FakeServer(others=1))
    with pytest.raises(PerfError, match="somebody else uses vit_high"):
        measure_backend("host:1", "file", IMAGES, 1, 1, 1, lambda: None)


def test_statistics_that_stand_still_are_noticed(monkeypatch):
    install(monkeypatch, FakeServer(counts=False))
    with pytest.raises(PerfError, match="do not count it"):
        measure_backend("host:1", "file", IMAGES, 1, 1, 1, lambda: None)


def test_too_few_images_are_refused(server):
    with pytest.raises(PerfError, match="4 images do not fill a batch of 5"):
        measure_backend("host:1", "file", IMAGES, 5, 1, 1, lambda: None)


def test_no_server_is_one_line():
    with pytest.raises(ClientError, match="no server answers") as caught:
        measure_backend("127.0.0.1:9", "file", IMAGES, 1, 1, 1, lambda: None)
    assert "\n" not in str(caught.value)


def test_the_direct_session_has_the_served_threads_on_the_cpu(tmp_path):
    write_rung(tmp_path / "model.onnx", seed=1)
    session = open_direct(tmp_path / "model.onnx", config("3"))
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 0)
    assert session.get_providers() == ["CPUExecutionProvider"]
