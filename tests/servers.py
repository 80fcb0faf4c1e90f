"""Real tritonservers for tests: their start and end, their processes, what they count."""

from __future__ import annotations

import io
import re
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from PIL import Image

from server import ServerStartError, TritonServer
from server.installation import find_installation, find_wheel

STUB = "triton_python_backend_stub"
# Arguments of the stub: model file, segment, two sizes, server, backends, pipe, instance, ...
_INSTANCE = 8
FLUSHED_S = 1.2  # the router hands its counts on twice a second
ECHO_CONFIG = """backend: "python"
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
ECHO_MODEL = """import os


class TritonPythonModel:
    def initialize(self, args):
        BODY

    def execute(self, requests):
        raise RuntimeError("not called here")
"""


@contextmanager
def running(repository: Path, attempts: int = 1, **options: object) -> Iterator[TritonServer]:
    """A server whose end nobody looks at: killed, for Triton takes four seconds to stop in peace.

    Args:
        repository: the model repository.
        attempts: starts to try, where a busy machine may not answer the first image in its budget.
        options: more of `TritonServer`'s.
    """
    server = TritonServer(repository, free_ports=True, stop_patience_s=0, **options)
    for left in reversed(range(attempts)):
        try:
            server.start()
            break
        except ServerStartError:
            if not left:
                raise
            server = TritonServer(repository, free_ports=True, stop_patience_s=0, **options)
    try:
        yield server
    finally:
        server.stop()


def add_model(repository: Path, name: str, body: str = "pass", config: str = ECHO_CONFIG) -> Path:
    """Write a python model that loads and is not asked; returns the repository.

    Args:
        repository: the model repository.
        name: of the model.
        body: what it does when it is loaded.
        config: its config.pbtxt.
    """
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(ECHO_MODEL.replace("BODY", body))
    (folder.parent / "config.pbtxt").write_text(config)
    return repository


def grey_image() -> bytes:
    """A JPEG that any server of ours decodes."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, "JPEG")
    return buffer.getvalue()


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def skip_stand_ins(items: Iterable[pytest.Item]) -> None:
    """Skip tests marked `stand_in` where the server that the others use runs C++ onnxruntime.

    Args:
        items: tests, of any mark.
    """
    marked = [item for item in items if item.get_closest_marker("stand_in")]
    if not marked or shutil.which("tritonserver") is None:  # the wheel has no such backend
        return
    with tempfile.TemporaryDirectory() as folder:
        found = find_installation(Path(folder) / "backends", wheel=find_wheel())
        has_stand_in = found.has_stand_in
    if not has_stand_in:
        for item in marked:
            item.add_marker(pytest.mark.skip(f"{found.binary} has the C++ onnxruntime backend"))


def is_alive(pid: int) -> bool:
    """Whether a process runs; an orphan that nobody has reaped yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stubs(pids: Sequence[int], model: str) -> list[int]:
    """Those of a server's processes that are instances of a model.

    Args:
        pids: of a server and its model processes.
        model: the model's name; its instances are called `<model>_0_0`, `<model>_0_1`, ...
    """
    return [pid for pid in pids if instance_of(pid).startswith(f"{model}_0_")]


def instance_of(pid: int) -> str:
    """The name of the model instance that a process is; empty where it is none, or has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    if len(words) <= _INSTANCE or not words[0].endswith(STUB.encode()):
        return ""
    return words[_INSTANCE].decode()


def metrics(server: TritonServer) -> dict[str, float]:
    """Every series of the router, by name and labels as printed."""
    with urllib.request.urlopen(server.metrics_url, timeout=30) as response:
        lines = response.read().decode().splitlines()
    series = (line.rsplit(" ", 1) for line in lines if line.startswith("adaptive_vit_"))
    return {name: float(value) for name, value in series}


def series(name: str, **labels: str) -> str:
    """A series as the server prints it: labels in alphabetical order, but for a bucket's bound."""
    ordered = sorted(labels, key=lambda label: (label == "le", label))
    inner = ",".join(f'{label}="{labels[label]}"' for label in ordered)
    return f"adaptive_vit_{name}{{{inner}}}"


def bucket(server: TritonServer, bound: float) -> str:
    """A bound of the score's buckets as the server prints it."""
    printed = re.findall(
        r'adaptive_vit_score_bucket{version="1",le="([-\d.e+]+)"', "\n".join(metrics(server))
    )
    return min(printed, key=lambda text: abs(float(text) - bound))


def growth(server: TritonServer) -> Callable[..., Callable[[], float]]:
    """By how much the router's series grow from now on.

    Returns:
        `grown(name, **labels)`, whose value for a series of version 1 is asked by calling it.
    """
    time.sleep(FLUSHED_S)  # what was asked before is counted before
    before = metrics(server)

    def grown(name: str, **labels: str) -> Callable[[], float]:
        key = series(name, version="1", **labels)
        return lambda: metrics(server)[key] - before[key]

    return grown
