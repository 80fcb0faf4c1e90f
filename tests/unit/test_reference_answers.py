"""Reference answers: kept by `fit`, carried by the repository, compared where it is served."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from bundle import config, manifest
from calibration.certify import Goal
from calibration.fit import EscalationRate, Threshold
from calibration.images import open_images
from calibration.outputs import Made
from calibration.running import open_session, run_session
from export.errors import UsageError
from export.repository import RepositoryError, RepositorySettings, assemble
from export.versions import add_version
from imaging import Preprocessing, decode
from routing import (
    AnswersError,
    Calibration,
    CascadeRequest,
    ReferenceAnswers,
    RungOutputs,
    answers_path,
    run_cascade,
)
from routing.reference import (
    BATCH,
    NONE_STORED,
    OTHER,
    SAME,
    WITHIN_SLACK,
    ServedAnswers,
    ask,
    compare,
)
from tests.unit.calibration_outputs import with_losing_high, with_reference
from tests.unit.reference_files import collected, fitted


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rungs, outputs and a fit of them."""
    graph_set, outputs = collected(tmp_path_factory.mktemp("made"))
    return graph_set, outputs, fitted(graph_set, outputs)


def served_by(graph_set, calibration):
    """The cascade of a server, here of ONNX Runtime's sessions; counts what it is asked."""
    sessions = {name: open_session(graph_set.files[name]) for name in graph_set.rungs}

    def cascade(image, overrides):
        cascade.batches.append(len(image))
        (answer,) = run_cascade(
            [CascadeRequest(image, overrides)],
            calibration,
            low=lambda rows: run_session(sessions["vit_low"], rows, layers=True),
            high=lambda rows: run_session(sessions["vit_high"], rows, layers=False),
        )
        return answer

    cascade.batches = []
    return cascade


def compared(fit, **changes):
    """A comparison of the recorded answers with themselves, some of them changed."""
    recorded, calibration = fit.answers, fit.calibration
    escalated = ~(recorded.scores <= calibration.threshold)
    which = escalated[:, None]
    answer = RungOutputs(
        np.where(which, recorded.high.embedding, recorded.low.embedding),
        None,
        np.where(which, recorded.high.logits, recorded.low.logits),
    )
    served = ServedAnswers(answer, escalated, recorded.scores, recorded.high)
    return compare(calibration, recorded, replace(served, **changes)), served


# --- made by fit ---------------------------------------------------------------------------------


def test_a_fit_keeps_images_that_nothing_was_fitted_on_spread_over_the_scores(made):
    graph_set, outputs, fit = made
    answers = fit.answers
    assert len(answers) == 32 == fit.calibration.reference_answers["images"]
    rows = [int(np.flatnonzero(fit.scores == score)[0]) for score in answers.scores]
    assert not set(rows) & set(fit.splits["fit"].tolist())
    assert len({outputs.groups[row] for row in rows}) == 32
    ranks = np.searchsorted(np.sort(fit.scores[fit.independent]), answers.scores)
    assert np.diff(ranks).max() <= 3 and ranks[0] == 0 and ranks[-1] == len(fit.independent) - 1
    assert 0 < (answers.scores > fit.calibration.threshold).sum() < 32
    np.testing.assert_array_equal(answers.low.logits, outputs.low.logits[rows])
    np.testing.assert_array_equal(answers.high.embedding, outputs.high.embedding[rows])


def test_the_stored_tensors_are_the_preprocessed_ones_bit_for_bit(made):
    graph_set, outputs, fit = made
    source = open_images(outputs.source)
    preprocessing = Preprocessing.from_dict(graph_set.preprocessing)
    by_score = dict(zip(fit.scores.tolist(), outputs.names, strict=True))
    for row in (0, 15, 31):
        index = source.names.index(by_score[float(fit.answers.scores[row])])
        expected = preprocessing(decode(source[index].data))
        found = fit.answers.image(slice(row, row + 1))[0]
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert fit.answers.pixels.dtype == np.uint8


