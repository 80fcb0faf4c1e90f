"""The keeper is killed, the server is away, the disk is full: nothing counts twice or is lost."""

import errno
import os
from pathlib import Path

import pytest

import calibration.live
from bundle.versions import Versions, present
from calibration.live_state import State
from routing.journal import SUFFIX, Journal
from tests.unit.live_site import (
    NEEDED,
    Interruption,
    Killed,
    Site,
    in_place_of_servers,
    journals_in,
    rollouts,
    site,
)

__all__ = ["rollouts", "site"]  # fixtures


def found(site):
    """All that matters of what a keeper knows and of what answers."""
    state = State.load(site.state_file, site.artifact)
    names = ("number", "images", "audited", "kept", "lost", "certified", "other", "damaged")
    return {
        **{name: getattr(state, name) for name in names},
        "threshold": state.served.threshold,
        "ordinal": state.served.ordinal,
        "answers": site.artifact.threshold,
        "journals": len(journals_in(site.evidence)),
    }


# --- killed --------------------------------------------------------------------------------------


class Life:
    """Certified, bolder, contradicted, and a little more; one writer lives on all the time."""

    def __init__(self, folder):
        self.site, self.deaths = Site(folder), 0
        self.writer = self.site.journal()

    def run(self):
        site = self.site
        for records, own in (
            (site.records(NEEDED + 10), 20),
            (site.records(4 * NEEDED), 20),
            (site.records(40, score=0.0, lost=True), 40),  # in no order where there are two
            (site.records(20), 10),
        ):
            assert self.writer.append(records[:own])
            if records[own:]:
                site.write(records[own:])
            self.step()
        self.step()
        return found(site)

    def step(self):
        """Again where it was killed, as whoever watches over it does."""
        while True:
            try:
                self.site.step()
                return
            except Killed:
                self.deaths += 1


UNDISTURBED = {"add_version": 3, "rollout": 3, "save": 14, "unlink": 3}  # calls, at least


@pytest.fixture
def interrupted(monkeypatch):
    """Lets the process end at a call, and gives what counts the calls."""

    def at(name, number=None, after=False):
        owner = {"save": State, "unlink": Path}.get(name, calibration.live)
        former = getattr(owner, name)
        made = Interruption(former, number, after)

        def instead(*arguments, **options):
            is_meant = name != "unlink" or arguments[0].suffix == SUFFIX
            return (made if is_meant else former)(*arguments, **options)

        monkeypatch.setattr(owner, name, instead)
        return made

    return at


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        in_place_of_servers(patch)
        return Life(tmp_path_factory.mktemp("undisturbed")).run()


def test_an_undisturbed_life_has_all_that_can_be_interrupted(tmp_path, interrupted):
    counted = {name: interrupted(name) for name in UNDISTURBED}
    life = Life(tmp_path)
    result = life.run()
    assert all(counted[name].calls >= calls for name, calls in UNDISTURBED.items())
    assert (result["number"], result["audited"]) == (2, 5 * NEEDED + 10 + 60)
    assert result["threshold"] is result["answers"] is None and result["journals"] == 1
    happened = life.site.kinds()
    assert happened == ["start", "rollout", "rollout", "retreat", "rollout"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("name", "number"),
    [(name, number) for name, calls in UNDISTURBED.items() for number in range(1, calls + 1)],
)
def test_whenever_it_is_killed_all_ends_as_if_it_had_not_been(
    tmp_path, undisturbed, interrupted, name, number, after
):
    life = Life(tmp_path)
    interrupted(name, number, after)
    assert life.run() == undisturbed
    assert life.deaths == 1
    assert len(present(life.site.repository)) <= 3  # the next rollout clears away


def test_a_rollout_that_is_killed_half_way_is_done_by_the_next_keeper(site, rollouts, monkeypatch):
    site.traffic(NEEDED + 10)
    with monkeypatch.context() as patched:
        patched.setattr(calibration.live, "rollout", rollouts.die_half_way)
        with pytest.raises(Killed):
            site.step()
    assert Versions.load(site.repository).served == (1, 2)
    state = site.step()
    assert Versions.load(site.repository) == Versions(2, (2,))
    assert site.artifact.threshold == state.served.threshold is not None
    assert (state.images, state.pending) == (NEEDED + 10, 0)


