"""The `router` model: loaded, and executed in an assembled repository, without Triton."""

import importlib
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bundle import config as configs
from bundle import manifest
from bundle.graphs import GraphSet
from bundle.versions import Versions, put
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.fit import Options, fit
from export.repository import RepositorySettings, assemble
from routing import PROBE_ID
from tests.unit.calibration_outputs import make_outputs, with_losing_high, with_reference
from tests.unit.fakes import make_calibration
from tests.unit.onnx_files import SIZE, write_graph_set
from tests.unit.router_parts import Tensor, backend, config, deployed, wait_for
from tests.unit.test_export_repository import write_inputs

__all__ = ["backend", "deployed"]  # fixtures

DEPTH = 4


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
    graph_set = with_reference(GraphSet.load(write_graph_set(folder / "onnx")))
    outputs = with_losing_high(make_outputs(graph_set, 800), share=0.02)
    options = Options(Fidelity("top1"), "margin")  # the images of all zeros escalate
    fit(outputs, graph_set, Goal(0.1, 0.9, "ltt"), options).save(folder / "calibration.json")
    return graph_set, folder / "calibration.json"


@pytest.fixture
def start(backend, certified, tmp_path, monkeypatch):
    """Starts the router of a repository with these settings; gives it and its backend."""
    started = []

    def make(**settings):
        repository = assemble(*certified, tmp_path / "repository", RepositorySettings(**settings))
        backend.get_model_dir = lambda: str(repository / "router/1")
        # Imported from a copy: the repository itself stays as it was assembled.
        shutil.copytree(repository / "router/1", tmp_path / "executed_router")
        monkeypatch.syspath_prepend(tmp_path)
        model = importlib.import_module("executed_router.model")
        monkeypatch.setattr(model, "time", SimpleNamespace(perf_counter=lambda: backend.now_s))
        router = model.TritonPythonModel()
        given = configs.read(repository / "router/config.pbtxt").parameters
        found = config(**{name: value.string_value for name, value in given.items()})
        router.initialize(
            {
                "model_config": json.dumps(found),
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
    wait_for(lambda: len(backend.asked) >= 6)
    asked = [(model, images) for model, _, images in backend.asked]
    audited = [call for call in asked if call not in (("vit_low", 2), ("vit_high", 2))]
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


def test_a_version_above_the_one_that_answers_is_told_of(deployed, backend, tmp_path):
    repository = assemble(*write_inputs(tmp_path), tmp_path / "repository")
    tell = deployed("model")._tell_of_higher
    put(repository, Versions(1, (1, 2)))
    tell(repository, 1)
    assert backend.warnings == []
    tell(repository, 2)
    (warning,) = backend.warnings
    assert warning.startswith("router: router/2 is loaded above router/1, so it answers requests")
    manifest.write(repository)  # as an earlier release does, which did not say what answers
    tell(repository, 2)
    assert len(backend.warnings) == 1


def test_a_candidate_of_other_rungs_is_refused(deployed, tmp_path):
    live = make_calibration()
    (tmp_path / "2").mkdir()
    make_calibration(0.3).save(tmp_path / "2/calibration.json")
    load = deployed("model")._load_candidate
    deployed_live = importlib.import_module("deployed_router.routing").Calibration.load(
        tmp_path / "2/calibration.json"
    )
    assert load(tmp_path / "2", deployed_live).threshold == 0.3
    other = {**live.rungs, "vit_low": replace(live.rungs["vit_low"], sha256="9" * 64)}
    make_calibration(rungs=other).save(tmp_path / "2/calibration.json")
    with pytest.raises(ValueError, match="made with other rungs"):
        load(tmp_path / "2", deployed_live)
