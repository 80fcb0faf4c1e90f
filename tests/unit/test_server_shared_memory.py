"""Clearing shared-memory segments, with a folder in place of /dev/shm and real locks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.shared_memory import hold, remove_dead_segments, remove_segments


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture
def two(tmp_path: Path) -> list[int]:
    """Two servers with a segment each, both alive."""
    held = []
    for server in ("triton_1_a", "triton_1_b"):
        (tmp_path / f"{server}_x").touch()
        held.append(hold(server, tmp_path))
    return held


def test_a_server_is_alive_as_long_as_a_process_has_its_file(tmp_path: Path, two: list[int]):
    assert remove_dead_segments(tmp_path) == []
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=two[:1]
    )
    for descriptor in two:  # The launcher is gone, of the first a process is left.
        os.close(descriptor)
    assert remove_dead_segments(tmp_path) == [".triton_1_b.lock", "triton_1_b_x"]
    child.communicate(b"\n")
    assert remove_dead_segments(tmp_path) == [".triton_1_a.lock", "triton_1_a_x"]
    assert names(tmp_path) == set()


def test_a_server_that_has_ended_is_cleared_away_by_its_launcher(tmp_path: Path, two: list[int]):
    assert remove_segments("triton_1_a", tmp_path) == [".triton_1_a.lock", "triton_1_a_x"]
    assert names(tmp_path) == {".triton_1_b.lock", "triton_1_b_x"}
    assert remove_segments("triton_1_a", tmp_path) == []


def test_what_is_not_ours_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "psm_1234").touch()
    (tmp_path / "triton_python_backend_shm_region_1").touch()  # Of a server without our file.
    (tmp_path / ".triton_2_x.lock").symlink_to(tmp_path / "psm_1234")
    before = names(tmp_path)
    assert remove_dead_segments(tmp_path) == []
    os.close(hold("triton_3_x", tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert remove_dead_segments(tmp_path) == []
    assert names(tmp_path) == before | {".triton_3_x.lock"}
