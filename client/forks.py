"""What a fork means for clients: connections belong to the process that opened them.

A forked child has its parent's sockets. Whichever of the two reads first gets the next answer, the
other's too; so a child forgets every connection that it inherits and opens its own.

gRPC has threads besides, which a fork does not copy. It stops them before a fork and starts them
again on both sides, but only where no thread is inside a call; else its child hangs or aborts. So a
fork waits until the calls in flight have ended, and calls that begin meanwhile wait for the fork.
Where that was not to be had, clients in the child say so instead.

C code may fork without calling Python's hooks, as uWSGI does. Clients notice at their next request
in the child; such a fork has waited for nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from .errors import ForkedError

FORK_WAIT_S = 10.0  # most that a fork waits for calls in flight
# After a channel was closed: of children that were forked off at once 4 in 100 hung on a busy
# machine, in a lock of gRPC's that nobody would give back.
SETTLE_S = 0.05

# gRPC reads it once, when it is imported; unset, it supports forks.
_SUPPORTED = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "1").lower() in ("1", "true", "yes", "on")


class _Grpc:
    """gRPC in this process: what is in flight, and whether a fork has made it unusable."""

    def __init__(self, unusable: str | None = None) -> None:
        self.changed = threading.Condition()
        self.calls = 0
        self.forks = 0
        self.closed_at = -SETTLE_S  # by `time.monotonic`
        self.used = False
        self.unusable = unusable


_holders: WeakSet[Any] = WeakSet()
_grpc = _Grpc()
_process = os.getpid()  # that all this is about
_noticing: dict[int, threading.Lock] = {}  # by process: an inherited one may be locked for ever


def forget_after_fork(holder: Any) -> None:
    """Have `holder.forget()` called in every child that is forked off, for as long as it lives.

    It is to let go of every inherited connection, without a word to the server.
    """
    _holders.add(holder)


def notice_fork() -> None:
    """In a child that was forked off without Python's hooks: do what they would have done."""
    if os.getpid() == _process:
        return
    with _noticing.setdefault(os.getpid(), threading.Lock()):
        if os.getpid() != _process:
            _start_anew(
                "by C code, without Python's hooks, while a gRPC request was in flight"
                if _grpc.calls
                else _why_unusable(_grpc)
            )


@contextmanager
def grpc_call(left_s: float | None) -> Iterator[float | None]:
    """Around a gRPC call, or what opens or closes a channel: no fork will interrupt it.

    May be left in another thread.

    Args:
        left_s: seconds until the call's deadline; None where there is none.

    Yields:
        What is left of them after waiting for a fork.

    Raises:
        ForkedError: gRPC cannot be used in this process.
        TimeoutError: nothing is left.
    """
    notice_fork()
    state = _grpc
    if state.unusable is not None:
        raise ForkedError(
            f"gRPC cannot be used in this process, which was forked {state.unusable}; start "
            'processes with multiprocessing\'s "spawn" or "forkserver", or use HttpClient'
        )
    with state.changed:
        state.used = True
        if state.forks:
            started = time.monotonic()
            if not state.changed.wait_for(lambda: not state.forks, left_s):
                raise TimeoutError
            if left_s is not None:
                left_s = max(1e-3, left_s - (time.monotonic() - started))
        state.calls += 1
    try:
        yield left_s
    finally:
        with state.changed:
            state.calls -= 1
            state.changed.notify_all()


def channel_closed() -> None:
    """Right after a channel was closed: gRPC's threads take a moment more to be done with it."""
    _grpc.closed_at = time.monotonic()


def _before() -> None:
    with _grpc.changed:
        _grpc.forks += 1
        _grpc.changed.wait_for(lambda: not _grpc.calls, FORK_WAIT_S)
    time.sleep(max(0.0, _grpc.closed_at + SETTLE_S - time.monotonic()))


def _after_in_parent() -> None:
    with _grpc.changed:
        _grpc.forks -= 1
        _grpc.changed.notify_all()


def _start_anew(why_unusable: str | None) -> None:
    global _grpc, _process
    _grpc = _Grpc(_grpc.unusable or why_unusable)
    failure = None
    for holder in list(_holders):
        try:
            holder.forget()
        except Exception as error:  # the others have connections to let go of too
            failure = error
    _process = os.getpid()  # last: until then other threads wait in `notice_fork`
    if failure is not None:
        raise failure  # Python reports what a hook raises


def _why_unusable(parents: _Grpc) -> str | None:
    if parents.calls:
        return f"while a gRPC request was in flight for more than {FORK_WAIT_S:g} s"
    if parents.used and not _SUPPORTED:
        return "after gRPC was used with GRPC_ENABLE_FORK_SUPPORT switched off"
    return None


os.register_at_fork(
    before=_before,
    after_in_parent=_after_in_parent,
    after_in_child=lambda: _start_anew(_why_unusable(_grpc)),
)
