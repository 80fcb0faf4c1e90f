"""Evidence of live traffic: what a router writes of it, and how it goes back by itself."""

import importlib
from dataclasses import replace

import numpy as np
import pytest

from bundle.fidelity import FidelityLoss
from bundle.graphs import GraphSet
from bundle.versions import live_folder
from calibration.journals import parts
from calibration.live_state import Served
from export.live import live_artifact
from routing import PROBE_ID
from routing.journal import retreat_file
from tests.unit.fakes import FakeRung, images, make_calibration
from tests.unit.onnx_files import write_graph_set
from tests.unit.router_parts import CERTIFIED, backend, deployed, make_metrics
from tests.unit.test_router_audit import losing
from tests.unit.test_router_model import request_of, start

__all__ = ["backend", "deployed", "make_metrics", "start"]  # fixtures

ARTIFACT = "ab" * 32
EPSILON = 0.1


def live(threshold=0.5, share=1.0, **changes):
    """As `calibration live` certifies a threshold, or starts without one."""
    certificate = {
        "certified": threshold is not None,
        "method": "live",
        "epsilon": EPSILON,
        "confidence": 0.9,
        "alarm": Served(threshold, ordinal=1).alarm,
    }
    chosen_by = {"fidelity": "top1", "tolerance": None, "method": "live", "audit_share": share}
    return make_calibration(threshold, chosen_by=chosen_by, certificate=certificate, **changes)


def batch(*scores, lost=()):
    """Images of these scores; the rungs name different classes for those in `lost`."""
    made = images(*scores)
    made[list(lost), 0, 0, 1] = 1
    return made


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "repository.live"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def router(deployed, make_metrics, backend, folder, clock):
    """Makes an instance: its evidence, its metrics, and a function that sends it a request."""
    made, routing = [], importlib.import_module("deployed_router.routing")

    def make(calibration=None, artifact=ARTIFACT, folder=folder, seed=0):
        backend.series.clear()
        calibration = live() if calibration is None else calibration
        metrics = make_metrics(calibration)
        evidence = deployed("evidence").Evidence(
            calibration, artifact, 3, folder, metrics, clock_s=clock
        )
        evidence._random = np.random.default_rng(seed)
        made.append(evidence)

        def send(batch, low=FakeRung(1.0), high=losing, is_probe=False, **overrides):  # noqa: B008
            request = routing.CascadeRequest(
                batch, routing.Overrides(**overrides), is_probe=is_probe
            )
            (answer,) = routing.run_cascade(
                [request], evidence.calibration, low, high, audit=evidence.audit
            )
            metrics.flush()
            return answer

        return evidence, send

    yield make
    for evidence in made:
        evidence.stop()


def written(folder):
    return [record for part in parts(folder, {}) for record in part.records]


# --- what is written -----------------------------------------------------------------------------


def test_the_journal_holds_what_both_rungs_said_and_whose_it_is(router, folder, backend):
    evidence, send = router()
    answer = send(batch(0.1, 0.4, 0.9, 0.8, lost=[1, 2]))
    assert answer.escalated.all() and answer.audited.all()
    assert answer.wanted.tolist() == [False, False, True, True]
    (part,) = parts(folder, {})
    header = part.header
    assert (header.artifact, header.version) == (ARTIFACT, 3)
    assert header.scoring == live().scoring_sha256
    assert [record.score for record in part.records] == pytest.approx([0.1, 0.4, 0.9, 0.8])
    assert [record.lost for record in part.records] == [False, True, True, False]
    # Both embeddings have four numbers, which differ by 1 each.
    assert [record.change for record in part.records] == pytest.approx([2.0] * 4)
    assert {record.chance for record in part.records} == {1.0}
    outcomes = {"kept_ok": 1, "kept_lost": 1, "escalated": 2, "escalated_lost": 0}
    for outcome, count in outcomes.items():
        assert backend.value("audited_images_total", outcome=outcome) == count
    assert backend.value("audit_share") == 1.0 and backend.warnings == []
    assert not part.is_over  # as long as the router may write more
    evidence.stop()
    assert next(parts(folder, {})).is_over


def test_the_coin_has_the_artifacts_share_and_says_so(router, folder, backend):
    _, send = router(live(share=0.25))
    scores = np.linspace(0, 1, 500).tolist()
    for start_at in range(0, 500, 20):
        send(batch(*scores[start_at : start_at + 20]))
    records = written(folder)
    assert 95 < len(records) < 155 and {record.chance for record in records} == {0.25}
    # Of all scores alike.
    assert np.mean([record.score for record in records]) == pytest.approx(0.5, abs=0.1)
    assert backend.value("audit_share") == 0.25


