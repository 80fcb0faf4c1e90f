"""What one look finds, and what it leaves alone. Server, answers and clock are stand-ins."""

from __future__ import annotations

import pytest

from routing.reference import COMPARING, OTHER, VERDICTS
from server.probe import Memory, look
from server.serving import Reply, Stub
from tests.unit.server_fakes import MODELS, FakeClock, Stand

FULL = Reply("[request id: 1] Exceeds maximum queue size", is_unavailable=True)
BROKEN = Reply("ValueError: no such thing")
DEAD = Reply("in ensemble 'adaptive_vit', Stub process 'router_0_1' is not healthy.")
PARTS = ("preprocess", "vit_low", "vit_high")


class Duty:
    """Looks at a stand-in every two seconds; `until` does so for so many seconds.

    Attributes:
        progress: requests that each model answers in a second.
        work: of a core that each model uses.
    """

    def __init__(self) -> None:
        self.clock, self.server = FakeClock(), Stand()
        self.memory = Memory()
        self.warnings: list[str] = []
        self.looks = 0
        self.progress: dict[str, float] = {}
        self.work: dict[str, float] = {}
        self.clock.each = self._pass

    def _pass(self, seconds: float) -> None:
        for model, rate in self.progress.items():
            self.server.counts[model] += rate * seconds
        for model, share in self.work.items():
            self.server.work_s[model] += share * seconds

    def look(self) -> str:
        found = look(self.server, self.memory, 5.0, clock=self.clock, sleep=self.clock.sleep)
        self.looks += 1
        self.warnings += found.warnings
        return found.failure

    def until(self, seconds: float) -> str:
        end = self.clock.now + seconds
        while self.clock.now < end:
            failure = self.look()
            if failure:
                assert self.clock.now <= end + 0.1, "too late"
                return failure
            self.clock.sleep(2)
        return ""

    def reply(self, *replies: Reply | None, of: tuple[str, ...] = MODELS) -> None:
        for model in of:
            self.server.replies[model] = list(replies)


@pytest.fixture
def duty() -> Duty:
    """One that has found all well so far."""
    duty = Duty()
    assert duty.until(3) == ""
    return duty


def test_a_healthy_server_costs_one_canary_a_part_each_interval(duty: Duty):
    assert duty.until(20) == ""
    assert duty.looks == 12 and duty.warnings == []
    assert sorted(duty.server.asked) == sorted(("adaptive_vit", *PARTS) * duty.looks)


def test_a_process_that_ended_is_seen_at_the_next_look_with_its_reason(duty: Duty):
    duty.server.ended = "tritonserver ended by itself (exit code 137)"
    assert duty.until(0.25) == duty.server.ended


def test_a_process_that_ends_while_a_canary_is_out_is_seen_at_once(duty: Duty):
    duty.reply(None)
    duty.clock.each = lambda seconds: setattr(duty.server, "ended", "exit code 137")
    assert duty.until(0.25) == "exit code 137"


SILENT = "{} gave no answer within 5 s"
LATE = Reply("vit_high failed: it has not answered an earlier call yet", is_unavailable=True)
ENTRY = ("adaptive_vit",)


@pytest.mark.parametrize(
    ("replies", "of", "progress", "seconds", "failure"),
    [
        *(([None], (*ENTRY, part), (), 8, SILENT.format(part)) for part in PARTS),
        # Each part is asked directly, and the router is one while its rungs answer.
        *(([BROKEN], (part,), (), 6, f"{part} failed: {BROKEN.error}") for part in PARTS),
        ([None], ENTRY, (), 8, SILENT.format("adaptive_vit")),
        # Overload is no failure while the models answer others, but each must.
        *(([reply], MODELS, MODELS, 60, "") for reply in (None, FULL)),
        ([None], MODELS, (*ENTRY, "router", "preprocess", "vit_high"), 8, SILENT.format("vit_low")),
        ([FULL], MODELS, (), 8, f"{SILENT.format('preprocess')}, nor to anybody else meanwhile: ["),
        ([DEAD], ENTRY, (), 0.5, f"adaptive_vit failed: {DEAD.error}"),
        # An error from every second request.
        ([BROKEN, Reply(), BROKEN, Reply()], ENTRY, (), 2, f"adaptive_vit failed: {BROKEN.error}"),
        # A router that declines while its rungs answer is left in peace for half a minute.
        ([LATE], ENTRY, (), 25, ""),
        ([LATE], ENTRY, (), 40, f"adaptive_vit has answered nobody for 35 s: {LATE.error}"),
    ],
)
def test_what_does_not_answer_is_a_failure_in_time_unless_it_is_at_work(
    duty: Duty, replies: list, of: tuple, progress: tuple, seconds: float, failure: str
):
    duty.reply(*replies, of=of)
    duty.progress = dict.fromkeys(progress, 12)
    found = duty.until(seconds)
    assert found.startswith(failure) and bool(found) is bool(failure)
    assert duty.warnings == []


