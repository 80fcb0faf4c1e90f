"""The parts of the `router` model without Triton: settings, time budgets, metrics, the audit."""

import importlib
import math
import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from bundle import manifest
from bundle.versions import Versions, put
from calibration.certify import Goal, certificate, certify
from calibration.fidelity import Fidelity
from calibration.outputs import FULL_MODEL, FULL_RUNG
from calibration.running import open_session, run_session
from export.repository import assemble
from routing import RungRecord
from tests.unit.fakes import FakeRung, images, make_calibration
from tests.unit.reference_files import collected, fitted
from tests.unit.test_export_repository import write_inputs

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {
    "on_high_failure": "error",
    "high_timeout_ms": "10000",
    "client_parameters": "careful",
    "degrade_queue_depth": "0",
    "degrade_threshold": "",
    "audit_fraction": "0",
    "shadow_version": "0",
    "shadow_fraction": "0",
    "reference_check": "warn",
}
REFERENCE = RungRecord(4, "px=4", "3" * 64)


def certified(method="ltt", errors=0, reference=FULL_RUNG):
    """What `fit` writes into an artifact whose threshold is certified for a risk of 5 %."""
    goal, fidelity = Goal(0.05, 0.9, method), Fidelity("top1")
    lost = np.arange(200) < errors
    verdict = certify(np.zeros(200, np.float32), lost, np.array([0.5]), goal)
    record = certificate(verdict, goal, fidelity, "cls_path", reference=reference)
    assert record["certified"]
    return {"chosen_by": {"fidelity": "top1", "tolerance": None}, "certificate": record}


CERTIFIED = certified()
ABOUT_FULL_MODEL = {**certified(reference=FULL_MODEL), "reference": REFERENCE}


class FakeMetric:
    def __init__(self):
        self.value, self.observed = 0.0, []

    def increment(self, amount):
        self.value += amount

    def set(self, value):
        self.value = value

    def observe(self, value):
        self.observed.append(value)


class FakeFamily:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, name, description, kind):
        assert description and name not in SERIES
        self.name = name
        SERIES[name] = {}

    def Metric(self, labels, buckets=None):  # noqa: N802, as Triton spells it
        return SERIES[self.name].setdefault(tuple(sorted(labels.items())), FakeMetric())


SERIES: dict[str, dict] = {}
WARNINGS: list[str] = []
INFOS: list[str] = []


class FakeTritonModelError(Exception):
    """What the python backend raises for a call that is made before `initialize` has returned."""


