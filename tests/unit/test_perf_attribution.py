"""Where a request spends its time: Triton's times and how they are taken apart."""

import pytest
from tritonclient.grpc.service_pb2 import ModelStatisticsResponse

from perf import attribution
from perf import server_times as times_module
from perf.attribution import all_signals, attribute, parts, scoring_ms, together
from perf.figures import PerfError
from perf.server_times import ms, server_times, since
from tests.unit.calibration_outputs import CLASS_SIGNALS
from tests.unit.fakes import make_calibration
from tests.unit.perf_measured import make_answer, make_system, make_times

# Two requests, one of them escalated, in milliseconds; `rest` is between queue and backend.
TIMES = {
    "adaptive_vit": make_times(2, rest=190),
    "preprocess": make_times(2, queue=1, input=1, infer=6, output=1, rest=1),
    "vit_low": make_times(2, queue=2, input=1, infer=50, output=1, rest=2),
    "vit_high": make_times(1, queue=3, input=2, infer=90, output=2, rest=3),
    "router": make_times(2, queue=4, infer=175),
}


def named(found):
    return {part["name"]: part["ms"] for part in found["parts"]}


def test_each_part_is_what_its_counter_says_per_request():
    found = parts(100.0, 2, TIMES, scoring_ms=0.5)
    assert (found["requests"], found["total_ms"]) == (2, 100.0)
    assert named(found) == pytest.approx(
        {
            "client and network": (200 - 190) / 2,
            "preprocess": 8 / 2,
            "cheap rung": 52 / 2,
            "scoring": 0.5,
            # All the ensemble took but the above and below.
            "router, BLS hops, ensemble": (190 - 8 - 52 - 1 - 94 - 10) / 2,
            "full rung": 94 / 2,
            "queues": (1 + 2 + 3 + 4) / 2,
        }
    )


@pytest.mark.parametrize("missing", [None, "vit_high", "preprocess", "router"])
@pytest.mark.parametrize("scoring", [0.0, 0.7])
def test_the_parts_add_up_to_the_total(missing, scoring):
    times = {name: model for name, model in TIMES.items() if name != missing}
    found = parts(101.5, 2, times, scoring)
    assert sum(named(found).values()) == pytest.approx(101.5)
    if missing == "vit_high":
        assert named(found)["full rung"] == 0.0


def test_only_images_that_the_cheap_rung_saw_are_scored():
    once = {**TIMES, "vit_low": make_times(1, infer=25)}
    assert named(parts(100.0, 2, once, scoring_ms=0.5))["scoring"] == 0.25


# --- both paths together -----------------------------------------------------------------------


def side(requests, total, **ms):
    return {
        "requests": requests,
        "total_ms": total,
        "parts": [{"name": name, "ms": value} for name, value in ms.items()],
    }


KEPT = side(30, 40.0, client=4.0, low=36.0, high=0.0)
ESCALATED = side(10, 140.0, client=6.0, low=34.0, high=100.0)


def test_both_paths_are_weighted_by_the_rate_not_by_what_was_sent():
    found = together(KEPT, ESCALATED, 0.1)
    assert found["requests"] == 40
    assert found["total_ms"] == pytest.approx(50.0)
    assert named(found) == pytest.approx({"client": 4.2, "low": 35.8, "high": 10.0})


@pytest.mark.parametrize(("rate", "only"), [(0.0, KEPT), (1.0, ESCALATED)])
def test_a_path_that_nothing_takes_is_not_needed(rate, only):
    both = (only, None) if rate == 0 else (None, only)
    assert together(*both, rate) == only
    assert together(KEPT, ESCALATED, rate) == only


def test_a_path_that_is_needed_and_missing_leaves_no_figure():
    assert together(KEPT, None, 0.1) is None
    assert together(None, ESCALATED, 0.1) is None


# --- asking ------------------------------------------------------------------------------------


