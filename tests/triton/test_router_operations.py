"""The router as an operator sees it: limits on clients, metrics, pressure, a hung full rung."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from bundle.graphs import GraphSet
from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.fit import Options, fit
from calibration.outputs import Made, Outputs
from calibration.reference import REFERENCE_IMAGES, with_reference_answers
from client import GrpcClient, HttpClient, InvalidRequestError, UnavailableError
from export.repository import RepositorySettings, assemble
from routing import RungOutputs
from tests.commands import said
from tests.servers import FLUSHED_S, bucket, growth, metrics, running, series, stubs, wait_for
from tests.triton.test_keystone import statistics

HIGH_TIMEOUT_MS = 250
# tritonserver gives up a stopped process after a second, and aborts when it goes on after that.
PAUSE_S = 0.6
RELIEF_DEPTH = 12


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "triton.log"


@pytest.fixture(scope="module")
def operated(build, graph_set, tmp_path_factory):
    """Relief under pressure and a short queue."""
    folder = tmp_path_factory.mktemp("operated")
    settings = RepositorySettings(
        max_queue=4, degrade_queue_depth=RELIEF_DEPTH, degrade_threshold=1e6
    )
    repository = assemble(graph_set, build / "calibration.json", folder / "repository", settings)
    with running(repository) as server:
        yield server


@pytest.fixture(scope="module")
def planned(build, log, tmp_path_factory):
    """A cascade certified against a full model that is not its full rung, with every image audited.

    Its full rung is as cheap as can be: the cheap rung once more.
    """
    folder = tmp_path_factory.mktemp("planned")
    pair = GraphSet.load(build / "onnx").cast("px32", "px32")
    outputs = Outputs.load(build / "outputs.json")
    again = RungOutputs(outputs.low.embedding, None, outputs.low.logits)
    # What `collect` would find.
    outputs = replace(outputs, high=again, reference=outputs.high, made=Made.by(pair))
    options = Options(Fidelity("cosine", 0.2))
    found = fit(outputs, pair, Goal(0.15, 0.9, "ltt"), options)
    found = with_reference_answers(found, outputs, pair, REFERENCE_IMAGES, print)
    found.save(folder / "calibration.json")
    settings = RepositorySettings(audit_fraction=1.0)
    repository = assemble(pair, folder / "calibration.json", folder / "repository", settings)
    with running(repository, log=log) as server:
        yield server


@pytest.fixture(scope="module")
def hasty(build, graph_set, tmp_path_factory):
    """A short budget of the full rung, which the check of the reference answers keeps to."""
    folder = tmp_path_factory.mktemp("hasty")
    settings = RepositorySettings(high_timeout_ms=HIGH_TIMEOUT_MS)
    repository = assemble(graph_set, build / "calibration.json", folder / "repository", settings)
    with running(repository, attempts=3) as server:
        yield server


@pytest.fixture(scope="module")
def falling_back(build, graph_set, tmp_path_factory):
    """`on_high_failure=low` with a short budget."""
    folder = tmp_path_factory.mktemp("falling_back")
    settings = RepositorySettings(
        on_high_failure="low",
        high_timeout_ms=HIGH_TIMEOUT_MS,
        client_parameters="any",
        reference_check="off",  # nothing but the tests' requests reaches a rung
    )
    repository = assemble(graph_set, build / "calibration.json", folder / "repository", settings)
    with running(repository, attempts=3) as server:
        yield server


@contextmanager
def paused(server, model):
    """Stops a model's processes; they go on after `PAUSE_S`, which the end waits for."""
    pids = stubs(server.process_ids(), model)
    assert pids
    signal_all(pids, signal.SIGSTOP)
    timer = threading.Timer(PAUSE_S, signal_all, (pids, signal.SIGCONT))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def signal_all(pids, number):
    for pid in pids:
        os.kill(pid, number)