def test_tensors_of_any_values_come_back_bit_for_bit():
    image = np.random.default_rng(0).normal(size=(3, 3, 20, 20)).astype(np.float32)
    image[0, 0, 0, :2] = 0.0, -0.0
    empty = RungOutputs(np.zeros((3, 2), np.float32), None, None)
    answers = ReferenceAnswers.of(image, empty, empty, None, np.zeros(3, np.float32))
    assert answers.pixels.dtype == np.uint16  # more than 256 values a channel
    found = answers.image(slice(0, 3))
    np.testing.assert_array_equal(found.view(np.uint32), image.view(np.uint32))


def test_saved_answers_are_those_that_the_artifact_names(made, tmp_path):
    _, _, fit = made
    artifact = tmp_path / "calibration.json"
    fit.save(artifact)
    file = answers_path(artifact)
    assert file.name == "calibration.answers.npz" and file.read_bytes() == fit.answers.to_bytes()
    calibration = Calibration.load(artifact)
    named = calibration.reference_answers["sha256"]
    assert named == hashlib.sha256(file.read_bytes()).hexdigest()
    loaded = ReferenceAnswers.load(file, calibration)
    assert loaded.to_bytes() == fit.answers.to_bytes() and loaded.truth is None
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AnswersError, match=r"calibration\.answers\.npz is not the file"):
        ReferenceAnswers.load(file, calibration)
    file.unlink()
    with pytest.raises(AnswersError, match="copy it along"):
        ReferenceAnswers.load(file, calibration)
    fit.save(artifact)
    bare = replace(fit.calibration, reference_answers=None)
    replace(fit, calibration=bare, answers=None).save(artifact)
    assert not file.exists(), "answers of an earlier fit were left beside a later artifact"


@pytest.mark.parametrize("why", ["asked for none", "gone", "changed"])
def test_without_pictures_a_fit_has_no_reference_answers_and_says_why(made, tmp_path, why):
    graph_set, outputs, _ = made
    said = []
    images = 0 if why == "asked for none" else 32
    if why == "gone":
        outputs = replace(outputs, source=str(tmp_path / "nowhere"))
    if why == "changed":
        outputs = replace(outputs, hashes=tuple(f"{i:064x}" for i in range(len(outputs))))
    found = fitted(graph_set, outputs, images=images, say=said.append)
    assert found.answers is None and found.calibration.reference_answers is None
    words = {
        "asked for none": [],
        "gone": [f"no reference answers: no such folder: {tmp_path / 'nowhere'}"],
        "changed": ["32 of 32 reference images are gone or have changed"],
    }
    assert said == words[why]
    with pytest.raises(AnswersError, match=NONE_STORED):
        ReferenceAnswers.load(tmp_path / "none", found.calibration)


def test_pictures_that_are_gone_since_are_left_out(made, tmp_path):
    graph_set, outputs, fit = made
    gone = [outputs.names[int(np.flatnonzero(fit.scores == s)[0])] for s in fit.answers.scores[:3]]
    folder = tmp_path / "images"
    folder.mkdir()
    source = open_images(outputs.source)
    for index, name in enumerate(source.names):
        if name not in gone:
            (folder / name).write_bytes(source[index].data)
    said = []
    found = fitted(graph_set, replace(outputs, source=str(folder)), say=said.append)
    assert len(found.answers) == 29
    assert said == ["3 of 32 reference images are gone or have changed"]


# --- asked and compared --------------------------------------------------------------------------


def test_the_same_rungs_answer_the_same(made):
    graph_set, _, fit = made
    cascade = served_by(graph_set, fit.calibration)
    found = compare(fit.calibration, fit.answers, ask(fit.answers, cascade))
    assert cascade.batches == [BATCH] * 8  # each image by score, and by the full rung
    assert found.outcome == SAME and found.other_decisions == found.other_answers == 0
    assert found.rungs["vit_high"].images == 32 and found.rungs["vit_high"].largest < 1e-5
    assert 0 < found.rungs["vit_low"].images < 32 and found.score_change < 1e-4
    assert found.sentence.startswith("this server answers as the calibration did: of 32 reference")


