"""Start, watch and end a process together with everything it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

from .errors import ServerError

_GUARD = Path(__file__).with_name("guard.py")
_STDOUT = 1
_POLL_S = 0.05
_KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class LogCopy:
    """Where what a command writes goes besides its log.

    Attributes:
        path: a file that is appended to, and made anew where it was moved or removed; None: the
            standard output of this process.
        as_json: each line as a JSON object.
    """

    path: Path | None
    as_json: bool = False


class ProcessGroup:
    """A command in a session of its own, ended as a whole, at the latest with this process.

    A session of its own keeps the terminal's Ctrl-C from reaching it: its owner decides when it
    ends. It is led by a guard (`guard.py`), which ends the rest if this process goes without
    having done so. The group's id also outlives a wrapper script that ends before what it started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path,
        log: Path,
        keep_open: Collection[int] = (),
        copy: LogCopy | None = None,
    ) -> None:
        """Start the command.

        Args:
            command: program and arguments.
            environment: all of its environment.
            cwd: its working directory, which the guard removes if it has to end the command.
            log: file that takes its stdout and stderr, emptied if it exists. When it is longer
                than 16 MiB its beginning goes.
            keep_open: descriptors that the command inherits.
            copy: where its stdout and stderr go besides.
        """
        told: dict[str, object] = {"command": list(command), "log": str(log)}
        handed = list(keep_open)
        if copy is not None:
            told["as_json"] = copy.as_json
            if copy.path is not None:
                told["copy"] = str(copy.path)
            else:
                with suppress(OSError):  # Closed: there is nowhere to write to.
                    handed.append(os.dup(_STDOUT))
                    told["stdout"] = handed[-1]
        log.write_bytes(b"")
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                # Without the environment's and the site's modules: it should start at once.
                [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), str(cwd)],
                env=dict(environment),
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                pass_fds=tuple(handed),
            )
        for descriptor in handed[len(keep_open) :]:
            os.close(descriptor)
        assert self._guard.stdin is not None
        with self._guard.stdin as stdin:
            stdin.write(json.dumps(told).encode() + b"\n")

    @cached_property
    def pid(self) -> int:
        """Id of the command's process; of its guard where the command did not start."""
        assert self._guard.stdout is not None
        with self._guard.stdout as said:
            return int(said.readline() or self._guard.pid)

    @property
    def exit_code(self) -> int | None:
        """Its exit code, 128 more than the number of a signal that ended it; None while it runs."""
        return self._guard.poll()

    def wait(self) -> int:
        """Wait until it ends by itself and return its exit code."""
        return self._guard.wait()

    def members(self) -> list[psutil.Process]:
        """The processes of the group that are alive, the guard among them."""
        self._guard.poll()  # Reaps it.
        found = []
        for pid in psutil.pids():
            try:
                if os.getpgid(pid) != self._guard.pid:  # First, as it is cheap and true of most.
                    continue
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.Error):
                continue
        return found

    def process_ids(self) -> list[int]:
        """Ids of the group's processes that are alive, without the guard."""
        return [process.pid for process in self._without_guard()]

    def memory_mib(self) -> float:
        """Proportional set size in MiB of all but the guard: shared pages count once in the sum."""
        return self._sum(lambda process: process.memory_full_info().pss) / 2**20

    def cpu_s(self) -> float:
        """CPU seconds that the processes alive now have taken, without the guard."""
        return self._sum(lambda process: sum(process.cpu_times()[:2]))

    def _sum(self, figure: Callable[[psutil.Process], float]) -> float:
        total = 0.0
        for process in self._without_guard():
            with suppress(psutil.Error):
                total += figure(process)
        return total

    def _without_guard(self) -> list[psutil.Process]:
        return [process for process in self.members() if process.pid != self._guard.pid]

    def listens_on(self, ports: Collection[int]) -> bool:
        """Whether processes of the group, and not others, listen on all of these TCP ports."""
        own: set[int] = set()
        for process in self.members():
            try:
                connections = process.net_connections(kind="tcp")
            except psutil.Error:
                continue
            own.update(c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN)
        return own.issuperset(ports)

    def stop(self, timeout_s: float) -> None:
        """End the group: ask, then ask again, then kill.

        Args:
            timeout_s: seconds to wait after SIGTERM; half of it more after SIGINT.

        Raises:
            ServerError: a process is left that cannot be killed, as one can be that waits for a
                broken disk.
        """
        try:
            # To all of the group, as the first process may be a wrapper that passes nothing on.
            # The python backend's stubs ignore both signals and end with their server.
            for number, patience_s in ((signal.SIGTERM, timeout_s), (signal.SIGINT, timeout_s / 2)):
                if self._signal(number, patience_s):
                    return
        finally:
            is_gone = self._signal(signal.SIGKILL, _KILL_TIMEOUT_S)
            assert self._guard.stdout is not None
            self._guard.stdout.close()
            if not is_gone:
                left = ", ".join(str(process.pid) for process in self.members())
                raise ServerError(f"processes of the server cannot be killed: {left}")

    def _signal(self, number: signal.Signals, patience_s: float) -> bool:
        deadline = time.monotonic() + patience_s
        if not self.members():
            return True
        try:
            os.killpg(self._guard.pid, number)
        except ProcessLookupError:
            return True
        while time.monotonic() < deadline:
            if not self.members():
                return True
            time.sleep(_POLL_S)
        return False
