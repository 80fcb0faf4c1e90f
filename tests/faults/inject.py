"""Faults, injected for real: signals to a model's own process, models taken away, memory filled."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tritonclient.grpc as triton

from tests.servers import instance_of


def kill(process_ids: Sequence[int]) -> None:
    """SIGKILL to each."""
    assert process_ids, "nothing to kill"
    for pid in process_ids:
        os.kill(pid, signal.SIGKILL)


def stop(process_ids: Sequence[int]) -> None:
    """SIGSTOP to each."""
    assert process_ids, "nothing to stop"
    for pid in process_ids:
        os.kill(pid, signal.SIGSTOP)


@contextmanager
def stopped(process_ids: Sequence[int]) -> Iterator[None]:
    """SIGSTOP to each, and SIGCONT at the end to those that are still there."""
    stop(process_ids)
    try:
        yield
    finally:
        for pid in process_ids:
            if instance_of(pid):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def without_model(server, model: str) -> Iterator[None]:
    """Unload a model, and load it again at the end. Needs explicit model control."""
    with triton.InferenceServerClient(server.grpc_url) as control:
        control.unload_model(model)
        try:
            yield
        finally:
            control.load_model(model)


@contextmanager
def filled(folder: Path) -> Iterator[int]:
    """Fill a small file system to its last byte, and free it at the end.

    Yields:
        How many bytes it took.
    """
    size = os.statvfs(folder)
    assert size.f_blocks * size.f_frsize < 2**30, f"{folder} is no small file system of its own"
    filler = folder / "filler"
    try:
        with filler.open("wb") as file:
            free = os.statvfs(folder)
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
        yield filler.stat().st_size
    finally:
        filler.unlink(missing_ok=True)
