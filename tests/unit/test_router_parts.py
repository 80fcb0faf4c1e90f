"""The small modules of the `router`: settings, calls of rungs, metrics, what waited, the hold."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.unit.fakes import make_calibration
from tests.unit.router_parts import backend, config, deployed, make_metrics, wait_for

__all__ = ["backend", "deployed", "make_metrics"]  # fixtures


# --- settings ------------------------------------------------------------------------------------

BOLD = {
    "on_high_failure": "low",
    "client_parameters": "any",
    "degrade_queue_depth": "8",
    "degrade_threshold": "2.5",
    "audit_fraction": "0.01",
}


def test_the_defaults_change_no_answer_and_what_an_operator_chooses_is_read(deployed):
    read = deployed("settings").RouterSettings.of
    settings = read(config())
    assert not settings.degrade_on_high_failure and settings.careful_only
    assert settings.relief is None and settings.high_timeout_s == 10
    assert settings.audit_fraction == settings.shadow_fraction == settings.shadow_version == 0
    settings = read(config(**BOLD))
    assert settings.degrade_on_high_failure and not settings.careful_only
    assert (settings.relief.depth, settings.relief.full, settings.relief.highest) == (8, 32, 2.5)
    assert settings.audit_fraction == 0.01


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("on_high_failure", "maybe", None),
        ("client_parameters", "", None),
        ("high_timeout_ms", "0", None),
        ("high_timeout_ms", "soon", None),
        ("degrade_queue_depth", "33", None),
        ("degrade_queue_depth", "8", "degrade_threshold"),  # relief needs a limit
        ("audit_fraction", "1.5", None),
        ("audit_fraction", "nan", None),
        ("shadow_fraction", "-0.1", None),
        ("reference_check", "maybe", None),
    ],
)
def test_a_setting_that_means_nothing_stops_the_load_by_name(deployed, name, value, named):
    with pytest.raises(ValueError, match=named or name):
        deployed("settings").RouterSettings.of(config(**{name: value}))


# --- calls of a rung, and the full one's time budget ---------------------------------------------


def test_a_call_of_a_rung_names_the_version(deployed, backend):
    image = SimpleNamespace(as_numpy=lambda: np.zeros((1, 3, 8, 8)))
    deployed("rung_calls").call_rung("vit_low", image, ["embedding"])
    assert backend.asked == [("vit_low", 1, 1)]


def test_a_call_in_time_is_answered_and_its_error_passed_on(deployed):
    rungs = deployed("rung_calls")

    def call(x):
        if x < 0:
            raise rungs.RungError("vit_high failed: bad", is_outage=False)
        return x + 1

    budgeted = rungs.Budgeted("vit_high", call, budget_s=5)
    assert budgeted(1) == 2
    with pytest.raises(rungs.RungError, match="bad"):
        budgeted(-1)
    assert budgeted(2) == 3


def test_a_hung_call_costs_one_budget_and_then_refuses_until_it_returns(deployed):
    rungs = deployed("rung_calls")
    released, calls = threading.Event(), []

    def call(x):
        calls.append(x)
        released.wait(30)
        return x

    budgeted = rungs.Budgeted("vit_high", call, budget_s=0.2)
    with pytest.raises(rungs.LateError, match=r"no answer within 0.2 s") as late:
        budgeted(1)
    assert late.value.reason == "timeout" and late.value.is_outage
    for _ in range(3):
        with pytest.raises(rungs.LateError, match="has not answered") as refused:
            budgeted(2)
        assert refused.value.reason == "open"
    assert calls == [1]
    released.set()

    def is_answered():
        try:
            return budgeted(3) == 3
        except rungs.LateError:
            return False

    wait_for(is_answered)


def test_an_outage_that_took_long_to_show_is_not_waited_for_again_at_once(deployed, monkeypatch):
    rungs = deployed("rung_calls")
    now, calls = [100.0], []
    monkeypatch.setattr(rungs, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def call(takes_s, is_outage):
        calls.append(takes_s)
        now[0] += takes_s
        raise rungs.RungError("vit_high failed: away", is_outage)

    budgeted = rungs.Budgeted("vit_high", call, budget_s=5)
    for takes_s, is_outage in ((0.01, True), (1.0, False), (1.0, True)):
        with pytest.raises(rungs.RungError, match="away"):
            budgeted(takes_s, is_outage)
    with pytest.raises(rungs.LateError, match="not there a moment ago") as refused:
        budgeted(0.0, True)
    assert refused.value.reason == "open" and calls == [0.01, 1.0, 1.0]
    now[0] += 2.01
    with pytest.raises(rungs.RungError, match="away"):
        budgeted(0.0, True)


# --- metrics -------------------------------------------------------------------------------------


def test_counts_reach_triton_as_sums(make_metrics, backend):
    metrics = make_metrics()
    for _ in range(3):
        metrics.count("images_total", 2, path="low")
    metrics.count("images_in_flight", 5)
    metrics.count("images_in_flight", -5)
    metrics.observe("score", [0.1, 0.2])
    metrics.stop()
    assert backend.value("images_total", path="low") == 6
    assert backend.value("images_total", path="high") == backend.value("images_in_flight") == 0
    (score,) = backend.series["adaptive_vit_score"].values()
    assert score.observed == [0.1, 0.2]


def test_what_the_server_does_not_take_costs_no_other_count(make_metrics, backend, monkeypatch):
    metrics = make_metrics()
    refused = backend.series["adaptive_vit_requests_total"][("outcome", "ok"), ("version", "1")]

    def refuse(amount):
        raise RuntimeError("the server is busy")

    monkeypatch.setattr(refused, "increment", refuse)
    for images in (2, 4):  # of the same flush, and of a later one
        metrics.count("requests_total", outcome="ok")
        metrics.count("images_total", 2, path="low")
        wait_for(lambda images=images: backend.value("images_total", path="low") == images)
    assert len(backend.warnings) == 1 and "the server is busy" in backend.warnings[0]


def test_identity_threshold_and_certified_risk_are_told(make_metrics, backend):
    make_metrics()
    identity = {"artifact": "ab" * 6, "signal": "cls_path", "low": "0" * 12, "high": "1" * 12}
    assert backend.value("router_info", **identity, weights="") == 1
    assert backend.value("queue_limit") == 64
    assert (backend.value("threshold"), backend.value("certified_risk")) == (0.5, 0.05)


def test_rungs_that_share_weights_are_told_by_the_hashes_of_their_files(make_metrics, backend):
    calibration = make_calibration()
    rungs = {
        name: replace(rung, weights_sha256="c" * 64) for name, rung in calibration.rungs.items()
    }
    make_metrics(replace(calibration, rungs=rungs))
    identity = {"artifact": "ab" * 6, "signal": "cls_path", "low": "0" * 12, "high": "1" * 12}
    assert backend.value("router_info", **identity, weights="c" * 12) == 1


def test_a_server_without_histograms_gets_the_other_metrics(make_metrics, backend):
    del backend.MetricFamily.HISTOGRAM  # Triton had none before 2.51.0
    metrics = make_metrics()
    metrics.observe("score", [0.1])
    metrics.count("images_total", 2, path="low")
    metrics.stop()
    assert backend.value("images_total", path="low") == 2
    assert not {"adaptive_vit_score", "adaptive_vit_request_duration_seconds"} & set(backend.series)
    assert len(backend.warnings) == 1 and "too old for histograms" in backend.warnings[0]


def test_without_a_certificate_there_is_no_certified_risk(make_metrics, backend):
    make_metrics(make_calibration(threshold=None))
    assert not {"adaptive_vit_certified_risk", "adaptive_vit_threshold"} & set(backend.series)


# --- what had to wait ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("px", "started_s", "instances", "sizes", "now_s", "waited"),
    [
        (4, 9.0, 2, [32], 11.0, 0),  # an idle router: nothing has waited, whatever its size
        (4, 9.0, 2, [8, 1, 2], 11.0, 3),  # what came behind the first
        # As soon as the router is free: the whole batch.
        (4, 9.99, 2, [32], 10.0005, 32),
        (4, 9.99, 2, [1, 1, 1], 10.0005, 3),
        (4, 9.99, 2, [1, 1, 1], 10.0015, 2),
        # A slow hand-over on busy cores: six clients of 32 images, and batches that took 4.5 s.
        *((4, 5.5, 2, [32], 10.0 + free_s, 32) for free_s in (0.004, 0.012, 0.328)),
        # A lone client: the other instance was asked, or the only one, as fast as it can.
        (4, 8.7, 2, [32], 11.3, 0),
        (4, 8.7, 1, [32], 10.004, 0),
        (4, 8.7, 1, [32], 10.001, 32),
        (4, 9.0, 2, [], 10.0, 0),  # no sound request
        # The time to copy large images, here 98 MiB, is no idle time.
        (518, 9.9, 2, [32], 10.040, 32),
        (518, 9.9, 2, [32], 10.080, 0),
    ],
)
def test_images_that_waited(deployed, px, started_s, instances, sizes, now_s, waited):
    """Of a batch that comes at `now_s`, when another was answered from `started_s` to 10.0."""

    def batch(*sizes):
        return [np.zeros((size, 3, px, px), np.float32) for size in sizes]

    made = deployed("waiting").Waiting(instances)
    assert made.images(batch(32), started_s) == 0  # the first
    made.answered(10.0)
    assert made.images(batch(*sizes), now_s) == waited


# --- calls that no request waits for -------------------------------------------------------------


@pytest.fixture
def clock(deployed, monkeypatch):
    """What the hold takes for the time; it stands still."""
    clock = SimpleNamespace(now_s=0.0)
    time = SimpleNamespace(monotonic=lambda: clock.now_s)
    monkeypatch.setattr(deployed("hold"), "time", time)
    return clock


@pytest.fixture
def hold(deployed, clock):
    made = deployed("hold").Hold()
    yield made
    made.stop()


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_a_call_off_the_request_path_waits_for_a_request(hold, clock):
    asked = []
    call = hold.keeping(asked.append)
    call("as it has just been loaded")
    clock.now_s += 1
    thread = in_thread(lambda: call("later"))
    time.sleep(0.1)
    assert len(asked) == 1
    with hold.answering():
        thread.join(10)
        assert len(asked) == 2
        clock.now_s += 1
    call("right after an answer")  # the time after it begins when it ends
    assert len(asked) == 3


def test_unloading_ends_what_waits_without_a_call(hold, clock, deployed):
    clock.now_s += 1
    asked, failed = [], []

    def ask():
        try:
            hold.keeping(asked.append)("never")
        except deployed("rung_calls").RungError as error:
            failed.append(error)

    threads = [in_thread(ask) for _ in range(3)]
    time.sleep(0.05)
    hold.stop()
    for thread in threads:
        thread.join(10)
    with hold.answering():
        ask()
    assert asked == [] and len(failed) == 4 and all(error.is_outage for error in failed)
