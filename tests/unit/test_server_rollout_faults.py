"""Whatever fails in a rollout, and wherever: disk and server agree, or the error says how not."""

import errno
import re
import shutil
from pathlib import Path

import pytest

from bundle import manifest
from bundle.versions import Versions
from calibration.fit import EscalationRate
from export.repository import RepositorySettings, assemble
from export.versions import add_version
from routing.reference import COMPARING, OTHER, VERDICTS
from server.access import ANSWERS
from server.errors import ServerUsageError
from server.rollout import RolloutError, RolloutInterruptedError
from tests.unit.loading_triton import (
    AFTER,
    BEFORE,
    BY_WAY_OF_BOTH,
    ENSEMBLES,
    NOT_LOADED,
    OUTAGE,
    TENSORS,
    LoadingTriton,
    assembled_twice,
    failure,
    lost,
    refusal,
    roll,
    without_pauses,
)
from tests.unit.reference_files import collected, fitted
from tests.unit.test_export_repository import contents


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    return assembled_twice(tmp_path_factory.mktemp("assembled"))


@pytest.fixture
def repository(assembled, tmp_path):
    return shutil.copytree(assembled / "careful", tmp_path / "repository")


@pytest.fixture(scope="module")
def assembled_to_refuse(tmp_path_factory):
    """A repository whose router refuses other answers than calibrated, and a candidate."""
    folder = tmp_path_factory.mktemp("refusing")
    graph_set, outputs = collected(folder)
    for rate in (0.3, 0.6):
        fitted(graph_set, outputs, EscalationRate(rate)).save(folder / f"{rate}.json")
    settings = RepositorySettings(reference_check="refuse")
    out = assemble(graph_set, folder / "0.3.json", folder / "repository", settings)
    add_version(out, folder / "0.6.json", shadow_fraction=0.1)
    return out


@pytest.fixture
def refusing(assembled_to_refuse, tmp_path):
    return shutil.copytree(assembled_to_refuse, tmp_path / "refusing")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    without_pauses(monkeypatch)


# --- failures at every step ----------------------------------------------------------------------

# Of a switch: two questions, three models, four questions, the router, four questions.
CALLS, LOADS, LAST_LOAD = 14, (2, 3, 4, 9), 9
RENAMES = 10  # on disk: the manifest, three configs and the manifest, and so again
AGREE = "to make them agree, run python -m server rollout --repository"


def test_a_switch_is_so_many_steps(repository, monkeypatch):
    triton = LoadingTriton(repository)
    renames = []
    rename = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda path, target: renames.append(path) or rename(path, target)
    )
    roll(repository, triton, 2)
    assert (triton.number + 1, len(renames)) == (CALLS, RENAMES)


def check_outcome(repository, triton, message):
    """Disk and server agree, or the error says what each says; returns what the disk says."""
    manifest.verify(repository)
    on_disk = Versions.load(repository)
    assert on_disk in (BEFORE, AFTER)
    if triton.served != on_disk:
        assert f"the repository says {on_disk.sentence}" in message and AGREE in message
    return on_disk


