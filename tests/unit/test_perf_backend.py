"""The server against a direct session: pairs, order and refusals, with a fake server's clock."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.grpc.service_pb2 import ModelConfigResponse

from perf import backend
from perf.backend import measure_backend, open_direct
from perf.figures import PerfError
from tests.unit.onnx_files import SIZE, write_rung

IMAGES = np.zeros((4, 3, SIZE, SIZE), np.float32)


def config(threads):
    found = ModelConfig(name="vit_high")
    found.instance_group.add(kind="KIND_CPU")
    found.parameters["intra_op_thread_count"].string_value = threads
    return found


class FakeServer:
    """Takes one second longer per request than the one before; counts it two questions later.

    Stands in for `Target` and its client, for `time`, and for a session that takes two seconds.
    """

    grpc_url = "host:1"

    def __init__(self, others=0):
        self.client = self
        self.others = others  # requests of somebody else beside each of ours
        self.log, self.sessions = [], []
        self._times, self._late, self._now = Counter(), 0, 0.0

    def get_model_config(self, model, client_timeout):
        return ModelConfigResponse(config=config("3"))

    def infer(self, model, inputs, outputs, client_timeout):
        self.log.append((model, inputs[0].shape()[0], [output.name() for output in outputs]))
        self._late = 2

    def times(self):
        if self._late:
            self._late -= 1
            if not self._late:
                self._times += Counter(requests=1 + self.others, total=len(self.log) * 10**9)
        return {"vit_high": self._times.copy()}

    def perf_counter(self):
        return self._now

    def open_direct(self, onnx, config):
        self.sessions.append(config.parameters["intra_op_thread_count"].string_value)
        return self

    def get_outputs(self):
        return [SimpleNamespace(name=name) for name in ("embedding", "cls_layers", "logits")]

    def run(self, names, feed):
        self.log.append(("direct", len(feed["image"]), names))
        self._now += 2.0


@pytest.fixture
def measure(monkeypatch):
    def measure(server, *how, on_step=lambda: None):
        monkeypatch.setattr(backend, "open_direct", server.open_direct)
        monkeypatch.setattr(backend, "time", server)
        return measure_backend(server, "file", IMAGES, *how, on_step)

    return measure


def test_a_round_is_the_median_of_its_pairs_and_has_a_session_of_its_own(measure):
    server, steps = FakeServer(), []
    found = measure(server, 2, 2, 3, on_step=lambda: steps.append(1))
    assert len(steps) == 6 and server.sessions == ["3", "3"]
    # Requests take as many seconds as their number in the log, where runs are entries too: warm-up
    # 1; pairs (3, -), (-, 6), (7, -); warm-up 9; pairs (-, 12), (13, -), (-, 16). A run takes 2.
    assert found.values == (3.0, 6.5)


def test_both_sides_go_first_in_turn_with_the_same_batch_and_outputs(measure):
    server = FakeServer()
    measure(server, 2, 1, 3)
    assert [entry[0] for entry in server.log[2:]] == [
        *("vit_high", "direct", "direct", "vit_high", "vit_high", "direct")
    ]
    assert {(batch, tuple(names)) for _, batch, names in server.log} == {
        (2, ("embedding", "logits"))
    }


def test_requests_of_somebody_else_are_noticed(measure):
    with pytest.raises(PerfError, match="somebody else uses vit_high"):
        measure(FakeServer(others=1), 1, 1, 1)


def test_the_direct_session_has_the_served_threads_on_the_cpu(tmp_path):
    write_rung(tmp_path / "model.onnx", seed=1)
    session = open_direct(tmp_path / "model.onnx", config("3"))
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 0)
    assert session.get_providers() == ["CPUExecutionProvider"]
