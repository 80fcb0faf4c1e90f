"""The stand-in onnxruntime backend on a machine whose GPU ONNX Runtime cannot use, with fakes."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from server.installation import STAND_IN

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
BARE = ("model", "onnx_config", "stall_guard")


class FakeOnnxRuntime(ModuleType):
    """`onnxruntime` that gets the providers it has out of those it is asked for."""

    GraphOptimizationLevel = SimpleNamespace(ORT_ENABLE_ALL=99)

    def __init__(self, has: list[str]) -> None:
        super().__init__("onnxruntime")
        self.has = has
        self.asked: list[Any] = []
        self.entries: dict[str, str] = {}

    def SessionOptions(self) -> SimpleNamespace:  # noqa: N802
        self.options = SimpleNamespace(add_session_config_entry=self.entries.__setitem__)
        return self.options

    def InferenceSession(self, path: str, options: Any, providers: list[Any]) -> Any:  # noqa: N802
        self.asked = [p if isinstance(p, str) else p[0] for p in providers]
        got = [name for name in self.asked if name in self.has]
        io = [SimpleNamespace(name="x", type="tensor(float)", shape=["N", 3])]
        return SimpleNamespace(
            get_providers=lambda: got, get_inputs=lambda: io, get_outputs=lambda: io
        )


class FakeTriton(ModuleType):
    """`triton_python_backend_utils` of one model folder."""

    class TritonModelException(Exception):  # noqa: N818
        """Triton's own name."""

    def __init__(self, model_folder: Path) -> None:
        super().__init__("triton_python_backend_utils")
        self.warnings: list[str] = []
        self.Logger = SimpleNamespace(log_warn=self.warnings.append)
        self.get_model_dir = lambda: str(model_folder / "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.onnx").write_bytes(b"")
    return tmp_path / "m"


@pytest.fixture
def triton(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTriton:
    fake = FakeTriton(folder)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    return fake


@pytest.fixture
def backend(triton: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    # As in Triton: the backend's directory is on sys.path, its modules have bare names.
    monkeypatch.syspath_prepend(str(STAND_IN))
    module = importlib.import_module("model")
    # The real one would watch over this process, and end it after a pause.
    monkeypatch.setattr(module, "StallGuard", lambda: SimpleNamespace(begin=lambda: None))
    yield module
    for name in BARE:
        del sys.modules[name]


TENSOR = {"name": "x", "data_type": "TYPE_FP32", "dims": [3]}


@pytest.fixture
def initialize(backend: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start an instance that Triton has put on GPU 0, as it does with AUTO where there is one."""

    def initialize(written: str | None, has: list[str], **parameters: str) -> FakeOnnxRuntime:
        onnxruntime = FakeOnnxRuntime(has)
        monkeypatch.setitem(sys.modules, "onnxruntime", onnxruntime)
        if written is not None:
            text = f'name: "m"\ninstance_group [ {{ count: 1 kind: {written} }} ]\n'
            (folder / "config.pbtxt").write_text(text)
        config = {
            "name": "m",
            "max_batch_size": 8,
            "instance_group": [{"kind": "KIND_GPU"}],
            "input": [TENSOR],
            "output": [TENSOR],
            "parameters": {key: {"string_value": value} for key, value in parameters.items()},
        }
        instance = {"model_instance_kind": "GPU", "model_instance_device_id": "0"}
        backend.TritonPythonModel().initialize({"model_config": json.dumps(config), **instance})
        return onnxruntime

    return initialize


@pytest.mark.parametrize("written", ["KIND_AUTO", None])
def test_auto_without_cuda_is_the_cpu_and_one_warning(initialize, triton, written: str | None):
    assert initialize(written, [CPU]).asked == [CUDA, CPU]
    (warning,) = triton.warnings
    assert "model 'm' runs on the CPU under KIND_AUTO" in warning and CPU in warning


def test_a_gpu_asked_for_by_name_is_not_replaced(initialize, triton):
    with pytest.raises(triton.TritonModelException, match="asks for KIND_GPU.*use KIND_CPU or"):
        initialize("KIND_GPU", [CPU])


@pytest.mark.parametrize("written", ["KIND_AUTO", "KIND_GPU"])
def test_with_cuda_both_are_the_gpu_and_nothing_is_said(initialize, triton, written: str):
    assert initialize(written, [CUDA, CPU]).asked[0] == CUDA
    assert triton.warnings == []


@pytest.mark.parametrize(
    ("parameters", "entries", "arena", "pattern"),
    [
        ({"session.disable_prepacking": "0"}, {}, True, True),
        ({"session.disable_prepacking": "1"}, {"session.disable_prepacking": "1"}, True, True),
        ({"enable_mem_arena": "0"}, {}, False, True),
        ({"enable_mem_pattern": "0"}, {}, True, False),
    ],
)
def test_a_session_is_opened_as_its_config_says(
    initialize, parameters: dict, entries: dict, arena: bool, pattern: bool
):
    found = initialize("KIND_GPU", [CUDA, CPU], **parameters)
    assert found.entries == entries
    assert (found.options.enable_cpu_mem_arena, found.options.enable_mem_pattern) == (
        arena,
        pattern,
    )
