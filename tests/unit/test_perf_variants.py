"""What a change to a repository costs: figures by hand; every variant gets every image."""

import contextlib

import numpy as np
import pytest
from typer.testing import CliRunner

from perf.costs import variants
from perf.costs.commands import app
from perf.costs.variants import SYSTEMS, Variant, measure
from perf.harness import Answer
from perf.measure.sets import Pool
from tests.unit.perf_workplace import write_repository, write_rungs


def test_figures_by_hand():
    variant = Variant(low=[10, 20, 40], router=[12, 21, 48], ensemble=[15, 25, 60])
    assert variant.low_ms == 20
    assert variant.router_adds_ms == 2  # of 2, 1, 8
    assert variant.router_overhead == pytest.approx(1.2)  # of 1.2, 1.05, 1.2
    assert variant.ensemble_adds_ms == 4  # of 3, 4, 12
    assert variant.ensemble_over_router == pytest.approx(100 / 81)


def test_a_router_faster_than_its_own_rung_is_not_believed():
    assert not Variant(low=[20], router=[19.5], ensemble=[19.0]).disturbed  # noise
    assert Variant(low=[20], router=[18], ensemble=[25]).disturbed
    assert Variant(low=[20], router=[25], ensemble=[20]).disturbed


def test_no_ratio_of_a_disturbed_variant_is_printed(monkeypatch):
    found = [Variant([20], [18], [25]), Variant([20], [22], [33])]
    monkeypatch.setattr(variants, "measure", lambda *arguments: found)
    monkeypatch.setattr("perf.costs.commands.RungSet.load", lambda folder: None)
    monkeypatch.setattr("perf.measure.sets.load_pool", lambda *arguments: range(50))
    printed = CliRunner().invoke(app, ["variants", "one", "other"]).stdout
    assert "0.900" not in printed and "1.389" not in printed
    assert "1.100" in printed and "1.500" in printed
    assert "the machine was too busy for a figure" in printed


class FakeAsker:
    """Takes a time that tells which variant, system and image were asked."""

    def __init__(self, number, asked):
        self.number, self.asked = number, asked

    def ask(self, system, rows):
        (row,) = rows
        self.asked.append((self.number, system.name, row))
        latency_ms = 1000 * self.number + 100 * SYSTEMS.index(system) + row
        return [Answer(float(latency_ms), np.zeros(4, np.float32), None, False, 0.0)]


def test_every_variant_is_asked_about_every_image_in_a_new_order(monkeypatch):
    asked, images = [], 6
    pool = Pool("made up", [b""] * images, [np.zeros(1, np.float32)] * images, [None] * images, [])

    @contextlib.contextmanager
    def serving(repositories, pool):
        yield [FakeAsker(number, asked) for number in range(len(repositories))]

    monkeypatch.setattr(variants, "_serving", serving)
    done = []
    found = measure(["one", "other"], pool, 2, lambda: done.append(1))
    assert len(done) == 2 * images
    warmed_up = 2 * len(SYSTEMS) * variants.WARMUP
    assert len(asked) == warmed_up + 2 * images * 2 * len(SYSTEMS)
    assert found[1].router == 2 * [1100 + row for row in range(images)]
    assert found[0].ensemble == 2 * [200 + row for row in range(images)]
    turns = [tuple(turn[:2] for turn in asked[i : i + 6]) for i in range(warmed_up, len(asked), 6)]
    assert {frozenset(turn) for turn in turns} == {frozenset(turns[0])}
    assert len(set(turns)) > 6


def test_the_routers_start_check_runs_in_no_measurement(tmp_path, monkeypatch):
    rung_set = write_rungs(tmp_path / "onnx")
    repository = write_repository(tmp_path / "repository", rung_set)
    seen = []

    class Server:
        grpc_url, http_url = "127.0.0.1:1", None

        def __init__(self, served, free_ports):
            seen.append((served / "router/config.pbtxt").read_text())

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(variants, "TritonServer", Server)
    monkeypatch.setattr(variants, "Target", lambda *a: contextlib.nullcontext())
    monkeypatch.setattr(variants, "Asker", lambda *a, **k: None)
    with variants._serving([repository], None):
        pass
    (text,) = seen
    assert '"reference_check" value: { string_value: "off" }' in text


def test_nothing_escalates():
    assert [system.parameters.get("threshold") for system in SYSTEMS] == [None, 10**9, 10**9]
