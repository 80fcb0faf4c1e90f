"""Judge one round of canaries: `adaptive_vit`, and directly whatever its answer leaves open.

A canary without an answer is not yet a failure: under overload it waits, or is refused. It is one
if the model asked has answered nobody else meanwhile and its processes were idle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from .canary import HIGH, LOW, PARTS, Question
from .comparing import is_comparing
from .readiness import ENTRY_MODEL, QUEUE_FULL

_ROUTER = "router"
# A healthy service answers its own canary long before; after that each part is asked, too.
_PATIENCE_S = 1.0
_COUNT_EVERY_S = 0.5
_REPEAT_AFTER_S = 0.3
_REPEATS = 3  # An error from one of two instances comes back in these, as they take turns.
_OWN_REQUESTS = 1  # At most so many of a model's answers in a round are to our other canary.
_BUSY_SHARE = 0.1  # of a core; an idle or stopped process takes a hundredth of that.
# A model may be at work on one batch for so many times the canary's timeout.
_BUSY_TIMEOUTS = 6
# The python backend's words for a process that has ended, was stopped or is stuck in C code.
_DEAD_INSTANCE = re.compile(r"Stub process .* is not healthy")


class Asked(Protocol):
    """What a round needs of the server; `canary.Canaries` has it."""

    def ask(self, model: str) -> Question:
        """Send a canary."""

    def successes(self) -> dict[str, int] | None:
        """Requests that each model has answered."""


@dataclass(frozen=True)
class Verdict:
    """How a round ended; both texts are empty if all is well."""

    failure: str = ""
    warning: str = ""


@dataclass
class _Case:
    """One model that is still to answer."""

    question: Question
    asked_at: float
    cpu_before_s: float
    last_error: str = ""
    is_refused: bool = False  # The last error is Triton's or the router's "not now".
    failed: bool = False  # An error was seen that overload does not explain.
    good_repeats: int = 0
    ask_again_at: float | None = None


@dataclass
class Round:
    """One round. Call `step` until it gives a verdict.

    Attributes:
        server: whom to ask.
        models: models to ask, out of `adaptive_vit` and `PARTS`; if empty, the server only has to
            say how many requests it has answered.
        is_partial: whether a model was taken out by an operator, so that `adaptive_vit` may fail.
        timeout_s: seconds a canary may take before the server's progress is looked at.
        started: when it begins, on the clock that `step` is given.
        cpu_s: CPU seconds that a model's own processes have taken.
        answered_at: when each model last answered anybody; kept between rounds.
    """

    server: Asked
    models: Collection[str]
    is_partial: bool
    timeout_s: float
    started: float
    cpu_s: Callable[[str], float]
    answered_at: dict[str, float]
    _open: dict[str, _Case] = field(default_factory=dict)
    _asked: set[str] = field(default_factory=set)
    _warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = self.server.successes()
        self._counts: dict[str, int] | None = self._before
        self._counted_at = self.started
        self._ask([ENTRY_MODEL] if ENTRY_MODEL in self.models else PARTS, self.started)

    def step(self, now: float) -> Verdict | None:
        """Look at what has come back.

        Args:
            now: the time in seconds.

        Returns:
            The verdict, or None while the round goes on.
        """
        for model in list(self._open):
            failure = self._look_at(model, now)
            if failure:
                return Verdict(failure)
        if ENTRY_MODEL in self._open and now - self.started >= _PATIENCE_S:
            self._ask(PARTS, now)
        if (self._open or not self.models) and now - self._counted_at >= _COUNT_EVERY_S:
            self._count(now)
        if not self._open and (self.models or self._counts is not None):
            return Verdict(warning="; ".join(self._warnings))
        return self._overdue(now) if now - self.started >= self.timeout_s else None

    def _ask(self, models: Collection[str], now: float) -> None:
        for model in models:
            if model in self.models and model not in self._asked:
                self._asked.add(model)
                self._open[model] = _Case(self.server.ask(model), now, self.cpu_s(model))

    def _look_at(self, model: str, now: float) -> str:
        """Take note of a model's answer; returns the failure if it is one, else nothing."""
        case = self._open[model]
        if case.ask_again_at is not None:
            if now >= case.ask_again_at:
                case.ask_again_at, case.question = None, self.server.ask(model)
            return ""
        answer = case.question.answer
        if answer is None:
            return ""
        if not answer.error:
            self._note_success(model, answer.exercised, now)
            return ""
        is_repeated = case.failed and not answer.is_unavailable
        case.last_error, case.is_refused = answer.error, answer.is_unavailable
        if is_repeated or _DEAD_INSTANCE.search(answer.error):
            return f"{model} failed: {answer.error}"
        case.failed = case.failed or not answer.is_unavailable
        case.ask_again_at = now + _REPEAT_AFTER_S
        if model == ENTRY_MODEL:
            self._ask(PARTS, now)
            if self.is_partial:
                del self._open[model]
        return ""

    def _note_success(self, model: str, exercised: Collection[str], now: float) -> None:
        case = self._open[model]
        self.answered_at[model] = now
        if model == ENTRY_MODEL:
            self._ask([part for part in PARTS if part not in exercised], now)
        if not case.failed:
            del self._open[model]
            return
        case.good_repeats += 1
        case.ask_again_at = now + _REPEAT_AFTER_S
        if case.good_repeats == _REPEATS:
            del self._open[model]
            self._warnings.append(
                f"{model} failed one canary and answered the next {_REPEATS}: {case.last_error}"
            )

    def _count(self, now: float) -> None:
        """Clear the models that have answered others."""
        self._counted_at = now
        counts = self.server.successes()
        if counts is None:  # Busy; whether it is more than that, the round's end tells.
            return
        self._counts = counts
        if self._before is None:
            self._before = counts
        for model, case in list(self._open.items()):
            steps = (ENTRY_MODEL, _ROUTER) if model == ENTRY_MODEL else (model,)
            if not case.failed and any(self._answered_others(step) for step in steps):
                self.answered_at[model] = now
                del self._open[model]
                self._ask(PARTS, now)  # Others may be answered without the part that is stuck.

    def _answered_others(self, model: str) -> bool:
        if self._counts is None or self._before is None:
            return False
        return self._counts.get(model, 0) - self._before.get(model, 0) > _OWN_REQUESTS

    def _is_at_work(self, model: str, case: _Case, now: float) -> bool:
        taken_s = self.cpu_s(model) - case.cpu_before_s
        return taken_s > _BUSY_SHARE * max(now - case.asked_at, _PATIENCE_S)

    def _is_excused(self, model: str, case: _Case, now: float) -> bool:
        if model != ENTRY_MODEL:
            return self._is_at_work(model, case, now)
        # The router waits while a rung works; and where it declines for a reason of its own, with
        # every part in order, it knows better than we.
        declined = case.is_refused and not QUEUE_FULL.search(case.last_error)
        others = {part: self._open.get(part) for part in (LOW, HIGH)}
        return declined or any(
            self._answered_others(part) or (other and self._is_at_work(part, other, now))
            for part, other in others.items()
        )

    def _overdue(self, now: float) -> Verdict:
        if self._counts is None:
            errors = [case.last_error for case in self._open.values() if case.last_error]
            return Verdict(": ".join(["the server does not answer on gRPC", *errors[-1:]]))
        # The parts first: where one is stuck, so is adaptive_vit.
        for model in sorted(self._open, key=lambda model: model == ENTRY_MODEL):
            case = self._open[model]
            silent_s = now - self.answered_at.setdefault(model, self.started)
            because = f": {case.last_error}" if case.last_error else ""
            if not self._is_excused(model, case, now):
                what = f"gave no answer within {self.timeout_s:g} s, nor to anybody else meanwhile"
                return Verdict(f"{model} {what}{because}")
            # Comparing takes as long as the rungs take, and would begin anew with another start.
            has_time = is_comparing(case.last_error)
            if not has_time and silent_s > _BUSY_TIMEOUTS * self.timeout_s:
                return Verdict(f"{model} has answered nobody for {silent_s:.0f} s{because}")
        return Verdict(warning="; ".join(self._warnings))
