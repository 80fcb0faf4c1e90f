"""The `router` model of an assembled repository, executed without Triton."""

import importlib
import json
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from bundle.graphs import GraphSet
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.fit import Options, fit
from export.repository import assemble
from export.settings import Settings
from routing import PROBE_ID
from tests.unit.calibration_outputs import make_outputs, with_losing_high, with_reference
from tests.unit.onnx_files import CLASSES, LAYERS, SIZE, D, write_rung_set

DEPTH = 4


class Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class Metric:
    """Counts nothing: what is asked and answered is looked at here."""

    def increment(self, amount):
        pass

    set = observe = increment


class Family:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, name, description, kind):
        pass

    def Metric(self, labels, buckets=None):  # noqa: N802, as Triton spells it
        return Metric()


class Backend:
    """What the router takes of `triton_python_backend_utils`; every rung answers zeros."""

    Tensor, MetricFamily = Tensor, Family
    TRITONSERVER_MEMORY_CPU = 0

    def __init__(self, folder):
        self.get_model_dir = lambda: str(folder)
        self.asked, self.warnings, self.now_s, self.takes_s = [], [], 0.0, 0.0
        self.Logger = SimpleNamespace(log_warn=self.warnings.append)
        self.InferenceRequest = lambda **fields: SimpleNamespace(exec=lambda: self._rung(**fields))

    def PreferredMemory(self, kind):  # noqa: N802, as Triton spells it
        return kind

    def InferenceResponse(self, tensors):  # noqa: N802, as Triton spells it
        return {tensor.name(): tensor.as_numpy() for tensor in tensors}

    def get_input_tensor_by_name(self, request, name):
        return request.tensor

    def _rung(self, model_name, requested_output_names, inputs, **_):
        n = len(inputs[0].as_numpy())
        self.asked.append((model_name, n))
        self.now_s += self.takes_s
        shapes = {"embedding": (n, D), "cls_layers": (n, LAYERS + 1, D), "logits": (n, CLASSES)}
        tensors = [Tensor(k, np.zeros(shapes[k], np.float32)) for k in requested_output_names]
        return SimpleNamespace(has_error=lambda: False, output_tensors=lambda: tensors)


def request_of(images, request_id=""):
    return SimpleNamespace(
        tensor=Tensor("image", np.zeros((images, 3, SIZE, SIZE), np.float32)),
        parameters=lambda: "",
        request_id=lambda: request_id,
        is_cancelled=lambda: False,
        timeout=lambda: 0,
    )


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """Rungs beside the full model, and what `fit` certifies about it."""
    folder = tmp_path_factory.mktemp("certified")
    rung_set = with_reference(GraphSet.load(write_rung_set(folder / "onnx")))
    outputs = with_losing_high(make_outputs(rung_set, 800), share=0.02)
    options = Options(Fidelity("top1"), "margin")  # the images of all zeros escalate
    fit(outputs, rung_set, Goal(0.1, 0.9, "ltt"), options).save(folder / "calibration.json")
    return rung_set, folder / "calibration.json"


@pytest.fixture
def start(certified, tmp_path, monkeypatch):
    """Starts the router of a repository with these settings; gives it and its backend."""
    started = []

    def make(**settings):
        repository = assemble(*certified, tmp_path / "repository", Settings(**settings))
        backend = Backend(repository / "router/1")
        # Imported from a copy: the repository itself stays as it was assembled.
        shutil.copytree(repository / "router/1", tmp_path / "executed_router")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
        model = importlib.import_module("executed_router.model")
        monkeypatch.setattr(model, "time", SimpleNamespace(perf_counter=lambda: backend.now_s))
        router = model.TritonPythonModel()
        given = {name: {"string_value": value} for name, value in _parameters(repository).items()}
        queue = {"default_queue_policy": {"max_queue_size": 64}}
        config = {
            "parameters": given,
            "max_batch_size": 32,
            "instance_group": [{"count": 2, "gpus": []}],
            "dynamic_batching": queue,
        }
        router.initialize(
            {
                "model_config": json.dumps(config),
                "model_version": "1",
                "model_instance_name": "router_0_0",
            }
        )
        started.append(router)
        return router, backend

    yield make
    for router in started:
        router.finalize()
    for name in [name for name in sys.modules if name.startswith("executed_router")]:
        del sys.modules[name]


def _parameters(repository):
    config = text_format.Parse((repository / "router/config.pbtxt").read_text(), ModelConfig())
    return {name: value.string_value for name, value in config.parameters.items()}


def test_pressure_is_what_waited_and_not_the_size_of_a_request(start):
    router, backend = start(degrade_queue_depth=DEPTH, degrade_threshold=1e6)

    def are_degraded(*sizes, after_s):
        backend.now_s += after_s
        answers = router.execute([request_of(size) for size in sizes])
        (degraded,) = {bool(answer["degraded"].all()) for answer in answers}
        assert all(np.all(answer["escalated"] != degraded) for answer in answers)
        return degraded

    assert not are_degraded(32, after_s=0.0)  # the first
    assert are_degraded(32, after_s=0.0005)  # as soon as the router was free
    assert not are_degraded(32, after_s=0.05)
    assert are_degraded(*[1] * (DEPTH + 1), after_s=0.05)  # those behind the first had to wait
    assert not are_degraded(*[1] * DEPTH, after_s=0.05)
    backend.takes_s = 2.0  # a rung's call, on cores so busy that the hand-over takes long, too
    assert not are_degraded(32, after_s=0.05)
    assert are_degraded(32, after_s=0.1)
    assert not are_degraded(32, after_s=1.0)


def test_the_audit_asks_the_full_model_that_the_certificate_is_about(start):
    router, backend = start(audit_fraction=1.0)
    router.execute([request_of(2)])
    deadline = time.monotonic() + 10
    while len(backend.asked) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    audited = [call for call in backend.asked if call not in (("vit_low", 2), ("vit_high", 2))]
    assert audited == [("vit_high", 1), ("vit_reference", 1)] * 2
    assert len(backend.asked) == 6 and backend.warnings == []


def test_a_probe_is_answered_and_in_no_figure_about_images(start, monkeypatch):
    router, _ = start(audit_fraction=1.0)
    counted = []
    monkeypatch.setattr(router.metrics, "count", lambda name, *_, **__: counted.append(name))
    monkeypatch.setattr(router.metrics, "observe", lambda name, *_, **__: counted.append(name))
    (answer,) = router.execute([request_of(1, PROBE_ID)])
    assert answer["escalated"].all()
    in_flight = "images_in_flight"
    assert counted == [in_flight, in_flight, "requests_total", "request_duration_seconds"]
