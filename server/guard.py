"""Run a command that must not outlive its launcher: `guard.py LAUNCHER_PID SCRATCH`.

What to run and where its output goes comes as one line of JSON on stdin (`ProcessGroup` writes it),
because every user of the machine may read the arguments of every process, and the command can hold
a key.

The server runs in a session of its own, so neither a closed terminal nor a kill of the launcher
reaches it. This program stands between the two. It prints the command's process id, hands its
output on, and returns its exit code; once the launcher is gone, however it went, it ends the
process group and removes the folder SCRATCH.

It asks for its parent's id instead of waiting for a pipe to close, because whatever the launcher
forked would hold that pipe open. It runs as a file, outside this package, and needs nothing of it.
"""

from __future__ import annotations

import json
import os
import queue
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_POLL_S = 0.5
_PATIENCE_S = 40.0  # Triton itself gives running requests 30 s.
_CANNOT_RUN = 126  # As a shell says it.
# The log that is kept for the launcher loses its beginning when it has grown so long.
_LONGEST_BYTES = 16 * 2**20
_KEPT_BYTES = 2**20
_READ_BYTES = 2**16
# Lines that wait for who reads the standard output; the server does not wait with them.
_WAITING_LINES = 10_000
_LAST_LINES_S = 2.0

# E1121 11:40:12.388730 6959 model_lifecycle.cc:642] "failed to load ..."
_ENTRY = re.compile(r"([IWEF])\d{4} [\d:.]+ \d+ ([\w.]+:\d+)\] (.*)")
_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "fatal"}


def main() -> int:
    """Run the command.

    Returns:
        Its exit code, as a shell gives it: 128 more than the signal that ended it.
    """
    launcher, scratch = sys.argv[1:]
    told = json.loads(sys.stdin.readline())  # To the end would wait for what a fork holds open.
    command = told["command"]
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        # What the group is sent is for the command. Not SIG_IGN, which the command would inherit.
        signal.signal(number, lambda number, frame: None)
    log = Log(told)
    reading, writing = os.pipe()
    try:
        # It inherits what this program was given to inherit.
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, close_fds=False
        )
    except OSError as error:
        said = f"error: {command[0]} does not start: {error.strerror}\n"
        log.write(said.encode(errors="replace"))
        log.end()
        return _CANNOT_RUN
    os.close(writing)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(int(launcher), scratch, ended))
    watcher.start()
    has_ended, say_ended = os.pipe()
    pump = threading.Thread(target=_pump, args=(reading, has_ended, log))
    pump.start()
    with suppress(BrokenPipeError):  # The launcher is gone already; the watcher sees to that.
        os.write(sys.stdout.fileno(), b"%d\n" % running.pid)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Nothing more to say to it.
    code = running.wait()
    ended.set()
    os.close(say_ended)
    pump.join()
    watcher.join()
    return code if code >= 0 else 128 - code


def _watch(launcher: int, scratch: str, ended: threading.Event) -> None:
    while os.getppid() == launcher:
        if ended.wait(_POLL_S):
            return
    os.killpg(0, signal.SIGTERM)
    ended.wait(_PATIENCE_S)
    shutil.rmtree(scratch, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)  # Whatever is left, this process included.


def _pump(reading: int, has_ended: int, log: Log) -> None:
    """Hand on what the command writes, to the last byte that it wrote itself."""
    rest, waits_for = b"", [reading, has_ended]
    while True:
        # Whoever the command leaves behind may hold its output open for ever.
        ready, _, _ = select.select(waits_for, [], [], 0 if waits_for == [reading] else None)
        if has_ended in ready:
            waits_for = [reading]
        elif ready:
            data = os.read(reading, _READ_BYTES)
            whole, newline, rest = (rest + data).rpartition(b"\n")
            log.write(whole + newline)
            if data and len(rest) < _READ_BYTES:
                continue
            log.write(rest)
            rest = b""
            if not data:
                break
        elif waits_for == [reading]:
            break
    log.write(rest)
    log.end()


