"""The keeper of a repository that live traffic certifies: what it decides and rolls out."""

from dataclasses import replace

import numpy as np
import pytest

from bundle import manifest
from bundle.versions import Versions, present
from calibration.anytime import images_needed
from calibration.live import keeping
from calibration.live_state import ALARM, LiveError
from export.repository import assemble
from routing import journal as journals
from routing.journal import Header, Journal, retreat_file
from tests.unit.live_site import EPSILON, NEEDED, Site, journals_in, rollouts, site

__all__ = ["rollouts", "site"]  # fixtures


def test_until_enough_is_known_every_image_escalates(site, rollouts):
    state = site.step()
    assert state.audited == 0 and site.artifact.threshold is None
    site.traffic(NEEDED - 1)
    state = site.step(2)
    assert (state.audited, state.images, state.certified) == (NEEDED - 1, NEEDED - 1, 0)
    assert site.live == 1 and rollouts.asked == [] and site.artifact.threshold is None
    assert "at least 1 more" in site.keeper().summary()


def test_the_first_certificate_is_rolled_out_and_says_what_it_is(site, rollouts):
    site.traffic(NEEDED + 20)
    state = site.step()
    assert rollouts.asked == [2] == [site.live]
    artifact = site.artifact
    assert 0.2 < artifact.threshold <= 0.8 and artifact.threshold == state.served.threshold
    certificate = artifact.certificate
    assert certificate["certified"] and certificate["method"] == "live"
    assert (certificate["epsilon"], certificate["confidence"]) == (EPSILON, 0.9)
    assert (certificate["n"], certificate["errors"]) == (NEEDED + 20, 0)
    assert (certificate["test"], certificate["share_of_delta"]) == (1, 0.5)
    assert len(certificate["window"]) == 2 and artifact.is_about_full_rung
    site.written = 0
    kept = [record.score <= artifact.threshold for record in site.records(NEEDED + 20)]
    assert artifact.metrics["escalation_rate"] == pytest.approx(1 - np.mean(kept))
    assert artifact.scoring_sha256 == state.scoring and artifact.chosen_by["audit_share"] <= 1
    assert site.kinds() == ["start", "rollout"]
    site.step(3)
    assert rollouts.asked == [2]


def test_bolder_thresholds_follow_and_their_forerunners_go(site, rollouts):
    thresholds, alarms = [], {}
    for _ in range(8):
        site.traffic(NEEDED)
        state = site.step()
        artifact = site.artifact
        thresholds.append(artifact.threshold)
        if artifact.threshold is not None:
            alarms[artifact.threshold] = artifact.certificate["alarm"]
            assert state.served.alarm == artifact.certificate["alarm"]
    known = [threshold for threshold in thresholds if threshold is not None]
    assert len(known) >= 7 and known == sorted(known) and len(set(known)) >= 2
    # Each is watched with a share of its own of what a false alarm may cost.
    assert list(alarms.values()) == [ALARM / (k * (k + 1)) for k in range(1, len(alarms) + 1)]
    # What a bolder one would keep is lost in a share of 10 % from 0.9 on.
    assert 0.8 <= known[-1] < 0.9
    assert len(present(site.repository)) <= 2 and site.live == max(present(site.repository))
    assert Versions.load(site.repository).served == (site.live,)


def test_a_threshold_that_keeps_nothing_low_is_no_reason_to_load_or_to_audit_less(site, rollouts):
    """It is certified easily, where every image that any other threshold keeps is lost."""
    site.traffic(3 * NEEDED, score=0.5, lost=True)
    state = site.step()
    assert state.certified > 0 and state.lost[state.certified - 1] == 0
    assert rollouts.asked == [] and site.artifact.chosen_by["audit_share"] == 1.0
    for _ in range(40):
        site.traffic(100, score=0.25, lost=False)
        state = site.step()
        if state.served.threshold is not None:
            break
    assert 0.25 < site.artifact.threshold < 0.5
    assert site.artifact.chosen_by["audit_share"] > 0.5


