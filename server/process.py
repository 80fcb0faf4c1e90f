"""Start, watch and end a process together with everything it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import psutil

_POLL_S = 0.05
_KILL_TIMEOUT_S = 10.0


class ProcessGroup:
    """A command in a session of its own, ended as a whole.

    A session of its own keeps the terminal's Ctrl-C from reaching it: its owner decides when it
    ends. Its id also outlives a wrapper script that ends before what it started.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        """Start the command.

        Args:
            command: program and arguments.
            environment: all of its environment.
            cwd: its working directory.
            log: file that takes its stdout and stderr, replaced if it exists.
        """
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                env=dict(environment),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Id of the process that was started, and of its group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Wait until it ends by itself and return its exit code."""
        return self._process.wait()

    def members(self) -> list[psutil.Process]:
        """The processes of the group that are alive."""
        self._process.poll()  # Reaps the first one.
        found = []
        for process in psutil.process_iter():
            try:
                is_member = os.getpgid(process.pid) == self.pid
                if is_member and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.Error):
                continue
        return found

    def memory_mib(self) -> float:
        """Proportional set size of the group in MiB: shared pages count once in the sum."""
        total = 0
        for process in self.members():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total / 2**20

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
        """
        try:
            # To all of the group, as the first process may be a wrapper that passes nothing on.
            # The python backend's stubs ignore both signals and end with their server.
            for number, patience_s in ((signal.SIGTERM, timeout_s), (signal.SIGINT, timeout_s / 2)):
                if self._signal(number, patience_s):
                    return
        finally:
            self._signal(signal.SIGKILL, _KILL_TIMEOUT_S)

    def _signal(self, number: signal.Signals, patience_s: float) -> bool:
        deadline = time.monotonic() + patience_s
        if not self.members():
            return True
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return True
        while time.monotonic() < deadline:
            if not self.members():
                return True
            time.sleep(_POLL_S)
        return False