def test_another_runtimes_answers_under_the_same_hashes_are_told(tmp_path):
    graph_set, outputs = collected(tmp_path, answering=(1, 2), served=(5, 6))
    fit = fitted(graph_set, outputs)
    fit.calibration.check_rungs(graph_set.files)  # nothing else would notice
    cascade = served_by(graph_set, fit.calibration)
    found = compare(fit.calibration, fit.answers, ask(fit.answers, cascade))
    assert found.outcome == OTHER and found.lost > found.allowed == found.lost_before
    assert found.rungs["vit_high"].median > 0.1
    assert "computes other answers than the calibration did; calibrate here" in found.sentence
    assert found.to_dict()["outcome"] == OTHER


def flipped(served, rows):
    """Other classes for some of the images."""
    logits = served.answer.logits.copy()
    logits[rows] = -logits[rows]
    return replace(served.answer, logits=logits)


def certified(made, **changes):
    """The fit as certified for a risk of 5 % with these figures, and the images not lost so far."""
    graph_set, outputs, _ = made
    fit = fitted(graph_set, outputs, Goal(0.3, 0.9, "ltt"))
    assert fit.calibration.certificate["certified"]
    certificate = {**fit.calibration.certificate, "epsilon": 0.05, **changes}
    changed = replace(fit, calibration=replace(fit.calibration, certificate=certificate))
    _, served = compared(changed)
    truth = fit.answers.high.logits.argmax(1)
    return changed, served, np.flatnonzero(served.answer.logits.argmax(1) == truth)


@pytest.mark.parametrize(("n", "errors"), [(150, 3), (500, 18), (500, 0), (2000, 85)])
def test_what_may_be_lost_is_what_a_server_of_the_certified_risk_shows(made, n, errors):
    fit, served, sound = certified(made, n=n, errors=errors, allowed=errors)  # as it mostly is
    unchanged, _ = compared(fit)
    assert unchanged.outcome == SAME and unchanged.lost == unchanged.lost_before
    others = unchanged.images - unchanged.lost_before
    slack = unchanged.allowed - unchanged.lost_before
    assert slack == binom.ppf(0.99, others, 0.05 - errors / n) >= 1
    for lost in (1, slack, slack + 1):
        found, _ = compared(fit, answer=flipped(served, sound[:lost]))
        assert found.lost == found.lost_before + lost and found.other_answers == lost
        assert found.outcome == (OTHER if lost > slack else WITHIN_SLACK)


def test_near_ties_that_flip_are_no_reason_to_calibrate_again_and_many_losses_are(made):
    """Four answers of 500 differed between two kernels, under which the certificate held."""
    fit, served, sound = certified(made, n=500, errors=18, allowed=18)
    rng = np.random.default_rng(0)

    def told(share):
        answers = [flipped(served, sound[rng.random(len(sound)) < share]) for _ in range(400)]
        return np.mean([compared(fit, answer=a)[0].outcome == OTHER for a in answers])

    assert told(4 / 500) <= 0.01
    assert told(0.3) >= 0.95


def test_where_nothing_is_certified_none_may_be_lost(made):
    _, _, fit = made
    assert fit.calibration.certificate is None
    _, served = compared(fit)
    kept = np.flatnonzero(~served.escalated)
    found, _ = compared(fit, answer=flipped(served, kept))
    assert found.allowed == found.lost_before and found.outcome == OTHER


def test_a_decision_that_changes_no_answer_is_no_loss(made):
    _, _, fit = made
    _, served = compared(fit)
    same_class = fit.answers.low.logits.argmax(1) == fit.answers.high.logits.argmax(1)
    row = np.flatnonzero(~served.escalated & same_class)[0]
    escalated = served.escalated.copy()
    escalated[row] = True
    found, _ = compared(fit, escalated=escalated)
    assert (found.other_decisions, found.other_answers) == (1, 0)
    assert found.outcome == WITHIN_SLACK


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_lost(made, bad):
    _, _, fit = made
    _, served = compared(fit)
    embedding, high = served.answer.embedding.copy(), served.high.embedding.copy()
    embedding[0, 0] = high[0, 0] = bad
    found, _ = compared(
        fit,
        answer=replace(served.answer, embedding=embedding),
        high=replace(served.high, embedding=high),
    )
    assert found.lost >= 1 and found.other_answers == 1
    assert found.rungs["vit_high"].largest == np.inf
    assert found.to_dict()["rungs"]["vit_high"]["largest"] is None


