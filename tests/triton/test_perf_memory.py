"""Memory of real servers, each with the models of one system."""

import pytest
from rich.console import Console

from bundle.graphs import GraphSet
from perf import original
from perf.images import Pool
from perf.memory import peak_memory, serving
from perf.systems import ADAPTIVE, HIGH, LOW
from perf.target import Target
from report.terminal import Bars

pytestmark = pytest.mark.alone
REQUESTS = 5


def test_a_server_of_one_rung_serves_that_rung_only(build):
    repository = build / "model_repository"
    with serving(repository, ["vit_low"]) as server, Target(server.grpc_url, None, server) as found:
        assert found.models == {"vit_low"}


def test_the_memory_of_a_rung_is_its_servers(build, crops, images):
    graphs, pool = GraphSet.load(build / "onnx"), Pool("", crops, list(images), [], ())
    how = (build / "model_repository", graphs, pool, range(REQUESTS), 1)
    use = peak_memory(original.SYSTEMS[0], *how)
    files = [graphs.files["vit_low"], build / "onnx/weights.bin"]
    assert use.weights_mib == pytest.approx(sum(file.stat().st_size for file in files) / 2**20)
    # The weights are in it, the tritonserver and the model's Python as well, and nothing huge.
    assert use.weights_mib + 20 < use.peak_pss_mib <= use.peak_rss_mib < 2000


def test_the_three_tables_are_measured_together(build, monkeypatch):
    monkeypatch.setattr(original, "FORWARD_RUNS", 5)
    monkeypatch.setattr(original, "FORWARD_WARMUP", 2)
    result = original.measure_original(build, 10, Bars(Console(quiet=True)))
    assert result["forward_ms"]["vit_low"] < result["forward_ms"]["vit_high"]
    latency = {name: spread["median"] for name, spread in result["latency_ms"].items()}
    assert set(latency) == {LOW, HIGH, ADAPTIVE} and latency[LOW] < latency[HIGH]
    # With both rungs, the router and no more: less than two servers, more than either.
    memory = {name: use["peak_pss_mib"] for name, use in result["memory"].items()}
    assert max(memory[LOW], memory[HIGH]) < memory[ADAPTIVE] < 1.5 * (memory[LOW] + memory[HIGH])
    # The weights that both rungs share count once.
    weights = {name: use["weights_mib"] for name, use in result["memory"].items()}
    shared_mib = (build / "onnx/weights.bin").stat().st_size / 2**20
    assert weights[ADAPTIVE] == pytest.approx(weights[LOW] + weights[HIGH] - shared_mib)
    assert 0 <= result["escalation_rate"] <= 1
    assert result["environment"]["triton_version"].startswith("2.")
