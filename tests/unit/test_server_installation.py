"""Finding a tritonserver, preparing its backends, and what it starts with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from server import Installation, ServerUsageError, Wheel, find_wheel, installation
from server.installation import RUNNING_PYTHON, STAND_IN, find_installation
from server.ports import Addresses, Ports
from tests.servers import skip_stand_ins

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
def find(tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> Find:
    """Searches only `tmp_path/bin`, and falls back to the wheel."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(installation, "RUNNING_PYTHON", "3.11")

    def find(*given: Path | None, **options: object) -> Installation:
        return find_installation(tmp_path / "out", *given, **{"wheel": wheel, **options})

    return find


def native(tmp_path: Path, *files: str) -> Path:
    """An executable with these backends beside it."""
    (tmp_path / "backends").mkdir(parents=True)
    for file in files:
        write(tmp_path / "backends" / file, STUB if file.endswith("stub") else b"native")
    return write(tmp_path / "bin" / "tritonserver", b"#!/bin/sh\n", 0o755)


# --- what the tests of a server ask -------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "skipped"),
    [((*PYTHON, ONNXRUNTIME), ["its"]), ((ONNXRUNTIME,), ["its"]), (PYTHON, []), (None, [])],
)
def test_tests_of_the_stand_in_are_skipped_where_the_cpp_backend_runs(
    tmp_path: Path, find: Find, files: tuple[str, ...] | None, skipped: list[str]
):
    if files is not None:
        native(tmp_path, *files)
    items = [FakeTest("its", ["stand_in"]), FakeTest("another", ["alone"])]
    skip_stand_ins(items)  # type: ignore[arg-type]
    assert [item.name for item in items if "skip" in item.marks] == skipped


class FakeTest:
    """What is asked of a pytest item."""

    def __init__(self, name: str, marks: list[str]) -> None:
        self.name, self.marks = name, marks

    def get_closest_marker(self, name: str) -> bool:
        return name in self.marks

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.name)


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


OWN, WHEELS, STAND_IN_S = b"native", b"wheel", (STAND_IN / "model.py").read_bytes()
TENSORRT = "tensorrt/libtriton_tensorrt.so"


@pytest.mark.parametrize(
    ("files", "has_wheel", "python", "onnxruntime", "stub_python"),
    [
        ((*PYTHON, ONNXRUNTIME), True, OWN, OWN, "3.12"),  # Before the wheel, and untouched.
        ((*PYTHON, TENSORRT), False, OWN, STAND_IN_S, "3.12"),
        ((ONNXRUNTIME, TENSORRT), True, WHEELS, OWN, "3.11"),
        ((), True, WHEELS, STAND_IN_S, "3.11"),  # A wrapper without backends of its own.
        ("link", True, WHEELS, STAND_IN_S, "3.11"),  # To the wheel's binary.
        (None, True, WHEELS, STAND_IN_S, "3.11"),  # The wheel's alone.
    ],
)
def test_a_server_gets_the_backends_that_it_has_not(
    tmp_path: Path,
    find: Find,
    wheel: Wheel,
    files: tuple[str, ...] | str | None,
    has_wheel: bool,
    python: bytes,
    onnxruntime: bytes,
    stub_python: str,
):
    binary = wheel.binary
    if files == "link":
        (tmp_path / "bin").mkdir()
        binary = tmp_path / "bin" / "tritonserver"
        binary.symlink_to(wheel.binary)
    elif files is not None:
        binary = native(tmp_path, *files)
    is_complete = (python, onnxruntime) == (OWN, OWN)
    backends = tmp_path / ("backends" if is_complete else "out")
    libraries = (wheel.libraries,) if python == WHEELS else ()
    found = find() if has_wheel else find(wheel=None)
    assert found == Installation(binary, backends, libraries, stub_python)
    assert found.has_stand_in is (onnxruntime == STAND_IN_S)
    assert (tmp_path / "out").exists() is not is_complete
    # Triton refuses a python-based backend whose library resolves to another directory.
    library = backends / "python/libtriton_python.so"
    assert library.resolve() == library and library.read_bytes() == python
    assert is_complete or os.access(backends / PYTHON[1], os.X_OK)
    assert not (backends / "python/__pycache__").exists()
    file = "onnxruntime/model.py" if onnxruntime == STAND_IN_S else ONNXRUNTIME
    assert (backends / file).read_bytes() == onnxruntime
    if isinstance(files, tuple) and TENSORRT in files:
        assert (backends / TENSORRT).read_bytes() == OWN


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
        ((), {}, r"for Python 3\.99, only for 3\.11"),
    ],
)
def test_what_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, find: Find, given: tuple, options: dict, message: str
):
    monkeypatch.setattr(installation, "RUNNING_PYTHON", "3.99")
    with pytest.raises(ServerUsageError, match=message):
        find(*given, **options)