@pytest.mark.parametrize(
    ("score", "is_written", "is_kept"),
    [(np.nan, None, False), (np.inf, None, False), (-np.inf, np.finfo(np.float32).min, True)],
)
def test_a_score_that_is_no_number_is_written_as_it_was_decided(
    router, folder, backend, score, is_written, is_kept
):
    def low(image):
        outputs = FakeRung(1.0)(image)
        outputs.cls_layers[0, -1, 0] = abs(score)
        return outputs

    sign = -1 if score == -np.inf else 1
    calibration = live()
    turned = replace(calibration, score_map=replace(calibration.score_map, sign=sign))
    _, send = router(turned)
    answer = send(batch(1.0, 0.25), low=low)
    assert answer.wanted[0] != is_kept
    first, second = written(folder)
    assert first.score == is_written and abs(second.score) == 0.25
    kept = backend.value("audited_images_total", outcome="kept_ok")
    assert kept == 1 + is_kept


def test_requests_with_parameters_and_probes_are_no_evidence(router, folder):
    _, send = router()
    routing = importlib.import_module("deployed_router.routing")
    send(batch(0.1), threshold=0.3)
    send(batch(0.1), policy=routing.Policy.HIGH)
    send(batch(0.1), is_probe=True)
    assert not folder.exists()


def test_an_artifact_that_was_calibrated_draws_nobody_and_makes_no_folder(router, folder, backend):
    evidence, send = router(make_calibration(**CERTIFIED))
    assert evidence.audit is None
    answer = send(batch(0.1, 0.9))
    assert answer.escalated.tolist() == [False, True] and not answer.audited.any()
    assert not folder.exists()
    assert "adaptive_vit_audit_share" not in backend.series


# --- faults --------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_told_once_and_answers_go_on(router, tmp_path, backend):
    in_the_way = tmp_path / "in_the_way"
    in_the_way.write_text("")
    evidence, send = router(folder=in_the_way / "evidence")
    for _ in range(3):
        assert send(batch(0.1, 0.9, lost=[0])).escalated.all()
    assert backend.value("audit_dropped_total") == 6
    assert len(backend.warnings) == 1 and str(in_the_way) in backend.warnings[0]
    # What it sees of its certificate counts all the same.
    for _ in range(20):
        send(batch(0.1, lost=[0]))
    assert evidence.calibration.threshold is None
    in_the_way.unlink()
    send(batch(0.1))
    assert len(written(in_the_way / "evidence")) == 1


def test_an_audit_that_fails_reaches_no_client(router, folder, backend):
    """Here the answers hold nothing to compare."""
    _, send = router()
    low, high = FakeRung(1.0, classes=None), FakeRung(2.0, classes=None)
    for _ in range(2):
        answer = send(batch(0.1, 0.2), low=low, high=high)
        assert answer.escalated.all() or answer.audited.all()
    assert backend.value("audit_dropped_total") == 4 and len(backend.warnings) == 1
    assert not folder.exists()


# --- going back ----------------------------------------------------------------------------------


def contradict(evidence, send):
    """Send lost images until the certificate falls; how many that took."""
    for number in range(1, 40):
        send(batch(0.1, lost=[0]))
        if evidence.calibration.threshold is None:
            return number
    raise AssertionError("it does not go back")


def test_a_certificate_that_traffic_contradicts_ends_at_once(router, folder, backend):
    evidence, send = router(live(share=1.0))
    assert send(batch(0.1, 0.9)).wanted.tolist() == [False, True]
    assert contradict(evidence, send) < 10
    assert not evidence.calibration.certificate["certified"]
    assert backend.value("certificate_contradicted_total") == 1
    (warning,) = backend.warnings
    assert "contradicts" in warning and "\n" not in warning
    assert retreat_file(folder, ARTIFACT).exists()
    for _ in range(30):
        answer = send(batch(0.1, 0.2, lost=[0]))
        assert answer.wanted.all() and answer.escalated.all()
    assert backend.value("certificate_contradicted_total") == 1 == len(backend.warnings)
    assert {record.chance for record in written(folder)} == {1.0}


def test_afterwards_every_image_is_audited(router, folder, backend):
    evidence, send = router(live(share=0.5))
    contradict(evidence, send)
    before = len(written(folder))
    send(batch(*[0.3] * 50))
    assert len(written(folder)) == before + 50
    assert backend.value("audit_share") == 1.0