def test_the_canarys_own_answers_are_no_progress(duty: Duty):
    duty.reply(None, of=("adaptive_vit", "vit_low"))
    duty.clock.each = lambda seconds: duty.server.counts.update(vit_low=1)
    assert duty.until(7).startswith("vit_low gave no answer")


def test_a_single_error_is_a_warning(duty: Duty):
    duty.reply(BROKEN, Reply(), of=("adaptive_vit",))
    assert duty.until(20) == ""
    assert duty.warnings == [
        f"adaptive_vit failed one canary and answered the next 3: {BROKEN.error}"
    ]


def test_a_server_that_does_not_talk_is_a_failure_within_8_s(duty: Duty):
    refused = Reply("failed to connect to all addresses", is_unavailable=True)
    duty.server.counts = None
    duty.reply(refused)
    assert duty.until(8) == f"the server does not answer on gRPC: {refused.error}"


def test_a_router_that_is_still_comparing_is_let_compare_while_its_rungs_answer(duty: Duty):
    duty.reply(Reply(COMPARING, is_unavailable=True), of=("adaptive_vit",))
    assert duty.until(200) == ""
    duty.reply(BROKEN, of=("vit_low",))
    assert duty.until(10).startswith("vit_low failed")
    duty.reply(Reply(VERDICTS[OTHER], is_unavailable=True), of=("adaptive_vit",))
    duty.reply(Reply(), of=("vit_low",))
    assert "adaptive_vit has answered nobody for" in duty.until(40)


def test_one_question_without_an_answer_is_no_failure(duty: Duty):
    # Under load even what needs no model may take too long.
    duty.reply(None)
    duty.progress = dict.fromkeys(MODELS, 12)
    truth, asked = duty.server.answered, []

    def answered() -> dict[str, int] | None:
        asked.append(duty.clock.now)
        return None if len(asked) % 2 else truth()

    duty.server.answered = answered
    assert duty.until(30) == ""
    assert len(asked) > 10


# --- slow is not dead --------------------------------------------------------------------------


def test_a_pause_of_the_whole_machine_voids_a_look(duty: Duty):
    duty.reply(None)
    pauses = [20.0, 1.5]

    def paused(seconds: float) -> None:
        if pauses:
            duty.clock.now += pauses.pop()
        if not pauses:
            duty.reply(Reply())

    duty.clock.each = paused
    assert duty.look() == "" and duty.warnings == []


def test_the_time_of_a_pause_is_no_models_silence(duty: Duty):
    duty.reply(None)
    duty.work = dict.fromkeys(MODELS, 0.05)  # At work before and after.
    pauses = [3600.0]

    def paused(seconds: float) -> None:
        duty._pass(seconds)
        if pauses:
            duty.clock.now += pauses.pop()

    duty.clock.each = paused
    assert duty.look() == ""


def test_what_a_void_look_has_seen_is_told_by_the_one_that_counts(duty: Duty):
    """The memory has it by then, so the look after it would not say it again."""
    duty.server.absent = {"vit_high": "UNAVAILABLE (unloaded)"}
    duty.reply(None)
    pauses = [1.5]

    def paused(seconds: float) -> None:
        if pauses:
            duty.clock.now += pauses.pop()
            duty.reply(Reply())

    duty.clock.each = paused
    assert duty.look() == "" and pauses == []
    assert duty.warnings == [
        "vit_high is not served any more (UNAVAILABLE (unloaded)); watching the others"
    ]


