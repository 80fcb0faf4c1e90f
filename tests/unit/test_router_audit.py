"""The live audit of the `router`, and its shadow: alone, and on streams of known risk."""

import importlib
import math
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from calibration.outputs import FULL_MODEL
from routing import RungRecord
from tests.unit.fakes import FakeRung, images, make_calibration
from tests.unit.router_parts import (
    CERTIFIED,
    backend,
    certified,
    config,
    deployed,
    make_metrics,
    wait_for,
)

__all__ = ["backend", "deployed", "make_metrics"]  # fixtures

REFERENCE = RungRecord(4, "px=4", "3" * 64)
ABOUT_FULL_MODEL = {**certified(reference=FULL_MODEL), "reference": REFERENCE}


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

    @property
    def contradicted(self):
        return self["certificate_contradicted_total",]

    @property
    def dropped(self):
        return self["audit_dropped_total",]


@pytest.fixture
def watching(deployed):
    """Makes a `LiveAudit`, and a function that sends requests through the cascade and past it."""
    audits, routing = [], importlib.import_module("deployed_router.routing")

    def make(calibration, high, counts, candidate=None, reference=None, **settings):
        chosen = config(
            **{"shadow_version": "2" if candidate else "0", "audit_fraction": "1", **settings}
        )
        chosen = deployed("settings").RouterSettings.of(chosen)
        audit = deployed("live_audit").LiveAudit(
            chosen, calibration, candidate, high, counts, reference
        )
        audits.append(audit)

        def send(batch, high=FakeRung(2.0), overrides=None, is_probe=False, **options):  # noqa: B008
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


def first_pixels(batches):
    return sorted(image[0, 0, 0] for batch in batches for image in batch)


def other_class(image):
    outputs = FakeRung(2.0)(image)
    outputs.logits[:, 1] += 1
    return outputs


def test_every_image_is_audited_and_scored_by_the_shadow_without_another_call(
    watching, make_metrics, backend
):
    """By the metrics that Triton shows."""
    asked, calibration, candidate = [], make_calibration(**CERTIFIED), make_calibration(0.3)

    def high(image):
        asked.append(image)
        return other_class(image)

    metrics = make_metrics(calibration, 2)
    _, send = watching(calibration, high, metrics, candidate, shadow_fraction="1")
    send(images(0.1, 0.4, 0.9))

    def audited(outcome):
        return backend.value("audited_images_total", outcome=outcome)

    def shadowed(outcome):
        return backend.value("shadow_images_total", candidate="2", outcome=outcome)

    wait_for(
        lambda: (audited("kept_lost"), audited("escalated"), shadowed("both_low")) == (2, 1, 1)
    )
    assert audited("kept_ok") == audited("escalated_lost") == shadowed("only_live_high") == 0
    assert (shadowed("only_candidate_high"), shadowed("both_high")) == (1, 1)
    np.testing.assert_allclose(first_pixels(asked), [0.1, 0.4, 0.9])
    for _ in range(25):
        send(images(0.1))
    wait_for(lambda: backend.value("certificate_contradicted_total") == 1)
    assert len(backend.warnings) == 1 and "contradicts the certificate" in backend.warnings[0]


def test_a_cascade_with_a_cheaper_full_rung_is_held_against_the_full_model(watching):
    """Kept and escalated answers can be lost there, and the certificate is about both."""
    high, reference, counts = FakeRung(2.0), FakeRung(2.0), Counts()
    calibration = make_calibration(**ABOUT_FULL_MODEL)
    _, send = watching(calibration, high, counts, reference=reference)
    send(images(0.1, 0.9))
    wait_for(lambda: counts.audited() == (2, 0))
    assert len(high.batches) == len(reference.batches) == 2
    _, send = watching(calibration, high, counts, reference=other_class)
    for _ in range(12):
        send(images(0.1, 0.9))
    wait_for(lambda: counts.audited() == (26, 24))
    assert counts["audited_images_total", "escalated_lost"] == 12
    wait_for(lambda: counts.contradicted == 1)


def test_images_that_pressure_kept_low_are_held_against_the_full_model_as_escalated(watching):
    counts = Counts()
    calibration = make_calibration(**ABOUT_FULL_MODEL)
    # The full rung's answer is sound here, only the cheap one's is not.
    _, send = watching(calibration, other_class, counts, reference=other_class)
    relief = importlib.import_module("deployed_router.routing").Relief(1, 1, 2.0)
    assert send(images(0.9), relief=relief, waiting=1).relieved.all()
    wait_for(lambda: counts["audited_images_total", "escalated"] == 1)


@pytest.mark.parametrize("reference", [REFERENCE, None])  # None: of an earlier release
def test_a_certificate_about_a_model_that_is_not_served_is_not_held_against_another(
    watching, backend, reference
):
    high, counts = FakeRung(2.0), Counts()
    calibration = make_calibration(**{**ABOUT_FULL_MODEL, "reference": reference})
    _, send = watching(calibration, high, counts)
    send(images(0.1, 0.9))
    (warning,) = backend.warnings
    assert "no audit" in warning and "vit_reference" in warning and high.batches == []


