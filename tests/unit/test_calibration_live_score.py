"""Scores that traffic teaches, or another artifact brings: a test of their own, from then on."""

import errno
from dataclasses import replace

import numpy as np
import pytest

import calibration.live
from calibration.anytime import images_needed
from calibration.live_state import FIXED, STRETCH, LiveError, State
from routing import ScoreMap
from routing.journal import Journal
from server.errors import ServerError
from tests.unit.live_site import EPSILON, NEEDED, Interruption, Killed, Site, rollouts, site

__all__ = ["rollouts", "site"]  # fixtures


@pytest.fixture
def headless(tmp_path):
    """Its score, the path, has a range and a sign that nobody knows beforehand."""
    return Site(tmp_path, classes=None)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


# --- fixed beforehand ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["margin", "label_margin"])
def test_fixed_thresholds_ascend_over_all_that_a_score_can_be(name):
    thresholds = FIXED[name]
    assert (np.diff(thresholds) > 0).all() and 50 < len(thresholds) < 200
    lowest, highest = {"margin": (0, 1), "label_margin": (-50, 0)}[name]
    assert lowest < thresholds[0] < thresholds[-1] <= highest
    # In FP32, as scores are, they are still as many.
    assert len(np.unique(thresholds.astype(np.float32))) == len(thresholds)


# --- a first stretch -----------------------------------------------------------------------------

FLIPPED = {"raw": lambda score: 50 - 10 * score}  # a large value means that nothing is lost


def taught(site, count=STRETCH):
    """A router writes of raw values, from 40 for the worst to 50 for the best."""
    records = site.records(count)
    site.write([replace(r, score=FLIPPED["raw"](r.score), change=1 + r.score) for r in records])


def test_the_first_images_teach_sign_and_thresholds_and_are_no_evidence(headless, rollouts):
    before = headless.artifact
    taught(headless, STRETCH - 1)
    state = headless.step()
    assert (state.images, state.thresholds, rollouts.asked) == (0, None, [])
    taught(headless, 1)
    state = headless.step()
    artifact = headless.artifact
    assert rollouts.asked == [2] and artifact.threshold is None
    assert artifact.score_map.sign == -1
    assert artifact.scoring_sha256 == state.scoring != before.scoring_sha256
    assert (state.images, state.certified, state.number) == (0, 0, 1)
    assert state.audited == STRETCH and state.stretch == state.scores == state.window == []
    # Thresholds keep a hundredth more each, of images like those.
    raw = np.array([FLIPPED["raw"](r.score) for r in headless.records(100)])
    kept = (artifact.score_map(raw) <= np.array(state.thresholds)[:, np.newaxis]).mean(axis=1)
    assert (np.diff(state.thresholds) > 0).all() and len(kept) > 50
    np.testing.assert_allclose(kept, np.linspace(1 / len(kept), 1, len(kept)), atol=0.05)


def test_what_follows_is_evidence_and_what_was_written_before_is_not(headless, rollouts):
    taught(headless)
    late = Journal(headless.evidence, headless.header)  # of a router that is not loaded anew yet
    assert late.append(headless.records(1))
    headless.step()
    assert late.append(headless.records(3 * NEEDED))
    state = headless.step()
    assert (state.images, state.other) == (0, 3 * NEEDED)
    score_map = headless.artifact.score_map
    records = headless.records(3 * NEEDED)
    scores = score_map(np.array([FLIPPED["raw"](record.score) for record in records])).tolist()
    headless.write([replace(r, score=s) for r, s in zip(records, scores, strict=True)])
    state = headless.step()
    assert state.images == 3 * NEEDED and headless.artifact.certificate["certified"]
    assert headless.artifact.certificate["n"] == 3 * NEEDED
    kept = [r.score for r, s in zip(records, scores, strict=True) if s <= state.served.threshold]
    assert 0.1 < max(kept) <= 0.85
    late.close()


def test_a_score_that_is_no_number_teaches_nothing_and_escalates(headless):
    taught(headless, 150)
    headless.traffic(100, score=None, lost=True)
    state = headless.step()
    assert (len(state.stretch), state.audited, state.thresholds) == (150, 250, None)
    taught(headless, 50)
    state = headless.step()
    assert state.thresholds is not None
    headless.traffic(3 * NEEDED, score=None, lost=True)
    assert headless.step().certified > 0  # nothing that escalates is lost


def test_a_first_stretch_without_any_difference_does_no_harm(headless):
    headless.traffic(STRETCH, score=3.0, change=0.0, lost=False)
    state = headless.step()
    assert len(state.thresholds) == 1 and headless.artifact.threshold is None