def test_a_machine_that_stands_still_all_the_time_is_judged_all_the_same(duty: Duty):
    duty.reply(None)
    duty.clock.each = lambda seconds: setattr(duty.clock, "now", duty.clock.now + 2)
    assert duty.look().startswith("preprocess gave no answer")


@pytest.mark.parametrize(("cores", "share"), [(1.0, 0.05), (0.2, 0.01)])
def test_a_rung_at_work_is_no_failure_for_six_timeouts_of_a_whole_core(
    duty: Duty, cores: float, share: float
):
    # A quota of 0.2 of a core shared by five models and sixteen requests that wait.
    duty.server.cores = cores
    duty.reply(None)
    duty.work = dict.fromkeys(MODELS, share)
    assert duty.until(25 / cores) == ""
    assert "has answered nobody for" in duty.until(20 / cores)


@pytest.mark.parametrize("cores", [1.0, 0.2])
def test_a_hung_rung_is_a_failure_under_any_quota(duty: Duty, cores: float):
    duty.server.cores = cores
    duty.reply(None, of=("adaptive_vit", "vit_low"))
    duty.work = {"vit_low": 0.001, "vit_high": 0.05}  # What an idle process takes.
    assert duty.until(8).startswith("vit_low gave no answer within 5 s")


# --- an operator's changes ---------------------------------------------------------------------


def test_a_model_taken_out_by_an_operator_is_told_once_and_the_others_are_watched(duty: Duty):
    duty.server.absent = {"vit_high": "UNAVAILABLE (unloaded)"}
    gone = Reply("Request for unknown model: 'vit_high' has no available versions")
    duty.reply(gone, of=("adaptive_vit", "vit_high"))
    assert duty.until(60) == ""
    duty.server.absent = {}
    duty.reply(Reply())
    assert duty.until(4) == ""
    assert duty.warnings == [
        "vit_high is not served any more (UNAVAILABLE (unloaded)); watching the others",
        "vit_high is served again",
    ]
    duty.reply(None, of=("vit_low",))
    assert duty.until(8).startswith("vit_low gave no answer")


def test_a_model_that_is_taken_out_while_its_canary_is_out_is_no_failure(duty: Duty):
    duty.reply(BROKEN, of=("adaptive_vit",))
    duty.clock.each = lambda seconds: duty.server.absent.update(vit_high="UNLOADING")
    assert duty.until(20) == ""


def test_a_repository_without_the_ensemble_is_watched_by_whether_it_talks():
    duty = Duty()
    duty.memory.known = {"echo"}
    states, duty.server.states = duty.server.states, lambda: {("echo", "1"): "READY"}
    assert duty.until(10) == ""
    assert duty.server.asked == []
    duty.server.counts, duty.server.states = None, states
    assert duty.until(8) == "the server does not answer on gRPC"


# --- model instances ---------------------------------------------------------------------------

ROUTER = Stub(17, "router", "1")


@pytest.fixture
def staffed(duty: Duty) -> Duty:
    duty.server.processes = [ROUTER]
    assert duty.until(3) == ""
    return duty


def test_an_instance_that_ended_is_a_failure_within_2_s_though_every_canary_is_answered(
    staffed: Duty,
):
    staffed.server.processes = []
    assert staffed.until(2) == (
        "1 of 1 instances of router (version 1) ended; Triton does not start them again"
    )


def test_an_instance_that_is_replaced_is_a_reload_and_no_failure(staffed: Duty):
    staffed.server.processes = []
    staffed.clock.each = lambda seconds: staffed.server.processes.append(ROUTER)
    assert staffed.until(20) == ""


def test_two_models_that_are_reloaded_one_after_the_other_are_no_failure(staffed: Duty):
    preprocess = Stub(18, "preprocess", "1")
    staffed.server.processes = [ROUTER, preprocess]
    assert staffed.until(3) == ""
    staffed.server.processes = [preprocess]
    then = iter([[ROUTER], [ROUTER, preprocess]])
    staffed.clock.each = lambda seconds: setattr(
        staffed.server, "processes", next(then, [ROUTER, preprocess])
    )
    assert staffed.until(20) == ""


def test_the_instances_of_a_model_that_was_taken_out_are_not_missed(staffed: Duty):
    staffed.server.absent = {"router": "UNAVAILABLE (unloaded)"}
    staffed.server.processes = []
    assert staffed.until(20) == ""