def test_no_python_backend_anywhere_is_refused(tmp_path: Path, find: Find):
    native(tmp_path)
    with pytest.raises(ServerUsageError, match="no python backend.*--backend-directory"):
        find(wheel=None)


# --- its environment ---------------------------------------------------------------------------


def test_environment_puts_this_python_and_the_libraries_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    libraries = (tmp_path, tmp_path)
    found = Installation(tmp_path, tmp_path, libraries, RUNNING_PYTHON)
    base = {"PATH": "/bin", "LD_LIBRARY_PATH": "/mine", "OMP_NUM_THREADS": "7"}
    monkeypatch.setattr(os, "environ", base)
    environment = found.environment(tmp_path)
    assert environment["PATH"] == f"{Path(sys.executable).parent}:/bin"
    parts = environment["LD_LIBRARY_PATH"].split(os.pathsep)
    assert parts[0] == str(tmp_path) and parts[-1] == "/mine"
    assert len(parts) == len(set(parts))
    assert environment["OMP_NUM_THREADS"] == "7"
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert base["PATH"] == "/bin"


def test_a_server_with_another_python_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "environ", {"PATH": "/bin"})
    environment = Installation(tmp_path, tmp_path, (), "3.99").environment(tmp_path)
    assert environment["PATH"] == "/bin"
    assert "LD_LIBRARY_PATH" not in environment


@pytest.mark.parametrize("path", [None, ""])
def test_without_path_programs_are_found_as_a_shell_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
):
    monkeypatch.setattr(os, "environ", {} if path is None else {"PATH": path})
    environment = Installation(tmp_path, tmp_path, (), "3.99").environment(tmp_path)
    assert environment["PATH"] == os.defpath


def test_without_bash_no_model_would_ever_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", {"PATH": str(tmp_path)})
    with pytest.raises(ServerUsageError, match=r"no bash on PATH.*install it, or give PATH"):
        Installation(tmp_path, tmp_path, (), "3.99").environment(tmp_path)


def test_lists_of_folders_hold_only_plain_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    odd = tmp_path / "a:b $LIB ü"
    python = write(odd / "venv/bin/python3", mode=0o755)
    (odd / "libraries").mkdir()
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(installation, "_libpython_directory", list)
    monkeypatch.setattr(os, "environ", {})
    found = Installation(tmp_path, tmp_path, (odd / "libraries",), RUNNING_PYTHON)
    environment = found.environment(links)
    assert environment["PATH"] == f"{links}/python/bin:{os.defpath}"  # And bash is found.
    assert (links / "python").resolve() == odd / "venv"
    assert environment["LD_LIBRARY_PATH"] == f"{links}/libraries-0"
    assert (links / "libraries-0").resolve() == odd / "libraries"


def test_where_no_program_may_run_only_a_stub_that_would_be_copied_there_is_refused(
    tmp_path: Path, find: Find, monkeypatch: pytest.MonkeyPatch
):
    binary = native(tmp_path / "own", *PYTHON, ONNXRUNTIME)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert find(binary).backends == tmp_path / "own" / "backends"
    with pytest.raises(ServerUsageError, match="is mounted noexec.*set TMPDIR to a folder where"):
        find()


def test_complete_backends_of_an_odd_path_are_handed_on_by_a_link(tmp_path: Path, find: Find):
    binary = native(tmp_path / "it's; a", *PYTHON, ONNXRUNTIME)
    found = find(binary)
    assert found.backends == tmp_path / "own-backends"
    assert found.backends.resolve() == tmp_path / "it's; a" / "backends"


# --- its command -------------------------------------------------------------------------------


def command(**options: object) -> list[str]:
    found = Installation(Path("/opt/tritonserver"), Path("/backends"), (), None)
    return found.command(
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
