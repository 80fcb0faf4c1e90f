"""Preparing a directory of backends."""

import os
from pathlib import Path

import pytest

from server import ServerUsageError, Tritonserver, Wheel
from server.backend_directory import STAND_IN, prepare_backend_directory


def write(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    root = tmp_path / "wheel" / "tritonserver"
    write(root / "bin" / "tritonserver")
    write(root / "backends" / "python" / "libtriton_python.so", b"wheel")
    write(root / "backends" / "python" / "__pycache__" / "x.pyc")
    stubs = root / "python_backend_stubs"
    write(stubs / "3.11" / "triton_python_backend_stub", b"\0libpython3.11.so.1.0\0")
    return Wheel(root, tmp_path / "wheel" / "libs")


def native(tmp_path: Path, *files: str) -> Tritonserver:
    backends = tmp_path / "native" / "backends"
    backends.mkdir(parents=True)
    for file in files:
        write(backends / file, b"\0libpython3.12.so.1.0\0" if file.endswith("stub") else b"native")
    return Tritonserver(tmp_path / "native" / "bin" / "tritonserver", backends, ())


PYTHON = ("python/libtriton_python.so", "python/triton_python_backend_stub")
ONNXRUNTIME = "onnxruntime/libtriton_onnxruntime.so"


def test_a_complete_server_runs_with_its_own_directory(tmp_path: Path, wheel: Wheel):
    server = native(tmp_path, *PYTHON, ONNXRUNTIME)
    prepared = prepare_backend_directory(server, tmp_path / "out", wheel, "3.11")
    assert prepared.path == server.backend_directory
    assert prepared.stub_python == "3.12"
    assert not (tmp_path / "out").exists()


def test_the_wheel_gets_its_stub_and_the_stand_in(tmp_path: Path, wheel: Wheel):
    server = Tritonserver(wheel.binary, wheel.root / "backends", (wheel.libraries,))
    prepared = prepare_backend_directory(server, tmp_path / "out", wheel, "3.11")
    python, onnxruntime = prepared.path / "python", prepared.path / "onnxruntime"
    # Triton refuses a python-based backend whose library resolves to another directory.
    assert (python / "libtriton_python.so").resolve() == python / "libtriton_python.so"
    assert os.access(python / "triton_python_backend_stub", os.X_OK)
    assert not (python / "__pycache__").exists()
    assert (onnxruntime / "model.py").read_bytes() == (STAND_IN / "model.py").read_bytes()
    assert prepared.stub_python == "3.11"
    assert prepared.library_directories == (wheel.libraries,)


def test_no_stand_in_where_the_native_backend_exists(tmp_path: Path, wheel: Wheel):
    server = native(tmp_path, ONNXRUNTIME, "tensorrt/libtriton_tensorrt.so")
    prepared = prepare_backend_directory(server, tmp_path / "out", wheel, "3.11")
    assert (prepared.path / ONNXRUNTIME).read_bytes() == b"native"
    assert (prepared.path / "tensorrt/libtriton_tensorrt.so").read_bytes() == b"native"
    assert (prepared.path / "python/libtriton_python.so").read_bytes() == b"wheel"


def test_a_native_python_backend_is_kept_beside_the_stand_in(tmp_path: Path):
    server = native(tmp_path, *PYTHON)
    prepared = prepare_backend_directory(server, tmp_path / "out", None, "3.11")
    assert (prepared.path / "python/libtriton_python.so").read_bytes() == b"native"
    assert (prepared.path / "onnxruntime/model.py").is_file()
    assert prepared.stub_python == "3.12"
    assert prepared.library_directories == ()


def test_a_wrapper_without_backends_falls_back_to_the_wheel(tmp_path: Path, wheel: Wheel):
    server = Tritonserver(tmp_path / "bin" / "tritonserver", None, ())
    prepared = prepare_backend_directory(server, tmp_path / "out", wheel, "3.11")
    assert (prepared.path / "python/libtriton_python.so").read_bytes() == b"wheel"
    assert prepared.library_directories == (wheel.libraries,)


def test_a_python_without_a_stub_is_refused(tmp_path: Path, wheel: Wheel):
    server = Tritonserver(wheel.binary, wheel.root / "backends", (wheel.libraries,))
    with pytest.raises(ServerUsageError, match=r"for Python 3\.99, only for 3\.11"):
        prepare_backend_directory(server, tmp_path / "out", wheel, "3.99")


def test_no_python_backend_anywhere_is_refused(tmp_path: Path):
    server = Tritonserver(tmp_path / "tritonserver", None, ())
    with pytest.raises(ServerUsageError, match="no python backend.*--backend-directory"):
        prepare_backend_directory(server, tmp_path / "out", None, "3.11")
