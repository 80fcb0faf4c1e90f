"""What graphs cost as served: groups, repositories and figures by hand, with a fake server."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from client import ClientError
from perf.costs import clients, serving
from perf.costs.serving import TOGETHER, GraphCost, Load, groups_of, lay_out, measure_serving, steps
from perf.figures import PerfError
from perf.measure.sets import Pool
from tests.unit.onnx_files import SIZE
from tests.unit.perf_workplace import write_rungs

LOAD = Load(instances=2, threads=1, batches=(1, 2), turns=3)
IMAGES = 5
COST_S = {"vit_high": 0.4, "vit_low": 0.1, "static_5": 0.2, "static_6": 0.3}  # of one image
CPU_S = 0.003  # the client's, of one image
SERVER_CPU = 0.9  # of the clock's time


class FakeClock:
    """`time`, with a clock for each thread, which only its own requests move, and one of CPU."""

    def __init__(self):
        self.own = threading.local()
        self.cpu_s = 0.0
        self.server_s = 0.0
        self.lock = threading.Lock()

    def pass_by(self, seconds, cpu_s, server_s):
        self.own.now = self.perf_counter() + seconds
        with self.lock:
            self.cpu_s += cpu_s
            self.server_s += server_s

    def perf_counter(self):
        return getattr(self.own, "now", 0.0)

    def process_time(self):
        return self.cpu_s


class FakeServer:
    """Stands in for `TritonServer` and for the client of any URL; has a price for every image."""

    grpc_url = "127.0.0.1:1"

    def __init__(self, clock):
        self.clock = clock
        self.slower = 1.0
        self.works_harder = {}  # by model, how many times as much CPU time it takes
        self.gains_by_batching = ()  # models whose images take half as long in a batch
        self.asked, self.started, self.repositories = [], [], []

    def serve(self, repository, free_ports, timeout_s):
        self.started.append(sorted(path.name for path in Path(repository).iterdir()))
        self.repositories.append(Path(repository))
        return self

    def connect(self, url):
        assert url == self.grpc_url
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def infer(self, model, inputs, outputs, client_timeout):
        batch = inputs[0].shape()[0]
        self.asked.append((model, batch, [output.name() for output in outputs]))
        share = 0.5 if batch > 1 and model in self.gains_by_batching else 1.0
        seconds = COST_S[model] * batch * share * self.slower
        server_s = SERVER_CPU * seconds * self.works_harder.get(model, 1.0)
        self.clock.pass_by(seconds, CPU_S * batch, server_s)

    def process_ids(self):
        return [1]

    def meter(self, process_ids):
        """Stands in for `CpuMeter`, of a server that takes nothing while idle."""
        assert process_ids == self.process_ids()
        return SimpleNamespace(
            read_s=lambda: self.clock.server_s,
            used_s=lambda before_s, seconds: self.clock.server_s - before_s,
        )


class RefusingServer(FakeServer):
    """Serves, and answers nothing."""

    def infer(self, model, inputs, outputs, client_timeout):
        raise InferenceServerException("no memory", status="StatusCode.INTERNAL")


@pytest.fixture(scope="module")
def rung_set(tmp_path_factory):
    return write_rungs(tmp_path_factory.mktemp("onnx"), alternatives=(5, 6))


@pytest.fixture
def pool():
    tensors = [np.full((3, SIZE, SIZE), i, np.float32) for i in range(IMAGES)]
    return Pool("made up", [b""] * IMAGES, tensors, [None] * IMAGES, [])


@pytest.fixture
def server(monkeypatch):
    return install(monkeypatch, FakeServer)


def install(monkeypatch, kind):
    clock = FakeClock()
    server = kind(clock)
    monkeypatch.setattr(serving, "TritonServer", server.serve)
    monkeypatch.setattr(serving.triton, "InferenceServerClient", server.connect)
    monkeypatch.setattr(serving, "CpuMeter", server.meter)
    monkeypatch.setattr(clients, "time", clock)
    return server


# --- which graphs, and how they are laid out ---------------------------------------------------


def test_every_group_holds_the_full_rung_and_no_more_graphs_than_fit(rung_set):
    assert groups_of(rung_set) == [["vit_high", "vit_low", "static_5", "static_6"]]
    record, file = rung_set.alternatives["static_5"], rung_set.alternative_files["static_5"]
    names = [f"static_{px}" for px in range(20)]
    many = replace(
        rung_set,
        alternatives=dict.fromkeys(names, record),
        alternative_files=dict.fromkeys(names, file),
    )
    groups = groups_of(many)
    assert [len(group) for group in groups] == [TOGETHER, TOGETHER, TOGETHER]
    assert all(group[0] == "vit_high" for group in groups)
    assert [name for group in groups for name in group[1:]] == ["vit_low", *names]


def test_graphs_can_be_chosen_and_the_full_rung_comes_with_them(rung_set):
    assert groups_of(rung_set, ["static_6"]) == [["vit_high", "static_6"]]
    assert groups_of(rung_set, ["vit_high"]) == [["vit_high"]]
    with pytest.raises(PerfError, match="no graph 'static_7' .* vit_low, vit_high, static_5"):
        groups_of(rung_set, ["static_6", "static_7"])


def test_graphs_are_configured_as_the_full_rung_but_for_instances_and_threads(tmp_path, rung_set):
    lay_out(rung_set, ["vit_low", "static_5"], Load(instances=3, threads=2), tmp_path)
    root = Path(__file__).resolve().parents[2]
    expected = ModelConfig()
    text_format.Parse((root / "model_repository/vit_high/config.pbtxt").read_text(), expected)
    expected.instance_group[0].count = 3
    expected.parameters["intra_op_thread_count"].string_value = "2"
    for name in ("vit_low", "static_5"):
        config = text_format.Parse((tmp_path / name / "config.pbtxt").read_text(), ModelConfig())
        assert config == expected
    low = tmp_path / "vit_low/1/model.onnx"
    assert os.path.samefile(low, rung_set.files["vit_low"])
    assert {path.name for path in tmp_path.iterdir()} == {"vit_low", "static_5"}


# --- figures -----------------------------------------------------------------------------------


def test_figures_by_hand(server, rung_set, pool):
    found = measure_serving(rung_set, groups_of(rung_set), pool, LOAD, lambda: None)
    for name, cost_s in COST_S.items():
        assert found[name].latency_ms == pytest.approx([1000 * cost_s] * 3)
        # Two requests are in flight, so that an image takes half as long.
        for batch in (1, 2):
            assert found[name].ms_per_image[batch] == pytest.approx([500 * cost_s] * 3)
            assert found[name].client_cpu_ms[batch] == pytest.approx([1000 * CPU_S] * 3)
        assert found[name].cost_ratio == pytest.approx([cost_s / 0.4] * 3)
        # Both instances work at once: of CPU time an image takes all that a lone request does.
        assert found[name].server_cpu_ms == pytest.approx([SERVER_CPU * 1000 * cost_s] * 3)
        assert found[name].cpu_cost_ratio == pytest.approx([cost_s / 0.4] * 3)
        assert not found[name].disturbed


def test_a_graph_whose_cost_differs_by_clock_and_cpu_time_is_called_disturbed(
    server, rung_set, pool
):
    server.works_harder = {"vit_low": 1.3, "static_5": 1.1}
    found = measure_serving(rung_set, groups_of(rung_set), pool, LOAD, lambda: None)
    assert {name: cost.disturbed for name, cost in found.items()} == {
        **{"vit_high": False, "vit_low": True, "static_5": False, "static_6": False}
    }
    assert found["vit_low"].to_dict()["disturbed"] is True


def test_ratios_are_of_the_largest_batch_within_one_turn(server, rung_set, pool):
    server.gains_by_batching = ("vit_low",)
    measured = 0

    def slow_down_after_each_turn():
        nonlocal measured
        measured += 1
        server.slower = 2.0 ** (measured // (3 * len(COST_S)))

    groups = groups_of(rung_set)
    found = measure_serving(rung_set, groups, pool, LOAD, slow_down_after_each_turn)
    assert measured == steps(groups, LOAD) == 3 * 3 * 4
    assert found["vit_low"].ms_per_image[2] == pytest.approx([25, 50, 100])
    assert found["vit_low"].cost_ratio == pytest.approx([0.125] * 3)


def test_the_full_rung_has_values_of_every_group_and_each_group_a_server(server, rung_set, pool):
    groups = [["vit_high", "static_5"], ["vit_high", "vit_low"]]
    found = measure_serving(rung_set, groups, pool, LOAD, lambda: None)
    assert server.started == [["static_5", "vit_high"], ["vit_high", "vit_low"]]
    assert len(found["vit_high"].cost_ratio) == 6 and len(found["vit_low"].cost_ratio) == 3
    assert not any(repository.exists() for repository in server.repositories)


def test_each_graph_is_asked_what_the_router_asks_it_in_an_order_drawn_anew(server, rung_set, pool):
    marks = []
    groups = groups_of(rung_set)
    load = replace(LOAD, turns=6)
    measure_serving(rung_set, groups, pool, load, lambda: marks.append(server.asked[-1][0]))
    outputs = {model: names for model, _, names in server.asked}
    assert outputs["vit_high"] == ["embedding", "logits"]
    assert outputs["vit_low"] == outputs["static_5"] == ["embedding", "cls_layers", "logits"]
    assert all(names == outputs[model] for model, _, names in server.asked)
    orders = [tuple(marks[i : i + 4]) for i in range(0, len(marks), 4)]
    assert all(sorted(order) == sorted(COST_S) for order in orders)
    assert len(set(orders)) > 6


def test_a_model_without_a_head_is_not_asked_for_logits(server, rung_set, pool):
    headless = replace(rung_set, classes=None)
    measure_serving(headless, [["vit_high", "vit_low"]], pool, LOAD, lambda: None)
    assert not any("logits" in names for _, _, names in server.asked)


def test_every_instance_is_warmed_up_before_anything_is_measured(server, rung_set, pool):
    asked = []
    measure_serving(rung_set, [["vit_high"]], pool, LOAD, lambda: asked.append(len(server.asked)))
    warm = [batch for _, batch, _ in server.asked[: asked[0]]]
    for batch in LOAD.batches:
        assert warm.count(batch) >= clients._FEWEST * LOAD.instances


def test_clients_send_different_images(pool):
    sent = [tensor.shape()[0] for tensor in clients.input_tensors(pool, 2)]
    assert sent == [2, 2]  # the fifth image fills no batch
    first, second = (tensor._get_content() for tensor in clients.input_tensors(pool, 2))
    assert first != second


def test_costs_become_spreads(server, rung_set, pool):
    found = measure_serving(rung_set, [["vit_high", "vit_low"]], pool, LOAD, lambda: None)
    entry = json.loads(json.dumps(found["vit_low"].to_dict()))
    assert set(entry) == {
        *("latency_ms", "ms_per_image", "client_cpu_ms", "server_cpu_ms"),
        *("cost_ratio", "cpu_cost_ratio", "disturbed"),
    }
    assert set(entry["ms_per_image"]) == set(entry["client_cpu_ms"]) == {"1", "2"}
    assert entry["cost_ratio"]["runs"] == 3
    assert entry["ms_per_image"]["2"]["median"] == pytest.approx(50)
    with pytest.raises(ValueError, match="at least one"):
        GraphCost().to_dict()


# --- refusals ----------------------------------------------------------------------------------


def test_batches_are_read_from_text():
    assert Load.of(1, 4, "8, 1,8", 2) == Load(1, 4, (1, 8), 2)
    for text in ("", "0,1", "1;8", "-1", "two"):
        with pytest.raises(PerfError, match="give numbers of images with commas, as 1,8"):
            Load.of(1, 1, text, 2)


def test_too_few_images_are_refused_before_a_server_starts(server, rung_set, pool):
    with pytest.raises(PerfError, match="5 images do not fill a batch of 6"):
        measure_serving(rung_set, [["vit_high"]], pool, replace(LOAD, batches=(6,)), lambda: None)
    assert server.started == []


def test_a_server_that_does_not_answer_is_one_line(monkeypatch, rung_set, pool):
    install(monkeypatch, RefusingServer)
    with pytest.raises(ClientError, match="no memory") as caught:
        measure_serving(rung_set, [["vit_high"]], pool, LOAD, lambda: None)
    assert "\n" not in str(caught.value)