# What is raised, whether for good, how it ends, and where it does not end well what is said.
FAULTS = {
    "an answer is lost": (lost, False, RolloutError, ": Deadline Exceeded; router/1 goes on answ"),
    "the server is gone": (
        lambda: refusal("failed to connect to all addresses", OUTAGE),
        True,
        RolloutError,
        "at 127.0.0.1:8001 does not say what it serves (failed to connect to all addresses); to "
        "make them agree, run",
    ),
    "ctrl-c": (KeyboardInterrupt, False, RolloutInterruptedError, "interrupted; router/"),
    "ctrl-c twice": (
        KeyboardInterrupt,
        True,
        RolloutInterruptedError,
        "and the server at 127.0.0.1:8001 was not asked what it serves; to make them agree, run",
    ),
}


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(2, CALLS))
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_step_leaves_both_agreeing_or_says_how_they_differ(
    repository, name, step, is_done
):
    fault, is_for_good, kind, said = FAULTS[name]
    triton = LoadingTriton(repository)

    def strike(this, model, done):
        if (this, done) == (step, is_done) or (is_for_good and this > step):
            raise fault()

    triton.fault = strike
    is_taken = step > LAST_LOAD or (step, is_done) == (LAST_LOAD, True)
    # A question is asked again, and the last step may have been taken.
    if name == "an answer is lost" and (step not in LOADS or is_taken):
        assert roll(repository, triton, 2) == AFTER == triton.served
        assert check_outcome(repository, triton, "") == AFTER
        return
    message = failure(repository, triton, 2, kind=kind, timeout_s=0.05 if is_for_good else 120)
    assert said in message
    on_disk = check_outcome(repository, triton, message)
    # A server that is gone starts again with what the disk says.
    assert on_disk == (AFTER if name == "ctrl-c" and is_taken else BEFORE)
    if not is_for_good:
        assert triton.served == on_disk
    if name == "ctrl-c":
        taken = "router/2 answers, as the repository says"
        assert message == f"interrupted; {taken if is_taken else 'router/1 goes on answering'}"


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("number", range(RENAMES))
def test_a_change_of_the_disk_that_ends_early_is_taken_back(repository, monkeypatch, number, kind):
    triton = LoadingTriton(repository)
    rename, renames = Path.replace, []

    def fail_once(path, target):
        renames.append(path)
        if len(renames) == number + 1:
            raise kind(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    halfway = RolloutError if number >= RENAMES // 2 else ServerUsageError
    expected = RolloutInterruptedError if kind is KeyboardInterrupt else halfway
    message = failure(repository, triton, 2, kind=expected)
    assert check_outcome(repository, triton, message) == BEFORE == triton.served


def no_space(path, *arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_full_disk_is_said_before_anything_is_loaded(repository, monkeypatch):
    triton = LoadingTriton(repository)
    before = contents(repository)
    monkeypatch.setattr(Path, "write_text", no_space)
    message = failure(repository, triton, 2, kind=ServerUsageError)
    assert "cannot be changed: " in message and "No space left on device" in message
    assert triton.calls == [] and contents(repository) == before


@pytest.mark.parametrize("model", ["router", *ENSEMBLES])
def test_what_cannot_be_taken_back_is_said(repository, monkeypatch, model):
    triton = LoadingTriton(repository)

    def refuse(number, name, is_done):
        if name == model:
            monkeypatch.setattr(Path, "write_text", no_space)
            raise refusal(NOT_LOADED)

    triton.fault = refuse
    message = failure(repository, triton, 2, timeout_s=0.05)
    assert "no such luck" in message and "cannot be changed back: " in message
    assert "the repository says router/2 answers; router/1 can be pinned too; but" in message
    says = "router/2 answers, and router/1 tensors" if model == TENSORS else "router/1 answers"
    assert f"the server at 127.0.0.1:8001 says {says}; router/" in message
    assert message.endswith("--url 127.0.0.1:8001 --to 1")


# --- where the router refuses other answers than calibrated ------------------------------------

STILL = refusal(COMPARING, OUTAGE)
FOREIGN = refusal(f"{VERDICTS[OTHER]}: of 32 reference images 20 have another answer", OUTAGE)


def test_the_ensemble_names_a_version_that_every_instance_has_found_to_answer_alike(refusing):
    triton = LoadingTriton(refusing)
    # Two instances take turns, and one knows before the other.
    triton.verdicts[2] = [STILL, STILL, None, STILL, None, STILL, None]
    assert roll(refusing, triton, 2) == triton.served == AFTER
    first = triton.asked[: 6 + ANSWERS]
    assert first == [(2, 1, 1)] * len(first) and triton.asked[len(first)] == (2, 2, 1)
    # What Triton has loaded since may be another process, which compares anew.
    assert len(triton.asked) == len(first) + 3 * ANSWERS
    assert triton.calls == BY_WAY_OF_BOTH


REFUSES = (
    "router/2 refuses every request: this server computes other answers than the calibration did; "
    "calibrate here: of 32 reference images 20 have .* --reference-check warn .*"
)


@pytest.mark.parametrize(
    ("verdicts", "timeout_s", "said", "named"),
    [
        ([STILL, FOREIGN], 120, REFUSES, {1}),
        # Once it is loaded anew.
        *([[*[None] * (step * ANSWERS), FOREIGN], 120, REFUSES, {1, 2}] for step in (1, 2, 3)),
        (
            [STILL],
            0.05,
            "router/2 is still comparing its answers with the calibration's after 0.05 s; give it "
            "longer with --timeout-s",
            {1},
        ),
    ],
)
def test_a_version_that_refuses_is_taken_back(refusing, verdicts, timeout_s, said, named):
    triton = LoadingTriton(refusing)
    triton.verdicts[2] = verdicts
    message = failure(refusing, triton, 2, timeout_s=timeout_s)
    assert re.fullmatch(f"{said}; router/1 goes on answering", message)
    assert triton.served == Versions.load(refusing) == BEFORE
    assert {state[0] for state in triton.states} == named


@pytest.mark.parametrize("verdict", [FOREIGN, STILL])
def test_a_version_that_refuses_does_not_go_on_answering(refusing, verdict):
    triton = LoadingTriton(refusing)
    triton.verdicts[1] = [verdict]
    message = failure(refusing, triton, timeout_s=0.05)
    assert "goes on" not in message
    assert message.endswith(f"the repository and the server say {BEFORE.sentence}")
    triton.verdicts[2] = [verdict]
    assert "; the way back failed: router/1 " in failure(refusing, triton, 2, timeout_s=0.05)
    assert triton.served == Versions.load(refusing) == BEFORE


@pytest.mark.parametrize(
    "error",
    [
        refusal("vit_high failed: no answer within 10000 ms", OUTAGE),
        refusal("Exceeds maximum queue size", OUTAGE),
        lost(),
        refusal("model output is not finite", "StatusCode.INTERNAL"),
    ],
)
def test_what_a_request_fails_with_otherwise_does_not_keep_from_rolling_back(refusing, error):
    triton = LoadingTriton(refusing)
    triton.verdicts = {1: [error], 2: [error]}
    for version in (2, 1):
        assert roll(refusing, triton, version) == triton.served == Versions(version, (version,))


@pytest.mark.parametrize("number", range(4 * ANSWERS))
def test_ctrl_c_while_it_is_waited_for_leaves_both_agreeing(refusing, number):
    triton = LoadingTriton(refusing)
    triton.verdicts[2] = [*[None] * number, KeyboardInterrupt(), None]
    message = failure(refusing, triton, 2, kind=RolloutInterruptedError)
    assert check_outcome(refusing, triton, message) == triton.served
    assert (triton.served.live == 2) == (number >= 3 * ANSWERS)


@pytest.mark.parametrize("verdict", [None, FOREIGN])
def test_after_an_answer_that_is_lost_what_was_loaded_has_to_compare_too(refusing, verdict):
    triton = LoadingTriton(refusing)

    def lose_the_last(number, name, is_done):
        if is_done and name == "router" and triton.calls.count("router") == 2:
            triton.verdicts[2] = [verdict]
            triton.fault = lambda *call: None
            raise lost()

    triton.fault = lose_the_last
    if verdict is None:
        assert roll(refusing, triton, 2) == triton.served == AFTER
    else:
        assert "did not answer while it was to load router" in failure(refusing, triton, 2)
        assert triton.served == Versions.load(refusing) == BEFORE