@pytest.mark.parametrize("call", ["add_version", "rollout", "save"])
@pytest.mark.parametrize("after", [False, True])
def test_a_keeper_that_dies_while_it_is_taught_begins_to_test_all_the_same(
    headless, monkeypatch, call, after
):
    taught(headless)
    with monkeypatch.context() as patched:
        owner = State if call == "save" else calibration.live
        ending = Interruption(getattr(owner, call), 2 if call == "save" else 1, after)
        patched.setattr(owner, call, lambda *given: ending(*given))
        with pytest.raises(Killed):
            headless.step()
    state = headless.step()
    assert headless.artifact.scoring_sha256 == state.scoring and state.thresholds is not None
    headless.traffic(NEEDED, score=-1e9, lost=False)
    assert headless.step().images == NEEDED and headless.artifact.threshold is not None


def test_a_disk_that_is_full_while_it_is_taught_costs_time_alone(headless, monkeypatch):
    taught(headless)
    with monkeypatch.context() as patched:
        patched.setattr(calibration.live, "add_version", full)
        keeper = headless.keeper()
        keeper.step()
        assert "No space left" in keeper.trouble
    keeper.step()
    state = headless.step()
    assert headless.artifact.scoring_sha256 == state.scoring and state.thresholds is not None
    assert state.images == 0 and headless.live == 2


# --- of another artifact -------------------------------------------------------------------------


def other_score(site, scores=None):
    """As `calibration fit` makes it of the same graphs: another signal in other units."""
    scores = np.linspace(0.1, 5, 500) if scores is None else scores
    return replace(
        site.artifact,
        signal="entropy",
        score_map=ScoreMap(1, (0.0, 1.0), (0.1, 2.0)),
        threshold=2.5,
        chosen_by={"fidelity": "top1", "tolerance": None, "escalation_rate": 0.1},
        reference_scores=np.array(scores, np.float32),
        certificate=None,
    )


def certified(site):
    site.traffic(3 * NEEDED)
    site.step()
    assert site.artifact.threshold is not None
    return site


def test_another_score_is_tested_from_now_on_with_a_share_of_its_own(site):
    other = other_score(certified(site))
    keeper = site.keeper()
    keeper.take_score(other)
    artifact = site.artifact
    assert (artifact.signal, artifact.score_map) == ("entropy", other.score_map)
    assert artifact.threshold is None and artifact.is_live
    assert (artifact.chosen_by["signal"], artifact.chosen_by["max_risk"]) == ("entropy", 0.1)
    state = keeper.state
    assert (state.number, state.images, state.certified) == (2, 0, 0)
    assert state.delta == pytest.approx(0.1 / 4)
    assert state.thresholds[-1] == pytest.approx(5) and state.thresholds[0] < 0.3
    before = site.live
    site.keeper().take_score(other)  # which is tested already
    assert site.live == before and State.load(site.state_file, site.artifact).number == 2
    site.traffic(images_needed(EPSILON, 0.1 / 4) + 5, score=0.5, lost=False)
    state = site.step()
    assert site.artifact.certificate["test"] == 2 and site.artifact.signal == "entropy"


def test_a_score_of_other_graphs_or_without_any_scores_is_refused(site, tmp_path):
    other = Site(tmp_path / "other", classes=None)
    keeper, before = site.keeper(), site.artifact
    for refused in (other.artifact, other_score(site, [])):
        with pytest.raises(LiveError) as refusal:
            keeper.take_score(refused)
        assert "--score" in str(refusal.value) and "\n" not in str(refusal.value)
    assert site.artifact == before and keeper.state.number == 1


def test_a_score_whose_rollout_fails_at_first_is_tested_once_it_succeeds(site, rollouts):
    other = other_score(certified(site))
    rollouts.fails = True
    keeper = site.keeper()
    keeper.take_score(other)
    for _ in range(2):
        keeper.step()
        assert site.artifact.signal == "margin" and "away" in keeper.trouble
    rollouts.fails = False
    for _ in range(2):
        state = site.step()
        assert (site.artifact.signal, site.artifact.threshold) == ("entropy", None)
    assert state.number == 2 and site.artifact.scoring_sha256 == state.scoring


def test_a_score_that_cannot_be_added_leaves_all_as_it_was(site, monkeypatch):
    other = other_score(certified(site))
    before = State.load(site.state_file, site.artifact)
    with monkeypatch.context() as patched:
        patched.setattr(calibration.live, "add_version", full)
        keeper = site.keeper()
        keeper.take_score(other)
        assert "No space left" in keeper.trouble
    keeper.step()
    state = site.step()
    assert site.artifact.signal == "margin" and site.artifact.threshold == before.served.threshold
    assert (state.number, state.images) == (before.number, before.images)


def test_troubles_of_a_server_are_no_troubles_of_a_score(site, monkeypatch):
    def refuse(*_):
        raise ServerError("it does not load")

    keeper = site.keeper()
    with monkeypatch.context() as patched:
        patched.setattr(calibration.live, "rollout", refuse)
        keeper.take_score(other_score(site))
    keeper.step()
    assert site.artifact.signal == "entropy" and keeper.trouble == ""