# --- what clients may ask for --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"policy": "low"}, {"threshold": 1e9}])
@pytest.mark.parametrize("protocol", [GrpcClient, HttpClient])
def test_a_client_cannot_make_routing_less_careful(operated, crops, protocol, options):
    url = operated.grpc_url if protocol is GrpcClient else operated.http_url
    with protocol(url) as client, pytest.raises(InvalidRequestError, match="may only lower"):
        client.infer(crops[:1], **options)


@pytest.mark.parametrize("options", [{"policy": "high"}, {"threshold": -1e9}])
def test_a_client_can_make_it_more_careful(operated, crops, options):
    with GrpcClient(operated.grpc_url) as client:
        assert all(p.escalated for p in client.infer(crops[:3], **options))


# --- metrics -------------------------------------------------------------------------------------


def test_outcomes_and_paths_are_counted(server, crops):
    grown = growth(server)
    ok, invalid = (grown("requests_total", outcome=outcome) for outcome in ("ok", "invalid"))
    low, high = (grown("images_total", path=path) for path in ("low", "high"))
    with GrpcClient(server.grpc_url) as client:
        predictions = client.infer(crops[:16])
        with pytest.raises(InvalidRequestError):
            client.infer(crops[:1], policy="sideways")
    escalated = sum(p.escalated for p in predictions)
    assert wait_for(lambda: ok() + invalid() == 2)
    assert (ok(), invalid()) == (1, 1)
    assert (low(), high()) == (16 - escalated, escalated)
    assert metrics(server)[series("images_in_flight", version="1")] == 0


def test_scores_and_durations_are_histograms(server, calibration, crops):
    grown = growth(server)
    scores = grown("score_count")
    times = grown("request_duration_seconds_count", path="high")
    below = grown("score_bucket", le=bucket(server, calibration.threshold))
    with GrpcClient(server.grpc_url) as client:
        predictions = client.infer(crops[:16], threshold=-1e9)
    assert wait_for(lambda: scores() == 16)
    assert times() == 1
    kept = sum(p.score <= calibration.threshold for p in predictions)
    assert below() == kept


def test_the_files_that_are_served_are_told_by_their_hashes(server, calibration, build):
    (info,) = [name for name in metrics(server) if name.startswith("adaptive_vit_router_info")]
    files = {"artifact": "router/1/calibration.json"}
    files |= {"low": "vit_low/1/model.onnx", "high": "vit_high/1/model.onnx"}
    files |= {"weights": "vit_low/1/weights.bin"}  # static-vit's rungs share theirs
    for label, file in files.items():
        digest = hashlib.sha256((build / "model_repository" / file).read_bytes()).hexdigest()
        assert f'{label}="{digest[:12]}"' in info
    assert f'signal="{calibration.signal}"' in info
    found = metrics(server)[series("threshold", version="1")]
    assert found == pytest.approx(calibration.threshold, rel=1e-5)


# --- pressure ------------------------------------------------------------------------------------


