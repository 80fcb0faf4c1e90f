"""Loads in turn: how much each pass sends, what its figures say, and when they are not trusted."""

from pathlib import Path

import pytest

from perf.analyzer import AnalyzerResult, InputData
from perf.measure import loads
from perf.measure.loads import Level, LoadRunner, Measured
from tests.unit.perf_measured import (
    make_figures,
    make_measured,
    make_pass,
    make_system,
    make_times,
)

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
        self.local, self.readings, self.cpu_readings = local, 0, 0

    def times(self):
        self.readings += 1
        return {
            "router": make_times(3 * self.readings, infer=30 * self.readings),
            "vit_low": make_times(5 * self.readings, infer=20 * self.readings),
            "idle": make_times(7),
        }

    def cpu_s(self):
        self.cpu_readings += 1
        return 0.012 * self.cpu_readings if self.local else None

    def url(self, protocol):
        return f"host:{protocol}"


class FakeAnalyzer:
    """Stands in for `perf.analyzer.run`: logs what it is to send and where its report goes."""

    def __init__(self):
        self.passes = []

    def __call__(self, load, analyzer, csv_path):
        self.passes.append((load, csv_path))
        return AnalyzerResult(load, make_figures(100.0 + len(self.passes)), None, {})


@pytest.fixture
def fake(monkeypatch):
    found = FakeAnalyzer()
    monkeypatch.setattr(loads, "run", found)
    return found


def runner(server=None, pass_s=2.0, **costs_ms):
    costs = {"adaptive": 25.0, "ensemble": 50.0, "static-low": 10.0, **costs_ms}
    return LoadRunner(server or FakeServer(), None, INPUTS, Path("raw"), pass_s, costs)


def measure(levels, turns=1, **changes):
    return runner(**changes).measure(levels, turns, lambda *_: None, lambda: None)


# --- taking turns ------------------------------------------------------------------------------


def test_each_level_is_measured_once_per_turn_and_none_is_always_first(fake):
    levels = [Level(ADAPTIVE, concurrency=c) for c in (1, 2, 4, 8)]
    before, after = [], []
    measured = runner().measure(
        levels,
        2,
        lambda level, turn, so_far: before.append(
            (level.concurrency, turn, sum(len(m.passes) for m in so_far))
        ),
        lambda: after.append(1),
    )
    assert [load.concurrency for load, _ in fake.passes] == [1, 2, 4, 8, 4, 8, 1, 2]
    assert [(c, turn) for c, turn, _ in before] == [
        *((c, 0) for c in (1, 2, 4, 8)),
        *((c, 1) for c in (4, 8, 1, 2)),
    ]
    assert [done for _, _, done in before] == list(range(8)) and len(after) == 8
    assert [entry.level for entry in measured] == levels
    assert measured[0].throughput.values == (101.0, 107.0)
    assert measured[2].throughput.values == (103.0, 105.0)


def test_every_pass_keeps_its_report_under_a_name_of_its_own(fake):
    measure([Level(ADAPTIVE, concurrency=4), Level(ADAPTIVE, rate_per_s=2.5)], turns=2)
    assert sorted(path.name for _, path in fake.passes) == [
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
def test_a_closed_pass_lasts_about_as_long_as_asked_in_whole_rounds(fake, cost_ms, rounds):
    measure([Level(ADAPTIVE, concurrency=4)], adaptive=cost_ms)
    ((load, _),) = fake.passes
    assert (load.rounds, load.records, load.concurrency) == (rounds, False, 4)
    assert load.rate_per_s is None


@pytest.mark.parametrize(("rate", "rounds"), [(2.5, 4), (40.0, 4), (41.0, 5), (333.0, 34)])
def test_an_open_pass_has_records_and_enough_requests_for_its_rate(fake, rate, rounds):
    measure([Level(ADAPTIVE, rate_per_s=rate)])
    ((load, _),) = fake.passes
    assert (load.rounds, load.records, load.rate_per_s) == (rounds, True, rate)


def test_a_pass_sends_its_set_in_the_form_the_system_takes(fake):
    never = make_system("adaptive-0", parameters={"threshold": 10})
    levels = [
        Level(never, "hard", 1),
        Level(ENSEMBLE, "easy", 1, protocol="http"),
        Level(LOW, concurrency=1, shared_memory="system"),
    ]
    measure(levels, server=FakeServer(local=False), **{"adaptive-0": 1.0})
    sent = [load for load, _ in fake.passes]
    assert [str(load.inputs.path) for load in sent] == [
        "hard.json",
        "easy-bytes.json",
        "mixed.json",
    ]
    assert [load.model for load in sent] == ["router", "adaptive_vit", "vit_low"]
    assert [load.url for load in sent] == ["host:grpc", "host:http", "host:grpc"]
    assert [load.protocol for load in sent] == ["grpc", "http", "grpc"]
    assert [load.shared_memory for load in sent] == ["none", "none", "system"]
    assert [dict(load.parameters) for load in sent] == [{"threshold": 10}, {}, {}]
    assert all(load.warmup_requests > 0 for load in sent)


def test_the_servers_times_and_cpu_are_those_of_the_pass(fake):
    (entry,) = measure([Level(ADAPTIVE, concurrency=1)], turns=2)
    for one in entry.passes:
        assert set(one.server) == {"router", "vit_low"}  # the idle model had no request
        assert (one.server["router"].requests, one.server["vit_low"].requests) == (3, 5)
        assert one.server_cpu_ms == pytest.approx(4.0)  # 12 ms for 3 requests


def test_a_server_that_is_not_ours_has_no_cpu_time(fake):
    (entry,) = measure([Level(ADAPTIVE, concurrency=1)], server=FakeServer(local=False))
    assert entry.passes[0].server_cpu_ms is None
    assert entry.to_dict()["server_cpu_ms"] is None


# --- what is said of it ------------------------------------------------------------------------


def test_a_level_is_an_entry_of_the_summary():
    server = {
        "router": make_times(4, queue=4, infer=40),
        "vit_low": make_times(2, queue=2, input=4, infer=20, output=6),
    }
    busy = {**server, "vit_low": make_times(4, queue=8, input=16, infer=80, output=24)}
    level = Level(ADAPTIVE, "easy", 4, protocol="http")
    passes = [make_pass(20.0, 10.0, server, 5.0), make_pass(21.0, 12.0, busy, 7.0)]
    entry = Measured(level, passes).to_dict()
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


def test_a_model_that_some_passes_did_not_reach_shares_the_requests_of_all():
    without = {"router": make_times(4, infer=4)}
    with_high = {"router": make_times(4, infer=4), "vit_high": make_times(2, infer=20)}
    level = Level(ADAPTIVE, concurrency=1)
    entry = Measured(level, [make_pass(server=without), make_pass(server=with_high)]).to_dict()
    assert entry["server_ms"]["vit_high"]["images_share"] == 0.25
    assert entry["server_ms"]["vit_high"]["infer"] == 10.0


def test_a_call_of_a_rung_with_a_batch_counts_all_its_images():
    # The router answers 8 requests with 2 calls of 4 images each.
    server = {"router": make_times(8), "vit_low": make_times(2, batch=4)}
    entry = Measured(Level(ADAPTIVE, concurrency=8), [make_pass(server=server)]).to_dict()
    assert entry["server_ms"]["vit_low"]["images_share"] == 1.0


def test_an_open_level_says_its_rate():
    load = Level(ADAPTIVE, rate_per_s=2.5).to_dict()["load"]
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
    assert Measured(Level(ADAPTIVE, rate_per_s=2.5), made).instability() == said
