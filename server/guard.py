"""Run a command that must not outlive its launcher: `guard.py LAUNCHER_PID SCRATCH`.

The command comes as one line of JSON on stdin, because every user of the machine may read the
arguments of every process, and the command can hold a key.

The server runs in a session of its own, so neither a closed terminal nor a kill of the launcher
reaches it. This program stands between the two. It prints the command's process id, waits, and
returns the command's exit code; once the launcher is gone, however it went, it ends the process
group and removes the folder SCRATCH.

It asks for its parent's id instead of waiting for a pipe to close, because whatever the launcher
forked would hold that pipe open. It runs as a file, outside this package, and needs nothing of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress

_POLL_S = 0.5
_PATIENCE_S = 40.0  # Triton itself gives running requests 30 s.
_CANNOT_RUN = 126  # As a shell says it.


def main() -> int:
    """Run the command.

    Returns:
        Its exit code, as a shell gives it: 128 more than the signal that ended it.
    """
    launcher, scratch = sys.argv[1:]
    command = json.loads(sys.stdin.readline())  # To the end would wait for what a fork holds open.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        # What the group is sent is for the command. Not SIG_IGN, which the command would inherit.
        signal.signal(number, lambda number, frame: None)
    try:
        # It inherits what this program was given to inherit.
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, close_fds=False
        )
    except OSError as error:
        sys.stderr.write(f"error: {command[0]} does not start: {error.strerror}\n")
        return _CANNOT_RUN
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(int(launcher), scratch, ended))
    watcher.start()
    with suppress(BrokenPipeError):  # The launcher is gone already; the watcher sees to that.
        os.write(sys.stdout.fileno(), b"%d\n" % running.pid)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Nothing more to say to it.
    code = running.wait()
    ended.set()
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


if __name__ == "__main__":
    sys.exit(main())
