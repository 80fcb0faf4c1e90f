"""On what graphs run, as it is kept with their answers. The sessions are fakes."""

import ctypes
from pathlib import Path

import onnxruntime as ort
import pytest

from bundle.graphs import GraphsError
from calibration import running

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture
def runtime(monkeypatch):
    """A machine with a GPU's driver, whose sessions get what `found` says; files by their name."""

    class Session:
        asked, found = [], {}

        def __init__(self, graph, options, providers):
            self.asked.append(providers)
            name = "device" if isinstance(graph, bytes) else Path(graph).name
            self.providers = [p for p in providers if p in self.found.get(name, (CUDA, CPU))]

        def get_providers(self):
            return self.providers

    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", Session)
    running.device.cache_clear()
    yield Session
    running.device.cache_clear()


def test_answers_are_those_of_the_gpu_where_sessions_get_it(runtime):
    assert running.local_runtime()["name"].endswith(" on CUDA")
    assert running.open_session(Path("low.onnx")).get_providers() == [CUDA, CPU]


def test_a_gpu_that_is_offered_and_does_not_load_is_not_the_one_that_answers(runtime):
    runtime.found = {"device": [CPU]}
    assert running.local_runtime()["name"].endswith(" on CPU")
    running.open_session(Path("low.onnx"))
    assert runtime.asked[-1] == [CPU]  # and it is not tried, and complained of, for every graph


def test_a_graph_that_gets_no_gpu_though_others_do_is_refused(runtime):
    runtime.found = {"low.onnx": [CPU]}
    with pytest.raises(GraphsError, match="low.onnx runs on the CPU although CUDA works"):
        running.open_session(Path("low.onnx"))


def test_without_a_driver_no_gpu_is_asked_for(runtime, monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    running.open_session(Path("low.onnx"))
    assert runtime.asked == [[CPU]]
