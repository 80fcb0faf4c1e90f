"""Finding a tritonserver: told, on PATH, in the wheel; and the environment it starts with."""

import os
import sys
from pathlib import Path

import pytest

from server import ServerUsageError, Wheel, find_tritonserver, find_wheel
from server.backend_directory import RUNNING_PYTHON, BackendDirectory
from server.environment import server_environment


def executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    site = tmp_path / "site-packages"
    (site / "nvidia_pytriton.libs").mkdir(parents=True)
    (site / "pytriton" / "tritonserver" / "backends" / "python").mkdir(parents=True)
    found = Wheel(site / "pytriton" / "tritonserver", site / "nvidia_pytriton.libs")
    executable(found.binary)
    return found


def test_the_installed_wheel_is_found_without_importing_it():
    sys.modules.pop("pytriton", None)
    found = find_wheel()
    assert found is not None
    assert found.binary.is_file()
    assert found.stub(RUNNING_PYTHON).is_file()
    assert list(found.libraries.glob("libtritonserver*.so"))
    assert "pytriton" not in sys.modules


def test_python_versions_are_sorted_as_versions(wheel: Wheel):
    for version in ("3.10", "3.9", "3.11"):
        (wheel.root / "python_backend_stubs" / version).mkdir(parents=True)
    assert wheel.python_versions == ["3.9", "3.10", "3.11"]


def test_path_comes_before_the_wheel(tmp_path: Path, wheel: Wheel):
    binary = executable(tmp_path / "image" / "bin" / "tritonserver")
    (tmp_path / "image" / "backends").mkdir()
    found = find_tritonserver(search_path=str(binary.parent), wheel=wheel)
    assert found.binary == binary
    assert found.backend_directory == tmp_path / "image" / "backends"
    assert found.library_directories == ()


def test_wheel_without_one_on_path(tmp_path: Path, wheel: Wheel):
    found = find_tritonserver(search_path=str(tmp_path), wheel=wheel)
    assert found.binary == wheel.binary
    assert found.backend_directory == wheel.root / "backends"
    assert found.library_directories == (wheel.libraries,)


def test_a_link_to_the_wheels_binary_gets_the_wheels_libraries(tmp_path: Path, wheel: Wheel):
    link = tmp_path / "bin" / "tritonserver"
    link.parent.mkdir()
    link.symlink_to(wheel.binary)
    found = find_tritonserver(search_path=str(link.parent), wheel=wheel)
    assert found.binary == link
    assert found.backend_directory == wheel.root / "backends"
    assert found.library_directories == (wheel.libraries,)


def test_explicit_comes_first_and_takes_a_backend_directory(tmp_path: Path, wheel: Wheel):
    binary = executable(tmp_path / "mine" / "tritonserver")
    on_path = executable(tmp_path / "bin" / "tritonserver")
    backends = tmp_path / "elsewhere"
    backends.mkdir()
    found = find_tritonserver(binary, backends, search_path=str(on_path.parent), wheel=wheel)
    assert found.binary == binary
    assert found.backend_directory == backends


def test_nothing_found_says_what_to_install(tmp_path: Path):
    with pytest.raises(ServerUsageError, match="no tritonserver found.*pip install.*pytriton"):
        find_tritonserver(search_path=str(tmp_path))


def test_explicit_must_be_executable(tmp_path: Path):
    plain = tmp_path / "tritonserver"
    plain.write_text("")
    with pytest.raises(ServerUsageError, match="not an executable file"):
        find_tritonserver(plain)


def test_backend_directory_must_exist(tmp_path: Path, wheel: Wheel):
    with pytest.raises(ServerUsageError, match="no backend directory at .*nowhere"):
        find_tritonserver(backend_directory=tmp_path / "nowhere", wheel=wheel)


def test_a_relative_backend_directory_is_made_absolute(
    tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
):
    # The server's own working directory is another one.
    (tmp_path / "backends").mkdir()
    monkeypatch.chdir(tmp_path)
    found = find_tritonserver(None, Path("backends"), search_path="", wheel=wheel)
    assert found.backend_directory == tmp_path / "backends"


def test_environment_puts_this_python_and_the_libraries_first(tmp_path: Path, wheel: Wheel):
    server = find_tritonserver(search_path=str(tmp_path), wheel=wheel)
    backends = BackendDirectory(tmp_path, (wheel.libraries,), RUNNING_PYTHON)
    base = {"PATH": "/bin", "LD_LIBRARY_PATH": "/mine", "OMP_NUM_THREADS": "7"}
    environment = server_environment(server, backends, base)
    assert environment["PATH"] == f"{Path(sys.executable).parent}:/bin"
    libraries = environment["LD_LIBRARY_PATH"].split(os.pathsep)
    assert libraries[0] == str(wheel.libraries)
    assert libraries[-1] == "/mine"
    assert len(libraries) == len(set(libraries))
    assert environment["OMP_NUM_THREADS"] == "7"
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert base["PATH"] == "/bin"


def test_a_server_with_another_python_keeps_its_own(tmp_path: Path):
    binary = executable(tmp_path / "bin" / "tritonserver")
    server = find_tritonserver(search_path=str(binary.parent))
    backends = BackendDirectory(tmp_path, (), "3.99")
    environment = server_environment(server, backends, {"PATH": "/bin"})
    assert environment["PATH"] == "/bin"
    assert "LD_LIBRARY_PATH" not in environment