def ask_at_once(url, images, requests):
    """Answers of so many requests with these images that are sent together; those let in."""
    client = triton_http.InferenceServerClient(url, concurrency=requests)
    tensor = triton_http.InferInput("image", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    found = []
    for call in [client.async_infer("router", [tensor]) for _ in range(requests)]:
        try:
            found.append(call.get_result())
        except InferenceServerException as error:
            assert error.status() == "503"
    client.close()
    return [{k: a.as_numpy(k)[:, 0] for k in ("degraded", "escalated", "score")} for a in found]


@contextmanager
def busy_cores(loops):
    """Work on so many cores that is none of the server's."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.alone  # takes waiting from times, which bursts of other tests' work may upset
@pytest.mark.parametrize("loops", [0, os.cpu_count()], ids=["quiet", "busy"])
def test_images_that_wait_raise_the_threshold_and_a_large_request_alone_does_not(
    operated, calibration, images, loops
):
    with busy_cores(loops):
        check_relief(operated, calibration, images)


def check_relief(operated, calibration, images):
    relieved = growth(operated)("degraded_images_total", cause="pressure")
    for _ in range(3):
        (alone,) = ask_at_once(operated.http_url, images[:32], 1)
        wanted = alone["score"] > calibration.threshold
        assert wanted.any() and not alone["degraded"].any()
        assert alone["escalated"].tolist() == wanted.tolist()
    for _ in range(3):  # one burst does it, unless the machine is slow to send it
        burst = ask_at_once(operated.http_url, images[:32], 6)
        degraded = [answer for answer in burst if answer["degraded"].any()]
        if degraded:
            break
    assert degraded
    for answer in degraded:
        assert answer["degraded"].tolist() == wanted.tolist() and not answer["escalated"].any()
    assert len(degraded) < len(burst)  # whichever arrived first came to an idle router
    assert wait_for(lambda: relieved() >= sum(wanted))


def test_a_full_queue_refuses_at_once_and_counts(operated, images):
    client = triton_http.InferenceServerClient(operated.http_url, concurrency=64)
    tensor = triton_http.InferInput("image", [32, *images.shape[1:]], "FP32")
    tensor.set_data_from_numpy(images[:32])
    with ThreadPoolExecutor(1):
        calls = [client.async_infer("router", [tensor]) for _ in range(64)]
        refused = 0
        for call in calls:
            try:
                call.get_result()
            except InferenceServerException as error:
                assert error.status() == "503" and "Exceeds maximum queue size" in error.message()
                refused += 1
    assert 0 < refused < 64
    client.close()


# --- the audit -----------------------------------------------------------------------------------


def test_what_watches_the_service_is_in_no_audit_and_no_figure_about_images(planned):
    """Each image is audited here: of the supervisor's, the start's and the check's none is."""
    outcomes = ("kept_ok", "kept_lost", "escalated", "escalated_lost")
    grown = growth(planned)
    unmoved = [
        *(grown("audited_images_total", outcome=outcome) for outcome in outcomes),
        *(grown("images_total", path=path) for path in ("low", "high", "degraded")),
        grown("audit_dropped_total"),
        grown("score_count"),
    ]
    answered = grown("requests_total", outcome="ok")
    planned._wait_for_first_answer()
    said("server", "check", "--url", planned.grpc_url)
    check = ("server", "check", "--answers", "--repository", planned.repository)
    said(*check, "--url", planned.grpc_url)
    assert wait_for(lambda: answered() >= 6)  # the check asks in batches
    time.sleep(2 * FLUSHED_S)
    assert [found() for found in unmoved] == [0] * len(unmoved)


def test_an_audit_of_a_cascade_with_a_cheaper_full_rung_asks_the_full_model(planned, unlike, log):
    name = series("certificate_contradicted_total", version="1")
    assert metrics(planned)[name] == 0
    asked, _ = statistics(planned, "vit_reference")
    with GrpcClient(planned.grpc_url) as client:

        def contradicted():
            client.infer(unlike)
            return metrics(planned)[name] > 0

        assert wait_for(contradicted)
    assert "live traffic contradicts the certificate" in log.read_text()
    assert statistics(planned, "vit_reference")[0] > asked


# --- a full rung that is slow --------------------------------------------------------------------


def ask_high(url, image):
    """The error of one request for the full rung, None where it is answered."""
    tensor = triton.InferInput("image", [1, *image.shape], "FP32")
    tensor.set_data_from_numpy(image[None])
    try:
        with triton.InferenceServerClient(url) as client:
            client.infer("router", [tensor], parameters={"policy": "high"})
    except InferenceServerException as error:
        return error
    return None


@pytest.mark.stand_in
def test_a_slow_full_rung_is_given_up_and_kept_images_are_answered(hasty, server, images):
    """That it costs each instance one budget is a unit test's: no busy machine disturbs it."""
    grown = growth(hasty)
    late = grown("high_failures_total", reason="timeout")
    refused = grown("high_failures_total", reason="open")
    with GrpcClient(server.grpc_url) as other, GrpcClient(hasty.grpc_url) as client:
        kept = [not p.escalated for p in other.infer_tensor(images[:16])]
        easy = images[:16][kept][:1]
        with paused(hasty, "vit_high"):
            errors = [ask_high(hasty.grpc_url, images[0]) for _ in range(6)]
            assert not client.infer_tensor(easy)[0].escalated
    failed = [error for error in errors if error is not None]
    assert failed and all(e.status() == "StatusCode.UNAVAILABLE" for e in failed)
    assert all("vit_high failed: " in e.message() for e in failed)
    assert wait_for(lambda: late() + refused() == len(failed))
    assert late() >= 1
    assert wait_for(lambda: ask_high(hasty.grpc_url, images[0]) is None)


@pytest.mark.stand_in
def test_a_slow_full_rung_degrades_where_the_operator_chose_so(falling_back, server, images):
    with GrpcClient(server.grpc_url) as other, GrpcClient(falling_back.grpc_url) as client:
        wanted = [p.escalated for p in other.infer_tensor(images[:16])]
        assert any(wanted)
        with paused(falling_back, "vit_high"):
            found = client.infer_tensor(images[:16])
        assert [p.degraded for p in found] == wanted
        assert not any(p.escalated for p in found)
        # One image: on a busy machine more of them may be late by themselves.
        hard = images[[wanted.index(True)]]
        assert wait_for(lambda: client.infer_tensor(hard)[0].escalated)


# --- clients that are gone -----------------------------------------------------------------------


def settled(server):
    """What `vit_high` has done once it does no more: calls that were given up are still made."""
    found, again = None, statistics(server, "vit_high")
    while found != again:
        time.sleep(0.3)
        found, again = again, statistics(server, "vit_high")
    return found


@pytest.mark.stand_in
def test_a_passed_deadline_costs_no_full_call(falling_back, images):
    """The cheap rung hangs until the deadline has passed, then would have escalated."""
    before = settled(falling_back)
    cancelled = growth(falling_back)("requests_total", outcome="cancelled")
    client = triton.InferenceServerClient(falling_back.grpc_url)
    tensor = triton.InferInput("image", [4, *images.shape[1:]], "FP32")
    tensor.set_data_from_numpy(images[:4])
    with paused(falling_back, "vit_low"):
        with pytest.raises(InferenceServerException, match="Deadline"):
            client.infer("router", [tensor], parameters={"threshold": -1e9}, client_timeout=0.2)
    assert wait_for(lambda: cancelled() == 1)
    assert settled(falling_back) == before


@pytest.mark.stand_in
def test_a_passed_timeout_of_the_request_costs_no_full_call(falling_back, images):
    """HTTP has no deadline of its own: the request's `timeout` stands in for it."""
    before = settled(falling_back)
    expired = growth(falling_back)("requests_total", outcome="expired")
    client = triton_http.InferenceServerClient(falling_back.http_url)
    tensor = triton_http.InferInput("image", [4, *images.shape[1:]], "FP32")
    tensor.set_data_from_numpy(images[:4])
    with paused(falling_back, "vit_low"):
        with pytest.raises(InferenceServerException, match="timeout of 200000 micro") as error:
            client.infer("router", [tensor], parameters={"threshold": -1e9}, timeout=200_000)
    assert error.value.status() == "503"
    assert wait_for(lambda: expired() == 1)
    client.close()
    assert settled(falling_back) == before


def is_healthy(server, images):
    """Whether all are answered: a busy machine may now and then exceed a short budget."""
    with GrpcClient(server.grpc_url) as client:
        try:
            return len(client.infer(images)) == len(images)
        except UnavailableError:
            return False


def test_all_of_it_left_the_models_healthy(operated, planned, hasty, falling_back, crops):
    for server in (operated, planned, hasty, falling_back):
        assert wait_for(partial(is_healthy, server, crops[:4]))
    assert np.isfinite(list(metrics(operated).values())).all()
