"""`python -m calibration live`, and what the other commands make of its artifact."""

import time
from dataclasses import replace

import numpy as np
import pytest

import calibration.live
from calibration.evaluate import EvaluateError, evaluate
from calibration.fidelity import Fidelity
from calibration.live_artifact import measured
from calibration.page_data import analysis_data, fit_data
from report.calibration_page import write_calibration
from report.live_page import write_live
from server.rollout import RolloutInterruptedError
from tests import commands
from tests.unit.calibration_outputs import make_outputs
from tests.unit.live_site import EPSILON, NEEDED, rollouts, site
from tests.unit.pages import FakeSource

__all__ = ["rollouts", "site"]  # fixtures


def live(site, *more):
    return commands.run("calibration", "live", "--repository", site.repository, *more)


def test_once_reads_tests_rolls_out_and_ends(site, rollouts, monkeypatch):
    monkeypatch.setattr(calibration.live, "write_live", write_live)
    first = live(site, "--once")
    assert first.code == 0 and len(first.out.splitlines()) == 1
    site.traffic(2 * NEEDED)
    second = live(site, "--once")
    assert second.code == 0 and rollouts.asked == [2] and site.artifact.threshold is not None
    assert f"{2 * NEEDED} images audited" in second.out and second.out != first.out
    page = (site.evidence / "live.html").read_text()
    assert page.lower().startswith("<!doctype html>") and "router/2" in page


def test_where_the_server_does_not_load_it_the_exit_code_says_so(site, rollouts):
    site.traffic(2 * NEEDED)
    rollouts.fails = True
    assert live(site, "--once").code == live(site, "--once").code == 1
    rollouts.fails = False
    assert live(site, "--once").code == 0 and site.artifact.threshold is not None


def test_it_goes_on_until_somebody_ends_it(site, monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        site.traffic(NEEDED)
        if len(pauses) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    done = live(site, "--every-s", 3)
    assert (done.code, pauses) == (130, [3.0] * 4)
    assert len(done.out.splitlines()) == 4 and site.artifact.threshold is not None
    with_nothing_new = live(site, "--once")
    assert with_nothing_new.code == 0


def test_whoever_ends_it_during_a_rollout_has_ended_it(site, monkeypatch):
    def interrupted(*_):
        raise RolloutInterruptedError("interrupted; router/1 goes on answering")

    site.traffic(2 * NEEDED)
    with monkeypatch.context() as patched:
        patched.setattr(calibration.live, "rollout", interrupted)
        assert live(site).code == 130
    assert live(site, "--once").code == 0 and site.artifact.threshold is not None


def test_what_cannot_be_kept_is_one_line(site, tmp_path):
    site.step()
    for options in (
        ("--score", tmp_path / "none.json"),
        ("--repository", tmp_path / "none"),
        ("--every-s", 0),
        ("--tls-ca", tmp_path / "none.pem"),
    ):
        result = live(site, "--once", *options)
        assert (result.code, result.out) == (2, "") and len(result.err.splitlines()) == 1
    site.assemble(0.2)
    result = live(site, "--once")
    assert (result.code, result.out) == (2, "") and len(result.err.splitlines()) == 1


# --- its artifact --------------------------------------------------------------------------------


def seen_by(site, outputs):
    """What a router writes of these images."""
    scores, lost = site.artifact.score(outputs.low).tolist(), Fidelity("top1").loss(outputs)
    change = np.linalg.norm(outputs.low.embedding - outputs.high.embedding, axis=1).tolist()
    records = site.records(len(outputs))
    seen = zip(records, scores, lost.tolist(), change, strict=True)
    return [replace(r, score=s, lost=is_lost, change=c) for r, s, is_lost, c in seen]


@pytest.fixture
def certified(site):
    """By images of which those are lost whose two best logits lie near each other."""
    site.write(seen_by(site, make_outputs(site.graphs, 800, 1)))
    site.step()
    assert 0.1 < site.artifact.threshold < 0.9
    return site


def test_images_like_those_of_the_traffic_leave_the_certificate_standing(certified):
    artifact = certified.artifact
    found = evaluate(artifact, make_outputs(certified.graphs, 600, 2))
    assert not found.contradicted and found.to_dict()["risk"] <= EPSILON
    escalated = artifact.metrics["escalation_rate"]
    assert found.to_dict()["escalation_rate"] == pytest.approx(escalated, abs=0.08)
    # Where more are lost than promised it is contradicted.
    assert evaluate(artifact, make_outputs(certified.graphs, 600, 3, unsure_below=3.0)).contradicted


def test_an_artifact_that_certifies_nothing_yet_cannot_be_held_against_images(site):
    with pytest.raises(EvaluateError) as refusal:
        evaluate(site.artifact, make_outputs(site.graphs, 100, 2))
    assert "\n" not in str(refusal.value)


def test_the_calibrations_page_shows_a_live_certificate_on_collected_images(certified, tmp_path):
    outputs = make_outputs(certified.graphs, 300, 4)
    fit = measured(certified.artifact_file, outputs)
    assert fit.calibration.threshold == certified.artifact.threshold
    assert fit.splits["test"].tolist() == list(range(300))
    kept = fit.scores <= certified.artifact.threshold
    assert fit.calibration.metrics["escalation_rate"] == pytest.approx(1 - kept.mean())
    assert fit.calibration.metrics["risk"] == pytest.approx((fit.loss & kept).mean())
    source = FakeSource(300)
    analysis = analysis_data(outputs, Fidelity("top1"), source, None)
    write_calibration(tmp_path / "report.html", fit_data(fit, outputs, source, None), analysis)
    page = (tmp_path / "report.html").read_text()
    assert f"{certified.artifact.certificate['n']:,}" in page and "live traffic" in page