def test_where_all_escalate_only_the_full_rung_is_compared(made):
    graph_set, outputs, _ = made
    fit = fitted(graph_set, outputs, Goal(0.001, 0.9, "ltt"))
    assert fit.calibration.threshold is None
    cascade = served_by(graph_set, fit.calibration)
    found = compare(fit.calibration, fit.answers, ask(fit.answers, cascade))
    assert found.outcome == SAME and found.rungs["vit_low"].images == 0
    assert found.to_dict()["score_change"] is None and "vit_low" not in found.sentence
    assert cascade.batches == [BATCH] * 4  # that was the full rung already


def test_losses_are_against_the_reference_where_the_full_rung_is_another(made):
    graph_set, outputs, _ = made
    three = with_reference(graph_set)
    losing = replace(with_losing_high(outputs, 0.3), made=Made.by(three))
    fit = fitted(three, losing, Threshold(-1e9))  # all escalate
    assert fit.answers.truth is not None
    found, served = compared(fit)
    expected = fit.answers.high.logits.argmax(1) != fit.answers.truth.logits.argmax(1)
    assert found.lost == found.lost_before == expected.sum() > 0
    better, _ = compared(fit, answer=fit.answers.truth)
    assert better.lost == 0 and better.other_answers == expected.sum()
    assert better.outcome == WITHIN_SLACK


def test_degraded_answers_are_not_compared(made):
    graph_set, _, fit = made
    cascade = served_by(graph_set, fit.calibration)

    def degraded(image, overrides):
        answer = cascade(image, overrides)
        return replace(answer, degraded=np.ones_like(answer.degraded))

    with pytest.raises(AnswersError, match="marked degraded"):
        ask(fit.answers, degraded)


# --- deployed ------------------------------------------------------------------------------------


def test_a_repository_and_an_added_version_carry_their_answers(made, tmp_path):
    graph_set, outputs, fit = made
    fit.save(tmp_path / "calibration.json")
    out = assemble(graph_set, tmp_path / "calibration.json", tmp_path / "repository")
    placed = "router/1/calibration.answers.npz"
    assert (out / placed).read_bytes() == fit.answers.to_bytes()
    assert placed in manifest.listed(out)
    other = fitted(graph_set, outputs, EscalationRate(0.5))
    other.save(tmp_path / "new.json")
    assert add_version(out, tmp_path / "new.json") == 2
    added = out / "router/2/calibration.answers.npz"
    assert added.read_bytes() == other.answers.to_bytes()
    manifest.verify(out)
    ReferenceAnswers.load(added, Calibration.load(added.with_name("calibration.json")))


@pytest.mark.parametrize("how", ["assemble", "add_version"])
def test_an_artifact_without_the_answers_that_it_names_is_refused(made, tmp_path, how):
    graph_set, outputs, fit = made
    fit.save(tmp_path / "calibration.json")
    out = assemble(graph_set, tmp_path / "calibration.json", tmp_path / "repository")
    fitted(graph_set, outputs, EscalationRate(0.5)).save(tmp_path / "new.json")
    answers_path(tmp_path / "new.json").unlink()
    with pytest.raises(RepositoryError, match=r"new\.answers\.npz.*copy it along"):
        if how == "assemble":
            assemble(graph_set, tmp_path / "new.json", tmp_path / "second")
        else:
            add_version(out, tmp_path / "new.json")
    manifest.verify(out)
    assert not (out / "router/2").exists()


def test_refusing_needs_something_to_compare_with(made, tmp_path):
    graph_set, outputs, fit = made
    refuse = RepositorySettings(reference_check="refuse")
    fitted(graph_set, outputs, images=0).save(tmp_path / "none.json")
    with pytest.raises(UsageError, match=f"--reference-check refuse: {NONE_STORED}"):
        assemble(graph_set, tmp_path / "none.json", tmp_path / "repository", refuse)
    fit.save(tmp_path / "some.json")
    out = assemble(graph_set, tmp_path / "some.json", tmp_path / "repository", refuse)
    router = config.read(out / "router/config.pbtxt")
    assert config.parameter(router, "reference_check") == "refuse"