@pytest.fixture
def deployed(tmp_path, monkeypatch):
    """Imports a module of the deployed router, laid out as `export repository` does."""
    SERIES.clear()
    WARNINGS.clear()
    INFOS.clear()
    folder = tmp_path / "deployed_router"
    folder.mkdir()
    for file in (ROOT / "model_repository/router/1").glob("*.py"):
        shutil.copy(file, folder)
    metrics, waits = folder / "metrics.py", "_FLUSH_S = 0.5\n"
    assert waits in metrics.read_text()
    metrics.write_text(metrics.read_text().replace(waits, "_FLUSH_S = 0.01\n"))
    shutil.copytree(ROOT / "routing", folder / "routing")
    backend = SimpleNamespace(
        MetricFamily=FakeFamily,
        Logger=SimpleNamespace(log_warn=WARNINGS.append, log_info=INFOS.append),
        TritonModelException=FakeTritonModelError,
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    yield lambda name: importlib.import_module(f"deployed_router.{name}")
    for name in [name for name in sys.modules if name.startswith("deployed_router")]:
        del sys.modules[name]


def config(**changed):
    parameters = {k: {"string_value": v} for k, v in {**DEFAULTS, **changed}.items()}
    queue = {"default_queue_policy": {"max_queue_size": 64}}
    return {
        "parameters": parameters,
        "max_batch_size": 32,
        "instance_group": [{"count": 2, "gpus": []}],
        "dynamic_batching": queue,
    }


class FakeInferenceRequest:
    """Triton's request to another model; keeps what it is made with."""

    made: ClassVar[list[dict]] = []

    def __init__(self, **arguments):
        self.made.append(arguments)

    def exec(self):
        tensor = SimpleNamespace(name=lambda: "embedding", as_numpy=lambda: np.zeros((1, 2)))
        return SimpleNamespace(has_error=lambda: False, output_tensors=lambda: [tensor])


def test_a_call_of_a_rung_names_the_version(deployed):
    rungs = deployed("rung_calls")
    rungs.pb_utils.InferenceRequest = FakeInferenceRequest
    rungs.pb_utils.PreferredMemory = lambda kind: kind
    rungs.pb_utils.TRITONSERVER_MEMORY_CPU = 0
    FakeInferenceRequest.made.clear()
    rungs.call_rung("vit_low", None, ["embedding"])
    (made,) = FakeInferenceRequest.made
    assert (made["model_name"], made["model_version"]) == ("vit_low", 1)


# --- settings ------------------------------------------------------------------------------------


def test_the_defaults_change_no_answer(deployed):
    settings = deployed("settings").RouterSettings.of(config())
    assert not settings.degrade_on_high_failure and settings.careful_only
    assert settings.relief is None and settings.high_timeout_s == 10
    assert settings.audit_fraction == settings.shadow_fraction == settings.shadow_version == 0


def test_what_an_operator_chooses_is_read(deployed):
    chosen = config(
        on_high_failure="low",
        client_parameters="any",
        degrade_queue_depth="8",
        degrade_threshold="2.5",
        audit_fraction="0.01",
    )
    settings = deployed("settings").RouterSettings.of(chosen)
    assert settings.degrade_on_high_failure and not settings.careful_only
    assert (settings.relief.depth, settings.relief.full, settings.relief.highest) == (8, 32, 2.5)
    assert settings.audit_fraction == 0.01


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("on_high_failure", "maybe"),
        ("client_parameters", ""),
        ("high_timeout_ms", "0"),
        ("high_timeout_ms", "soon"),
        ("degrade_queue_depth", "33"),
        ("audit_fraction", "1.5"),
        ("audit_fraction", "nan"),
        ("shadow_fraction", "-0.1"),
        ("reference_check", "maybe"),
    ],
)
def test_a_setting_that_means_nothing_stops_the_load_by_name(deployed, name, value):
    with pytest.raises(ValueError, match=name):
        deployed("settings").RouterSettings.of(config(**{name: value}))


def test_pressure_relief_needs_a_limit(deployed):
    with pytest.raises(ValueError, match="degrade_threshold"):
        deployed("settings").RouterSettings.of(config(degrade_queue_depth="8"))


# --- the full rung's time budget -----------------------------------------------------------------


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
    deadline = time.monotonic() + 10
    while True:
        try:
            assert budgeted(3) == 3
            return
        except rungs.LateError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


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


def value(name, **labels):
    return SERIES[f"adaptive_vit_{name}"][tuple(sorted({"version": "1", **labels}.items()))].value


@pytest.fixture
def make_metrics(deployed):
    made = []

    def make(calibration=None, candidate=0):
        calibration = calibration or make_calibration(**CERTIFIED)
        made.append(deployed("metrics").Metrics("1", calibration, "ab" * 32, candidate, 64))
        return made[-1]

    yield make
    for metrics in made:
        metrics.stop()


def test_counts_reach_triton_as_sums(make_metrics):
    metrics = make_metrics()
    for _ in range(3):
        metrics.count("images_total", 2, path="low")
    metrics.count("images_in_flight", 5)
    metrics.count("images_in_flight", -5)
    metrics.observe("score", [0.1, 0.2])
    metrics.stop()
    assert value("images_total", path="low") == 6
    assert value("images_total", path="high") == 0
    assert value("images_in_flight") == 0
    (score,) = SERIES["adaptive_vit_score"].values()
    assert score.observed == [0.1, 0.2]


def test_identity_threshold_and_certified_risk_are_told(make_metrics):
    make_metrics()
    assert value("queue_limit") == 64
    assert value("threshold") == 0.5 and value("certified_risk") == 0.05
    assert (
        value("router_info", artifact="ab" * 6, signal="cls_path", low="0" * 12, high="1" * 12) == 1
    )


def test_without_a_certificate_there_is_no_certified_risk(make_metrics):
    make_metrics(make_calibration(threshold=None))
    assert "adaptive_vit_certified_risk" not in SERIES
    assert "adaptive_vit_threshold" not in SERIES


# --- audit and shadow ----------------------------------------------------------------------------


