"""When a supervisor starts another server, and when it gives up. Server and clock are stand-ins."""

from __future__ import annotations

import errno

import psutil
import pytest

from server.errors import ServerError, ServerStartError, ServerUsageError
from server.ports import Ports
from server.probe import Finding, Memory
from server.supervise import Supervisor
from tests.unit.server_fakes import FakeClock, FakeServer

PORTS = Ports(5001, 5002, 5003)


class Drill:
    """A supervisor whose servers each answer for so many seconds, or do not start."""

    def __init__(
        self,
        *servers: float | Exception,
        max_restarts: int = 5,
        stop_error: Exception | None = None,
    ) -> None:
        self.stop_errors = [] if stop_error is None else [stop_error]
        self.clock = FakeClock()
        self.said: list[str] = []
        self.diary: list[str] = []
        self.ports: list[Ports] = []
        self._plan = list(servers)
        first = self._next(PORTS)
        first.start()
        self.supervisor = Supervisor(
            first,
            self._next,
            self._look,
            self.said.append,
            max_restarts=max_restarts,
            sleep=self.clock.sleep,
            clock=self.clock,
        )

    def _next(self, ports: Ports) -> FakeServer:
        self.ports.append(ports)
        answers_s = self._plan.pop(0)
        error = answers_s if isinstance(answers_s, Exception) else None
        self._fails_at = None if error else self.clock() + answers_s
        return FakeServer(self.diary, ports, error, self.stop_errors)

    def _look(self, server: FakeServer, memory: Memory) -> Finding:
        assert server.runs and self.diary[-1] == "start"
        return Finding("it is down" if self.clock() >= self._fails_at else "")

    def run_until_it_gives_up(self) -> ServerStartError:
        with pytest.raises(ServerStartError) as caught:
            self.supervisor.run()
        return caught.value

    @property
    def delays(self) -> list[float]:
        return [seconds for seconds in self.clock.slept if seconds != 0.25]


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
BROKEN = ServerStartError("calibration.json is broken", log_tail="E1")
STUCK = ServerError("processes of the server cannot be killed: 7")
TROUBLES = {
    NO_SPACE: str(NO_SPACE),
    STUCK: str(STUCK),
    ServerUsageError("the port is taken"): "the port is taken",
    RuntimeError("can't start new thread"): "RuntimeError: can't start new thread",
    MemoryError(): "MemoryError: ",
    psutil.NoSuchProcess(7): "NoSuchProcess: process no longer exists (pid=7)",
}


@pytest.mark.parametrize(
    ("servers", "options", "delays", "said"),
    [
        # At once, and each further one waits twice as long.
        ([0.0] * 8, {"max_restarts": 7}, [0, 1, 2, 4, 8, 16, 30], "restart 7 of 7 in 30 s"),
        ([0.0], {"max_restarts": 0}, [], "failure: it is down"),
        ([1.0, 0.0], {"max_restarts": 1}, [0], "answering again after 0.0 s, process 1"),
        # A healthy minute begins the count anew.
        ([0.0, 0.0, 61.0, 0.0, 0.0], {"max_restarts": 2}, [0, 1, 0, 1], "restart 2 of 2 in 1 s"),
        # What passes is a failed restart and no traceback.
        *(
            (
                [0.0, trouble, 0.0],
                {"max_restarts": 2},
                [0, 1],
                f"failure: restart 1 of 2 did not come up: {said}",
            )
            for trouble, said in TROUBLES.items()
        ),
    ],
)
def test_one_server_after_another_runs_on_the_ports_of_the_first_until_it_gives_up(
    servers: list, options: dict, delays: list[float], said: str
):
    drill = Drill(*servers, **options)
    error = drill.run_until_it_gives_up()
    assert drill.delays == delays and said in drill.said
    # The old one is stopped before the next starts, and nothing is left running.
    assert drill.diary == ["start", "stop"] * len(servers) and not drill.supervisor.server.runs
    assert drill.ports == [PORTS] * len(servers)
    assert f"gave up after {options['max_restarts']} restarts without 60 s of health" in str(error)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_that_cannot_be_made_is_a_failed_restart(trouble: Exception):
    drill = Drill(0.0, 0.0, max_restarts=2)
    make, troubles = drill.supervisor._make_server, [trouble]

    def make_server(ports: Ports) -> FakeServer:
        if troubles:
            raise troubles.pop()
        return make(ports)

    drill.supervisor._make_server = make_server
    drill.run_until_it_gives_up()
    assert f"failure: restart 1 of 2 did not come up: {TROUBLES[trouble]}" in drill.said
    assert drill.delays == [0, 1] and drill.diary.count("start") == 2


