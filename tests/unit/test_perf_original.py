"""The research script's tables: figures on hand-made costs, and refusals before a server starts."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from bundle import config, manifest
from bundle.graphs import GraphsError, GraphSet
from perf import original
from perf.figures import PerfError, Spread
from perf.original import SOURCE, original_rows
from perf.systems import ADAPTIVE, HIGH, LOW
from report.terminal import Bars
from tests.unit.onnx_files import write_graph_set
from tests.unit.perf_workplace import write_repository, write_rungs

BARS = Bars(Console(quiet=True))


class StoppedError(Exception):
    """What ends a measurement once the test has seen enough of it."""


def memory(pss_mib, weights_mib):
    return {"peak_pss_mib": pss_mib, "peak_rss_mib": 999.0, "weights_mib": weights_mib}


RESULT = {
    "kind": "original",
    "backbone": "static-vit",
    "environment": {"device": "2 cores of Some"},
    "px": {"vit_low": 32, "vit_high": 64},
    "images": {"source": "sample crops, seed 32", "count": 2000},
    "forward_ms": {"vit_low": 2.0, "vit_high": 7.0},
    "latency_ms": {
        LOW: Spread.of([2.0, 4.0, 3.0]).to_dict(),
        HIGH: Spread.of([9.0]).to_dict(),
        ADAPTIVE: Spread.of([4.5]).to_dict(),
    },
    "memory": {LOW: memory(100.4, 21.0), HIGH: memory(150.0, 22.0), ADAPTIVE: memory(240.0, 43.0)},
    "escalation_rate": 0.1,
    "speedup": Spread.of([2.0]).to_dict(),
    "bound": Spread.of([2.3077]).to_dict(),
    "disturbed": False,
    "doubts": [],
    "source": SOURCE,
    "notes": ["a note"],
}


def test_our_figures_stand_beside_the_sources():
    rows = {title: figures for title, *figures in original_rows(RESULT)}
    assert rows["forward pass, 32 px"] == ["2.00 ms", "1.8 ms"]
    assert rows["forward pass, 64 px"] == ["7.00 ms", "8.7 ms"]
    assert rows["forward pass, high / low"] == ["3.5x", "4.8x"]
    assert rows["static low: average latency"] == ["3.00 ms", "2.5 ms"]
    assert rows["static low: peak memory"] == ["100 MiB (weights 21)", "30 MB"]
    assert rows["static high: peak memory"] == ["150 MiB (weights 22)", "68 MB"]
    assert rows["adaptive: average latency"] == ["4.50 ms", "2.894 ms"]
    assert rows["adaptive: peak memory"] == ["240 MiB (weights 43)", "61.8 MB"]
    assert rows["average latency, static high / low"] == ["3.0x", "3.5x"]
    assert rows["escalated"] == ["10.0%", "9.5%"]
    assert rows["speed-up over static high"] == ["2.00x", "3.3x"]
    # 1 / (2.5 / 8.8 + 0.095): what the source's own parts allow.
    assert rows["cascade bound"] == ["2.31x", "2.64x"]


def test_ratios_that_cannot_be_true_are_not_shown():
    disturbed = RESULT | {"disturbed": True, "doubts": ["a reason"]}
    rows = {title: figures for title, *figures in original_rows(disturbed)}
    assert rows["speed-up over static high"] == rows["cascade bound"][:1] + ["3.3x"]
    assert rows["average latency, static high / low"][0] == "not believed"
    assert rows["cascade bound"][0] == "not believed" and rows["escalated"][0] == "10.0%"


def test_a_forward_pass_is_timed_for_both_rungs(tmp_path, monkeypatch):
    monkeypatch.setattr(original, "FORWARD_RUNS", 3)
    monkeypatch.setattr(original, "FORWARD_WARMUP", 1)
    found = original.measure_forward(GraphSet.load(write_graph_set(tmp_path)), BARS)
    assert set(found) == {"vit_low", "vit_high"} and min(found.values()) > 0


def test_what_is_missing_is_said_before_a_server_starts(tmp_path):
    with pytest.raises(GraphsError, match="export rungs"):
        original.measure_original(tmp_path, 10, BARS)
    with pytest.raises(PerfError, match="at least 5"):
        original.measure_original(tmp_path, 4, BARS)


def test_what_is_measured_is_a_copy_whose_router_compares_nothing_at_its_start(
    tmp_path, monkeypatch
):
    graph_set = write_rungs(tmp_path / "onnx")
    repository = write_repository(tmp_path / "model_repository", graph_set)
    before = (repository / "router/config.pbtxt").read_text()
    calibration = SimpleNamespace(check_rungs=lambda files: None, threshold=1.0)
    monkeypatch.setattr(original.Calibration, "load", lambda file: calibration)
    monkeypatch.setattr(original, "measure_forward", lambda *arguments: {})
    monkeypatch.setattr(original, "load_pool", lambda *arguments: [])
    monkeypatch.setattr(original, "environment", lambda *arguments: {})
    seen = []

    def serve(*arguments):
        (served,) = (argument for argument in arguments if isinstance(argument, Path))
        manifest.verify(served)
        seen.append(config.read(served / "router/config.pbtxt"))
        raise StoppedError

    for stage in ("measure_in_turn", "peak_memory"):
        monkeypatch.setattr(original, "measure_in_turn", lambda *arguments: (None, "2.51.0"))
        monkeypatch.setattr(original, stage, serve)
        with pytest.raises(StoppedError):
            original.measure_original(tmp_path, 10, BARS)
    assert len(seen) == 2
    assert [config.parameter(router, "reference_check") for router in seen] == ["off", "off"]
    assert (repository / "router/config.pbtxt").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_repository", "onnx"]


@pytest.mark.parametrize("doubts", [[], ["a reason"]])
def test_the_result_is_kept_and_shown(tmp_path, monkeypatch, capsys, doubts):
    def measured(build, images, bars):
        return {**RESULT, "images": {"source": "crops", "count": images}, "doubts": doubts}

    monkeypatch.setattr(original, "measure_original", measured)
    original.run_original(tmp_path, tmp_path / "new" / "original.json", 7)
    kept = json.loads((tmp_path / "new" / "original.json").read_text())
    assert kept["kind"] == "original" and kept["images"]["count"] == 7
    shown = capsys.readouterr().out
    for words in ("static-vit, 7 crops", "2 cores of Some", "source", "a note"):
        assert words in shown
    assert ("too busy for a figure: a reason" in shown) == bool(doubts)
