"""When a server counts as failed, and what follows. Server, answers and clock are stand-ins."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from routing.reference import COMPARING, OTHER, VERDICTS
from server.backend_directory import STUB_NAME
from server.canary import Answer
from server.errors import ServerStartError, ServerUsageError
from server.ports import Ports
from server.stubs import Stub, cpu_s, find_stubs
from server.supervise import Rules, Supervisor
from server.watch import Watch
from tests.unit.supervised import FakeCanaries, FakeClock, FakeProcesses, FakeServer

PORTS = Ports(5001, 5002, 5003)
FULL = Answer("[request id: 1] Exceeds maximum queue size", is_unavailable=True)
BROKEN = Answer("ValueError: no such thing")
DEAD = Answer("in ensemble 'adaptive_vit', Stub process 'router_0_1' is not healthy.")


# --- restarts ----------------------------------------------------------------------------------


class Drill:
    """A supervisor whose servers each answer for so many seconds, or do not start."""

    def __init__(self, *servers: float | Exception, max_restarts: int = 5) -> None:
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
            self._watch,
            self.said.append,
            rules=Rules(max_restarts),
            sleep=self.clock.sleep,
            clock=self.clock,
        )

    def _next(self, ports: Ports) -> FakeServer:
        self.ports.append(ports)
        self._answers_s = self._plan.pop(0)
        error = self._answers_s if isinstance(self._answers_s, Exception) else None
        return FakeServer(self.diary, ports, error)

    def _watch(self, server: FakeServer) -> Drill:
        assert server.runs and self.diary[-1] == "start"
        self._fails_at = self.clock() + self._answers_s
        return self

    def look(self, now: float) -> str:
        return "it is down" if now >= self._fails_at else ""

    def close(self) -> None:
        pass

    def run_until_it_gives_up(self) -> ServerStartError:
        with pytest.raises(ServerStartError) as caught:
            self.supervisor.run()
        return caught.value

    @property
    def delays(self) -> list[float]:
        return [seconds for seconds in self.clock.slept if seconds != 0.25]


def test_the_first_restart_is_at_once_and_each_further_one_waits_twice_as_long():
    drill = Drill(*[0.0] * 8, max_restarts=7)
    drill.run_until_it_gives_up()
    assert drill.delays == [0, 1, 2, 4, 8, 16, 30]


def test_it_gives_up_with_one_message_that_names_the_last_failure_and_leaves_nothing_running():
    drill = Drill(
        0.0, 0.0, ServerStartError("calibration.json is broken", log_tail="E1"), max_restarts=2
    )
    error = drill.run_until_it_gives_up()
    assert "gave up after 2 restarts without 60 s of health" in str(error)
    assert "restart 2 of 2 did not come up: calibration.json is broken" in str(error)
    assert "\n" not in str(error) and error.log_tail == "E1"
    assert drill.diary[-1] == "stop" and not drill.supervisor.server.runs


def test_no_restart_at_all_may_be_allowed():
    drill = Drill(0.0, max_restarts=0)
    drill.run_until_it_gives_up()
    assert drill.diary == ["start", "stop"]


def test_a_healthy_minute_begins_the_count_anew():
    drill = Drill(0.0, 0.0, 61.0, 0.0, 0.0, max_restarts=2)
    drill.run_until_it_gives_up()
    assert drill.delays == [0, 1, 0, 1]


def test_a_minute_of_failing_starts_is_no_healthy_minute():
    drill = Drill(0.0, *[ServerStartError("not ready")] * 3, max_restarts=3)
    drill.supervisor._sleep = lambda seconds: drill.clock.sleep(seconds + 100)
    assert "after 3 restarts" in str(drill.run_until_it_gives_up())


def test_the_old_server_is_stopped_before_the_next_starts():
    drill = Drill(0.0, ServerUsageError("the port is taken"), 0.0, 5.0, max_restarts=3)
    drill.run_until_it_gives_up()
    assert drill.diary == ["start", "stop"] * 4


def test_the_ports_of_the_first_server_stay():
    drill = Drill(0.0, 0.0, 0.0, max_restarts=2)
    drill.run_until_it_gives_up()
    assert drill.ports == [PORTS] * 3


def test_every_event_is_said():
    drill = Drill(1.0, 0.0, max_restarts=1)
    drill.run_until_it_gives_up()
    assert drill.said[:4] == [
        "failure: it is down",
        "stopped what was left of it in 0.0 s",
        "restart 1 of 1 now",
        "answering again after 0.0 s, process 1",
    ]


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


# --- failures ----------------------------------------------------------------------------------


class Duty:
    """A watch over stand-ins; `until` looks four times a second for so many seconds."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.server, self.canaries = FakeProcesses(), FakeCanaries()
        self.warnings: list[str] = []
        self.connections = 0
        self.watch = Watch(self.server, self._connect, self.warnings.append)

    def _connect(self) -> FakeCanaries:
        self.connections += 1
        return self.canaries

    def until(self, seconds: float, progress: dict[str, int] | None = None) -> str:
        end = self.clock.now + seconds
        while self.clock.now < end:
            failure = self.watch.look(self.clock.now)
            if failure:
                return failure
            self.clock.sleep(0.25)
            for model, count in (progress or {}).items():
                self.canaries.counts[model] += count
        return ""


