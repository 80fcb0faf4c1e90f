"""perf_analyzer against the real server: what is measured is what was meant."""

import numpy as np
import pytest

from perf.analyzer_install import PerfAnalyzerError, find_analyzer
from perf.perf_analyzer import WARMUP_REQUESTS, Level, run, write_inputs
from perf.systems import System
from tests.servers import wait_for
from tests.triton.test_keystone import statistics

COUNT = 12  # images; few enough to be quick, easy and hard among them


@pytest.fixture(scope="module")
def analyzer():
    return find_analyzer()


@pytest.fixture(scope="module")
def tensors(images, tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("perf") / "image.json", list(images[:COUNT]))


@pytest.fixture(scope="module")
def encoded(crops, tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("perf") / "bytes.json", crops[:COUNT])


@pytest.fixture
def measure(server, analyzer, tmp_path):
    """Asks a model of the server in two rounds of the inputs."""

    def measure(model, inputs, parameters=None, **load):
        level = Level(System("any", "any", model, parameters or {}), **load)
        url = server.http_url if level.protocol == "http" else server.grpc_url
        return run(level, url, inputs, 2, analyzer, tmp_path / "report.csv")

    return measure


def possible_counts(measured):
    """How many requests a pass sends: its warm-up and it, each again where it saw no statistics."""
    again = 1, 2
    return {warm_up * WARMUP_REQUESTS + rounds * measured for warm_up in again for rounds in again}


@pytest.mark.parametrize("load", [{"concurrency": 3}, {"rate_per_s": 20.0}])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_pass_has_figures(measure, encoded, protocol, load):
    found = measure("adaptive_vit", encoded, protocol=protocol, **load)
    assert found.requests == 2 * COUNT and found.throughput_per_s > 0
    latency = found.latency_ms
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] and latency["mean"] > 0


@pytest.mark.parametrize(("threshold", "escalates"), [(10**9, False), (-(10**9), True)])
def test_a_threshold_and_the_warm_up_reach_the_router(
    server, measure, tensors, threshold, escalates
):
    before = np.array([statistics(server, model)[0] for model in ("vit_low", "vit_high")])
    measure("router", tensors, {"threshold": threshold}, concurrency=1)

    def are_counted():  # a moment late
        low, high = [statistics(server, model)[0] for model in ("vit_low", "vit_high")] - before
        return low in possible_counts(2 * COUNT) and high == (low if escalates else 0)

    assert wait_for(are_counted)


def test_policy_high_has_figures_though_its_score_is_no_number(measure, tensors):
    assert measure("router", tensors, {"policy": "high"}, concurrency=1).latency_ms["p50"] > 0


def test_the_servers_refusal_is_shown(measure, tensors):
    with pytest.raises(PerfAnalyzerError, match="medium") as caught:
        measure("router", tensors, {"policy": "medium"}, concurrency=1)
    assert "\n" not in str(caught.value)