@pytest.mark.parametrize("where", ["look", "process_ids"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_look_that_cannot_be_taken_is_told_and_a_failure_where_that_lasts(
    trouble: Exception, where: str
):
    drill = Drill(100.0, 0.0, max_restarts=1)
    look, asked = drill.supervisor._look, []

    def blind(*arguments: object) -> Finding:
        asked.append(drill.clock.now)
        if drill.clock.now < 1006 or drill.clock.now >= 1020:
            raise trouble
        return look(*arguments) if where == "look" else [1]

    target = drill.supervisor if where == "look" else drill.supervisor.server
    setattr(target, "_look" if where == "look" else where, blind)
    drill.run_until_it_gives_up()
    told = f"it cannot be looked at: {TROUBLES[trouble]}"
    first = drill.said.index(f"failure: {told}")
    assert drill.said[:first] == [f"warning: {told}"] * (3 + 5)
    assert drill.clock.now < 1060


@pytest.mark.parametrize("trouble", [NO_SPACE, ValueError("I/O operation on closed file")])
def test_what_cannot_be_said_is_done_all_the_same(trouble: Exception):
    drill = Drill(0.0, 0.0, max_restarts=1)

    def say(line: str) -> None:
        raise trouble

    drill.supervisor._say = say
    drill.run_until_it_gives_up()
    assert drill.diary == ["start", "stop"] * 2


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_that_would_not_stop_is_told_again_before_each_restart(trouble: Exception):
    drill = Drill(0.0, 0.0, 0.0, max_restarts=2, stop_error=trouble)
    error = drill.run_until_it_gives_up()
    assert drill.said.count(f"not all of it could be stopped: {TROUBLES[trouble]}") == 3
    assert drill.diary[:3] == ["start", "stop", "start"] and drill.delays == [0, 1]
    assert f"health between them, and {TROUBLES[trouble]}; the last failure" in str(error)
    drill.supervisor.stop()  # It has been said.
    drill.stop_errors.clear()
    drill.supervisor.stop()
    assert drill.supervisor._unstopped == set()


def test_a_server_that_would_not_stop_at_the_end_is_an_error_of_one_line():
    drill = Drill(0.0, stop_error=NO_SPACE)
    with pytest.raises(ServerError, match="No space left"):
        drill.supervisor.stop()


def test_every_event_is_said_in_its_order():
    drill = Drill(1.0, 0.0, max_restarts=1)
    drill.run_until_it_gives_up()
    assert drill.said[:4] == [
        "failure: it is down",
        "stopped what was left of it in 0.0 s",
        "restart 1 of 1 now",
        "answering again after 0.0 s, process 1",
    ]


def test_it_gives_up_with_one_message_that_names_the_last_failure():
    error = Drill(0.0, 0.0, BROKEN, max_restarts=2).run_until_it_gives_up()
    assert "restart 2 of 2 did not come up: calibration.json is broken" in str(error)
    assert "\n" not in str(error) and error.log_tail == "E1"


def test_a_minute_of_failing_starts_is_no_healthy_minute():
    drill = Drill(0.0, *[ServerStartError("not ready")] * 3, max_restarts=3)
    drill.supervisor._sleep = lambda seconds: drill.clock.sleep(seconds + 100)
    assert "after 3 restarts" in str(drill.run_until_it_gives_up())


def test_a_server_that_takes_long_to_answer_is_left_alone_for_longer():
    drill = Drill(200.0, 0.0, max_restarts=0)
    looks_s = [1.5, 5.0, 60.0]
    began: list[float] = []

    def slow(server: FakeServer, memory: Memory) -> Finding:
        began.append(drill.clock.now)
        drill.clock.now += looks_s.pop(0) if looks_s else 0.0
        return Finding("" if looks_s else "gone")

    drill.supervisor._look = slow
    drill.run_until_it_gives_up()
    first, second, third = began
    assert second - first == pytest.approx(1.5 + 2, abs=0.3)
    assert third - second == pytest.approx(5 + 12, abs=0.3)


def test_the_time_of_a_pause_between_two_looks_is_no_models_silence():
    drill = Drill(200.0, max_restarts=0)
    seen: list[dict[str, float]] = []

    def look(server: FakeServer, memory: Memory) -> Finding:
        seen.append(dict(memory.answered_at))
        memory.answered_at["vit_high"] = drill.clock.now
        return Finding("gone" if len(seen) == 4 else "")

    def paused(seconds: float) -> None:
        drill.clock.now += 60.0 if len(seen) == 2 else 0.0

    drill.supervisor._look, drill.clock.each = look, paused
    drill.run_until_it_gives_up()
    assert [bool(answered) for answered in seen] == [False, True, False, True]


def test_it_looks_at_once_where_a_process_has_ended():
    drill = Drill(100.0)
    looked: list[float] = []

    def looks(server: FakeServer, memory: Memory) -> Finding:
        looked.append(drill.clock.now - 1000)
        return Finding("gone" if len(looked) == 3 else "", ("a warning",))

    def ended(seconds: float) -> None:
        drill.supervisor.server.runs = drill.clock.now < 1003

    drill.clock.each, drill.supervisor._look = ended, looks
    assert drill.supervisor._wait_for_failure() == "gone"
    assert looked == [0, 2, 3]
    assert drill.said == ["a warning"] * 3


def test_an_interruption_while_it_waits_to_restart_passes_through_and_nothing_starts():
    drill = Drill(0.0, 0.0, 0.0)

    def interrupted(seconds: float) -> None:
        if seconds == 1.0:
            raise KeyboardInterrupt
        drill.clock.now += seconds

    drill.supervisor._sleep = interrupted
    with pytest.raises(KeyboardInterrupt):
        drill.supervisor.run()
    assert drill.diary == ["start", "stop", "start", "stop"]
