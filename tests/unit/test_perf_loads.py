"""Loads in turn: which there are, how much is sent, what is said of them and what is trusted."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from perf import loads
from perf.analyzer_install import PerfAnalyzerError
from perf.loads import LoadRunner, Passes, closed_levels, most_in_flight, open_levels
from perf.perf_analyzer import InputData, Level
from perf.record import Record
from perf.suites import FULL, QUICK, SUITES
from tests.unit.perf_measured import make_measured, make_pass, make_system, make_times

ADAPTIVE, ENSEMBLE = make_system("adaptive"), make_system("ensemble")
LOW = make_system("static-low", parameters={})
INPUTS = {
    name: {
        "image": InputData(Path(f"{name}.json"), 10),
        "image_bytes": InputData(Path(f"{name}-bytes.json"), 10),
    }
    for name in ("mixed", "easy", "hard")
}


class FakeServer:
    """A target whose router answers 3 requests in 12 ms of CPU time between two readings."""

    def __init__(self, local=True):
        self.local, self.readings = local, 0

    def times(self):
        self.readings += 1
        return {
            "router": make_times(3 * self.readings, infer=30 * self.readings),
            "vit_low": make_times(5 * self.readings, infer=20 * self.readings),
            "adaptive_vit": make_times(self.readings),
            "idle": make_times(7),
        }

    def meter(self):
        used = SimpleNamespace(read_s=lambda: 5.0, used_s=lambda before_s, seconds: 0.012)
        return used if self.local else None

    def url(self, protocol):
        return f"host:{protocol}"


class FakeAnalyzer:
    """Stands in for `perf_analyzer.run`: logs what it is to send and where its report goes."""

    def __init__(self):
        self.passes, self.fails_at = [], None

    def __call__(self, level, url, inputs, rounds, analyzer, report, timeout_s):
        self.passes.append(SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"}))
        if len(self.passes) == self.fails_at:
            raise PerfAnalyzerError("failed")
        return make_pass(100.0 + len(self.passes))


@pytest.fixture
def fake(monkeypatch):
    found = FakeAnalyzer()
    monkeypatch.setattr(loads, "run", found)
    return found


def runner(server=None, pass_s=2.0, **costs_ms):
    costs = {"adaptive": 25.0, "ensemble": 50.0, "static-low": 10.0, **costs_ms}
    server = server or FakeServer()
    return LoadRunner(server, server.meter(), None, INPUTS, Path("raw"), pass_s, costs)


@pytest.fixture
def measure(tmp_path):
    """Measures levels, and has the record they are kept in."""

    def measure(levels, turns=1, **changes):
        return runner(**changes).measure(levels, turns, measure.record, "loop")

    measure.record = Record(tmp_path, Console(quiet=True), {"answers": {}, "systems": ["before"]})
    return measure


# --- taking turns ------------------------------------------------------------------------------


def test_each_level_is_measured_once_per_turn_and_none_is_always_first(fake, measure):
    levels = [Level(ADAPTIVE, concurrency=c) for c in (1, 2, 4, 8)]
    found = measure(levels, turns=2)
    assert [sent.level.concurrency for sent in fake.passes] == [1, 2, 4, 8, 4, 8, 1, 2]
    assert [entry.level for entry in found] == levels
    assert found[0].throughput.values == (101.0, 107.0)
    assert found[2].throughput.values == (103.0, 105.0)
    kept = json.loads((measure.record.folder / "summary.json").read_text())["systems"]
    assert kept == ["before", *(entry.to_dict() for entry in found)]


def test_what_was_measured_before_a_pass_that_fails_is_kept(fake, measure):
    fake.passes += [None] * 2
    fake.fails_at = 5
    with pytest.raises(PerfAnalyzerError):
        measure([Level(ADAPTIVE, concurrency=c) for c in (1, 2, 4)], turns=2)
    before, *kept = measure.record.summary["systems"]
    assert before == "before" and [entry["load"]["concurrency"] for entry in kept] == [1, 2]


def test_every_pass_keeps_its_report_under_a_name_of_its_own(fake, measure):
    measure([Level(ADAPTIVE, concurrency=4), Level(ADAPTIVE, rate_per_s=2.5)], turns=2)
    assert sorted(sent.report.name for sent in fake.passes) == [
        "adaptive-mixed-c4-grpc-1.csv",
        "adaptive-mixed-c4-grpc-2.csv",
        "adaptive-mixed-rate2.5-grpc-1.csv",
        "adaptive-mixed-rate2.5-grpc-2.csv",
    ]
    level = Level(ADAPTIVE, "easy", 4, shared_memory="system")
    assert level.slug == "adaptive-easy-c4-grpc-shm"


# --- what is sent ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost_ms", "rounds"),
    [(25.0, 8), (24.0, 8), (200.0, 1), (1900.0, 1)],  # 2 s / cost, in rounds of 10 images
)
def test_a_closed_pass_lasts_about_as_long_as_asked_in_whole_rounds(fake, measure, cost_ms, rounds):
    measure([Level(ADAPTIVE, concurrency=4)], adaptive=cost_ms)
    (sent,) = fake.passes
    assert sent.rounds == rounds


@pytest.mark.parametrize(("rate", "rounds"), [(2.5, 6), (60.0, 6), (61.0, 7), (333.0, 34)])
def test_an_open_pass_has_enough_requests_for_its_rate_and_its_percentiles(
    fake, measure, rate, rounds
):
    measure([Level(ADAPTIVE, rate_per_s=rate)])
    (sent,) = fake.passes
    assert sent.rounds == rounds and sent.timeout_s > 10 * rounds / rate


def test_a_pass_sends_its_set_in_the_form_the_system_takes(fake, measure):
    never = make_system("adaptive-0", parameters={"threshold": 10})
    levels = [
        Level(never, "hard", 1),
        Level(ENSEMBLE, "easy", 1, protocol="http"),
        Level(LOW, concurrency=1, shared_memory="system"),
    ]
    measure(levels, server=FakeServer(local=False), **{"adaptive-0": 1.0})
    assert [(str(sent.inputs.path), sent.url) for sent in fake.passes] == [
        ("hard.json", "host:grpc"),
        ("easy-bytes.json", "host:http"),
        ("mixed.json", "host:grpc"),
    ]


def test_the_servers_times_and_cpu_are_those_of_the_pass(fake, measure):
    (entry,) = measure([Level(ADAPTIVE, concurrency=1)], turns=2)
    for one in entry.passes:
        assert set(one.server) == {"router", "vit_low", "adaptive_vit"}  # idle had no request
        assert (one.server["router"]["requests"], one.server["vit_low"]["requests"]) == (3, 5)
        assert one.server_cpu_ms == pytest.approx(4.0)  # 12 ms for 3 requests
    (elsewhere,) = measure([Level(ADAPTIVE, concurrency=1)], server=FakeServer(local=False))
    assert elsewhere.passes[0].server_cpu_ms is elsewhere.to_dict()["server_cpu_ms"] is None


# --- what is said of it ------------------------------------------------------------------------


def test_a_level_is_an_entry_of_the_summary():
    server = {
        "router": make_times(4, queue=4, infer=40),
        "vit_low": make_times(2, queue=2, input=4, infer=20, output=6),
    }
    busy = {**server, "vit_low": make_times(4, queue=8, input=16, infer=80, output=24)}
    level = Level(ADAPTIVE, "easy", 4, protocol="http")
    passes = [make_pass(20.0, 10.0, server, 5.0), make_pass(21.0, 12.0, busy, 7.0)]
    entry = Passes(level, passes).to_dict()
    assert (entry["system"], entry["model"], entry["set"]) == ("adaptive", "router", "easy")
    assert entry["load"] == {
        "loop": "closed",
        "concurrency": 4,
        "rate_per_s": None,
        "protocol": "http",
        "shared_memory": "none",
    }
    assert (entry["requests"], entry["stable"], entry["unstable_reason"]) == (16, True, None)
    assert entry["throughput_per_s"]["values"] == [20.0, 21.0]
    latency = {name: spread["values"] for name, spread in entry["latency_ms"].items()}
    assert latency == {"mean": [11, 13], "p50": [10, 12], "p95": [12, 14], "p99": [13, 15]}
    assert entry["server_cpu_ms"]["median"] == 6.0
    # 6 requests of the rung for 8 of the router; times per request, the median of both passes.
    rung = {"images_share": 0.75, "queue": 1.5, "input": 3.0, "infer": 15.0, "output": 4.5}
    assert entry["server_ms"]["vit_low"] == pytest.approx(rung)
    assert entry["server_ms"]["router"]["images_share"] == 1.0


def test_images_are_counted_over_all_passes_whatever_a_call_of_a_rung_holds():
    # The router answers 8 requests with 2 calls of 4 images; one pass did not reach the full rung.
    without = {"router": make_times(8), "vit_low": make_times(2, batch=4)}
    with_high = {**without, "vit_high": make_times(2, infer=20)}
    level = Level(ADAPTIVE, rate_per_s=2.5)
    entry = Passes(level, [make_pass(server=without), make_pass(server=with_high)]).to_dict()
    assert entry["server_ms"]["vit_low"]["images_share"] == 1.0
    assert entry["server_ms"]["vit_high"]["images_share"] == 0.125
    assert entry["server_ms"]["vit_high"]["infer"] == 10.0
    load = entry["load"]
    assert (load["loop"], load["concurrency"], load["rate_per_s"]) == ("open", None, 2.5)


@pytest.mark.parametrize(
    ("throughputs", "said"),
    [
        ([10.0], "measured once"),
        ([10.0, 10.9], None),
        ([10.0, 11.2, 10.0], "throughput differs by 12% between its passes"),
        ([11.2, 10.0], "throughput differs by 12% between its passes"),
    ],
)
def test_closed_passes_whose_throughput_differs_are_not_stable(throughputs, said):
    entry = make_measured("adaptive", throughputs)
    assert entry.instability() == said
    assert entry.to_dict()["stable"] == (said is None)
    assert entry.to_dict()["unstable_reason"] == said


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([(10.0, 0.0), (10.5, 0.05)], None),
        ([(10.0, 0.0), (13.0, 0.0)], "median latency differs by 30% between its passes"),
        ([(10.0, 0.0), (10.0, 0.08)], "8% of the requests were sent later than planned"),
    ],
)
def test_open_passes_must_agree_in_latency_and_be_sent_in_time(passes, said):
    # Their throughput is the rate, and says nothing.
    made = [make_pass(5.0 * (i + 1), p50, delayed=late) for i, (p50, late) in enumerate(passes)]
    assert Passes(Level(ADAPTIVE, rate_per_s=2.5), made).instability() == said


# --- which loads there are ----------------------------------------------------------------------

NAMES = ["static-low", "static-6", "static-high", "adaptive-0", "adaptive", "ensemble"]
SYSTEMS = [make_system(name) for name in NAMES]
SETS = ("mixed", "easy", "hard")


def slugs(levels):
    return [level.slug for level in levels]


def closed(suite, sets=SETS, http=True, shared_memory=True, systems=SYSTEMS):
    return slugs(closed_levels(suite, systems, sets, http, shared_memory))


# --- closed loops ------------------------------------------------------------------------------


def test_the_quick_suite_measures_what_is_compared_and_the_rest_saturated():
    assert closed(replace(QUICK, concurrency=(1, 4))) == [
        "static-low-mixed-c1-grpc",
        "static-high-mixed-c1-grpc",
        "adaptive-mixed-c1-grpc",
        "static-low-mixed-c4-grpc",
        "static-high-mixed-c4-grpc",
        "adaptive-mixed-c4-grpc",
        "ensemble-mixed-c4-grpc",
        "adaptive-easy-c4-grpc",
        "adaptive-hard-c4-grpc",
        "adaptive-mixed-c4-http",
        "adaptive-mixed-c4-grpc-shm",
    ]


def test_the_full_suite_draws_the_curves_and_measures_the_ends_of_all_others():
    found = closed(replace(FULL, concurrency=(1, 2, 8)))
    curves = ["static-low", "static-high", "adaptive", "ensemble"]
    plain = [f"{name}-mixed-c{c}-grpc" for c in (1, 2, 8) for name in curves]
    others = [name for name in NAMES if name not in curves]
    plain += [f"{name}-mixed-c{c}-grpc" for c in (1, 8) for name in others]
    assert others and found[: len(plain)] == plain
    variants = [
        f"{name}-mixed-c{c}-{kind}"
        for name in ("static-high", "adaptive")
        for c in (1, 8)
        for kind in ("http", "grpc-shm")
    ]
    assert sorted(found[len(plain) :]) == sorted(
        ["adaptive-easy-c8-grpc", "adaptive-hard-c8-grpc", *variants]
    )


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_no_load_is_measured_twice_and_what_cannot_be_measured_is_left_out(suite):
    assert len(set(closed(suite))) == len(closed(suite))
    assert not any("http" in slug for slug in closed(suite, http=False))
    assert any("shm" in slug for slug in closed(suite, http=False))
    assert not any("shm" in slug for slug in closed(suite, shared_memory=False))
    assert any("http" in slug for slug in closed(suite, shared_memory=False))
    no_hard = closed(suite, sets=("mixed", "easy"))
    assert any("-easy-" in slug for slug in no_hard)
    assert not any("-hard-" in slug for slug in no_hard)
    assert not any("ensemble" in slug for slug in closed(suite, systems=SYSTEMS[:-1]))


def test_no_parameters_are_sent_over_http():
    with_threshold = [
        make_system(name, parameters={"threshold": 1} if name == "adaptive-0" else {})
        for name in NAMES
    ]
    over_http = [
        level
        for level in closed_levels(FULL, with_threshold, SETS, http=True, shared_memory=True)
        if level.protocol == "http"
    ]
    assert over_http and not any(level.system.parameters for level in over_http)


# --- saturated ---------------------------------------------------------------------------------

MEASURED = [
    make_measured("static-low", [30.0, 32.0], concurrency=1),
    make_measured("static-low", [60.0, 62.0, 61.0], concurrency=8),
    make_measured("static-low", [55.0], concurrency=4),
    make_measured("static-high", [18.0, 20.0], concurrency=8),
    make_measured("adaptive", [40.0], concurrency=8),
    make_measured("adaptive", [90.0], concurrency=16, set_name="easy"),
    make_measured("adaptive", [91.0], concurrency=16, protocol="http"),
    make_measured("adaptive", [92.0], concurrency=16, shared_memory="system"),
]


def test_saturated_is_the_highest_closed_loop_on_mixed_images_over_plain_grpc():
    found = most_in_flight(MEASURED)
    assert set(found) == {"static-low", "static-high", "adaptive"}
    assert found["static-low"] is MEASURED[1]
    assert found["adaptive"] is MEASURED[4]


# --- open loops --------------------------------------------------------------------------------


def test_images_arrive_at_parts_of_the_median_that_each_system_reached_itself():
    levels = open_levels(replace(FULL, rates=(0.5, 0.9)), SYSTEMS, MEASURED)
    assert [(level.system.name, level.rate_per_s) for level in levels] == [
        ("static-low", 30.5),
        ("static-high", 9.5),
        ("adaptive", 20.0),
        ("static-low", 54.9),
        ("static-high", 17.1),
        ("adaptive", 36.0),
    ]
    assert {(level.concurrency, level.set_name, level.protocol) for level in levels} == {
        (0, "mixed", "grpc")
    }


def test_the_quick_suite_sends_open_loops_to_the_adaptive_system_only():
    levels = open_levels(replace(QUICK, rates=(0.6,)), SYSTEMS, MEASURED)
    assert [level.system.name for level in levels] == ["adaptive"]
