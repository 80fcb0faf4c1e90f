"""Servers as separate commands: supervised ones, and ones with file systems of their own."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from server.shared_memory import SHM_DIRECTORY
from tests.servers import STUB

ROOT = Path(__file__).resolve().parents[2]


class ServerCommand:
    """`python -m server` in a process of its own, between `with` and its end.

    Its `grpc_url`, `http_url` and `metrics_url` are known once it has started.

    Args:
        repository: the model repository.
        log: file for the command's own words.
        options: more options of the command.
        within: words to put before the command, such as those that give it a namespace.
    """

    def __init__(
        self,
        repository: Path,
        log: Path,
        options: Sequence[str] = (),
        within: Sequence[str] = (),
    ) -> None:
        self._log = log
        serve = [sys.executable, "-m", "server", "--repository", str(repository)]
        self._command = [*within, *serve, "--free-ports", "--json", *options]

    def __enter__(self) -> ServerCommand:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.stop()
            raise AssertionError(f"the server did not start: {self.log()}")
        facts = json.loads(line)
        self.grpc_url: str = facts["grpc_url"]
        self.http_url: str = facts["http_url"]
        self.metrics_url: str = facts["metrics_url"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask it to end and wait."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=90)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def log(self) -> str:
        """What the command itself has said."""
        return self._log.read_text(errors="replace")

    def process_ids(self) -> list[int]:
        """Ids of tritonserver and all its model processes, alive now."""
        return [*self.tritonservers(), *self._children(lambda name: name == STUB)]

    def tritonservers(self) -> list[int]:
        """Ids of the tritonserver processes that belong to this command; one, or none."""
        return self._children(lambda name: name == "tritonserver")

    def memory_mib(self) -> float:
        """Proportional set size of the server and all its model processes, in MiB."""
        return memory_mib(self.process_ids())

    def _children(self, wanted: Callable[[str], bool]) -> list[int]:
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                words = process.cmdline()
                if words and process.status() != psutil.STATUS_ZOMBIE:
                    if wanted(Path(words[0]).name):
                        found.append(process.pid)
            except psutil.Error:
                continue
        return found


def memory_mib(process_ids: Sequence[int]) -> float:
    """Proportional set size in MiB: shared pages count once in the sum."""
    return sum(psutil.Process(pid).memory_full_info().pss for pid in process_ids) / 2**20


def segment_bytes(pid: int) -> int:
    """Memory that the shared segments of a server really take."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in lines if f" {SHM_DIRECTORY}/" in line}
    return sum(Path(path).stat().st_blocks * 512 for path in paths)


def own_file_systems(sizes: Mapping[str, str], first: Sequence[str] = ()) -> list[str]:
    """Words to put before a command, which then has small file systems of its own.

    They lie in a mount namespace, so other processes see neither them nor that they are full.

    Args:
        sizes: folder to size, such as `{"/dev/shm": "64m"}`; the folders must exist.
        first: a command to run in there before.
    """
    steps = [f"mount -t tmpfs -o size={size} tmpfs {path}" for path, size in sizes.items()]
    if first:
        steps.append(f"{shlex.join(first)} >&2")
    script = " && ".join([*steps, 'exec "$@"'])
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]


def seen_by(pid: int, path: Path | str) -> Path:
    """A path in the mount namespace of a process."""
    return Path(f"/proc/{pid}/root") / str(path).lstrip("/")


def run_beside(pid: int, command: Sequence[str]) -> subprocess.CompletedProcess:
    """Run a command in the mount namespace of a process."""
    enter = ["nsenter", f"--target={pid}", "--user", "--mount", "--preserve-credentials"]
    return subprocess.run(
        [*enter, f"--wd={ROOT}", *command], capture_output=True, text=True, check=False
    )