@pytest.mark.parametrize("culprit", ["fsync", "replace", "write"])
def test_a_state_is_written_whole_or_stays_as_it_was(site, monkeypatch, culprit):
    site.traffic(5)
    site.step()
    before = site.state_file.read_bytes()
    site.traffic(7)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if culprit == "fsync":
            patched.setattr(os, "fsync", full)
        elif culprit == "replace":
            patched.setattr(Path, "replace", full)
        else:
            patched.setattr(Path, "open", _half_open(Path.open))
        with pytest.raises(OSError, match="No space left"):
            site.step()
        assert site.state_file.read_bytes() == before
        assert len(journals_in(site.evidence)) == 1  # not removed before it is kept
    state = site.step()
    assert (state.images, state.audited) == (12, 12)


def _half_open(real):
    """Files that are opened for writing take half of a text."""

    def opened(path, mode="r", *arguments, **options):
        file = real(path, mode, *arguments, **options)
        if mode == "w" and path.name == "state.new":
            whole = file.write

            def write(text):
                whole(text[: len(text) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")

            file.write = write
        return file

    return opened


# --- the server is away --------------------------------------------------------------------------


def test_a_rollout_that_fails_is_tried_again_and_evidence_goes_on_being_counted(site, rollouts):
    rollouts.fails = True
    site.traffic(NEEDED + 10)
    keeper = site.keeper()
    for number in range(3):
        keeper.step()
        assert "away" in keeper.trouble and site.artifact.threshold is None
        assert keeper.state.images == NEEDED + 10 + 5 * number
        site.traffic(5)
    assert set(rollouts.asked) == {2} and present(site.repository) == [1, 2]
    assert site.kinds() == ["start", "failed"]  # told once
    rollouts.fails = False
    keeper.step()
    assert keeper.trouble == "" and site.live >= 2
    assert site.artifact.threshold == keeper.state.served.threshold is not None
    assert keeper.state.images == NEEDED + 10 + 15


def contradict_while_a_rollout_waits(site, rollouts):
    """A careful threshold answers and is contradicted, as a bolder one is not rolled out."""
    site.traffic(NEEDED + 10)
    site.step()
    rollouts.fails = True
    site.traffic(5 * NEEDED)
    site.step()
    site.traffic(40, score=0.0, lost=True)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_rollout_that_waits_is_given_up_once_traffic_contradicts(site, rollouts, restarted):
    """A bolder threshold must not follow on the contradiction of the careful one."""
    site.traffic(NEEDED + 10)
    site.step()
    careful = site.artifact.threshold
    rollouts.fails = True
    site.traffic(5 * NEEDED)
    keeper = site.keeper()
    keeper.step()
    assert keeper.state.pending and site.artifact.threshold == careful
    site.traffic(40, score=0.0, lost=True)
    keeper.step()
    assert keeper.state.number == 2
    rollouts.fails = False
    if restarted:
        keeper = site.keeper()
    for _ in range(2):
        keeper.step()
        assert site.artifact.threshold is keeper.state.served.threshold is None
    assert keeper.state.number == 2 and keeper.state.certified == 0


@pytest.mark.parametrize("name", ["add_version", "save"])
def test_a_keeper_that_dies_between_a_contradiction_and_its_rollout_goes_back_later(
    site, rollouts, monkeypatch, name
):
    contradict_while_a_rollout_waits(site, rollouts)
    with monkeypatch.context() as patched:
        owner = State if name == "save" else calibration.live
        ending = Interruption(getattr(owner, name), 1, after=name == "save")
        patched.setattr(owner, name, lambda *given: ending(*given))
        with pytest.raises(Killed):
            site.step()
    rollouts.fails = False
    site.step(2)
    assert site.artifact.threshold is None


def test_what_cannot_be_added_is_no_retreat_undone(site, rollouts, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    contradict_while_a_rollout_waits(site, rollouts)
    with monkeypatch.context() as patched:
        patched.setattr(calibration.live, "add_version", full)
        for _ in range(3):
            state = site.step()
        assert state.served.threshold is None and state.number == 2
    rollouts.fails = False
    site.step()
    assert site.artifact.threshold is None


# --- writers -------------------------------------------------------------------------------------


def test_a_journal_that_is_cut_in_the_middle_of_a_record_counts_up_to_there(site):
    site.traffic(10)
    (file,) = journals_in(site.evidence)
    file.write_bytes(file.read_bytes()[:-20])
    state = site.step()
    assert (state.images, state.damaged, journals_in(site.evidence)) == (9, 1, [])


def test_a_writer_whose_folder_is_removed_by_hand_is_heard_again(site):
    writer = Journal(site.evidence, site.header)
    assert writer.append(site.records(5))
    for file in site.evidence.iterdir():
        file.unlink()
    site.evidence.rmdir()
    assert writer.append(site.records(6))
    assert site.step().images == 6
    writer.close()
