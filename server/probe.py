"""One look at a server: every model by name, every model process alive, canaries answered.

`python -m server check` looks once; `--supervise` looks again and again (`supervise`). A canary
without an answer is not yet a failure: under overload it waits, or is refused. It is one if the
model asked has answered nobody else meanwhile and its processes did no work.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from .access import ENTRY, HIGH, LOW, PREPROCESS, QUEUE_FULL, ROUTER, STILL_COMPARING, STOOD_STILL_S
from .serving import READY, Canary, Key, Reply, Serving

ASKED = (PREPROCESS, LOW, HIGH, ENTRY)
_POLL_S = 0.1
_COUNT_EVERY_S = 0.5
_REPEAT_AFTER_S = 0.3
_REPEATS = 3  # An error from one of two instances comes back in these, as they take turns.
_OWN_REQUESTS = 1  # At most so many of a model's answers meanwhile are to our other canary.
# Of the cores that the server may use, of one at most. Idle, a model's process takes 0.001 of a
# core; stopped, none.
_BUSY_SHARE = 0.02
# A model may be at work on one batch for so many times the canary's timeout, on a whole core.
_BUSY_TIMEOUTS = 6
_CONFIRM_S = 0.8  # A reload's processes come and go for moments; one that died stays away.
_VOID_LOOKS = 3
# The python backend's words for a process that has ended, was stopped or is stuck in C code.
_DEAD_INSTANCE = re.compile(r"Stub process .* is not healthy")


@dataclass
class Memory:
    """What one look tells the next; a single look begins with what should be there.

    Attributes:
        known: models that were ready once, or should be.
        absent: of these, the ones that an operator has taken out.
        with_processes: versions of models that have processes of their own.
        answered_at: when a model last answered anybody, on the clock of the looks.
    """

    known: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    with_processes: set[Key] = field(default_factory=set)
    answered_at: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What a look has found.

    Attributes:
        failure: what failed, in one line; empty if all is well.
        warnings: lines about what is worth knowing but no failure.
        latency_ms: milliseconds until `adaptive_vit` answered; None if it did not.
    """

    failure: str = ""
    warnings: tuple[str, ...] = ()
    latency_ms: float | None = None