def wait_for(condition, pause_s=0.01):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause_s)


class Counts:
    """Stands in for `Metrics` where more is counted than a test can wait for."""

    def __init__(self):
        self._lock, self._counts = threading.Lock(), Counter()

    def count(self, name, amount=1, **labels):
        with self._lock:
            self._counts[(name, *labels.values())] += amount

    def __getitem__(self, key):
        with self._lock:
            return self._counts[key]

    def audited(self):
        """Images, and those of them that are lost."""
        outcomes = ("kept_ok", "kept_lost", "escalated", "escalated_lost")
        found = {outcome: self["audited_images_total", outcome] for outcome in outcomes}
        return sum(found.values()), found["kept_lost"] + found["escalated_lost"]


@pytest.fixture
def watching(deployed):
    """Makes a `LiveAudit`, and a function that sends requests through the cascade and past it."""
    audits, high_rung = [], FakeRung(2.0)

    def make(calibration, high, metrics, candidate=None, reference=None, **settings):
        routing = importlib.import_module("deployed_router.routing")
        chosen = config(shadow_version="2" if candidate else "0", **settings)
        chosen = deployed("settings").RouterSettings.of(chosen)
        audit = deployed("live_audit").LiveAudit(
            chosen, calibration, candidate, high, metrics, reference
        )
        audits.append(audit)

        def send(batch, high=high_rung, overrides=None, is_probe=False, **options):
            chosen = routing.Overrides(**(overrides or {}))
            request = routing.CascadeRequest(batch, chosen, is_probe=is_probe)
            (answer,) = routing.run_cascade(
                [request], calibration, FakeRung(1.0), high, decided=audit.look, **options
            )
            return answer

        return audit, send

    yield make
    for audit in audits:
        audit.stop()


@pytest.fixture
def look(watching, make_metrics):
    """Sends images through the cascade and its audit; returns the metrics."""

    def run(scores, high, calibration, candidate=None, overrides=None, repeats=1, **settings):
        metrics = make_metrics(calibration, 2 if candidate else 0)
        _, send = watching(calibration, high, metrics, candidate, **settings)
        for _ in range(repeats):
            send(images(*scores), overrides=overrides)
        return metrics

    return run


def audited(outcome):
    return value("audited_images_total", outcome=outcome)


def other_class(image):
    outputs = FakeRung(2.0)(image)
    outputs.logits[:, 1] += 1
    return outputs


def test_an_audit_asks_the_full_rung_about_every_image_and_compares_kept_ones(look):
    asked = []

    def high(image):
        asked.append(image[0, 0, 0, 0])
        return other_class(image)

    look([0.1, 0.2, 0.9], high, make_calibration(**CERTIFIED), audit_fraction="1")
    wait_for(lambda: audited("kept_lost") == 2)
    wait_for(lambda: audited("escalated") == 1)
    assert audited("kept_ok") == audited("escalated_lost") == 0
    np.testing.assert_allclose(sorted(asked), [0.1, 0.2, 0.9])


def test_traffic_that_contradicts_the_certificate_is_told_once(look):
    look([0.1], other_class, make_calibration(**CERTIFIED), audit_fraction="1", repeats=25)
    wait_for(lambda: audited("kept_lost") == 25)
    wait_for(lambda: value("certificate_contradicted_total") == 1)
    assert len(WARNINGS) == 1 and "contradicts the certificate" in WARNINGS[0]


def test_a_cascade_with_a_cheaper_full_rung_is_held_against_the_full_model(watching):
    """Kept and escalated answers can be lost there, and the certificate is about both."""
    high, reference, counts = FakeRung(2.0), FakeRung(2.0), Counts()
    calibration = make_calibration(**ABOUT_FULL_MODEL)
    _, send = watching(calibration, high, counts, reference=reference, audit_fraction="1")
    send(images(0.1, 0.9))
    wait_for(lambda: counts.audited() == (2, 0))
    assert len(high.batches) == len(reference.batches) == 2
    _, send = watching(calibration, high, counts, reference=other_class, audit_fraction="1")
    for _ in range(12):
        send(images(0.1, 0.9))
    wait_for(lambda: counts.audited() == (26, 24))
    assert counts["audited_images_total", "escalated_lost"] == 12
    wait_for(lambda: counts["certificate_contradicted_total",] == 1)


