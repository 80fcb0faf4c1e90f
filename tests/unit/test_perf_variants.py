"""What a change to a repository costs: figures by hand; every variant gets every image."""

import contextlib

import numpy as np
import pytest
from typer.testing import CliRunner

from bundle import config
from perf import variants
from perf.__main__ import app
from perf.harness import ONE_BY_ONE, Paired
from perf.images import Pool
from perf.variants import SYSTEMS, Variant, measure
from tests.unit.perf_measured import make_answer
from tests.unit.perf_workplace import write_repository, write_rungs


def variant(low, router, ensemble):
    """A variant whose images took these milliseconds."""
    taken = dict(zip((system.name for system in SYSTEMS), (low, router, ensemble), strict=True))
    return Variant.of(Paired([{n: [make_answer(ms) for ms in mss] for n, mss in taken.items()}]))


def test_figures_by_hand():
    found = variant(low=[10, 20, 40], router=[12, 21, 48], ensemble=[15, 25, 60])
    assert found.low_ms == 20
    assert found.router_adds_ms == 2  # of 2, 1, 8
    assert found.router_overhead == pytest.approx(1.2)  # of 1.2, 1.05, 1.2
    assert found.ensemble_adds_ms == 4  # of 3, 4, 12
    assert found.ensemble_over_router == pytest.approx(100 / 81)


def test_a_router_faster_than_its_own_rung_is_not_believed():
    assert not variant(low=[20], router=[19.5], ensemble=[19.0]).disturbed  # noise
    assert variant(low=[20], router=[18], ensemble=[25]).disturbed
    assert variant(low=[20], router=[25], ensemble=[20]).disturbed


def test_no_ratio_of_a_disturbed_variant_is_printed(monkeypatch):
    found = [variant([20], [18], [25]), variant([20], [22], [33])]
    pool = Pool("crops", [b""] * 50, [], [None] * 50, [])
    monkeypatch.setattr(variants, "measure", lambda *arguments: found)
    monkeypatch.setattr("perf.__main__.GraphSet.load", lambda folder: None)
    monkeypatch.setattr("perf.images.load_pool", lambda *arguments, **stage: pool)
    printed = CliRunner().invoke(app, ["variants", "one", "other"]).stdout
    assert "0.900" not in printed and "1.389" not in printed
    assert "1.100" in printed and "1.500" in printed
    assert "the machine was too busy for a figure" in printed


class FakeAsker:
    """Takes a time that tells which variant, system and image were asked."""

    def __init__(self, number, asked):
        self.number, self.asked = number, asked

    def ask(self, system, rows, load):
        assert load == ONE_BY_ONE
        name = system.name.split()[1]
        self.asked += [(self.number, name, row) for row in rows]
        place = [system.name for system in SYSTEMS].index(name)
        return [make_answer(float(1000 * self.number + 100 * place + row + 1)) for row in rows]


def test_every_variant_is_asked_about_every_image_in_a_new_order(monkeypatch):
    asked, images = [], 6
    pool = Pool("made up", [b""] * images, [np.zeros(1, np.float32)] * images, [None] * images, [])

    @contextlib.contextmanager
    def serving(repositories, pool):
        yield [FakeAsker(number, asked) for number in range(len(repositories))]

    monkeypatch.setattr(variants, "_serving", serving)
    done = []
    found = measure(["one", "other"], pool, 2, lambda: done.append(1))
    assert len(done) == 2 * images * 2 * len(SYSTEMS)
    warmed_up = 2 * len(SYSTEMS) * variants.WARM_UP
    assert len(asked) == warmed_up + 2 * images * 2 * len(SYSTEMS)
    assert found[0].low_ms == 3.5 and found[1].low_ms == 1003.5
    assert found[0].router_adds_ms == found[1].ensemble_adds_ms == 100
    turns = [asked[i : i + 6] for i in range(warmed_up, len(asked), 6)]
    assert [turn[0][2] for turn in turns] == 2 * [*range(images)]
    assert all(len({row for *_, row in turn}) == 1 for turn in turns)
    orders = [tuple(turn[:2] for turn in turn) for turn in turns]
    assert {frozenset(order) for order in orders} == {frozenset(orders[0])}
    assert len(set(orders)) > 6


def test_the_routers_start_check_runs_in_no_measurement(tmp_path, monkeypatch):
    graph_set = write_rungs(tmp_path / "onnx")
    repository = write_repository(tmp_path / "repository", graph_set)
    seen = []

    class Server:
        grpc_url, http_url = "127.0.0.1:1", None

        def __init__(self, served, **options):
            seen.append(config.read(served / "router/config.pbtxt"))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(variants, "TritonServer", Server)
    monkeypatch.setattr(variants, "Target", lambda *a: contextlib.nullcontext())
    monkeypatch.setattr(variants, "Asker", lambda *a, **k: None)
    with variants._serving([repository], None):
        pass
    (router,) = seen
    assert config.parameter(router, "reference_check") == "off"


def test_nothing_escalates():
    assert [system.parameters.get("threshold") for system in SYSTEMS] == [None, 10**9, 10**9]