class FakeServer:
    """Answers in 10 ms times the image's number; counts a request `late` questions later."""

    def __init__(self, late=0, counts=True):
        self.late, self.counts = late, counts
        self.asked, self.counted, self.questions = [], 3, 0

    def ask(self, system, rows):
        (row,) = rows
        self.asked.append((system.name, row))
        self.questions = self.late
        return [make_answer(10.0 * row)]

    def times(self):
        if self.questions:
            self.questions -= 1
        elif self.counts:
            self.counted = 3 + len(self.asked)
        infer = 8 * self.counted
        return {name: make_times(self.counted, infer=infer) for name in ("adaptive_vit", "router")}


@pytest.mark.parametrize("late", [0, 3])
def test_the_requests_that_were_sent_are_taken_apart_however_late_they_are_counted(late):
    server, steps = FakeServer(late), []
    found = attribute(
        server, server, make_system("ensemble"), [1, 2, 6], 0.0, lambda: steps.append(1)
    )
    assert server.asked == [("ensemble", 1), ("ensemble", 2), ("ensemble", 6)]
    assert (found["requests"], found["total_ms"], len(steps)) == (3, 30.0, 3)
    assert named(found)["client and network"] == pytest.approx(30.0 - 8.0)


def test_a_server_that_does_not_count_is_told(monkeypatch):
    monkeypatch.setattr(times_module, "PATIENCE_S", 0.02)
    server = FakeServer(counts=False)
    with pytest.raises(PerfError, match="do not count"):
        attribute(server, server, make_system("ensemble"), [1], 0.0, lambda: None)


@pytest.mark.parametrize("classes", [5, None])
def test_scoring_takes_a_moment(classes):
    assert 0 < scoring_ms(make_calibration(classes=classes)) < 50


# --- Triton's times ----------------------------------------------------------------------------


class FakeClient:
    """Statistics in Triton's own messages; `answered` is requests by model and version.

    The n-th field of a request takes n ms, and each request holds three images.
    """

    def __init__(self, answered):
        self.answered = answered

    def get_inference_statistics(self, client_timeout):
        fields = ("success", "queue", "compute_input", "compute_infer", "compute_output")
        answer = ModelStatisticsResponse()
        for (name, version), count in self.answered.items():
            entry = answer.model_stats.add(name=name, version=version, inference_count=3 * count)
            for index, field in enumerate(fields, start=1):
                getattr(entry.inference_stats, field).count = count
                getattr(entry.inference_stats, field).ns = count * index * 10**6
        return answer


def statistics(count):
    parts = ("total", "queue", "input", "infer", "output")
    ns = {part: count * i * 10**6 for i, part in enumerate(parts, 1)}
    return {"requests": count, "images": 3 * count, **ns}


def test_tritons_statistics_are_read_by_model():
    times = server_times(FakeClient({("vit_low", "1"): 4}))["vit_low"]
    assert times == statistics(4)
    assert (ms(times, "queue"), ms(times, "input", "infer", "output")) == (8.0, 48.0)


@pytest.mark.parametrize("answering", ["1", "2"])
@pytest.mark.parametrize("order", [("1", "2"), ("2", "1")])
def test_a_router_of_two_versions_is_counted_whichever_of_them_answers(answering, order):
    client = FakeClient({("router", version): 7 for version in order} | {("vit_low", "1"): 9})
    before = server_times(client)
    client.answered["router", answering] += 5
    assert since(before, server_times(client)) == {"router": statistics(5)}


def test_between_two_readings_only_models_that_were_asked_count():
    before = {"a": make_times(2, infer=10), "b": make_times(5, infer=50)}
    after = {"a": make_times(5, queue=1, infer=25), "b": make_times(5, infer=50)}
    assert since(before, after) == {"a": make_times(3, queue=1, infer=15)}


def test_every_signal_is_timed(monkeypatch):
    monkeypatch.setattr(attribution, "SIGNAL_ROUNDS", 3)
    found = all_signals(2, layers=4, dim=8, classes=5)
    assert set(found) == set(CLASS_SIGNALS) and all(ms > 0 for ms in found.values())
