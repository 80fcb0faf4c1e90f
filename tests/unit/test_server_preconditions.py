"""What a start needs of the machine: each thing that is missing is named, with a way out."""

import os
import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from server import ServerUsageError, TritonServer, preconditions
from server.preconditions import check_machine, check_shared_memory, temporary_folder
from tests.servers import ECHO_CONFIG, add_model

MIB = 2**20


def disk(free_mib: float = 1000, flags: int = 0) -> SimpleNamespace:
    """What statvfs says of a file system."""
    return SimpleNamespace(f_bavail=int(free_mib * 256), f_frsize=4096, f_flag=flags)


def test_a_whole_machine_has_what_is_needed():
    check_machine()
    assert temporary_folder().is_dir()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("proc", "there is no /proc here.*mount -t proc"),
        ("shm", "there is no folder .*nowhere.*mount a tmpfs"),
        ("read-only shm", "shm cannot be written.*mount a tmpfs"),
        ("files", "only 64 files may be open.*ulimit -n 1024"),
    ],
)
def test_what_is_missing_is_named_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, message: str
):
    if missing == "proc":
        monkeypatch.setattr(preconditions, "_PROC", tmp_path / "self/stat")
    elif missing == "shm":
        monkeypatch.setattr(preconditions, "SHM_DIRECTORY", tmp_path / "nowhere")
    elif missing == "read-only shm":
        (tmp_path / "shm").mkdir()
        monkeypatch.setattr(preconditions, "SHM_DIRECTORY", tmp_path / "shm")
        refuse = lambda path, mode: path != tmp_path / "shm"  # noqa: E731  # root may write it
        monkeypatch.setattr(os, "access", refuse)
    else:
        monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 4096))
    with pytest.raises(ServerUsageError, match=message):
        check_machine()
    # Before a port, a folder or a process: not even the repository is looked at.
    with pytest.raises(ServerUsageError, match=message):
        TritonServer(tmp_path / "no repository").start()


def test_a_folder_for_temporary_files_that_is_full_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda path: disk(free_mib=3))
    with pytest.raises(ServerUsageError, match="has 3 MiB left.*make room, or set TMPDIR"):
        temporary_folder()


def test_where_no_program_may_run_another_folder_is_preferred_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    odd, first, second = tmp_path / "it's", tmp_path / "noexec", tmp_path / "plain"
    for folder in (odd, first, second):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    monkeypatch.setattr(preconditions, "_PLAIN_FOLDERS", (first, second))
    flags = {first: os.ST_NOEXEC}
    monkeypatch.setattr(os, "statvfs", lambda path: disk(flags=flags.get(path, 0)))
    assert temporary_folder() == second


def test_no_folder_for_temporary_files_is_said(monkeypatch: pytest.MonkeyPatch):
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(ServerUsageError, match=r"no folder for .*'/tmp'.*; set TMPDIR"):
        temporary_folder()


def test_in_place_of_an_odd_folder_for_temporary_files_another_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    odd, first, second = tmp_path / "it's", tmp_path / "nowhere", tmp_path / "plain"
    odd.mkdir()
    second.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    monkeypatch.setattr(preconditions, "_PLAIN_FOLDERS", (first, second))
    assert temporary_folder() == second
    monkeypatch.setattr(preconditions, "_PLAIN_FOLDERS", (first,))
    with pytest.raises(ServerUsageError, match=r"it's.*misread.*no folder .*nowhere.*TMPDIR"):
        temporary_folder()


@pytest.mark.parametrize(("free_mib", "fits"), [(31, False), (33, True)])
def test_segments_of_all_model_processes_have_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_mib: int, fits: bool
):
    add_model(tmp_path / "models", "router", config=ECHO_CONFIG.replace("count: 1", "count: 3"))
    add_model(tmp_path / "models", "low", config='backend: "onnxruntime"')
    add_model(tmp_path / "models", "entry", config='platform: "ensemble"')
    add_model(tmp_path / "models", "broken", config="no {")
    stand_in = tmp_path / "backends" / "onnxruntime" / "model.py"
    stand_in.parent.mkdir(parents=True)
    stand_in.touch()
    monkeypatch.setattr(os, "statvfs", lambda path: disk(free_mib))
    models = ["router", "low", "entry", "broken"]
    arguments = (tmp_path / "models", models, tmp_path / "backends", 8 * MIB)
    if fits:
        check_shared_memory(*arguments)
        return
    with pytest.raises(ServerUsageError, match=r"has 31 MiB left, and 4 .* 32 MiB.*--shm-size"):
        check_shared_memory(*arguments)
    stand_in.unlink()  # The C++ backend has no processes.
    check_shared_memory(*arguments)