def look(
    server: Serving,
    memory: Memory,
    timeout_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Finding:
    """Look once, which takes as long as the slowest answer.

    Where this process itself stood still meanwhile, so may the server have: it looks again.

    Args:
        server: whom to look at.
        memory: what earlier looks have seen.
        timeout_s: seconds a canary may take before the server's progress is looked at.
        clock: the time in seconds.
        sleep: waits for so many seconds.
    """
    warnings: list[str] = []  # A look that is void has told the memory, so what it said counts.
    for is_void in [True] * _VOID_LOOKS + [False]:
        with suppress(_StoodStillError):
            return _Look(server, memory, timeout_s, clock, sleep, is_void, warnings).take()
        memory.answered_at.clear()  # That time was nobody's silence.
    raise AssertionError("the last look is never void")


class _StoodStillError(Exception):
    """This process was not run for a while."""


@dataclass
class _Case:
    """One model that is still to answer."""

    canary: Canary
    asked_at: float
    cpu_before_s: float
    last: Reply = field(default_factory=Reply)
    failed: bool = False  # An error was seen that overload does not explain.
    good_repeats: int = 0
    ask_again_at: float | None = None


@dataclass
class _Look:
    """One look; `is_void` makes it end with `_StoodStillError` where this process stood still."""

    server: Serving
    memory: Memory
    timeout_s: float
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    is_void: bool
    warnings: list[str]
    latency_ms: float | None = None

    def take(self) -> Finding:
        ended = self.server.why_it_ended()
        if ended:
            return Finding(ended)
        states = self.server.states()
        self._note_absent(states)
        failure = self._missing_instances(states) or self._unanswered()
        if failure:  # Unless an operator took a model out meanwhile, or put one back.
            states = self.server.states()
            if states is not None and _ready(states) != self.memory.known - self.memory.absent:
                failure = ""
        return Finding(failure, tuple(self.warnings), self.latency_ms)

    # --- models and their processes ---

    def _note_absent(self, states: dict[Key, str] | None) -> None:
        if states is None:
            return
        memory, ready = self.memory, _ready(states)
        memory.known |= ready
        for model in sorted(memory.known - ready - memory.absent):
            said = ", ".join(state for (name, _), state in states.items() if name == model)
            self.warnings.append(
                f"{model} is not served any more ({said or 'gone'}); watching the others"
            )
        for model in sorted(memory.absent & ready):
            self.warnings.append(f"{model} is served again")
        memory.absent = memory.known - ready

    def _missing_instances(self, states: dict[Key, str] | None) -> str:
        """Compare the processes of each model with the instances it should have, twice.

        A canary would not do: of two instances one answers, and under load it answers most.
        """
        first = self._too_few(states)
        if not first:
            return ""
        self._pause(_CONFIRM_S)
        for key, (alive, wanted) in self._too_few(self.server.states()).items():
            if key in first:
                model, version = key
                return (
                    f"{wanted - alive} of {wanted} instances of {model} (version {version}) ended; "
                    "Triton does not start them again"
                )
        return ""

    def _too_few(self, states: dict[Key, str] | None) -> dict[Key, tuple[int, int]]:
        """Processes alive and wanted, of the models that have too few."""
        stubs = self.server.stubs()
        if states is None or stubs is None:
            return {}
        alive = Counter((stub.model, stub.version) for stub in stubs)
        self.memory.with_processes |= alive.keys()
        found = {}
        for key in sorted(self.memory.with_processes):
            wanted = self.server.instances(*key) if states.get(key) == READY else None
            if wanted is not None and alive[key] < wanted:
                found[key] = alive[key], wanted
        return found

    # --- canaries ---

    def _unanswered(self) -> str:
        """Send canaries, until everything has answered or something has failed to."""
        present = self.memory.known - self.memory.absent
        asked = [model for model in ASKED if model in present and ENTRY in self.memory.known]
        self._started = counted_at = self.clock()
        self._before = self._counts = self.server.answered()
        self._open = {
            model: _Case(self.server.ask(model), self.clock(), self.server.cpu_s(model))
            for model in asked
        }
        while True:
            now = self.clock()
            for model in list(self._open):
                failure = self._judge(model, now)
                if failure:
                    return failure
            if not self._open and (asked or self._counts is not None):
                return ""
            if now - counted_at >= _COUNT_EVERY_S:
                counted_at = now
                self._count(now)
            if now - self._started >= self.timeout_s:
                return self._overdue(now)
            self._pause(_POLL_S)
            ended = self.server.why_it_ended()
            if ended:
                return ended

    def _judge(self, model: str, now: float) -> str:
        """Take note of a model's reply; returns the failure if it is one, else nothing."""
        case = self._open[model]
        if case.ask_again_at is not None:
            if now >= case.ask_again_at:
                case.ask_again_at, case.canary = None, self.server.ask(model)
            return ""
        reply = case.canary.reply
        if reply is None:
            return ""
        if not reply.error:
            self._note_answer(model, case, now)
            return ""
        is_repeated = case.failed and not reply.is_unavailable
        case.last = reply
        if is_repeated or _DEAD_INSTANCE.search(reply.error):
            return f"{model} failed: {reply.error}"
        case.failed = case.failed or not reply.is_unavailable
        case.ask_again_at = now + _REPEAT_AFTER_S
        if model == ENTRY and self.memory.absent:  # It cannot do without.
            del self._open[model]
        return ""

    def _note_answer(self, model: str, case: _Case, now: float) -> None:
        self.memory.answered_at[model] = now
        if model == ENTRY and self.latency_ms is None:
            self.latency_ms = case.canary.latency_ms
        if not case.failed:
            del self._open[model]
            return
        case.good_repeats += 1
        case.ask_again_at = now + _REPEAT_AFTER_S
        if case.good_repeats == _REPEATS:
            del self._open[model]
            self.warnings.append(
                f"{model} failed one canary and answered the next {_REPEATS}: {case.last.error}"
            )

    def _count(self, now: float) -> None:
        """Clear the models that have answered others."""
        counts = self.server.answered()
        if counts is None:  # Busy; whether it is more than that, the look's end tells.
            return
        self._counts = counts
        if self._before is None:
            self._before = counts
        for model, case in list(self._open.items()):
            steps = (ENTRY, ROUTER) if model == ENTRY else (model,)
            if not case.failed and any(self._answered_others(step) for step in steps):
                self.memory.answered_at[model] = now
                del self._open[model]

    def _answered_others(self, model: str) -> bool:
        if self._counts is None or self._before is None:
            return False
        return self._counts.get(model, 0) - self._before.get(model, 0) > _OWN_REQUESTS

    # --- when the time is up ---

    def _overdue(self, now: float) -> str:
        if self._counts is None:
            errors = [case.last.error for case in self._open.values() if case.last.error]
            return ": ".join(["the server does not answer on gRPC", *errors[-1:]])
        cores = min(1.0, self.server.allowed_cores())
        # In the order of `ASKED`, the parts first: where one is stuck, so is adaptive_vit.
        for model, case in self._open.items():
            silent_s = now - self.memory.answered_at.setdefault(model, self._started)
            because = f": {case.last.error}" if case.last.error else ""
            if not self._is_excused(model, case, now, cores):
                return (
                    f"{model} gave no answer within {self.timeout_s:g} s, nor to anybody else "
                    f"meanwhile{because}"
                )
            # Comparing takes as long as the rungs take, and would begin anew with another start.
            has_time = STILL_COMPARING in case.last.error
            if not has_time and silent_s > _BUSY_TIMEOUTS * self.timeout_s / cores:
                return f"{model} has answered nobody for {silent_s:.0f} s{because}"
        return ""

    def _is_excused(self, model: str, case: _Case, now: float, cores: float) -> bool:
        if model != ENTRY:
            return self._is_at_work(model, case, now, cores)
        # The router waits while a rung works; and where it declines for a reason of its own, with
        # every part in order, it knows better than we.
        declined = case.last.is_unavailable and not QUEUE_FULL.search(case.last.error)
        others = {rung: self._open.get(rung) for rung in (LOW, HIGH)}
        return declined or any(
            self._answered_others(rung) or (other and self._is_at_work(rung, other, now, cores))
            for rung, other in others.items()
        )

    def _is_at_work(self, model: str, case: _Case, now: float, cores: float) -> bool:
        taken_s = self.server.cpu_s(model) - case.cpu_before_s
        return taken_s > _BUSY_SHARE * cores * (now - case.asked_at)

    def _pause(self, seconds: float) -> None:
        before = self.clock()
        self.sleep(seconds)
        if self.is_void and self.clock() - before > seconds + STOOD_STILL_S:
            raise _StoodStillError


def _ready(states: dict[Key, str]) -> set[str]:
    return {model for (model, _), state in states.items() if state == READY}