def test_afterwards_no_gauge_tells_of_the_former_threshold(router, backend):
    evidence, send = router(replace(live(), metrics={"escalation_rate": 0.2}))
    figures = "threshold", "certified_risk", "calibrated_escalation_rate"
    gauges = [backend.series[f"adaptive_vit_{figure}"] for figure in figures]
    assert [len(gauge) for gauge in gauges] == [1, 1, 1]
    contradict(evidence, send)
    assert not any(gauges)


def test_what_escalates_or_is_sound_contradicts_nothing(router, backend):
    evidence, send = router()
    for _ in range(50):
        send(batch(0.9, 0.8, lost=[0, 1]))
        send(batch(0.1, 0.2))
    assert evidence.calibration.threshold == 0.5
    assert backend.value("certificate_contradicted_total") == 0


def test_without_a_certificate_there_is_nothing_to_contradict(router, folder, backend):
    evidence, send = router(live(None))
    for _ in range(50):
        assert send(batch(0.1, lost=[0])).escalated.all()
    assert backend.warnings == [] and len(written(folder)) == 50
    assert not retreat_file(folder, ARTIFACT).exists()


def test_another_instance_goes_back_within_a_second(router, clock, backend):
    (first, send_first), (other, send_other) = router(), router(seed=1)
    send_other(batch(0.1))
    contradict(first, send_first)
    clock.now_s += 0.5
    assert send_other(batch(0.1)).wanted.tolist() == [False]
    clock.now_s += 0.6
    send_other(batch(0.1))
    assert send_other(batch(0.1)).wanted.all() and other.calibration.threshold is None
    assert backend.value("certificate_contradicted_total") == 1 and len(backend.warnings) == 2


def test_a_restart_knows_it_and_another_artifact_is_not_meant(router, folder):
    contradict(*router())
    again, send = router()
    assert again.calibration.threshold is None and send(batch(0.1)).wanted.all()
    other, send = router(artifact="cd" * 32)
    assert other.calibration.threshold == 0.5 and not send(batch(0.1)).wanted.any()


def test_who_cannot_tell_the_others_goes_back_all_the_same(router, folder, monkeypatch, backend):
    evidence, send = router()
    send(batch(0.1))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "touch", refuse)
    contradict(evidence, send)
    assert evidence.calibration.threshold is None and len(backend.warnings) == 2


# --- in the router -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """What `start` assembles: a threshold that keeps everything, certified by live traffic."""
    folder = tmp_path_factory.mktemp("live")
    graphs = GraphSet.load(write_graph_set(folder / "onnx"))
    first = live_artifact(graphs, FidelityLoss("top1"), EPSILON)
    certificate = {**live().certificate, **first.certificate, "certified": True, "alarm": 0.005}
    replace(first, threshold=1.0, certificate=certificate).save(folder / "calibration.json")
    return graphs, folder / "calibration.json"


def test_a_router_answers_drawn_images_twice_and_counts_them_as_what_they_are(start, tmp_path):
    router, backend = start()
    answers = router.execute([request_of(2), request_of(1)])
    assert [answer["escalated"].all() for answer in answers] == [True, True]
    assert [(model, count) for model, _, count in backend.asked] == [
        ("vit_low", 3),
        ("vit_high", 3),
    ]
    router.metrics.flush()
    assert backend.value("images_total", path="audited") == 3
    assert backend.value("images_total", path="low") == backend.value("images_total", path="high")
    assert backend.value("answered_twice_images_total", reason="audit") == 3
    assert backend.value("answered_twice_images_total", reason="score") == 0
    evidence = live_folder(tmp_path / "repository")
    assert evidence == tmp_path / "repository.live"
    (part,) = parts(evidence, {})
    assert len(part.records) == 3 and not any(record.lost for record in part.records)
    assert part.header.scoring == router.calibration.scoring_sha256
    router.execute([request_of(4, PROBE_ID)])
    assert len(written(evidence)) == 3


def test_a_router_that_goes_back_asks_the_full_rung_about_every_image(start, tmp_path):
    router, backend = start()
    retreat = router.evidence._retreat
    retreat.parent.mkdir()
    retreat.touch()
    router.evidence._looked_s = -np.inf
    router.execute([request_of(1)])  # which finds it
    router.execute([request_of(2)])
    router.metrics.flush()
    assert backend.value("certificate_contradicted_total") == 1
    assert backend.value("images_total", path="high") == 2
    assert backend.value("answered_twice_images_total", reason="audit") == 3


def test_evidence_goes_where_the_settings_say(start, tmp_path):
    router, _ = start(live_folder=str(tmp_path / "elsewhere/evidence"))
    router.execute([request_of(2)])
    assert len(written(tmp_path / "elsewhere/evidence")) == 2
    assert not (tmp_path / "repository.live").exists()