@pytest.fixture
def duty() -> Duty:
    return Duty()


def test_a_healthy_server_costs_one_image_each_interval(duty: Duty):
    assert duty.until(20) == ""
    assert set(duty.canaries.asked) == {"adaptive_vit"}
    assert 7 <= len(duty.canaries.asked) <= 10
    assert duty.connections == len(duty.canaries.asked)
    assert duty.warnings == []


def test_a_rung_that_the_ensembles_answer_left_out_is_asked_directly(duty: Duty):
    duty.canaries.answers["adaptive_vit"] = [
        Answer(exercised=frozenset({"adaptive_vit", "preprocess", "vit_low"}))
    ]
    assert duty.until(3) == ""
    assert set(duty.canaries.asked) == {"adaptive_vit", "vit_high"}
    duty.canaries.answers["vit_high"] = [BROKEN]
    assert duty.until(6) == "vit_high failed: ValueError: no such thing"


def test_a_process_that_ended_is_seen_at_the_next_look_with_its_reason(duty: Duty):
    assert duty.until(5) == ""
    duty.server.runs = False
    assert duty.until(0.25) == "tritonserver ended by itself (exit code 137)"


@pytest.mark.parametrize("silent", ["vit_low", "vit_high", "preprocess"])
def test_a_silent_part_is_a_failure_within_8_s(duty: Duty, silent: str):
    assert duty.until(5) == ""
    duty.canaries.answers["adaptive_vit"] = [None]
    duty.canaries.answers[silent] = [None]
    assert duty.until(8).startswith(f"{silent} gave no answer within 5 s")


def test_a_silent_router_is_a_failure_while_its_rungs_answer(duty: Duty):
    duty.canaries.answers["adaptive_vit"] = [None]
    assert duty.until(8).startswith("adaptive_vit gave no answer within 5 s")


def test_silence_under_load_is_none_while_the_models_answer_others(duty: Duty):
    for model in duty.canaries.answers:
        duty.canaries.answers[model] = [None]
    assert duty.until(60, dict.fromkeys(duty.canaries.answers, 3)) == ""


def test_a_rung_that_is_silent_while_only_the_other_answers_is_a_failure(duty: Duty):
    for model in duty.canaries.answers:
        duty.canaries.answers[model] = [None]
    others = {"adaptive_vit": 3, "router": 3, "preprocess": 3, "vit_high": 3}
    assert duty.until(8, others).startswith("vit_low gave no answer")


def test_the_canarys_own_answers_are_no_progress(duty: Duty):
    duty.canaries.answers["adaptive_vit"] = duty.canaries.answers["vit_low"] = [None]
    assert duty.until(1) == ""
    duty.canaries.counts["vit_low"] += 1
    assert duty.until(7).startswith("vit_low gave no answer")


def test_a_full_queue_is_no_failure_while_the_models_answer_others(duty: Duty):
    for model in duty.canaries.answers:
        duty.canaries.answers[model] = [FULL]
    assert duty.until(60, dict.fromkeys(duty.canaries.answers, 3)) == ""
    assert duty.warnings == []


def test_a_queue_that_stays_full_with_no_answer_to_anybody_is_a_failure(duty: Duty):
    for model in duty.canaries.answers:
        duty.canaries.answers[model] = [FULL]
    assert "Exceeds maximum queue size" in duty.until(8)


def test_a_router_that_declines_while_its_rungs_answer_is_left_in_peace_for_half_a_minute(
    duty: Duty,
):
    late = Answer("vit_high failed: it has not answered an earlier call yet", is_unavailable=True)
    assert duty.until(3) == ""
    duty.canaries.answers["adaptive_vit"] = [late]
    assert duty.until(25) == ""
    assert "adaptive_vit has answered nobody for 3" in duty.until(15)


def test_a_dead_instance_named_in_an_answer_is_a_failure_at_once(duty: Duty):
    duty.canaries.answers["adaptive_vit"] = [DEAD]
    assert duty.until(0.5) == f"adaptive_vit failed: {DEAD.error}"


def test_an_error_from_every_second_request_is_a_failure(duty: Duty):
    good = duty.canaries.answers["adaptive_vit"][0]
    duty.canaries.answers["adaptive_vit"] = [BROKEN, good, BROKEN, good]
    assert duty.until(2) == f"adaptive_vit failed: {BROKEN.error}"


def test_a_single_error_is_a_warning(duty: Duty):
    good = duty.canaries.answers["adaptive_vit"][0]
    duty.canaries.answers["adaptive_vit"] = [BROKEN, good]
    assert duty.until(20) == ""
    assert duty.warnings == [
        f"adaptive_vit failed one canary and answered the next 3: {BROKEN.error}"
    ]