def test_a_certificate_on_average_is_contradicted_by_more_than_its_average(watching):
    """Risks a little above epsilon are what `crc` leaves possible."""
    allowed = 9  # of 200 for an average of 5 %: the risk may well be 7 %
    calibration = make_calibration(**certified("crc", allowed))
    counts = Counts()
    _, send = watching(calibration, losing, counts)
    fed = Feeder(send, counts, seed=1)
    fed.send(2000, risk=0.07, escalated=0.0)
    assert counts.contradicted == 0
    fed.send(2000, risk=0.2, escalated=0.0)
    assert counts.contradicted == 1


@pytest.mark.parametrize("options", [{"overrides": {"threshold": 0.4}}, {"is_probe": True}])
def test_what_has_parameters_of_its_own_or_watches_the_service_is_no_sample_of_the_traffic(
    watching, options
):
    high, counts, candidate = FakeRung(2.0), Counts(), make_calibration(0.3)
    _, send = watching(make_calibration(**CERTIFIED), high, counts, candidate, shadow_fraction="1")
    send(images(0.1), **options)
    send(images(0.2))
    wait_for(lambda: counts.audited() == (1, 0))
    wait_for(lambda: counts["shadow_images_total", "2", "both_low"] == 1)
    np.testing.assert_allclose(first_pixels(high.batches), [0.2])


def test_a_failing_full_rung_drops_audits_and_counts_them(watching, deployed):
    def failing(image):
        raise deployed("rung_calls").RungError("vit_high is away", is_outage=True)

    counts = Counts()
    _, send = watching(make_calibration(**CERTIFIED), failing, counts)
    send(images(0.1, 0.2, 0.9))
    wait_for(lambda: counts.dropped == 3)


def test_what_goes_wrong_in_the_audit_fails_no_answer(watching, backend):
    counts = Counts()
    audit, send = watching(make_calibration(**CERTIFIED), other_class, counts)
    for _ in range(3):
        audit.look(SimpleNamespace(request=None))
    assert counts.dropped == 3
    assert len(backend.warnings) == 1 and "AttributeError" in backend.warnings[0]
    send(images(0.1))
    wait_for(lambda: counts.audited() == (1, 1))


# --- on a stream of known risk --------------------------------------------------------------------


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
        return self._counts.dropped


def test_pressure_raises_no_false_alarm(watching):
    """A risk of 4.5 % under a certificate of 5 %, 30 % of the images kept low by pressure."""
    relief = importlib.import_module("deployed_router.routing").Relief(1, 1, 2.0)
    images_seen = losses = 0
    for seed in range(20):
        counts = Counts()
        calibration = make_calibration(**CERTIFIED)
        audit, send = watching(calibration, losing, counts)
        audit._random = np.random.default_rng(seed)  # shuffles what it draws of a request
        Feeder(send, counts, seed).send(800, 0.045, 0.3, relief=relief, waiting=1)
        assert counts.contradicted == 0
        seen, lost = counts.audited()
        images_seen, losses = images_seen + seen, losses + lost
    assert images_seen == 20 * 800
    # Four standard errors; the share among images that pressure left alone would be 6.4 %.
    assert abs(losses / images_seen - 0.045) < 4 * math.sqrt(0.045 * 0.955 / images_seen)


def test_a_risk_above_the_certified_is_seen(watching):
    for seed in range(3):
        counts = Counts()
        _, send = watching(make_calibration(**CERTIFIED), losing, counts)
        Feeder(send, counts, seed).send(3200, 0.08, 0.3)
        assert counts.contradicted == 1


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
    _, send = watching(make_calibration(**CERTIFIED), high, counts)
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
    _, send = watching(make_calibration(**CERTIFIED), high, counts)
    fed = Feeder(send, counts, seed=4, images=1)
    fed.send(round(600 / escalated), 0.1, escalated, waits=0.0, high=high)
    seen, lost = counts.audited()
    assert seen > 400 and fed.dropped() > 0.3 * fed.sent
    looked_at = counts["audited_images_total", "escalated"]
    for share, true in ((lost / seen, 0.1), (looked_at / seen, escalated)):
        assert abs(share - true) < 4 * math.sqrt(true * (1 - true) / seen)


def test_answers_of_several_threads_are_watched_while_the_certificate_falls(
    watching, deployed, backend, monkeypatch
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
        _, send = watching(make_calibration(**CERTIFIED), other_class, fed)
        threads = [threading.Thread(target=answer, args=[send]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(lambda fed=fed: fed.audited()[0] + fed.dropped == 72)
        assert fed.contradicted == 1
    assert ["contradicts" in warning for warning in backend.warnings] == [True] * 3