def test_images_that_pressure_kept_low_are_held_against_the_full_model_as_escalated(watching):
    counts = Counts()
    calibration = make_calibration(**ABOUT_FULL_MODEL)
    # The full rung's answer is sound here, only the cheap one's is not.
    _, send = watching(calibration, other_class, counts, reference=other_class, audit_fraction="1")
    relief = importlib.import_module("deployed_router.routing").Relief(1, 1, 2.0)
    assert send(images(0.9), relief=relief, waiting=1).relieved.all()
    wait_for(lambda: counts["audited_images_total", "escalated"] == 1)


@pytest.mark.parametrize("reference", [REFERENCE, None])  # None: of an earlier release
def test_a_certificate_about_a_model_that_is_not_served_is_not_held_against_another(
    watching, reference
):
    high, counts = FakeRung(2.0), Counts()
    calibration = make_calibration(**{**ABOUT_FULL_MODEL, "reference": reference})
    _, send = watching(calibration, high, counts, audit_fraction="1")
    send(images(0.1, 0.9))
    (warning,) = WARNINGS
    assert "no audit" in warning and "vit_reference" in warning and high.batches == []


def test_a_certificate_on_average_is_contradicted_by_more_than_its_average(watching):
    """Risks a little above epsilon are what `crc` leaves possible."""
    allowed = 9  # of 200 for an average of 5 %: the risk may well be 7 %
    calibration = make_calibration(**certified("crc", allowed))
    counts = Counts()
    _, send = watching(calibration, losing, counts, audit_fraction="1")
    fed = Feeder(send, counts, seed=1)
    fed.send(2000, risk=0.07, escalated=0.0)
    assert counts["certificate_contradicted_total",] == 0
    fed.send(2000, risk=0.2, escalated=0.0)
    assert counts["certificate_contradicted_total",] == 1


def test_requests_with_parameters_of_their_own_are_no_sample_of_the_traffic(watching):
    high, counts = FakeRung(2.0), Counts()
    _, send = watching(make_calibration(**CERTIFIED), high, counts, audit_fraction="1")
    send(images(0.1), overrides={"threshold": 0.4})
    send(images(0.2))
    wait_for(lambda: counts.audited() == (1, 0))
    np.testing.assert_allclose([batch[0, 0, 0, 0] for batch in high.batches], [0.2])


def test_what_watches_the_service_is_no_sample_of_the_traffic(watching):
    high, counts = FakeRung(2.0), Counts()
    calibration = make_calibration(**CERTIFIED)
    settings = {"audit_fraction": "1", "shadow_fraction": "1"}
    _, send = watching(calibration, high, counts, make_calibration(0.3), **settings)
    send(images(0.1), is_probe=True)
    send(images(0.2))
    wait_for(lambda: counts.audited() == (1, 0))
    wait_for(lambda: counts["shadow_images_total", "2", "both_low"] == 1)
    np.testing.assert_allclose([batch[0, 0, 0, 0] for batch in high.batches], [0.2])


def test_a_failing_full_rung_drops_audits_and_counts_them(look, deployed):
    def failing(image):
        raise deployed("rung_calls").RungError("vit_high is away", is_outage=True)

    look([0.1, 0.2, 0.9], failing, make_calibration(**CERTIFIED), audit_fraction="1")
    wait_for(lambda: value("audit_dropped_total") == 3)


def test_what_goes_wrong_in_the_audit_fails_no_answer(watching):
    counts = Counts()
    audit, send = watching(make_calibration(**CERTIFIED), other_class, counts, audit_fraction="1")
    for _ in range(3):
        audit.look(SimpleNamespace(request=None))
    assert counts["audit_dropped_total",] == 3
    assert len(WARNINGS) == 1 and "AttributeError" in WARNINGS[0]
    send(images(0.1))
    wait_for(lambda: counts.audited() == (1, 1))


# --- the audit on a stream of known risk ---------------------------------------------------------


def losing(image):
    """A full rung that answers otherwise where the second pixel is set."""
    outputs = FakeRung(2.0)(image)
    outputs.logits[:, 1] += image[:, 0, 0, 1]
    return outputs


