"""Clearing shared-memory segments, with a folder in place of /dev/shm and real mappings."""

import mmap
import os
import time
from pathlib import Path

import pytest

from server.shared_memory import remove_dead_segments


def segment(directory: Path, name: str, age_s: float = 3600) -> Path:
    path = directory / name
    path.write_bytes(b"\0" * mmap.PAGESIZE)
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_a_dead_segment_goes_and_a_mapped_one_stays(tmp_path: Path):
    dead, live = segment(tmp_path, "triton_dead"), segment(tmp_path, "triton_live")
    with live.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        # ctime cannot be set back, so the age limit is off here.
        assert remove_dead_segments(directory=tmp_path, youngest_age_s=0) == ["triton_dead"]
        assert remove_dead_segments("triton_live", tmp_path) == []
        assert live.exists()
    assert not dead.exists()
    assert remove_dead_segments("triton_live", tmp_path) == ["triton_live"]


def test_a_young_segment_stays_unless_its_server_is_known_to_be_dead(tmp_path: Path):
    segment(tmp_path, "triton_1_a_x", age_s=0)
    segment(tmp_path, "triton_1_b_x", age_s=0)
    assert remove_dead_segments(directory=tmp_path) == []
    assert remove_dead_segments("triton_1_a", tmp_path) == ["triton_1_a_x"]
    assert [path.name for path in tmp_path.iterdir()] == ["triton_1_b_x"]


def test_other_names_are_never_touched(tmp_path: Path):
    segment(tmp_path, "psm_1234")
    segment(tmp_path, "not_triton_1")
    assert remove_dead_segments(directory=tmp_path, youngest_age_s=0) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_maps_of_other_processes_count(tmp_path: Path):
    shm, proc = tmp_path / "shm", tmp_path / "proc"
    (proc / "42").mkdir(parents=True)
    (proc / "self").mkdir()
    shm.mkdir()
    segment(shm, "triton_a")
    segment(shm, "triton_ab")
    (proc / "42" / "maps").write_text(
        f"7f3b9f10f000-7f3b9f20f000 rw-s 00000000 00:1b 43    {shm}/triton_ab\n"
        "7f3b9f30f000-7f3b9f40f000 r--p 00000000 00:1b 44    /usr/lib/libc.so.6\n"
    )
    assert remove_dead_segments(directory=shm, proc=proc, youngest_age_s=0) == ["triton_a"]


@pytest.mark.parametrize("command", ["tritonserver", "bash"])
def test_where_a_triton_cannot_be_asked_only_what_is_known_to_be_dead_goes(
    tmp_path: Path, command: str
):
    shm, proc = tmp_path / "shm", tmp_path / "proc"
    shm.mkdir()
    (proc / "42" / "maps").mkdir(parents=True)  # not to be read, even by root
    (proc / "42" / "cmdline").write_text(f"/usr/bin/{command}\0--x\0")
    segment(shm, "triton_1_x")
    assert remove_dead_segments("triton_1", shm, proc) == ["triton_1_x"]
    segment(shm, "triton_2_x")
    expected = [] if command == "tritonserver" else ["triton_2_x"]
    assert remove_dead_segments(directory=shm, proc=proc, youngest_age_s=0) == expected


def test_another_users_triton_does_not_stand_in_the_way(tmp_path: Path, monkeypatch):
    shm, proc = tmp_path / "shm", tmp_path / "proc"
    shm.mkdir()
    (proc / "42" / "maps").mkdir(parents=True)
    (proc / "42" / "cmdline").write_text("/usr/bin/tritonserver\0")
    segment(shm, "triton_2_x")
    own, stat = os.geteuid(), Path.stat

    def other(path, **options):
        found = list(stat(path, **options))
        return os.stat_result([*found[:4], own + 1, *found[5:]])

    monkeypatch.setattr(
        type(proc), "stat", lambda p, **o: (other if p.parent == proc else stat)(p, **o)
    )
    assert remove_dead_segments(directory=shm, proc=proc, youngest_age_s=0) == ["triton_2_x"]


def test_no_shared_memory_directory_is_fine(tmp_path: Path):
    assert remove_dead_segments(directory=tmp_path / "none") == []