def test_less_is_audited_as_evidence_grows_down_to_the_floor(tmp_path, rollouts):
    site = Site(tmp_path, audit_floor=0.2)
    shares = []
    for _ in range(12):
        site.traffic(NEEDED)
        site.step()
        artifact = site.artifact
        if artifact.threshold is not None:
            shares.append(artifact.chosen_by["audit_share"])
    assert shares[0] == 1.0 or shares[0] > 0.5
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0.2
    assert min(shares) == 0.2 and len(set(shares)) > 2
    # Not a version for every little: each halves it, or is bolder.
    assert len(rollouts.asked) < 8


def test_records_of_all_instances_count_whatever_their_version(site):
    headers = [Header("", site.header.scoring, "c" * 64, version) for version in (1, 7)]
    writers = [Journal(site.evidence, header) for header in headers]
    for writer in writers:
        assert writer.append(site.records(NEEDED))
    writers[1].close()
    state = site.step()
    assert state.images == state.audited == 2 * NEEDED and state.other == 0
    assert len(journals_in(site.evidence)) == 1  # the other writer is at its end
    assert writers[0].append(site.records(1))
    assert site.step().images == 2 * NEEDED + 1


def test_records_of_another_score_are_counted_apart_and_are_no_evidence(site):
    other = Header("", "d" * 64, "c" * 64, 1)
    journal = Journal(site.evidence, other)
    assert journal.append(site.records(5 * NEEDED))
    site.traffic(3)
    state = site.step(2)
    assert (state.images, state.audited, state.other) == (3, 3, 5 * NEEDED)
    assert site.artifact.threshold is None


def test_damaged_lines_are_counted_and_cost_themselves_alone(site):
    site.traffic(3)
    (file,) = journals_in(site.evidence)
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    state = site.step(2)
    assert (state.images, state.damaged) == (2, 1)
    assert journals_in(site.evidence) == []


# --- going back ----------------------------------------------------------------------------------


def certified(site):
    site.traffic(3 * NEEDED)
    site.step()
    assert site.artifact.threshold is not None
    return site


def test_traffic_that_contradicts_the_certificate_takes_it_back_at_once(site, rollouts):
    certified(site)
    site.traffic(60, score=0.0, lost=True)  # kept by all thresholds
    state = site.step()
    assert site.artifact.threshold is None and state.served.threshold is None
    assert site.artifact.chosen_by["audit_share"] == 1.0
    assert not site.artifact.certificate["certified"]
    assert state.number == 2 and state.delta == pytest.approx(0.1 / 4)
    assert 0 < state.images < 60  # what came after the contradiction is the next test's
    assert state.images == len(state.scores) and state.certified == 0
    assert set(state.kept) == set(state.lost) == {state.images}
    assert site.kinds()[-2:] == ["retreat", "rollout"] and rollouts.asked == [2, 3]


def test_the_routers_are_told_before_a_rollout_that_takes_long_or_fails(site, rollouts):
    certified(site)
    told = retreat_file(site.evidence, manifest.sha256_file(site.artifact_file))
    assert not told.exists()
    rollouts.fails = True
    site.traffic(60, score=0.0, lost=True)
    site.step()
    assert told.exists() and site.artifact.threshold is not None
    rollouts.fails = False
    site.step()
    assert site.artifact.threshold is None and not told.exists()


def test_the_next_test_has_half_of_delta_and_nothing_of_what_was(site):
    certified(site)
    site.traffic(60, score=0.0, lost=True)
    left = site.step().images
    needs = images_needed(EPSILON, 0.1 / 4)
    site.traffic(needs - 1)
    assert site.step().certified == 0 and site.artifact.threshold is None
    for _ in range(60):
        site.traffic(50)
        if (state := site.step()).certified:
            break
    assert site.artifact.certificate["test"] == state.number == 2
    assert site.artifact.certificate["share_of_delta"] == 0.25
    assert state.images > needs + left


def test_what_other_instances_saw_before_is_no_evidence_after_a_retreat(site, monkeypatch):
    """Journals are read one after the other, so some hold what was long before."""
    certified(site)
    times = iter([1000.0, 2000.0])
    monkeypatch.setattr(journals.time, "time", lambda: next(times))
    first, second = site.journal(), site.journal()
    assert first.append(site.records(1)) and second.append(site.records(20 * NEEDED))
    assert first.append(site.records(60, score=0.0, lost=True))
    state = site.step()
    assert state.number == 2 and state.images < 60 and state.certified == 0
    assert state.audited == 3 * NEEDED + 1 + 20 * NEEDED + 60
    assert second.append(site.records(5)) and site.step().images == state.images + 5
    assert site.artifact.threshold is None