class SharedRung:
    """The one full rung of a server: live requests and the audit take turns, in the order they ask.

    Args:
        answer: to the images of a call, or raises.
        takes_s: that every call takes.
    """

    def __init__(self, answer, takes_s):
        self._answer, self._takes_s = answer, takes_s
        self._instance = ThreadPoolExecutor(1)

    def __call__(self, image):
        return self._instance.submit(self._work, image).result()

    def _work(self, image):
        time.sleep(self._takes_s)
        return self._answer(image)


class Feeder:
    """Draws images of known risk, and sends them as fast as the audit takes them.

    Some requests are all alike in whether they escalate, as bursts of real images are.
    """

    def __init__(self, send, counts, seed, images=16):
        self._send, self._counts, self._images = send, counts, images
        self._rng, self.sent = np.random.default_rng(seed), 0

    def send(self, n, risk, escalated, waits=1.0, **options):
        """Sends n images and waits for the audit after this share of the requests."""
        for _ in range(n // self._images):
            alike = self._rng.random() < 0.5
            high = self._rng.random(1 if alike else self._images) < escalated
            high = np.broadcast_to(high, self._images)
            lost = ~high & (self._rng.random(self._images) < risk / (1 - escalated))
            batch = images(*np.where(high, 0.9, 0.1))
            batch[:, 0, 0, 1] = lost
            self._send(batch, **options)
            self.sent += self._images
            if self._rng.random() < waits:
                self.wait()
        self.wait()

    def wait(self):
        wait_for(lambda: self._counts.audited()[0] + self.dropped() == self.sent, pause_s=0.0002)

    def dropped(self):
        return self._counts["audit_dropped_total",]


def test_pressure_raises_no_false_alarm(watching):
    """A risk of 4.5 % under a certificate of 5 %, 30 % of the images kept low by pressure."""
    relief = importlib.import_module("deployed_router.routing").Relief(1, 1, 2.0)
    images_seen = losses = 0
    for seed in range(20):
        counts = Counts()
        calibration = make_calibration(**CERTIFIED)
        audit, send = watching(calibration, losing, counts, audit_fraction="1")
        audit._random = np.random.default_rng(seed)  # shuffles what it draws of a request
        Feeder(send, counts, seed).send(800, 0.045, 0.3, relief=relief, waiting=1)
        assert counts["certificate_contradicted_total",] == 0
        seen, lost = counts.audited()
        images_seen, losses = images_seen + seen, losses + lost
    assert images_seen == 20 * 800
    # Four standard errors; the share among images that pressure left alone would be 6.4 %.
    assert abs(losses / images_seen - 0.045) < 4 * math.sqrt(0.045 * 0.955 / images_seen)


def test_a_risk_above_the_certified_is_seen(watching):
    for seed in range(3):
        counts = Counts()
        _, send = watching(make_calibration(**CERTIFIED), losing, counts, audit_fraction="1")
        Feeder(send, counts, seed).send(3200, 0.08, 0.3)
        assert counts["certificate_contradicted_total",] == 1


@pytest.mark.parametrize("degrade", [True, False])
def test_full_queues_and_outages_leave_the_realised_share_as_it_is(watching, degrade):
    """Half of the time the full rung is away, and often more comes than can be looked at."""
    counts, away = Counts(), threading.Event()
    routing = importlib.import_module("deployed_router.routing")

    def answer(image):
        if away.is_set():
            raise routing.RungError("vit_high is away", is_outage=True)
        return losing(image)

    high = SharedRung(answer, takes_s=0.0001)
    _, send = watching(make_calibration(**CERTIFIED), high, counts, audit_fraction="1")
    fed = Feeder(send, counts, seed=3)
    for phase in range(60):
        away.set() if phase % 2 else away.clear()
        options = {"high": high, "degrade_on_high_failure": degrade}
        fed.send(160, risk=0.2, escalated=0.5, waits=0.5, **options)
    seen, lost = counts.audited()
    assert seen > 2000 and fed.dropped() > 0.5 * fed.sent
    # Bursts make images of a request alike, so that their number counts for less.
    assert abs(lost / seen - 0.2) < 4 * math.sqrt(0.2 * 0.8 / (seen / 4))


@pytest.mark.parametrize("escalated", [0.1, 0.3])
def test_an_audit_that_waits_for_the_full_rung_with_its_clients_looks_at_all_alike(
    watching, escalated
):
    """A client that asks image by image, faster than the audit; while it waits, the audit gains."""
    counts = Counts()
    high = SharedRung(losing, takes_s=0.001)
    _, send = watching(make_calibration(**CERTIFIED), high, counts, audit_fraction="1")
    fed = Feeder(send, counts, seed=4, images=1)
    fed.send(round(600 / escalated), 0.1, escalated, waits=0.0, high=high)
    seen, lost = counts.audited()
    assert seen > 400 and fed.dropped() > 0.3 * fed.sent
    looked_at = counts["audited_images_total", "escalated"]
    for share, true in ((lost / seen, 0.1), (looked_at / seen, escalated)):
        assert abs(share - true) < 4 * math.sqrt(true * (1 - true) / seen)


def test_answers_of_several_threads_are_watched_while_the_certificate_falls(
    watching, deployed, monkeypatch
):
    """The moment at which the audit is done with its test, and others have images for it."""
    test = deployed("live_audit").RiskTest
    evidence = test.log_evidence.fget
    # A look at the evidence lets the other threads run.
    monkeypatch.setattr(
        test, "log_evidence", property(lambda s: (time.sleep(0.002), evidence(s))[1])
    )

    def answer(send):
        for _ in range(12):
            send(images(0.1, 0.9))

    for _ in range(3):
        fed = Counts()
        _, send = watching(make_calibration(**CERTIFIED), other_class, fed, audit_fraction="1")
        threads = [threading.Thread(target=answer, args=[send]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(lambda fed=fed: fed.audited()[0] + fed["audit_dropped_total",] == 72)
        assert fed["certificate_contradicted_total",] == 1
    assert len(WARNINGS) == 3 and all("contradicts" in warning for warning in WARNINGS)


def test_a_version_above_the_one_that_answers_is_told_of(deployed, tmp_path):
    repository = assemble(*write_inputs(tmp_path), tmp_path / "repository")
    tell = deployed("model")._tell_of_higher
    put(repository, Versions(1, (1, 2)))
    tell(repository, 1)
    assert WARNINGS == []
    tell(repository, 2)
    (warning,) = WARNINGS
    assert warning.startswith("router: router/2 is loaded above router/1, so it answers requests")
    manifest.write(repository)  # as an earlier release does, which did not say what answers
    tell(repository, 2)
    assert len(WARNINGS) == 1


def test_a_candidate_of_other_rungs_is_refused(deployed, tmp_path):
    live = make_calibration()
    (tmp_path / "2").mkdir()
    make_calibration(0.3).save(tmp_path / "2/calibration.json")
    load = deployed("model")._load_candidate
    deployed_live = importlib.import_module("deployed_router.routing").Calibration.load(
        tmp_path / "2/calibration.json"
    )
    assert load(tmp_path / "2", deployed_live).threshold == 0.3
    other = {**live.rungs, "vit_low": replace(live.rungs["vit_low"], sha256="9" * 64)}
    make_calibration(rungs=other).save(tmp_path / "2/calibration.json")
    with pytest.raises(ValueError, match="made with other rungs"):
        load(tmp_path / "2", deployed_live)


def test_a_shadow_is_counted_without_another_call(look):
    high = FakeRung(2.0)
    calibration = make_calibration(0.5, **CERTIFIED)
    look([0.1, 0.4, 0.9], high, calibration, make_calibration(0.3), shadow_fraction="1")

    def counted(outcome):
        return value("shadow_images_total", candidate="2", outcome=outcome)

    wait_for(lambda: counted("both_low") == 1)
    assert (counted("only_candidate_high"), counted("both_high")) == (1, 1)
    assert counted("only_live_high") == 0 and high.batches == []


# --- what had to wait ----------------------------------------------------------------------------


@pytest.fixture
def waiting(deployed):
    """One of two instances that has answered a batch between two moments, the only one, ..."""

    def make(started_s=9.0, answered_s=10.0, instances=2):
        made = deployed("waiting").Waiting(instances)
        assert made.images(batch_of(32), started_s) == 0  # the first
        made.answered(answered_s)
        return made

    return make


def batch_of(*sizes):
    return [np.zeros((size, 3, 4, 4), np.float32) for size in sizes]


def test_a_request_to_an_idle_router_has_not_waited_whatever_its_size(waiting):
    assert waiting().images(batch_of(32), 11.0) == 0


def test_what_came_behind_the_first_request_has_waited(waiting):
    assert waiting().images(batch_of(8, 1, 2), 11.0) == 3


def test_a_batch_that_comes_as_soon_as_the_router_is_free_has_waited_whole(waiting):
    assert waiting(9.99).images(batch_of(32), 10.0005) == 32
    assert waiting(9.99).images(batch_of(1, 1, 1), 10.0005) == 3
    assert waiting(9.99).images(batch_of(1, 1, 1), 10.0015) == 2


def test_the_time_to_copy_large_images_is_no_idle_time(waiting):
    large = [np.zeros((32, 3, 518, 518), np.float32)]  # 98 MiB
    assert waiting(9.9).images(large, 10.040) == 32
    assert waiting(9.9).images(large, 10.080) == 0


def test_a_slow_hand_over_on_busy_cores_is_no_idle_time(waiting):
    """Six clients of 32 images each, and a busy loop on each core: batches took 4.5 s."""
    for free_s in (0.004, 0.012, 0.328):
        assert waiting(5.5).images(batch_of(32), 10.0 + free_s) == 32


def test_a_lone_clients_requests_have_not_waited_wherever_they_go(waiting):
    assert waiting(8.7).images(batch_of(32), 11.3) == 0  # the other of two instances was asked
    # The only one: as fast as its client sends the next request.
    assert waiting(8.7, instances=1).images(batch_of(32), 10.004) == 0
    assert waiting(8.7, instances=1).images(batch_of(32), 10.001) == 32


def test_a_batch_without_a_sound_request_waits_for_nothing(waiting):
    assert waiting().images([], 10.0) == 0


# --- reference answers: does this server answer as the calibration did? --------------------------


@pytest.fixture(scope="module")
def fit_with_answers(tmp_path_factory):
    """An artifact as `fit` saves it, and the rungs that it was made with."""
    folder = tmp_path_factory.mktemp("fitted")
    rung_set, outputs = collected(folder)
    fitted(rung_set, outputs).save(folder / "calibration.json")
    fitted(rung_set, outputs, images=0).save(folder / "none.json")
    return rung_set, folder / "calibration.json"


class Rungs:
    """Both rungs by ONNX Runtime, as a server's; `faults` are raised first, one a call."""

    def __init__(self, deployed, rung_set, faults=(), change=lambda outputs: outputs):
        self._outputs = importlib.import_module("deployed_router.routing").RungOutputs
        self._sessions = {name: open_session(file) for name, file in rung_set.files.items()}
        self._faults, self._change = list(faults), change
        self.batches = []

    def ask(self, name):
        def rung(image):
            self.batches.append((name, len(image)))
            if self._faults:
                raise self._faults.pop(0)
            found = run_session(self._sessions[name], image, layers=name == "vit_low")
            return self._outputs(**vars(self._change(found)))

        return rung


@pytest.fixture
def check(deployed, fit_with_answers, make_metrics, monkeypatch):
    """Starts the comparison of one instance, with pauses of no length to speak of."""
    made = []
    rung_set, artifact = fit_with_answers
    module = deployed("reference_check")
    monkeypatch.setattr(module, "_FIRST_TRY_S", 0.001)
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.002)

    def start(mode, first=True, file=artifact, **rungs):
        calibration = importlib.import_module("deployed_router.routing").Calibration.load(file)
        asked = Rungs(deployed, rung_set, **rungs)
        metrics = make_metrics()
        report = metrics.set_reference_outcome if first else None
        low, high = asked.ask("vit_low"), asked.ask("vit_high")
        made.append(module.ReferenceCheck(mode, calibration, file, low, high, report))
        return made[-1], asked

    yield start
    for one in made:
        one.stop()


def outcome():
    names = ("same", "within_slack", "other")
    return [name for name in names if value("reference_answers", outcome=name)]


def other_classes(outputs):
    return replace(outputs, logits=-outputs.logits)


def test_answers_as_calibrated_are_told_and_cost_each_image_one_call_of_each_rung(check):
    """One by one: a client's image waits behind one of them at most."""
    found, asked = check("warn")
    wait_for(lambda: outcome() == ["same"])
    wait_for(lambda: INFOS)
    assert found.refusal is None and WARNINGS == []
    assert "router: this server answers as the calibration did: of 32 reference" in INFOS[0]
    assert Counter(asked.batches) == {("vit_low", 1): 32, ("vit_high", 1): 32}


def test_other_answers_are_a_warning_with_both_sides(check):
    found, _ = check("warn", change=other_classes)
    wait_for(lambda: WARNINGS)
    assert outcome() == ["other"] and found.refusal is None and INFOS == []
    assert "computes other answers than the calibration did; calibrate here" in WARNINGS[0]
    assert "Calibrated on onnxruntime 1." in WARNINGS[0] and "; this is " in WARNINGS[0]


def test_refusing_lasts_until_the_answers_agree_and_stays_if_they_do_not(check):
    released = threading.Event()

    def held(outputs):
        released.wait(30)
        return outputs

    found, _ = check("refuse", change=held)
    assert "still comparing" in found.refusal
    released.set()
    wait_for(lambda: found.refusal is None)


def test_a_router_that_refuses_says_what_it_found(check):
    found, _ = check("refuse", first=False, change=other_classes)  # the second instance, too
    wait_for(lambda: "computes other answers" in found.refusal)
    assert "\n" not in found.refusal and outcome() == []


def test_an_answer_that_is_no_number_is_another(check):
    found, _ = check(
        "refuse", change=lambda o: replace(o, embedding=np.full_like(o.embedding, np.nan))
    )
    wait_for(lambda: "computes other answers" in found.refusal)
    assert outcome() == ["other"] and "NaN" in found.refusal


def test_rungs_that_are_not_there_yet_are_asked_again_without_a_word(check, deployed):
    error = deployed("rung_calls").RungError
    faults = [
        FakeTritonModelError("BLS is only supported during the 'execute' function."),
        error("vit_low failed: Server not ready", is_outage=True),
        error("vit_low failed: broken", is_outage=False),
        error("vit_low failed: broken", is_outage=False),
    ]
    check("warn", faults=faults)
    wait_for(lambda: outcome() == ["same"])
    assert WARNINGS == ["router: reference answers not compared yet: vit_low failed: broken"]


@pytest.mark.parametrize(
    ("mode", "first", "file"),
    [
        ("off", True, "calibration.json"),
        ("warn", False, "calibration.json"),
        ("warn", True, "none.json"),
    ],
)
def test_nothing_is_asked_where_nobody_wants_to_know(check, fit_with_answers, mode, first, file):
    found, asked = check(mode, first, fit_with_answers[1].with_name(file))
    found.stop()
    time.sleep(0.05)
    assert asked.batches == [] and found.refusal is None and outcome() == []


def test_refusing_without_reference_answers_stops_the_load(check, fit_with_answers):
    with pytest.raises(ValueError, match="no reference answers in this artifact"):
        check("refuse", file=fit_with_answers[1].with_name("none.json"))


def test_unloading_ends_the_comparison_at_the_next_image(check):
    entered, released = threading.Event(), threading.Event()

    def held(outputs):
        entered.set()
        released.wait(30)
        return outputs

    found, asked = check("warn", change=held)
    assert entered.wait(10)
    stopping = threading.Thread(target=found.stop)
    stopping.start()
    released.set()
    stopping.join(10)
    assert not stopping.is_alive() and not found._thread.is_alive()
    assert len(asked.batches) <= 3 and outcome() == []


# --- calls that no request waits for -------------------------------------------------------------


@pytest.fixture
def hold(deployed, monkeypatch):
    monkeypatch.setattr(deployed("hold"), "_AFTERWARDS_S", 0.05)
    made = deployed("hold").Hold()
    yield made
    made.stop()


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_a_call_off_the_request_path_waits_for_a_request(hold):
    asked = []
    call = hold.keeping(asked.append)
    call("as it has just been loaded")
    time.sleep(0.06)
    thread = in_thread(lambda: call("later"))
    time.sleep(0.1)
    assert len(asked) == 1
    with hold.answering():
        thread.join(10)
        assert len(asked) == 2
    call("right after an answer")
    assert len(asked) == 3


def test_the_time_after_an_answer_begins_when_it_ends(hold):
    asked = []
    with hold.answering():
        time.sleep(0.1)
    hold.keeping(asked.append)("soon")
    assert asked == ["soon"]


def test_unloading_ends_what_waits_without_a_call(hold, deployed):
    time.sleep(0.06)
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
