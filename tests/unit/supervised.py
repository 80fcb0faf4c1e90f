"""Stand-ins for what the supervisor watches: a server, its answers and the time. No processes."""

from __future__ import annotations

from server.canary import Answer, ModelState, Question
from server.errors import ServerStartError
from server.ports import Ports

MODELS = ("adaptive_vit", "preprocess", "router", "vit_high", "vit_low")
WHOLE = frozenset({"adaptive_vit", "preprocess", "vit_low", "vit_high"})


class FakeClock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class FakeServer:
    """A server that writes into a diary what is done to it."""

    def __init__(
        self, diary: list[str], ports: Ports, start_error: Exception | None = None
    ) -> None:
        self.ports = ports
        self.pid = 1
        self.runs = False
        self._diary = diary
        self._start_error = start_error

    def start(self) -> None:
        self._diary.append("start")
        if self._start_error is not None:
            raise self._start_error
        self.runs = True

    def stop(self, patience_s: float | None = None) -> None:
        self._diary.append("stop")
        self.runs = False


class FakeProcesses:
    """A server as `Watch` sees it."""

    def __init__(self) -> None:
        self.runs = True
        self.ids: list[int] = []

    def is_running(self) -> bool:
        return self.runs

    def wait(self) -> None:
        raise ServerStartError("tritonserver ended by itself (exit code 137)")

    def process_ids(self) -> list[int]:
        return self.ids


class FakeCanaries:
    """A server's answers: what `answers` holds for a model, in turn, the last one for good.

    None is a canary that does not come back.
    """

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer | None]] = {
            model: [Answer(exercised=WHOLE if model == "adaptive_vit" else frozenset({model}))]
            for model in MODELS
        }
        self.counts: dict[str, int] | None = dict.fromkeys(MODELS, 0)
        self.absent: dict[str, str] = {}
        self.wanted = 1
        self.asked: list[str] = []

    def ask(self, model: str) -> Question:
        self.asked.append(model)
        answers = self.answers[model]
        return Question(model, answers.pop(0) if len(answers) > 1 else answers[0])

    def successes(self) -> dict[str, int] | None:
        return None if self.counts is None else dict(self.counts)

    def states(self) -> list[ModelState] | None:
        if self.counts is None:
            return None
        return [
            ModelState(model, "1", model not in self.absent, self.absent.get(model, "READY"))
            for model in MODELS
        ]

    def instances(self, model: str, version: str) -> int | None:
        return self.wanted

    def close(self) -> None:
        pass
