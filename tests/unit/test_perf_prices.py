"""What graphs cost as served: groups, repositories and figures by hand, with a scripted asker."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
from typer.testing import CliRunner

from perf import prices
from perf.__main__ import app
from perf.figures import PerfError
from perf.harness import ONE_BY_ONE
from perf.images import Pool
from perf.prices import LONE, TOGETHER, VARIED, Served, disturbed, groups_of, lay_out, price
from tests.unit.onnx_files import SIZE
from tests.unit.perf_measured import make_answer
from tests.unit.perf_workplace import write_rungs

SERVED = Served(instances=2, threads=1, batch=2, turns=3)
IMAGES = 5
COST_MS = {"vit_high": 400.0, "vit_low": 100.0, "px5": 200.0, "px6": 300.0}  # an image's
SERVER_CPU = 0.9  # of the clock's time


class FakeServers:
    """Stands in for servers and their askers; has a price for every image."""

    def __init__(self):
        self.slower = 1.0
        self.works_harder = {}  # by graph, how many times as much CPU time it takes
        self.by_image = lambda name, row: 1.0  # how many times as dear an image is as usual
        self.asked, self.started = [], []
        self.measures_cpu = True

    @contextlib.contextmanager
    def serving(self, graph_set, names, pool, served):
        self.started.append(list(names))
        yield self

    def ask(self, system, rows, load=ONE_BY_ONE):
        self.asked.append((system.name, list(rows), load, system.outputs))
        taken_ms = COST_MS[system.model] * self.slower
        cpu_ms = SERVER_CPU * taken_ms * self.works_harder.get(system.name, 1.0)
        cpu_ms = cpu_ms if self.measures_cpu else None
        shares = [self.by_image(system.name, row) for row in rows]
        if load.in_flight > 1:  # they share the time
            shares = [np.mean(shares)] * len(rows)
        return [
            replace(
                make_answer(
                    taken_ms / load.in_flight * share, cpu_ms=cpu_ms and float(cpu_ms * share)
                ),
                tokens=10.0 + row if "tokens" in system.outputs else None,
            )
            for row, share in zip(rows, shares, strict=True)
        ]


@pytest.fixture(scope="module")
def graph_set(tmp_path_factory):
    return write_rungs(tmp_path_factory.mktemp("onnx"), alternatives=(5, 6))


def pool_of(images):
    tensors = [np.full((3, SIZE, SIZE), i, np.float32) for i in range(images)]
    return Pool("made up", [b""] * images, tensors, [None] * images, [])


@pytest.fixture
def pool():
    return pool_of(IMAGES)


@pytest.fixture
def servers(monkeypatch):
    fake = FakeServers()
    monkeypatch.setattr(prices, "_serving", fake.serving)
    return fake


def priced(
    graph_set, pool, names=(), served=SERVED, on_step=lambda: None, again=lambda words: None
):
    bar = SimpleNamespace(advance=on_step, begin_again=again)
    stages = SimpleNamespace(
        stage=lambda title, total: contextlib.nullcontext(bar), say=lambda words: None
    )
    return price(graph_set, names, pool, served, stages)


# --- which graphs, and how they are laid out ---------------------------------------------------


def test_every_group_holds_the_full_rung_and_no_more_graphs_than_fit(graph_set):
    assert groups_of(graph_set, []) == [["vit_high", "vit_low", "px5", "px6"]]
    names = [f"px{px}" for px in range(20)]
    more = {name: replace(graph_set.graphs["px5"], name=name) for name in names}
    many = replace(graph_set, graphs={"vit_low": graph_set.low, "vit_high": graph_set.high, **more})
    groups = groups_of(many, [])
    assert [len(group) for group in groups] == [TOGETHER, TOGETHER, TOGETHER]
    assert all(group[0] == "vit_high" for group in groups)
    assert [name for group in groups for name in group[1:]] == ["vit_low", *names]


def test_graphs_can_be_chosen_and_the_full_rung_comes_with_them(graph_set):
    assert groups_of(graph_set, ["px6"]) == [["vit_high", "px6"]]
    assert groups_of(graph_set, ["vit_high"]) == [["vit_high"]]
    with pytest.raises(PerfError, match="no graph 'px7' .* vit_high, vit_low, px5"):
        groups_of(graph_set, ["px6", "px7"])


def test_graphs_are_configured_as_the_full_rung_but_for_instances_and_threads(tmp_path, graph_set):
    lay_out(graph_set, ["vit_low", "px5"], Served(instances=3, threads=2), tmp_path)
    root = Path(__file__).resolve().parents[2]
    expected = ModelConfig()
    text_format.Parse((root / "model_repository/vit_high/config.pbtxt").read_text(), expected)
    expected.instance_group[0].count = 3
    expected.parameters["intra_op_thread_count"].string_value = "2"
    for name in ("vit_low", "px5"):
        config = text_format.Parse((tmp_path / name / "config.pbtxt").read_text(), ModelConfig())
        assert config == expected
    low = tmp_path / "vit_low/1/model.onnx"
    assert os.path.samefile(low, graph_set.files["vit_low"])
    assert {path.name for path in tmp_path.iterdir()} == {"vit_low", "px5"}


# --- figures -----------------------------------------------------------------------------------


def test_figures_by_hand(servers, graph_set, pool):
    found = json.loads(json.dumps(priced(graph_set, pool)))
    for name, cost_ms in COST_MS.items():
        entry = found[name]
        assert entry["latency_ms"]["values"] == pytest.approx([cost_ms] * 3)
        # Two requests are in flight, so that an image takes half as long.
        assert entry["ms_per_image"]["values"] == pytest.approx([cost_ms / 2] * 3)
        assert entry["cost_ratio"]["values"] == pytest.approx([cost_ms / 400] * 3)
        # Both instances work at once: of CPU time an image takes all that a lone request does.
        assert entry["server_cpu_ms"]["values"] == pytest.approx([SERVER_CPU * cost_ms] * 3)
        assert entry["cpu_cost_ratio"]["values"] == pytest.approx([cost_ms / 400] * 3)
        assert entry["disturbed"] is False and entry["batch"] == 2


def test_cpu_time_that_is_not_measured_disturbs_nothing(servers, graph_set, pool):
    servers.measures_cpu = False
    found = priced(graph_set, pool)
    assert disturbed(found) == []
    assert found["vit_low"]["server_cpu_ms"] is found["vit_low"]["cpu_cost_ratio"] is None


def test_ratios_are_taken_within_a_turn(servers, graph_set, pool):
    measured = 0

    def slow_down_after_each_turn():
        nonlocal measured
        measured += 1
        servers.slower = 2.0**measured

    found = priced(graph_set, pool, on_step=slow_down_after_each_turn)
    assert measured == 6  # three turns of lone requests and of batches
    assert found["vit_low"]["ms_per_image"]["values"] == pytest.approx([400, 800, 1600])
    assert found["vit_low"]["cost_ratio"]["values"] == pytest.approx([0.25] * 3)


def test_the_full_rung_has_values_of_every_group_and_each_group_a_server(
    servers, graph_set, pool, monkeypatch
):
    monkeypatch.setattr(prices, "TOGETHER", 3)
    found = priced(graph_set, pool)
    assert servers.started == [["vit_high", "vit_low", "px5"], ["vit_high", "px6"]]
    assert found["vit_high"]["cost_ratio"]["values"] == [1.0] * 6
    assert found["vit_low"]["cost_ratio"]["runs"] == found["px6"]["cost_ratio"]["runs"] == 3


def test_graphs_are_warm_and_take_turns_by_blocks_in_an_order_drawn_anew(servers, graph_set, pool):
    served = replace(SERVED, turns=6)
    priced(graph_set, pool, served=served)
    warm = servers.asked[: 2 * len(COST_MS) + 1]
    assert {(name, len(rows)) for name, rows, *_ in warm} == {
        (name, images) for name in COST_MS for images in (1, 8)
    }
    lone = [name for name, _, load, _ in servers.asked[len(warm) :] if load == ONE_BY_ONE]
    blocks = [(name, rows) for name, rows, load, _ in servers.asked[len(warm) :] if load.batch == 2]
    assert len(lone) == 6 * LONE * len(COST_MS)
    # Two requests of two images for each of two instances; the full rung takes 1.6 s for them.
    assert {len(rows) for _, rows in blocks} == {8} and len(blocks) == 6 * len(COST_MS)
    for asked in (lone, [name for name, _ in blocks]):
        orders = [tuple(asked[i : i + 4]) for i in range(0, len(asked), 4)]
        assert all(sorted(order) == sorted(COST_MS) for order in orders)
        assert len(set(orders)) > 3


def test_a_quick_graph_has_more_blocks_in_a_turn(servers, graph_set, pool):
    servers.slower = 1 / 16  # a block of the full rung in a tenth of a second
    priced(graph_set, pool, names=["vit_high"], served=replace(SERVED, turns=1))
    assert sum(load.batch == 2 for _, _, load, _ in servers.asked) == 2 + 10


def test_each_graph_is_asked_what_the_router_asks_it(servers, graph_set, pool):
    priced(graph_set, pool)
    outputs = {name: names for name, *_, names in servers.asked}
    assert outputs["vit_high"] == ("embedding", "logits")
    assert outputs["vit_low"] == outputs["px5"] == ("embedding", "cls_layers", "logits")
    priced(replace(graph_set, classes=None), pool)
    assert servers.asked[-1][-1] in (("embedding",), ("embedding", "cls_layers"))


# --- graphs whose cost depends on the image ----------------------------------------------------


def varying(graph_set, tokens=True, folder=None):
    """The set with a graph `apt`, whose file perhaps tells its tokens."""
    model = onnx.load(graph_set.files["vit_low"])
    if tokens:
        model.graph.output.add().name = "tokens"
    file = folder / "apt.onnx"
    onnx.save(model, file)
    record = replace(graph_set.low.record, recipe="px=4,apt=5.5")
    return graph_set.adding(replace(graph_set.low, name="apt", record=record, file=file))


@pytest.fixture
def dear(servers, monkeypatch):
    """Image i costs `apt` 1 + i / 10 times its usual cost, which is that of the cheap rung."""
    monkeypatch.setitem(COST_MS, "apt", 100.0)
    servers.by_image = lambda name, row: 1 + row / 10 if name == "apt" else 1.0
    return servers


def test_figures_by_image_by_hand(dear, graph_set, tmp_path):
    n = 21
    found = json.loads(json.dumps(priced(varying(graph_set, folder=tmp_path), pool_of(n))))
    own = found["apt"]["per_image"]
    factors = 1 + np.arange(n) / 10  # their percentiles lie on images: 1.1, 2 and 2.9
    assert own["images"] == n
    assert own["cost_ratio"] == pytest.approx(
        {"mean": 0.25 * 2, "std": 0.25 * factors.std(), "p5": 0.25 * 1.1, "p95": 0.25 * 2.9}
    )
    assert own["latency_ms"] == pytest.approx({"p50": 200.0, "p95": 290.0})
    assert own["tokens"] == {"mean": 20.0, "min": 10.0, "max": 30.0}
    assert {name for name in found if found[name]["per_image"]} == {"apt"}


def test_an_image_s_ratio_is_of_one_turn_and_the_median_of_them(dear, graph_set, tmp_path):
    # The machine is 1, 8 and 2 times as slow, and something holds `apt` up in the first turn.
    slower = iter((8.0, 2.0))
    dear.by_image = lambda name, row: 10.0 if name == "apt" and dear.slower == 1 else 1.0

    def next_turn():
        dear.slower = next(slower, 2.0)

    own = priced(varying(graph_set, folder=tmp_path), pool_of(8), ["apt"], on_step=next_turn)
    assert own["apt"]["per_image"]["cost_ratio"]["mean"] == pytest.approx(0.25)
    assert own["apt"]["per_image"]["latency_ms"]["p50"] == pytest.approx(800.0)  # 1000, 800, 200


def test_only_graphs_whose_cost_varies_and_the_full_one_are_asked_about_more_images(
    dear, graph_set, tmp_path
):
    images = 50
    priced(varying(graph_set, folder=tmp_path), pool_of(images), served=replace(SERVED, turns=1))
    lone = {name: [] for name in COST_MS}
    timed = dear.asked[2 * len(COST_MS) + 1 :]
    for name, rows, load, outputs in timed:
        if load == ONE_BY_ONE and "tokens" not in outputs:
            lone[name] += rows
    assert {name: len(rows) for name, rows in lone.items()} == {
        name: VARIED if name in ("vit_high", "apt") else LONE for name in COST_MS
    }
    assert lone["apt"] == lone["vit_high"] and len(set(lone["apt"])) == VARIED
    assert max(lone["apt"]) >= VARIED  # drawn from all of them, not the first
    # A block of the full rung takes more than a second, and has 8 images; a turn has more blocks.
    blocks = [rows for name, rows, load, _ in timed if name == "apt" and load.batch == 2]
    seen = [row for rows in blocks for row in rows]
    assert len(seen) == VARIED and set(seen) == set(lone["apt"])


def test_of_few_images_all_are_asked_and_each_counts_once(dear, graph_set, pool, tmp_path):
    found = priced(varying(graph_set, tokens=False, folder=tmp_path), pool)["apt"]
    assert found["per_image"]["images"] == IMAGES and found["per_image"]["tokens"] is None
    assert found["per_image"]["cost_ratio"]["mean"] == pytest.approx(0.25 * 1.2)
    assert not any("tokens" in outputs for *_, outputs in dear.asked)


def test_what_depends_on_the_image_has_a_line_of_its_own(dear, graph_set, tmp_path, monkeypatch):
    monkeypatch.setattr("perf.images.load_pool", lambda *arguments, **stage: pool_of(21))
    folder = tmp_path / "onnx"
    graphs = varying(write_rungs(folder), folder=folder)
    graphs.save(folder)
    arguments = ["serving", "--onnx", str(folder), "--batch", "2", "--turns", "1"]
    printed = CliRunner().invoke(app, arguments).stdout
    assert (
        "apt: a lone image, of 21: 0.50 (0.28 to 0.72 by image) of the full model's cost; 200.00 "
        "ms, at the 95th percentile 290.00 ms; 20.0 tokens (10 to 30)"
    ) in printed
    assert printed.count("a lone image") == 1
    dear.works_harder = {"apt": 1.3}
    busy = CliRunner().invoke(app, arguments).stdout
    assert "of 21: –; 200.00 ms" in busy and "0.50" not in busy


# --- disturbed ---------------------------------------------------------------------------------


def test_a_graph_whose_cost_differs_by_clock_and_cpu_time_is_measured_once_more(
    servers, graph_set, pool
):
    servers.works_harder = {"vit_low": 1.3, "px5": 1.1}
    said = []
    found = priced(graph_set, pool, again=said.append)
    assert len(servers.started) == 2 and len(said) == 1 and "CPU time of vit_low differ" in said[0]
    assert disturbed(found) == ["vit_low"] and found["vit_low"]["disturbed"] is True

    def calm(words):
        servers.works_harder = {}

    assert disturbed(priced(graph_set, pool, again=calm)) == []


def test_the_less_disturbed_of_two_measurements_is_kept(servers, graph_set, pool):
    servers.works_harder = {"vit_low": 1.3}

    def worse(words):
        servers.works_harder = {"px5": 1.3, "px6": 1.3}

    assert disturbed(priced(graph_set, pool, again=worse)) == ["vit_low"]


def test_no_ratio_of_a_disturbed_graph_is_printed(servers, graph_set, pool, monkeypatch):
    servers.works_harder = {"vit_low": 1.3}
    monkeypatch.setattr("perf.images.load_pool", lambda *arguments, **stage: pool)
    folder = str(graph_set.files["vit_low"].parent)
    arguments = ["serving", "--onnx", folder, "--batch", "2", "--turns", "1"]
    printed = CliRunner().invoke(app, arguments).stdout
    assert "0.250" not in printed and "0.325" not in printed  # vit_low's
    assert printed.count("0.500") == 2  # px5's
    assert "the machine was too busy for a figure" in printed
    content = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert content["graphs"]["vit_low"]["disturbed"] and content["batch"] == 2


# --- refusals ----------------------------------------------------------------------------------


def test_too_few_images_are_refused_before_a_server_starts(servers, graph_set, pool):
    with pytest.raises(PerfError, match="5 images do not fill a batch of 6"):
        priced(graph_set, pool, served=replace(SERVED, batch=6))
    assert servers.started == []
