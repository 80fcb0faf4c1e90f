"""From routers to the keeper and back: nothing, a certificate, another traffic, nothing again."""

import importlib

import numpy as np
import pytest

from bundle import manifest
from calibration.journals import parts
from routing import RungOutputs
from tests.unit.live_site import EPSILON, Site, in_place_of_servers
from tests.unit.onnx_files import CLASSES, LAYERS, SIZE, D
from tests.unit.router_parts import backend, deployed, make_metrics

__all__ = ["backend", "deployed", "make_metrics"]  # fixtures


def images(scores, lost):
    """Images of these margins; the rungs name different classes where they are lost."""
    batch = np.zeros((len(scores), 3, SIZE, SIZE), np.float32)
    batch[:, 0, 0, 0], batch[:, 0, 0, 1] = scores, lost
    return batch


def low(batch):
    logits = np.full((len(batch), CLASSES), -60, np.float32)
    logits[:, 0] = np.arctanh(1 - np.clip(batch[:, 0, 0, 0], 1e-3, 1))
    logits[:, 1] = -logits[:, 0]  # the two best classes differ by 1 - score
    layers = np.zeros((len(batch), LAYERS + 1, D), np.float32)
    return RungOutputs(np.ones((len(batch), D), np.float32), layers, logits)


def high(batch):
    outputs = low(batch)
    lost = batch[:, 0, 0, 1] > 0
    outputs.logits[lost] = outputs.logits[lost][:, [1, 0, *range(2, CLASSES)]]
    outputs.embedding[:] = 2
    return outputs


class Service:
    """Two instances of the router, loaded anew whenever another version answers."""

    def __init__(self, site, deployed, make_metrics, backend):
        self._site, self._deployed = site, deployed
        self._make_metrics, self._backend = make_metrics, backend
        self._rng, self._loaded, self._instances = np.random.default_rng(0), None, []

    def _load(self):
        site = self._site
        if self._loaded == site.live:
            return
        self.stop()
        sha256 = manifest.sha256_file(site.artifact_file)
        for _ in range(2):
            self._backend.series.clear()
            metrics = self._make_metrics(site.artifact)
            evidence = self._deployed("evidence").Evidence(
                site.artifact, sha256, site.live, site.evidence, metrics
            )
            evidence._random = self._rng
            self._instances.append(evidence)
        self._loaded = site.live

    def stop(self):
        while self._instances:
            self._instances.pop().stop()

    def serve(self, count, worst):
        """Images of all scores alike, of which those above `worst` are lost.

        Returns:
            The share that escalates, and the share with another answer than the full rung's.
        """
        routing = importlib.import_module("deployed_router.routing")
        self._load()
        escalated, wrong = [], []
        for number in range(count // 10):
            scores = self._rng.uniform(0.01, 1, size=10)
            batch = images(scores, scores > worst)
            evidence = self._instances[number % 2]
            calibration = evidence.calibration
            request = routing.CascadeRequest(batch, routing.Overrides())
            (answer,) = routing.run_cascade([request], calibration, low, high, audit=evidence.audit)
            assert calibration.threshold is not None or answer.escalated.all()
            escalated += answer.wanted.tolist()
            wrong += (answer.logits.argmax(axis=1) != high(batch).logits.argmax(axis=1)).tolist()
        return np.mean(escalated), np.mean(wrong)


@pytest.fixture
def site(tmp_path, monkeypatch):
    in_place_of_servers(monkeypatch)
    return Site(tmp_path, audit_floor=0.2)


@pytest.fixture
def service(site, deployed, make_metrics, backend):
    made = Service(site, deployed, make_metrics, backend)
    yield made
    made.stop()


def test_escalation_falls_while_few_are_wrong_and_rises_once_they_are(site, service):
    way_down, wrong = [], []
    for _ in range(12):
        escalated, is_wrong = service.serve(100, worst=0.7)
        way_down.append(escalated)
        wrong.append(is_wrong)
        state = site.step()
    assert way_down[0] == 1 and wrong[0] == 0
    # An oracle escalates 0.2 and is wrong in 0.1; nothing that was answered by both is wrong.
    assert 0.15 < way_down[-1] < 0.35
    assert max(wrong) <= EPSILON and state.number == 1 and state.damaged == state.other == 0
    assert 0.2 < state.audited / 1200 < 0.6  # fewer are audited as time goes by
    asked = 0
    while site.artifact.threshold is not None and asked < 3000:
        service.serve(100, worst=0.1)
        asked += 100
        state = site.step()
    # Some seventy of a hundred are wrong then, of which every fifth is audited.
    assert asked <= 300
    assert state.number == 2 and state.served.audit_share == 1
    assert service.serve(100, worst=0.1) == (1.0, 0.0)


def test_what_the_keeper_counts_is_what_the_routers_saw(site, service):
    service.serve(200, worst=0.7)
    records = [record for part in parts(site.evidence, {}) for record in part.records]
    assert len(records) == 200
    state = site.step()
    assert state.images == 200
    for threshold, kept, lost in zip(state.thresholds, state.kept, state.lost, strict=True):
        below = [record for record in records if record.score <= threshold]
        assert (kept, lost) == (len(below), sum(record.lost for record in below))
    assert {record.lost for record in records if record.score < 0.69} == {False}
    assert {record.lost for record in records if record.score > 0.71} == {True}