class Log:
    """Where output goes: to a file for the launcher, and a copy of it to where users want it."""

    def __init__(self, told: dict[str, object]) -> None:
        """Open nothing yet.

        Args:
            told: `log`, the launcher's file; `copy`, the users' file, if any; `stdout`, the
                descriptor of their standard output, if that; `as_json`, what form the copy has.
        """
        form = _as_json if told.get("as_json") else bytes
        self._sinks: list[tuple[Callable[[bytes], bytes], Callable[[bytes], None]]] = []
        self._stdout: _Stdout | None = None
        if told.get("copy"):
            self._sinks.append((form, _File(str(told["copy"])).write))
        elif isinstance(stdout := told.get("stdout"), int):
            self._stdout = _Stdout(stdout)
            self._sinks.append((form, self._stdout.write))
        # Last: what the launcher has read stands in the copy, too.
        self._sinks.append((bytes, _File(str(told["log"]), _LONGEST_BYTES).write))

    def write(self, lines: bytes) -> None:
        """Write whole lines. What cannot be written is lost: the command is worth more."""
        for form, sink in self._sinks:
            if data := form(lines):
                with suppress(OSError):
                    sink(data)

    def end(self) -> None:
        """Wait a moment for who reads the standard output."""
        if self._stdout is not None:
            self._stdout.end()


class _File:
    """A file that is appended to, and made anew where somebody moved or removed it (logrotate)."""

    def __init__(self, path: str, longest_bytes: int | None = None) -> None:
        self._path = path
        self._longest_bytes = longest_bytes
        self._descriptor = -1
        self._is_torn = False  # in the middle of a line, the rest of which is lost

    def write(self, data: bytes) -> None:
        self._open()
        if self._is_torn:
            data = b"\n" + data
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, memoryview(data)[written:])
            self._is_torn = False
        except OSError:
            if written:
                self._is_torn = data[written - 1 : written] != b"\n"
            raise
        size = os.fstat(self._descriptor).st_size
        if self._longest_bytes is not None and size > self._longest_bytes:
            end = os.pread(self._descriptor, _KEPT_BYTES, size - _KEPT_BYTES)
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, end)

    def _open(self) -> None:
        if self._descriptor >= 0:
            with suppress(OSError):
                there = os.stat(self._path)
                if os.path.samestat(there, os.fstat(self._descriptor)):
                    return
        try:
            fresh = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError:
            if self._descriptor < 0:
                raise
            return  # It goes on in the one that was moved.
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._is_torn = fresh, False


class _Stdout:
    """The standard output, behind a queue, so that a reader who stands still stops nobody else."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self._queue: queue.Queue[bytes] = queue.Queue(_WAITING_LINES)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        for line in data.splitlines(keepends=True):
            with suppress(queue.Full):
                self._queue.put_nowait(line)

    def end(self) -> None:
        with suppress(queue.Full):
            self._queue.put_nowait(b"")
        self._thread.join(_LAST_LINES_S)

    def _run(self) -> None:
        while data := memoryview(self._queue.get()):
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:  # Somebody else made it so.
                    time.sleep(_POLL_S)
                except OSError:  # Nobody reads it any more.
                    return


def _as_json(lines: bytes) -> bytes:
    """One JSON object for each line that says something, as `events.py` writes those of our own."""
    seconds, ns = divmod(time.time_ns(), 10**9)
    now = time.strftime(f"%Y-%m-%dT%H:%M:%S.{ns // 10**6:03}Z", time.gmtime(seconds))
    objects = []
    for line in lines.decode(errors="replace").splitlines():
        entry = {"time": now, "level": "info", "source": "tritonserver", "message": line}
        if found := _ENTRY.fullmatch(line):
            level, place, message = found.groups()
            if message.startswith('"'):
                with suppress(ValueError):  # Inside it line breaks and quotes are escapes.
                    message = json.loads(message)
            entry |= {"level": _LEVELS[level], "message": message, "at": place}
        if line.strip():
            objects.append(json.dumps(entry, ensure_ascii=False))
    return "".join(f"{line}\n" for line in objects).encode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
