"""perf_analyzer against the real server: what is measured is what was meant."""

from dataclasses import replace

import pytest

from perf.analyzer_install import PerfAnalyzerError, find_analyzer
from perf.perf_analyzer import Load, run, write_bytes, write_tensors
from tests.triton.test_keystone import statistics

COUNT = 12  # images; few enough to be quick, easy and hard among them


@pytest.fixture(scope="module")
def analyzer():
    return find_analyzer()


@pytest.fixture(scope="module")
def tensors(images, tmp_path_factory):
    return write_tensors(tmp_path_factory.mktemp("perf") / "image.json", list(images[:COUNT]))


@pytest.fixture(scope="module")
def encoded(crops, tmp_path_factory):
    return write_bytes(tmp_path_factory.mktemp("perf") / "bytes.json", crops[:COUNT])


@pytest.mark.parametrize("rate_per_s", [None, 20.0])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_pass_has_figures(server, analyzer, encoded, protocol, rate_per_s):
    url = server.grpc_url if protocol == "grpc" else server.http_url
    load = Load("adaptive_vit", url, encoded, protocol, 3, rate_per_s, rounds=2)
    figures = run(load, analyzer)
    assert figures.requests == 2 * COUNT and figures.throughput_per_s > 0
    assert 0 < figures.latency_ms_p50 <= figures.latency_ms_p95 <= figures.latency_ms_p99


@pytest.mark.parametrize(("threshold", "escalated"), [(10**9, 0), (-(10**9), 2 * COUNT)])
def test_a_threshold_reaches_the_router(server, analyzer, tensors, threshold, escalated):
    before, asked = (statistics(server, model)[0] for model in ("vit_high", "vit_low"))
    parameters = {"threshold": threshold}
    load = Load("router", server.grpc_url, tensors, rounds=2, parameters=parameters)
    run(replace(load, warmup_requests=0), analyzer)
    statistics(server, "vit_low", answered=asked + 2 * COUNT)
    statistics(server, "vit_high", answered=before + escalated)


def test_the_server_counts_the_warm_up_and_the_measured_requests(server, analyzer, tensors):
    before = statistics(server, "vit_low")[0]
    run(Load("vit_low", server.grpc_url, tensors, rounds=2, warmup_requests=5), analyzer)
    statistics(server, "vit_low", answered=before + 5 + 2 * COUNT)


def test_policy_high_has_figures_though_its_score_is_no_number(server, analyzer, tensors):
    load = Load("router", server.grpc_url, tensors, parameters={"policy": "high"})
    assert run(load, analyzer).latency_ms_p50 > 0


def test_the_servers_refusal_is_shown(server, analyzer, tensors):
    load = Load("router", server.grpc_url, tensors, parameters={"policy": "medium"})
    with pytest.raises(PerfAnalyzerError, match="medium") as caught:
        run(load, analyzer)
    assert "\n" not in str(caught.value)
