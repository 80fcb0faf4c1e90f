"""The deployed `router` without Triton: its modules, and a backend that keeps what it is told."""

import importlib
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakValueDictionary

import numpy as np
import pytest

from calibration.certify import Goal, certificate, certify
from calibration.fidelity import Fidelity
from calibration.outputs import FULL_RUNG
from tests.unit.fakes import make_calibration
from tests.unit.onnx_files import CLASSES, LAYERS, D

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {
    "on_high_failure": "error",
    "high_timeout_ms": "10000",
    "client_parameters": "careful",
    "degrade_queue_depth": "0",
    "degrade_threshold": "",
    "audit_fraction": "0",
    "shadow_version": "0",
    "shadow_fraction": "0",
    "reference_check": "warn",
    "live_folder": "",
}


def config(**parameters):
    given = {**DEFAULTS, **parameters}
    return {
        "parameters": {name: {"string_value": value} for name, value in given.items()},
        "max_batch_size": 32,
        "instance_group": [{"count": 2, "gpus": []}],
        "dynamic_batching": {"default_queue_policy": {"max_queue_size": 64}},
    }


def certified(method="ltt", errors=0, reference=FULL_RUNG):
    """What `fit` writes into an artifact whose threshold is certified for a risk of 5 %."""
    goal, fidelity = Goal(0.05, 0.9, method), Fidelity("top1")
    lost = np.arange(200) < errors
    verdict = certify(np.zeros(200, np.float32), lost, np.array([0.5]), goal)
    record = certificate(verdict, goal, fidelity, "cls_path", reference=reference)
    assert record["certified"]
    return {"chosen_by": {"fidelity": "top1", "tolerance": None}, "certificate": record}


CERTIFIED = certified()


class Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class Metric:
    def __init__(self):
        self.value, self.observed = 0.0, []

    def increment(self, amount):
        self.value += amount

    def set(self, value):
        self.value = value

    def observe(self, value):
        self.observed.append(value)


class TooEarlyError(Exception):
    """What the python backend raises for a call that is made before `initialize` has returned."""


class Backend:
    """What the router takes of `triton_python_backend_utils`; every rung answers zeros.

    Attributes:
        series: metrics by name, and then by their labels.
        asked: calls of rungs, as (model, version, images).
        takes_s: how long a call takes, by `now_s`.
    """

    Tensor, TritonModelException = Tensor, TooEarlyError
    TRITONSERVER_MEMORY_CPU = 0

    def __init__(self):
        self.series, self.warnings, self.infos, self.asked = {}, [], [], []
        self.now_s = self.takes_s = 0.0
        self.Logger = SimpleNamespace(log_warn=self.warnings.append, log_info=self.infos.append)
        self.InferenceRequest = lambda **fields: SimpleNamespace(exec=lambda: self._rung(**fields))
        series = self.series

        class MetricFamily:
            COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

            def __init__(self, name, description, kind):
                assert description and name not in series
                self._metrics = series[name] = WeakValueDictionary()
                self._held = []  # a metric ends with its family, and not before

            def Metric(self, labels, buckets=None):  # noqa: N802, as Triton spells it
                self._held.append(self._metrics.setdefault(tuple(sorted(labels.items())), Metric()))
                return self._held[-1]

        self.MetricFamily = MetricFamily

    def value(self, name, **labels):
        """Of the series of version 1 with these labels."""
        labels = tuple(sorted({"version": "1", **labels}.items()))
        return self.series[f"adaptive_vit_{name}"][labels].value

    def PreferredMemory(self, kind):  # noqa: N802, as Triton spells it
        return kind

    def InferenceResponse(self, tensors):  # noqa: N802, as Triton spells it
        return {tensor.name(): tensor.as_numpy() for tensor in tensors}

    def get_input_tensor_by_name(self, request, name):
        return request.tensor

    def _rung(self, model_name, model_version, requested_output_names, inputs, **_):
        n = len(inputs[0].as_numpy())
        self.asked.append((model_name, model_version, n))
        self.now_s += self.takes_s
        shapes = {"embedding": (n, D), "cls_layers": (n, LAYERS + 1, D), "logits": (n, CLASSES)}
        tensors = [Tensor(k, np.zeros(shapes[k], np.float32)) for k in requested_output_names]
        return SimpleNamespace(has_error=lambda: False, output_tensors=lambda: tensors)


@pytest.fixture
def backend(monkeypatch):
    made = Backend()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", made)
    return made


@pytest.fixture
def deployed(backend, tmp_path, monkeypatch):
    """Imports a module of the deployed router, laid out as `export repository` does."""
    folder = tmp_path / "deployed_router"
    folder.mkdir()
    for file in (ROOT / "model_repository/router/1").glob("*.py"):
        shutil.copy(file, folder)
    metrics, waits = folder / "metrics.py", "_FLUSH_S = 0.5\n"
    assert waits in metrics.read_text()
    metrics.write_text(metrics.read_text().replace(waits, "_FLUSH_S = 0.01\n"))
    shutil.copytree(ROOT / "routing", folder / "routing")
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name: importlib.import_module(f"deployed_router.{name}")
    for name in [name for name in sys.modules if name.startswith("deployed_router")]:
        del sys.modules[name]


@pytest.fixture
def make_metrics(deployed):
    made = []

    def make(calibration=None, candidate=0):
        calibration = calibration or make_calibration(**CERTIFIED)
        made.append(deployed("metrics").Metrics("1", calibration, "ab" * 32, candidate, 64))
        return made[-1]

    yield make
    for metrics in made:
        metrics.stop()


def wait_for(condition, pause_s=0.01):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause_s)