def test_what_a_router_found_by_itself_is_taken_over(site, rollouts):
    certified(site)
    site.mark()
    state = site.step()
    assert state.number == 2 and site.artifact.threshold is None
    assert site.kinds()[-2:] == ["retreat", "rollout"]
    assert list(site.evidence.glob("retreat-*")) == []
    assert site.step(2).number == 2 and rollouts.asked == [2, 3]


def test_a_word_about_another_artifact_is_not_heeded(site):
    certified(site)
    retreat_file(site.evidence, "e" * 64).touch()
    assert site.step().number == 1 and site.artifact.threshold is not None


def test_an_instance_that_went_back_before_the_first_look_begins_with_nothing(site):
    """The state is lost, and the certificate with it."""
    certified(site)
    site.state_file.unlink()
    state = site.step()
    assert state.images == 0 and site.artifact.threshold is None


# --- clocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [[0.0], [1e18], [-1e18], [1.7e9, 1e18, 0.0, 1.6e9]])
def test_clocks_that_jump_change_nothing_but_what_people_read(site, times):
    for at in times * 4:
        site.clock_s = lambda at=at: at
        site.traffic(NEEDED, at=at)
        state = site.step()
    assert state.images == state.audited == 4 * len(times) * NEEDED
    artifact = site.artifact
    assert artifact.certificate["certified"] and len(artifact.certificate["window"]) == 2
    assert site.step().images == state.images


# --- whose it is ---------------------------------------------------------------------------------


def test_two_keepers_at_once_are_one_too_many(site):
    with keeping(site.repository, object(), site.said.append):
        with pytest.raises(LiveError) as refusal:
            with keeping(site.repository, object(), site.said.append):
                raise AssertionError("both keep it")
        assert "\n" not in str(refusal.value) and str(site.evidence) in str(refusal.value)
    with keeping(site.repository, object(), site.said.append) as keeper:
        keeper.step()


@pytest.mark.parametrize("goal", [{"epsilon": 0.2}, {"confidence": 0.95}])
def test_evidence_for_another_promise_is_refused_in_one_line(site, goal):
    certified(site)
    before = site.state_file.read_bytes()
    site.assemble(**goal)
    with pytest.raises(LiveError) as refusal:
        site.keeper()
    assert "\n" not in str(refusal.value) and site.state_file.read_bytes() == before


def test_a_repository_that_is_assembled_anew_goes_on_where_it_was(site):
    threshold = certified(site).artifact.threshold
    site.assemble()
    assert site.artifact.threshold is None
    state = site.step()
    assert site.artifact.threshold == threshold and state.number == 1


def test_evidence_about_other_graphs_is_refused_in_one_line(site, tmp_path):
    certified(site)
    other = Site(tmp_path / "other", kind="cosine")
    other.evidence.mkdir()
    other.state_file.write_bytes(site.state_file.read_bytes())
    with pytest.raises(LiveError) as refusal:
        other.step()
    assert "\n" not in str(refusal.value) and other.artifact.threshold is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema_version": 9}', '{"a": 1}'])
def test_a_state_that_cannot_be_read_is_refused_in_one_line(site, content):
    site.step()
    site.state_file.write_text(content)
    with pytest.raises(LiveError) as refusal:
        site.keeper()
    assert "\n" not in str(refusal.value) and str(site.state_file) in str(refusal.value)


def test_a_repository_with_a_calibration_of_its_own_is_refused(site, tmp_path):
    chosen_by = {"fidelity": "top1", "threshold": 0.5}
    file = tmp_path / "calibrated.json"
    replace(site.artifact, chosen_by=chosen_by, threshold=0.5).save(file)
    assemble(site.graphs, file, site.repository)
    with pytest.raises(LiveError, match="--live"):
        site.keeper()
    assert not site.evidence.exists()
