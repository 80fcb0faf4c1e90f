"""Finding a tritonserver, preparing its backends, and what it starts with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server import Installation, ServerUsageError, Wheel, find_wheel
from server.installation import RUNNING_PYTHON, STAND_IN, find_installation
from server.ports import Addresses, Ports

PYTHON = ("python/libtriton_python.so", "python/triton_python_backend_stub")
ONNXRUNTIME = "onnxruntime/libtriton_onnxruntime.so"
STUB = b"\0libpython3.12.so.1.0\0"
Find = Callable[..., Installation]


def write(path: Path, data: bytes = b"", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    root = tmp_path / "wheel" / "tritonserver"
    write(root / "bin" / "tritonserver", b"#!/bin/sh\n", 0o755)
    write(root / "backends" / "python" / "libtriton_python.so", b"wheel")
    write(root / "backends" / "python" / "__pycache__" / "x.pyc")
    stubs = root / "python_backend_stubs"
    write(stubs / "3.11" / "triton_python_backend_stub", b"\0libpython3.11.so.1.0\0")
    return Wheel(root, tmp_path / "wheel" / "libs")


@pytest.fixture
def find(tmp_path: Path, wheel: Wheel) -> Find:
    """Searches only `tmp_path/bin`, and falls back to the wheel."""

    def find(*given: Path | None, **options: object) -> Installation:
        usual = {"wheel": wheel, "search_path": str(tmp_path / "bin"), "python_version": "3.11"}
        return find_installation(tmp_path / "out", *given, **{**usual, **options})

    return find


def native(tmp_path: Path, *files: str) -> Path:
    """An executable with these backends beside it."""
    (tmp_path / "backends").mkdir()
    for file in files:
        write(tmp_path / "backends" / file, STUB if file.endswith("stub") else b"native")
    return write(tmp_path / "bin" / "tritonserver", b"#!/bin/sh\n", 0o755)


# --- found -------------------------------------------------------------------------------------


def test_the_installed_wheel_is_found_without_importing_it():
    sys.modules.pop("pytriton", None)
    found = find_wheel()
    assert found is not None
    assert found.binary.is_file()
    assert found.stub(RUNNING_PYTHON).is_file()
    assert list(found.libraries.glob("libtritonserver*.so"))
    assert "pytriton" not in sys.modules


def test_python_versions_are_sorted_as_versions(wheel: Wheel):
    for version in ("3.10", "3.9"):
        (wheel.root / "python_backend_stubs" / version).mkdir()
    assert wheel.python_versions == ["3.9", "3.10", "3.11"]


def test_path_comes_before_the_wheel(tmp_path: Path, find: Find):
    binary = native(tmp_path, *PYTHON, ONNXRUNTIME)
    assert find() == Installation(binary, tmp_path / "backends", (), "3.12")


def test_wheel_without_one_on_path(find: Find, wheel: Wheel, tmp_path: Path):
    assert find() == Installation(wheel.binary, tmp_path / "out", (wheel.libraries,), "3.11")


def test_a_link_to_the_wheels_binary_gets_the_wheels_libraries(
    tmp_path: Path, wheel: Wheel, find: Find
):
    link = tmp_path / "bin" / "tritonserver"
    link.parent.mkdir()
    link.symlink_to(wheel.binary)
    found = find()
    assert (found.binary, found.libraries) == (link, (wheel.libraries,))


def test_explicit_comes_first_and_takes_a_backend_directory(
    tmp_path: Path, find: Find, monkeypatch: pytest.MonkeyPatch
):
    native(tmp_path, *PYTHON, ONNXRUNTIME)
    (tmp_path / "backends").rename(tmp_path / "elsewhere")
    mine = write(tmp_path / "mine" / "tritonserver", b"#!/bin/sh\n", 0o755)
    monkeypatch.chdir(tmp_path)  # The server's own working directory is another one.
    found = find(mine, Path("elsewhere"))
    assert (found.binary, found.backends) == (mine, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((), {"wheel": None}, "no tritonserver found.*pip install.*pytriton"),
        ((Path("setup.py"),), {}, "not an executable file"),
        ((None, Path("nowhere")), {}, "no backend directory at nowhere"),
        ((), {"python_version": "3.99"}, r"for Python 3\.99, only for 3\.11"),
    ],
)
def test_what_cannot_be_used_is_refused(find: Find, given: tuple, options: dict, message: str):
    with pytest.raises(ServerUsageError, match=message):
        find(*given, **options)


def test_no_python_backend_anywhere_is_refused(tmp_path: Path, find: Find):
    native(tmp_path)
    with pytest.raises(ServerUsageError, match="no python backend.*--backend-directory"):
        find(wheel=None)


# --- its backends ------------------------------------------------------------------------------


def test_a_complete_server_runs_with_its_own_directory(tmp_path: Path, find: Find):
    native(tmp_path, *PYTHON, ONNXRUNTIME)
    assert find().backends == tmp_path / "backends"
    assert not (tmp_path / "out").exists()


def test_the_wheel_gets_its_stub_and_the_stand_in(find: Find):
    found = find()
    python, onnxruntime = found.backends / "python", found.backends / "onnxruntime"
    # Triton refuses a python-based backend whose library resolves to another directory.
    assert (python / "libtriton_python.so").resolve() == python / "libtriton_python.so"
    assert os.access(python / "triton_python_backend_stub", os.X_OK)
    assert not (python / "__pycache__").exists()
    assert (onnxruntime / "model.py").read_bytes() == (STAND_IN / "model.py").read_bytes()


def test_no_stand_in_where_the_native_backend_exists(tmp_path: Path, find: Find, wheel: Wheel):
    native(tmp_path, ONNXRUNTIME, "tensorrt/libtriton_tensorrt.so")
    found = find()
    assert (found.backends / ONNXRUNTIME).read_bytes() == b"native"
    assert (found.backends / "tensorrt/libtriton_tensorrt.so").read_bytes() == b"native"
    assert (found.backends / "python/libtriton_python.so").read_bytes() == b"wheel"
    assert found.libraries == (wheel.libraries,)


def test_a_native_python_backend_is_kept_beside_the_stand_in(tmp_path: Path, find: Find):
    native(tmp_path, *PYTHON)
    found = find(wheel=None)
    assert (found.backends / "python/libtriton_python.so").read_bytes() == b"native"
    assert (found.backends / "onnxruntime/model.py").is_file()
    assert (found.stub_python, found.libraries) == ("3.12", ())


def test_a_wrapper_without_backends_falls_back_to_the_wheel(
    tmp_path: Path, find: Find, wheel: Wheel
):
    write(tmp_path / "bin" / "tritonserver", b"#!/bin/sh\n", 0o755)
    found = find()
    assert (found.backends / "python/libtriton_python.so").read_bytes() == b"wheel"
    assert found.libraries == (wheel.libraries,)


# --- its environment ---------------------------------------------------------------------------


def test_environment_puts_this_python_and_the_libraries_first(tmp_path: Path):
    libraries = (tmp_path, tmp_path)
    found = Installation(tmp_path, tmp_path, libraries, RUNNING_PYTHON)
    base = {"PATH": "/bin", "LD_LIBRARY_PATH": "/mine", "OMP_NUM_THREADS": "7"}
    environment = found.environment(base)
    assert environment["PATH"] == f"{Path(sys.executable).parent}:/bin"
    parts = environment["LD_LIBRARY_PATH"].split(os.pathsep)
    assert parts[0] == str(tmp_path) and parts[-1] == "/mine"
    assert len(parts) == len(set(parts))
    assert environment["OMP_NUM_THREADS"] == "7"
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert base["PATH"] == "/bin"


def test_a_server_with_another_python_keeps_its_own(tmp_path: Path):
    environment = Installation(tmp_path, tmp_path, (), "3.99").environment({"PATH": "/bin"})
    assert environment["PATH"] == "/bin"
    assert "LD_LIBRARY_PATH" not in environment


# --- its command -------------------------------------------------------------------------------


def command(**options: object) -> list[str]:
    installation = Installation(Path("/opt/tritonserver"), Path("/backends"), (), None)
    return installation.command(
        "triton_1_ab",
        Path("/models"),
        options.pop("addresses", Addresses()),
        Ports(8000, 8001, 8002),
        **options,
    )


def test_every_port_is_bound_to_loopback_unless_told():
    found = command()
    assert found[0] == "/opt/tritonserver"
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        assert f"--{name}-address=127.0.0.1" in found
        assert f"--{name}-port={port}" in found


def test_each_port_can_have_an_address_of_its_own():
    found = command(addresses=Addresses(http="127.0.0.1", grpc="0.0.0.0", metrics="10.0.0.1"))
    assert "--http-address=127.0.0.1" in found
    assert "--grpc-address=0.0.0.0" in found
    assert "--metrics-address=10.0.0.1" in found


def test_further_arguments_come_last_and_so_win():
    assert command(extra_args=["--a=1", "--b=2"])[-2:] == ["--a=1", "--b=2"]
