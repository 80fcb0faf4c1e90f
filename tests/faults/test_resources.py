"""No shared memory, no disk: on small file systems of the server's own, which nobody else sees."""

import logging
import os
import subprocess
import sys
import time
from dataclasses import replace

from bundle import manifest
from server.shared_memory import hold
from tests.faults import inject
from tests.faults.asking import question
from tests.faults.experiment import measure, reasons
from tests.faults.load import Load, counts
from tests.faults.processes import ROOT, ServerCommand, own_file_systems, run_beside, seen_by

SHM = "/dev/shm"
FAULT_S = 4.0


def test_a_full_shared_memory_fails_large_requests_and_no_others(
    assembled, truth, record, tmp_path
):
    padding = bytes(12 * 2**20)  # more than a segment holds at first; decoders stop before it
    padded = replace(truth, files=[data + padding for data in truth.files[:4]])
    large = [question(padded, "grpc", "adaptive_vit", [row]) for row in range(4)]
    own = own_file_systems({SHM: "160m"})  # 48 at the start, and room to grow
    with ServerCommand(assembled(), tmp_path / "server.log", ["--supervise"], own) as server:
        folder = seen_by(server.tritonservers()[0], SHM)

        def fill():
            with inject.filled(folder), Load(server, truth, [large]) as load:
                time.sleep(FAULT_S)
            crowd.extend(load.requests)

        crowd = []
        fault = f"/dev/shm full for {FAULT_S:g} s, images of 12 MiB"
        found, after = measure(server, truth, fault, fill)
        with Load(server, truth, [large]) as load:
            time.sleep(FAULT_S)
        said = (tmp_path / "server.log").read_text()
    of_large = {outcome: count for outcome, count in counts(crowd).items() if count}
    record(found.noting(f"the large ones: {of_large}"))
    assert found.wrong == 0 and not reasons(crowd, "wrong"), reasons(after, "wrong")
    assert not any(request.outcome == "ok" for request in crowd), "there was room"
    assert found.recovery_s is not None and found.recovery_s < 30, said[-2000:]
    assert load.requests and all(request.outcome == "ok" for request in load.requests), reasons(
        load.requests, "failed"
    )
    logging.getLogger("faults").info("large requests were told: %s", reasons(crowd, "failed"))


def test_a_full_disk_while_assembling_leaves_the_served_repository_whole(
    build, truth, record, tmp_path
):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    assemble = [sys.executable, "-m", "export", "repository", "--onnx", str(build / "onnx")]
    assemble += ["--calibration", str(build / "calibration.json")]
    assemble += ["--out", str(shelf / "repository")]
    # Room for one repository of static-vit (21 MiB), not for two.
    own = own_file_systems({str(shelf): "32m"}, first=assemble)
    with ServerCommand(shelf / "repository", tmp_path / "server.log", within=own) as server:
        pid = server.tritonservers()[0]
        here = seen_by(pid, shelf)
        before = files(here)
        done = []
        found, after = measure(
            server,
            truth,
            "disk full while assembling",
            lambda: done.append(run_beside(pid, assemble)),
        )
        left = files(here)
        manifest.verify(here / "repository")
    record(found)
    assert found.ok == found.requests, reasons(after, "failed")
    assert done[0].returncode == 2, done[0].stderr
    assert done[0].stderr.startswith("error: ") and done[0].stderr.count("\n") == 1
    assert "No space left on device" in done[0].stderr
    assert left == before


def files(folder):
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(path) for path in found if "__pycache__" not in path.parts)


def test_a_launcher_in_a_user_namespace_leaves_a_live_servers_segment(tmp_path):
    """Root there may not read the maps of a process outside, though both are the same user."""
    for name in ("triton_live", "triton_dead"):
        (tmp_path / f"{name}_x").touch()
        (tmp_path / f".{name}.lock").touch()
    clear = (
        "import sys; from pathlib import Path; from server.shared_memory import *; "
        "print(*remove_dead_segments(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", clear, str(tmp_path)]
    lived = hold("triton_live", tmp_path)
    removed = subprocess.check_output(["unshare", "--map-root-user", *command], cwd=ROOT)
    assert removed == b".triton_dead.lock triton_dead_x\n"
    os.close(lived)
    assert subprocess.check_output(command, cwd=ROOT) == b".triton_live.lock triton_live_x\n"
