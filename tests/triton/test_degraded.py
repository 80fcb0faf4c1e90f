"""When the cascade is not whole: an artifact without a threshold, a full rung that fails."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import tritonclient.grpc as triton

from client import GrpcClient, HttpClient, UnavailableError
from client.messages import UNSCORED
from export.repository import RepositorySettings, assemble
from tests.raw_http import bytes_input, framed, post
from tests.servers import running
from tests.triton.test_keystone import statistics

MODEL_CONTROL = ["--model-control-mode=explicit", "--load-model=*"]  # lets a test unload a model


@pytest.fixture(scope="module")
def always_high(build, graph_set, tmp_path_factory):
    """The session's rungs behind an artifact for which no threshold was found."""
    folder = tmp_path_factory.mktemp("always_high")
    artifact = json.loads((build / "calibration.json").read_text())
    artifact["threshold"] = None
    artifact["reference_answers"] = None  # they stay beside the artifact that was fitted
    (folder / "calibration.json").write_text(json.dumps(artifact))
    settings = RepositorySettings(client_parameters="any")
    repository = assemble(graph_set, folder / "calibration.json", folder / "repository", settings)
    with running(repository, extra_args=MODEL_CONTROL) as server:
        yield server


@pytest.fixture(scope="module")
def degrading(build, graph_set, tmp_path_factory):
    """The session's repository with `on_high_failure` set to `low`."""
    folder = tmp_path_factory.mktemp("degrading")
    settings = RepositorySettings(on_high_failure="low", client_parameters="any")
    repository = assemble(graph_set, build / "calibration.json", folder / "repository", settings)
    with running(repository, extra_args=MODEL_CONTROL) as server:
        yield server


@contextmanager
def without_vit_high(server):
    with triton.InferenceServerClient(server.grpc_url) as control:
        control.unload_model("vit_high")
        assert not control.is_model_ready("vit_high")
        try:
            yield
        finally:
            control.load_model("vit_high")


# --- no threshold ------------------------------------------------------------------------------


def test_without_a_threshold_everything_escalates_unscored(always_high, server, crops):
    before = statistics(always_high, "vit_low")
    with GrpcClient(always_high.grpc_url) as client, GrpcClient(server.grpc_url) as other:
        found = client.infer(crops[:8])
        expected = other.infer(crops[:8], policy="high")
    assert all(p.escalated and np.isnan(p.score) and not p.degraded for p in found)
    embeddings = [p.embedding for p in expected]
    np.testing.assert_allclose([p.embedding for p in found], embeddings, rtol=1e-4, atol=1e-5)
    assert statistics(always_high, "vit_low") == before


def test_without_a_threshold_a_request_may_bring_its_own(always_high, server, crops):
    with GrpcClient(always_high.grpc_url) as client, GrpcClient(server.grpc_url) as other:
        scores = [p.score for p in other.infer(crops[:8])]
        found = client.infer(crops[:8], threshold=float(np.median(scores)))
    assert [p.score for p in found] == pytest.approx(scores, rel=1e-4)
    assert [p.escalated for p in found] == [score > np.median(scores) for score in scores]


def test_a_missing_score_is_a_number_that_strict_json_parsers_read(always_high, crops):
    """The largest FP32, above any threshold as what escalates is."""

    def strict(word):
        raise ValueError(f"{word} is no JSON")

    for policy in ("auto", "high"):  # no threshold, and the cheap rung not asked for
        head = {
            "inputs": [bytes_input([crops[0]])],
            "outputs": [{"name": "score"}, {"name": "logits"}, {"name": "embedding"}],
            "parameters": {"policy": policy},
        }
        status, answer = post(always_high, "adaptive_vit", head, framed(crops[0]))
        assert status == 200
        outputs = json.loads(answer, parse_constant=strict)["outputs"]
        (score,) = (output["data"] for output in outputs if output["name"] == "score")
        assert score == [UNSCORED]
    # Our clients know what it stands for.
    with HttpClient(always_high.http_url) as client:
        assert np.isnan(client.infer(crops[:1])[0].score)


# --- a full rung that fails --------------------------------------------------------------------


def test_a_failing_full_rung_is_a_clear_error_and_the_server_goes_on(always_high, crops):
    with GrpcClient(always_high.grpc_url) as client:
        with without_vit_high(always_high):
            for options in ({}, {"policy": "high"}, {"threshold": -1e9}):
                with pytest.raises(
                    UnavailableError, match="^vit_high failed: .*vit_high"
                ) as caught:
                    client.infer(crops[:4], **options)
                assert "\n" not in str(caught.value)
            low = client.infer(crops[:4], policy="low")
            assert not any(p.escalated or p.degraded for p in low)
        assert all(p.escalated for p in client.infer(crops[:4]))


def test_a_failing_full_rung_is_replaced_by_marked_low_answers(degrading, crops):
    with GrpcClient(degrading.grpc_url) as client:
        whole, low = client.infer(crops[:16]), client.infer(crops[:16], policy="low")
        with without_vit_high(degrading):
            found = client.infer(crops[:16])
            # Without a low answer there is nothing to fall back on.
            with pytest.raises(UnavailableError, match="^vit_high failed: "):
                client.infer(crops[:2], policy="high")
        again = client.infer(crops[:16])
    wanted = [p.escalated for p in whole]
    assert {*wanted} == {True, False}
    assert [p.degraded for p in found] == wanted
    assert not any(p.escalated for p in found)
    embeddings = [p.embedding for p in low]
    np.testing.assert_allclose([p.embedding for p in found], embeddings, rtol=1e-4, atol=1e-5)
    assert [p.score for p in found] == pytest.approx([p.score for p in whole], rel=1e-4)
    assert [(p.escalated, p.degraded) for p in again] == [(w, False) for w in wanted]
