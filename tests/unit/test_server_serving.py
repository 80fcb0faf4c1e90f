"""What a look sees of real processes and cgroups. No server."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from server.access import Access
from server.installation import STUB_NAME
from server.serving import Serving, Stub, allowed_cores, find_stubs, local_processes


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[int]:
    """Id of a process that looks like an instance of `router` and ends with its input."""
    model = tmp_path / "router" / "1" / "model.py"
    model.parent.mkdir(parents=True)
    model.write_text("read line\n")
    process = subprocess.Popen(
        [f"/backends/{STUB_NAME}", str(model)], executable="/bin/sh", stdin=subprocess.PIPE
    )
    yield process.pid
    process.kill()
    process.communicate()


def test_model_instances_are_told_by_their_arguments(stub: int):
    other = subprocess.Popen(["/bin/sleep", "61"])
    try:
        assert find_stubs([stub, other.pid, 2**22 + 1]) == [Stub(stub, "router", "1")]
        serving = Serving(Access("127.0.0.1:1"), lambda: [stub, other.pid])
        assert serving.stubs() == [Stub(stub, "router", "1")]
        assert 0 <= serving.cpu_s("router") < 5 and serving.cpu_s("vit_low") == 0
    finally:
        other.kill()
        other.wait()


def test_where_processes_cannot_be_seen_none_are_missed():
    serving = Serving(Access("10.0.0.7:8001"), None)
    assert serving.stubs() is None and serving.cpu_s("router") == 0
    assert serving.allowed_cores() > 0 and serving.why_it_ended() == ""


def test_a_local_servers_processes_are_found_by_its_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        found = local_processes(Access(f"127.0.0.1:{port}"))
        child = subprocess.Popen(["/bin/sleep", "61"])
        try:
            assert found is not None and child.pid in found()
        finally:
            child.kill()
            child.wait()
        assert local_processes(Access(f"10.0.0.7:{port}")) is None
    assert local_processes(Access(f"127.0.0.1:{port}")) is None


@pytest.mark.parametrize(
    ("line", "files", "cores"),
    [
        ("0::/pod/app", {"pod/app/cpu.max": "20000 100000"}, 0.2),
        ("0::/pod/app", {"pod/app/cpu.max": "max 100000", "pod/cpu.max": "30000 100000"}, 0.3),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),  # As a container sees its own.
        (
            "4:cpu,cpuacct:/pod",
            {
                "cpu,cpuacct/pod/cpu.cfs_quota_us": "25000",
                "cpu,cpuacct/pod/cpu.cfs_period_us": "50000",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/cpu.cfs_period_us": "50000",
            },
            0.5,
        ),
        ("4:memory:/pod", {"memory/pod/cpu.max": "1000 100000"}, None),
        ("0::/pod", {"pod/cpu.max": "max 100000"}, None),
    ],
)
def test_the_quota_of_a_cgroup_limits_the_cores(
    tmp_path: Path, line: str, files: dict[str, str], cores: float | None
):
    (tmp_path / "proc" / "1").mkdir(parents=True)
    (tmp_path / "proc" / "1" / "cgroup").write_text(f"{line}\n")
    for name, text in files.items():
        (tmp_path / "cgroups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroups" / name).write_text(text)
    found = allowed_cores(1, tmp_path / "cgroups", tmp_path / "proc")
    assert found == cores if cores is not None else found >= 1


def test_an_interruption_while_a_connection_is_made_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    monkeypatch.setattr("grpc.insecure_channel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Access("127.0.0.1:1").open()
    gc.collect()
    assert ignored == []


class Starved:
    """A client of a server that has no time to say what a model takes."""

    def get_model_metadata(self, *_: object, **__: object) -> None:
        raise InferenceServerException("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED")


def test_a_server_too_busy_to_say_what_a_model_takes_has_not_failed():
    serving = Serving(Access("127.0.0.1:8001"), None)
    serving._client = Starved()
    reply = serving.ask("vit_low").reply
    assert reply is not None and reply.is_unavailable
