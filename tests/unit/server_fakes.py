"""Stand-ins of the server's tests: servers, what they answer, and the time. No processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.ports import Ports
from server.serving import READY, Canary, Key, Reply, Stub

MODELS = ("adaptive_vit", "preprocess", "router", "vit_high", "vit_low")


class FakeClock:
    """A clock that only sleeping moves; `each` is told of every sleep."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.each: Callable[[float], None] = lambda seconds: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self.each(seconds)


class Verdicts:
    """A server and access to it: answers as the next verdict says, the last one for good."""

    def __init__(self, *verdicts: BaseException | None) -> None:
        self.verdicts = list(verdicts)
        self.asked = 0

    def open(self) -> Verdicts:
        return self

    def __enter__(self) -> Verdicts:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def infer(self, *request: object, **options: object) -> None:
        self.asked += 1
        verdict = self.verdicts.pop(0) if len(self.verdicts) > 1 else self.verdicts[0]
        if verdict is not None:
            raise verdict


class FakeServer:
    """A server that writes into a diary what is done to it."""

    def __init__(
        self,
        diary: list[str],
        ports: Ports,
        start_error: Exception | None = None,
        stop_errors: Sequence[Exception] = (),
    ) -> None:
        self.ports = ports
        self.pid = 1
        self.runs = False
        self._diary = diary
        self._start_error = start_error
        self._stop_errors = stop_errors

    def process_ids(self) -> list[int]:
        return [1] if self.runs else []

    def start(self) -> None:
        self._diary.append("start")
        if self._start_error is not None:
            raise self._start_error
        self.runs = True

    def stop(self, patience_s: float | None = None) -> None:
        self._diary.append("stop")
        self.runs = False
        for error in self._stop_errors:
            raise error


class Stand:
    """A server as a look sees it.

    A model answers with what `replies` holds for it, in turn, the last one for good; None is a
    canary that does not come back.
    """

    def __init__(self) -> None:
        self.ended = ""
        self.replies: dict[str, list[Reply | None]] = {model: [Reply()] for model in MODELS}
        self.counts: dict[str, int] | None = dict.fromkeys(MODELS, 0)
        self.absent: dict[str, str] = {}
        self.processes: list[Stub] | None = []
        self.wanted = 1
        self.cores = 1.0
        self.work_s = dict.fromkeys(MODELS, 0.0)
        self.asked: list[str] = []

    def why_it_ended(self) -> str:
        return self.ended

    def states(self) -> dict[Key, str] | None:
        if self.counts is None:
            return None
        return {(model, "1"): self.absent.get(model, READY) for model in MODELS}

    def instances(self, model: str, version: str) -> int | None:
        return self.wanted

    def stubs(self) -> list[Stub] | None:
        return self.processes

    def cpu_s(self, model: str) -> float:
        return self.work_s[model]

    def allowed_cores(self) -> float:
        return self.cores

    def answered(self) -> dict[str, int] | None:
        return None if self.counts is None else dict(self.counts)

    def ask(self, model: str) -> Canary:
        self.asked.append(model)
        replies = self.replies[model]
        return Canary(model, replies.pop(0) if len(replies) > 1 else replies[0], 31.0)
