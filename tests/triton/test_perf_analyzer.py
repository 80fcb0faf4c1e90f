"""perf_analyzer against the real server: what is measured is what was meant."""

import numpy as np
import pytest

from client import GrpcClient
from perf.analyzer import Load, PerfAnalyzerError, run, write_bytes, write_tensors
from tests.triton.test_keystone import statistics

COUNT = 12  # images; few enough to be quick, easy and hard among them


@pytest.fixture(scope="module")
def tensors(images, tmp_path_factory):
    return write_tensors(tmp_path_factory.mktemp("perf") / "image.json", list(images[:COUNT]))


@pytest.fixture(scope="module")
def encoded(crops, tmp_path_factory):
    return write_bytes(tmp_path_factory.mktemp("perf") / "bytes.json", crops[:COUNT])


@pytest.fixture(scope="module")
def escalation_rate(server, crops):
    """Of the measured images, as the client sees it."""
    with GrpcClient(server.grpc_url) as client:
        rate = float(np.mean([p.escalated for p in client.infer(crops[:COUNT])]))
    assert 0 < rate < 1
    return rate


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_every_image_is_measured_equally_often(
    server, encoded, escalation_rate, protocol, concurrency
):
    url = server.grpc_url if protocol == "grpc" else server.http_url
    load = Load("adaptive_vit", url, encoded, protocol, concurrency, rounds=2, warmup_requests=7)
    result = run(load)
    assert result.figures.requests == 2 * COUNT
    assert result.figures.escalation_rate == pytest.approx(escalation_rate)
    assert result.figures.latency_ms_p50 > 0


def test_tensors_take_the_path_that_bytes_take(server, tensors, escalation_rate):
    result = run(Load("router", server.grpc_url, tensors))
    assert result.figures.escalation_rate == pytest.approx(escalation_rate)


@pytest.mark.parametrize(("threshold", "expected"), [(10**9, 0.0), (-(10**9), 1.0)])
def test_a_threshold_reaches_the_router(server, tensors, threshold, expected):
    result = run(Load("router", server.grpc_url, tensors, parameters={"threshold": threshold}))
    assert result.figures.escalation_rate == expected


def test_the_server_counts_the_warm_up_and_the_measured_requests(server, tensors):
    before = statistics(server, "vit_low")[0]
    run(Load("vit_low", server.grpc_url, tensors, rounds=2, warmup_requests=5, records=False))
    statistics(server, "vit_low", answered=before + 5 + 2 * COUNT)


def test_policy_high_has_figures_without_records_only(server, tensors):
    load = Load("router", server.grpc_url, tensors, parameters={"policy": "high"}, records=False)
    assert run(load).figures.latency_ms_p50 > 0
    with pytest.raises(PerfAnalyzerError, match="records=False"):
        run(Load("router", server.grpc_url, tensors, parameters={"policy": "high"}))


def test_the_servers_refusal_is_shown(server, tensors):
    load = Load("router", server.grpc_url, tensors, parameters={"policy": "medium"})
    with pytest.raises(PerfAnalyzerError, match="medium") as caught:
        run(load)
    assert "\n" not in str(caught.value)