def test_a_server_that_does_not_talk_is_a_failure_within_8_s(duty: Duty):
    assert duty.until(5) == ""
    refused = Answer("failed to connect to all addresses", is_unavailable=True)
    duty.canaries.counts = None
    for model in duty.canaries.answers:
        duty.canaries.answers[model] = [refused]
    assert duty.until(8) == f"the server does not answer on gRPC: {refused.error}"


def test_a_router_that_is_still_comparing_is_let_compare_while_its_rungs_answer(duty: Duty):
    assert duty.until(3) == ""
    duty.canaries.answers["adaptive_vit"] = [Answer(COMPARING, is_unavailable=True)]
    assert duty.until(200) == ""
    duty.canaries.answers["vit_low"] = [BROKEN]
    assert duty.until(10).startswith("vit_low failed")
    other = Answer(VERDICTS[OTHER], is_unavailable=True)
    duty.canaries.answers |= {"adaptive_vit": [other], "vit_low": [Answer()]}
    assert "adaptive_vit has answered nobody for" in duty.until(40)


def test_one_question_without_an_answer_is_no_failure(duty: Duty):
    # Under load even what needs no model may take too long.
    for model in duty.canaries.answers:
        duty.canaries.answers[model] = [None]
    assert duty.until(2, {}) == ""
    counts, duty.canaries.counts = duty.canaries.counts, None
    assert duty.until(1) == ""
    duty.canaries.counts = counts
    assert duty.until(30, dict.fromkeys(duty.canaries.answers, 3)) == ""


def test_a_model_taken_out_by_an_operator_is_told_once_and_the_others_are_watched(duty: Duty):
    assert duty.until(3) == ""
    duty.canaries.absent = {"vit_high": "UNAVAILABLE (unloaded)"}
    gone = Answer("Request for unknown model: 'vit_high' has no available versions")
    duty.canaries.answers["adaptive_vit"] = duty.canaries.answers["vit_high"] = [gone]
    assert duty.until(60) == ""
    assert duty.warnings == [
        "vit_high is not served any more (UNAVAILABLE (unloaded)); watching the others"
    ]
    duty.canaries.answers["vit_low"] = [None]
    assert duty.until(8).startswith("vit_low gave no answer")


def test_a_model_that_is_taken_out_while_its_canary_is_out_is_no_failure(duty: Duty):
    assert duty.until(3) == ""
    duty.canaries.answers["adaptive_vit"] = [BROKEN]
    assert duty.watch.look(duty.clock.now + 2) == ""
    duty.canaries.absent = {"vit_high": "UNLOADING"}
    duty.clock.sleep(2.5)
    assert duty.until(20) == ""


def test_a_repository_without_the_ensemble_is_watched_by_its_process_and_whether_it_talks(
    duty: Duty,
):
    duty.canaries.absent = dict.fromkeys(duty.canaries.answers, "never there")
    duty.watch._known = {"echo"}
    duty.canaries.states = lambda: []
    assert duty.until(10) == ""
    assert duty.canaries.asked == []
    duty.canaries.counts = None
    assert duty.until(8) == "the server does not answer on gRPC"


# --- model instances ---------------------------------------------------------------------------


@pytest.fixture
def stub(tmp_path: Path):
    """A process that looks like an instance of `router` and ends with its input."""
    model = tmp_path / "router" / "1" / "model.py"
    model.parent.mkdir(parents=True)
    model.write_text("read line\n")
    process = subprocess.Popen(
        [f"/backends/{STUB_NAME}", str(model)], executable="/bin/sh", stdin=subprocess.PIPE
    )
    yield process
    process.kill()
    process.communicate()


def test_model_instances_are_told_by_their_arguments(stub: subprocess.Popen[bytes]):
    other = subprocess.Popen(["/bin/sleep", "61"])
    try:
        found = find_stubs([stub.pid, other.pid, 2**22 + 1])
        assert found == [Stub(stub.pid, "router", "1")]
        assert 0 <= cpu_s(found) < 5
    finally:
        other.kill()
        other.wait()


def test_an_instance_that_ended_is_a_failure_within_2_s_though_every_canary_is_answered(
    duty: Duty, stub: subprocess.Popen[bytes]
):
    duty.server.ids = [stub.pid]
    assert duty.until(5) == ""
    duty.server.ids = []
    assert duty.until(2) == (
        "1 of 1 instances of router (version 1) ended; Triton does not start them again"
    )


def test_an_instance_that_is_replaced_is_a_reload_and_no_failure(
    duty: Duty, stub: subprocess.Popen[bytes]
):
    duty.server.ids = [stub.pid]
    assert duty.until(5) == ""
    duty.server.ids = []
    assert duty.until(0.5) == ""
    duty.server.ids = [stub.pid]
    assert duty.until(20) == ""


def test_the_instances_of_a_model_that_was_taken_out_are_not_missed(
    duty: Duty, stub: subprocess.Popen[bytes]
):
    duty.server.ids = [stub.pid]
    assert duty.until(5) == ""
    duty.canaries.absent = {"router": "UNAVAILABLE (unloaded)"}
    duty.server.ids = []
    assert duty.until(20) == ""
