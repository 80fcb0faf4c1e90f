import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta, binom, fisher_exact, ks_2samp

from bundle.prints import encode
from calibration.certify import Goal, candidate_thresholds, certificate, certify
from calibration.evaluate import (
    DRIFT_LEVEL,
    EvaluateError,
    contradiction_p_value,
    evaluate,
)
from calibration.fidelity import Fidelity
from calibration.outputs import Made
from imaging import code_sha256
from routing import RungOutputs, RungRecord
from tests.unit.calibration_outputs import FINGERPRINTS, outputs_of
from tests.unit.fakes import make_calibration

THRESHOLD = 0.5
MADE = Made(FINGERPRINTS, "2" * 64, code_sha256(), "classes")
DATA = {"image_prints": "", "seed": 0, "group_by": "source"}
LTT = Goal(0.05, 0.9, "ltt")
CRC = Goal(0.05, 0.9, "crc")


def made_of(scores, loss, **fields):
    """Two-class outputs whose margin score is `scores` and whose classes differ where `loss`."""
    n = len(scores)
    low = np.zeros((n, 2), np.float32)
    low[:, 0] = 2 * np.arctanh(1 - np.asarray(scores, np.float64))  # p1 - p2 = 1 - score
    high, one = np.where(np.asarray(loss)[:, None], low[:, ::-1], low), np.ones((n, 1), np.float32)
    rungs = RungOutputs(one, np.zeros((n, 2, 1), np.float32), low), RungOutputs(one, None, high)
    return outputs_of(*rungs, made=MADE, **fields)


def certificate_of(goal, certified=True, n=480, errors=15, allowed=17):
    return {
        "certified": certified,
        "method": goal.method,
        "epsilon": goal.max_risk,
        "confidence": None if goal.method == "crc" else goal.confidence,
        "fidelity": "top1",
        "tolerance": None,
        "signal": "margin",
        "n": n,
        "errors": errors,
        "allowed": allowed,
        "statement": "...",
    }


def calibration_of(**changes):
    """Identity score map, threshold 0.5, scores uniform at calibration."""
    fields = {
        "rungs": {name: RungRecord(8, "px=8", sha) for name, sha in FINGERPRINTS.items()},
        "embedding_dim": 1,
        "layers": 1,
        "signal": "margin",
        "chosen_by": {"fidelity": "top1", "tolerance": None, "threshold": THRESHOLD},
        "certificate": certificate_of(LTT),
        "data": DATA,
        "reference_scores": np.linspace(0.001, 0.999, 800, dtype=np.float32),
    }
    return make_calibration(**{"threshold": THRESHOLD, "classes": 2, **fields, **changes})


def stream(n, seed, risk=0.04, power=1.0):
    """Scores U**power; `risk` of all images are lost below the threshold, every other above."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.001, 0.999, size=n) ** power
    kept_share = THRESHOLD ** (1 / power)
    lost = rng.uniform(size=n) < np.where(scores <= THRESHOLD, risk / kept_share, 0.5)
    return made_of(scores, lost)


def test_the_figures_are_those_counted_by_hand():
    # Ten images: six kept, of them one lost; four escalated, of them two needed.
    scores = [0.1, 0.2, 0.3, 0.4, 0.45, 0.49, 0.6, 0.7, 0.8, 0.9]
    loss = np.isin(np.arange(10), [5, 8, 9])
    # Low answers class 0 everywhere, high class 1 where lost; the last image has no label.
    labels = [0, 0, 0, 0, 1, 1, 0, 0, 1, -1]
    evaluation = evaluate(calibration_of(), made_of(scores, loss, labels=np.array(labels)))
    assert (evaluation.images, evaluation.errors, evaluation.risk) == (10, 1, 0.1)
    assert evaluation.escalation_rate == 0.4
    assert evaluation.reference_escalation_rate == 0.5
    assert evaluation.figures == pytest.approx(
        {
            "agreement_low": 0.7,
            "agreement_with_high": 0.9,
            "accuracy_low": 6 / 9,
            "accuracy_high": 8 / 9,
            "accuracy_adaptive": 7 / 9,
        }
    )
    assert set(evaluation.intervals) == set(evaluation.figures)
    assert evaluation.lines()[-2:] == [
        "Agreement with the full rung: 90.0 %; of the cheap rung alone 70.0 %.",
        "Accuracy on labelled images: 77.8 % adaptive, 66.7 % cheap rung, 88.9 % full rung.",
    ]


def test_the_statistics_are_those_of_scipy():
    outputs = stream(300, seed=3, power=1.3)
    calibration = calibration_of()
    evaluation = evaluate(calibration, outputs)
    scores = calibration.score(outputs.low)
    up, down = int((scores > THRESHOLD).sum()), int((scores <= THRESHOLD).sum())
    k = evaluation.errors
    assert 0 < k < 40
    assert evaluation.escalation_p == pytest.approx(fisher_exact([[up, down], [400, 400]]).pvalue)
    expected = ks_2samp(scores, calibration.reference_scores)
    assert (evaluation.score_distance, evaluation.score_p) == pytest.approx(tuple(expected))
    assert evaluation.risk_interval == pytest.approx(
        (beta.ppf(0.025, k, 301 - k), beta.ppf(0.975, k + 1, 300 - k))
    )
    assert evaluation.contradiction_p == pytest.approx(1 - binom.cdf(k - 1, 300, 0.05))


def test_images_like_those_of_the_calibration_leave_the_certificate_standing():
    evaluation = evaluate(calibration_of(), stream(1000, seed=0))
    assert not evaluation.contradicted
    assert not evaluation.drift
    certificate_line, risk, escalation, scores, agreement = evaluation.lines()
    assert certificate_line.startswith(
        "Certificate not contradicted: if it is right (risk at most 5 %), "
    )
    assert certificate_line.endswith("its confidence of 90 % puts the limit at 0.1.")
    assert f"{evaluation.errors} of 1000 independent images" in risk
    assert "names another class than the full rung" in risk
    assert "no drift at 1 %" in escalation
    assert "no drift at 1 %" in scores
    assert "cheap rung alone" in agreement


@pytest.mark.parametrize("seed", range(5))
def test_a_big_shift_always_contradicts_and_drifts(seed):
    evaluation = evaluate(calibration_of(), stream(500, seed, risk=0.15, power=2))
    assert evaluation.contradicted
    assert evaluation.drift
    assert "CONTRADICTED" in evaluation.lines()[0]
    assert sum("DRIFT" in line for line in evaluation.lines()) == 2


def test_a_shift_of_the_scores_alone_is_drift_and_no_contradiction():
    evaluation = evaluate(calibration_of(), stream(1000, seed=0, risk=0.03, power=0.7))
    assert evaluation.drift
    assert not evaluation.contradicted


def test_scores_may_drift_where_escalation_does_not():
    rng = np.random.default_rng(0)
    scores = np.where(rng.uniform(size=600) < 0.5, 0.3, 0.7)
    evaluation = evaluate(calibration_of(), made_of(scores, np.zeros(600, bool)))
    assert evaluation.escalation_p > DRIFT_LEVEL
    assert evaluation.score_p < 1e-6
    assert evaluation.drift


def test_drift_is_seldom_seen_where_there_is_none():
    alarms = 0
    for seed in range(40):
        reference = np.sort(np.random.default_rng([7, seed]).random(400, np.float32))
        alarms += evaluate(calibration_of(reference_scores=reference), stream(150, seed)).drift
    assert alarms <= binom.ppf(0.999, 40, 2 * DRIFT_LEVEL)


def test_at_a_risk_of_exactly_epsilon_contradictions_are_as_rare_as_stated():
    n, repeats = 2000, 4000
    errors = np.random.default_rng(0).binomial(n, LTT.max_risk, size=repeats)
    alarms = sum(contradiction_p_value(certificate_of(LTT), int(k), n) <= 0.1 for k in errors)
    assert 0.07 * repeats < alarms <= binom.ppf(0.999, repeats, 0.1)


@pytest.mark.parametrize(
    ("lost", "confidence", "contradicted"), [(8, 0.9, False), (9, 0.9, True), (9, 0.95, False)]
)
def test_the_certificates_own_confidence_is_the_limit(lost, confidence, contradicted):
    # P(Bin(100, 0.05) ≥ 8) = 0.128 and P(Bin(100, 0.05) ≥ 9) = 0.063.
    record = certificate_of(Goal(0.05, confidence, "ltt"))
    outputs = made_of(np.full(100, 0.2), np.arange(100) < lost)
    assert evaluate(calibration_of(certificate=record), outputs).contradicted is contradicted


def test_hand_computed_p_values_of_a_certificate_on_average():
    # No error allowed among 19: the risk is at most Beta(1, 19), of mean 1/20; and the chance that
    # two new images both escape it is 19/20 * 20/21.
    record = certificate_of(CRC, n=19, errors=0, allowed=0)
    assert contradiction_p_value(record, 0, 1) == pytest.approx(1)
    assert contradiction_p_value(record, 1, 1) == pytest.approx(1 / 20)
    assert contradiction_p_value(record, 1, 2) == pytest.approx(1 - 19 / 20 * 20 / 21)


def conformal_calibrations(repeats, n=400):
    """True risks of certificates on average, and each certificate; every image kept is at risk."""
    rng = np.random.default_rng(1)
    risks, certificates = [], []
    for _ in range(repeats):
        candidates = candidate_thresholds(rng.uniform(size=500))
        scores, loss = rng.uniform(size=n), rng.uniform(size=n) < 0.2
        verdict = certify(scores, loss, candidates, CRC)
        risks.append(0.2 * verdict.threshold)
        certificates.append(certificate(verdict, CRC, Fidelity("top1"), "margin"))
    return np.array(risks), certificates


def test_a_certificate_on_average_is_not_contradicted_by_its_own_spread():
    new, repeats = 4000, 2000
    risks, certificates = conformal_calibrations(repeats)
    errors = np.random.default_rng(2).binomial(new, risks)
    p_values = np.array(
        [
            contradiction_p_value(record, int(k), new)
            for record, k in zip(certificates, errors, strict=True)
        ]
    )
    limit = binom.ppf(0.999, repeats, 0.1)
    assert 0.05 * repeats < (p_values <= 0.1).sum() <= limit
    # Testing each against ε itself would call about 30 % of these valid certificates wrong.
    assert (binom.sf(errors - 1, new, CRC.max_risk) <= 0.1).sum() > 2 * limit


def test_a_certificate_on_average_is_tested_at_90_percent_and_says_so():
    crc = certificate_of(CRC, allowed=23)
    holds = evaluate(calibration_of(certificate=crc), stream(1000, seed=0))
    assert not holds.contradicted
    assert "90 %, taken because it has no confidence of its own" in holds.lines()[0]
    wrong = evaluate(calibration_of(certificate=crc), stream(1000, seed=0, risk=0.15))
    assert wrong.contradicted


def test_without_a_certified_threshold_nothing_can_be_lost_or_contradicted():
    calibration = calibration_of(threshold=None, certificate=certificate_of(LTT, certified=False))
    evaluation = evaluate(calibration, stream(200, seed=0, risk=0.3))
    assert (evaluation.risk, evaluation.escalation_rate) == (0, 1)
    assert (evaluation.contradiction_p, evaluation.contradicted) == (None, False)
    assert evaluation.escalation_p == 1
    assert "no threshold was certified" in evaluation.lines()[0]


def test_a_threshold_chosen_without_a_certificate_is_measured_all_the_same():
    evaluation = evaluate(calibration_of(certificate=None), stream(400, seed=0, risk=0.3))
    assert evaluation.risk > 0.2
    assert not evaluation.contradicted
    assert evaluation.lines()[0].startswith("Certificate: none")


def test_the_fidelity_is_that_of_the_artifact():
    outputs = stream(100, seed=0)
    embedding = np.where(np.arange(100)[:, None] < 30, -1, 1).astype(np.float32)
    outputs = replace(outputs, high=replace(outputs.high, embedding=embedding))
    record = {**certificate_of(LTT), "fidelity": "cosine", "tolerance": 0.2}
    chosen_by = {"fidelity": "cosine", "tolerance": 0.2, "max_risk": 0.05}
    evaluation = evaluate(calibration_of(certificate=record, chosen_by=chosen_by), outputs)
    kept = calibration_of().score(outputs.low) <= THRESHOLD
    assert evaluation.errors == kept[:30].sum() > 5
    assert "cosine below 0.8" in evaluation.lines()[1]


def test_one_image_of_each_group_is_counted():
    scores, loss = np.full(60, 0.2), np.repeat([True, False, False], 20)
    names = tuple(f"video {i // 20}/{i}.jpg" for i in range(60))
    outputs = made_of(scores, loss, names=names)
    data = DATA | {"group_by": "folder"}
    evaluation = evaluate(calibration_of(data=data), outputs)
    assert (evaluation.images, evaluation.errors) == (3, 1)
    assert not evaluation.contradicted  # 20 errors among 60 images would be
    assert evaluate(calibration_of(), outputs).contradicted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"graphs": {**FINGERPRINTS, "vit_high": "c" * 64}}, "another vit_high"),
        ({"preprocessing_sha256": "0" * 64}, "another preprocessing"),
        ({"task": "labels"}, "a model that answers labels and not classes"),
        ({"imaging_sha256": "e" * 64}, "other code of imaging/"),
    ],
)
def test_outputs_that_were_made_otherwise_are_refused(change, words):
    outputs = replace(stream(50, seed=0), made=replace(MADE, **change))
    with pytest.raises(EvaluateError, match=f"as the artifact's were: {words}; coll") as error:
        evaluate(calibration_of(), outputs)
    assert "\n" not in str(error.value)


def test_the_calibrations_own_images_are_refused():
    outputs = stream(50, seed=0)
    data = DATA | {"image_prints": encode(outputs.hashes, outputs.looks)}
    with pytest.raises(EvaluateError, match="evaluate it on others"):
        evaluate(calibration_of(data=data), outputs)


def test_an_earlier_artifact_and_no_image_are_refused():
    outputs = stream(50, seed=0)
    data = {"image_hashes": "", "seed": 0, "group_by": "source"}
    with pytest.raises(EvaluateError, match="of an earlier release.* collect and fit again"):
        evaluate(calibration_of(data=data), outputs)
    with pytest.raises(EvaluateError, match="all of these images were used to fit a graph or its"):
        evaluate(calibration_of(), outputs.rows(np.zeros(0, np.intp)))


def test_images_that_the_calibration_has_seen_are_left_out():
    outputs = stream(50, seed=0)
    data = DATA | {"image_prints": encode(outputs.hashes[:20], outputs.looks[:20])}
    evaluation = evaluate(calibration_of(data=data), outputs)
    assert (evaluation.known, evaluation.images) == (20, 30)
    expected = evaluate(calibration_of(), outputs.rows(np.arange(20, 50)))
    assert evaluation.errors == expected.errors and evaluation.score_p == expected.score_p
    assert evaluation.lines()[-1] == "Left out: 20 images that the calibration has seen."


def test_an_artifact_without_reference_scores_is_refused():
    with pytest.raises(EvaluateError, match="no reference scores"):
        evaluate(calibration_of(reference_scores=np.zeros(0, np.float32)), stream(50, seed=0))


def test_the_dictionary_is_json_and_holds_the_readings():
    evaluation = evaluate(calibration_of(), stream(200, seed=0))
    content = evaluation.to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["readings"] == evaluation.lines()
    assert content["contradicted"] is False
    assert content["certificate"]["epsilon"] == 0.05


def against_a_reference(outputs, high_lost):
    """The full rung's answers become the reference's; a new full rung loses some of them."""
    truth = outputs.high
    logits = np.where(np.asarray(high_lost)[:, None], truth.logits[:, ::-1], truth.logits)
    return replace(outputs, high=replace(truth, logits=logits), reference=truth)


ABOUT_THE_MODEL = {**certificate_of(LTT), "reference": "full FP32 model"}


def test_answers_of_a_full_rung_that_is_wrong_itself_are_errors():
    # Six kept, of them one lost; four escalated, of them one lost by the full rung.
    scores = [0.1, 0.2, 0.3, 0.4, 0.45, 0.49, 0.6, 0.7, 0.8, 0.9]
    plain = made_of(scores, np.isin(np.arange(10), [5, 8]))
    outputs = against_a_reference(plain, np.isin(np.arange(10), [0, 9]))
    evaluation = evaluate(calibration_of(certificate=ABOUT_THE_MODEL), outputs)
    assert (evaluation.errors, evaluation.risk) == (2, 0.2)
    assert evaluation.figures["agreement_with_high"] == 0.8
    assert evaluate(calibration_of(), plain).errors == 1
    _, risk, *_, agreement = evaluation.lines()
    assert risk.startswith("Risk: 2 of 10 independent images got an answer that names another")
    assert "than the full FP32 model, 20.0 %" in risk
    assert agreement.startswith("Agreement with the full FP32 model: 80.0 %;")


def test_escalated_losses_can_contradict_a_certificate():
    plain = made_of(np.full(200, 0.9), np.zeros(200, bool))
    outputs = against_a_reference(plain, np.arange(200) < 30)
    assert evaluate(calibration_of(certificate=ABOUT_THE_MODEL), outputs).contradicted
    assert not evaluate(calibration_of(), plain).contradicted


def test_nothing_says_that_none_is_lost_where_the_full_rung_loses():
    outputs = against_a_reference(stream(100, seed=0), np.arange(100) < 10)
    refused = {**ABOUT_THE_MODEL, "certified": False}
    evaluation = evaluate(calibration_of(threshold=None, certificate=refused), outputs)
    assert evaluation.risk == 0.1
    assert evaluation.lines()[0].endswith("every image goes to the full rung.")


@pytest.mark.parametrize("has_reference", [True, False])
def test_outputs_that_are_held_against_something_else_are_refused(has_reference):
    outputs = stream(50, seed=0)
    record = ABOUT_THE_MODEL
    if has_reference:
        outputs = against_a_reference(outputs, np.zeros(50, bool))
        record = {**certificate_of(LTT), "reference": "full rung"}
    with pytest.raises(EvaluateError, match="the certificate is about the full") as error:
        evaluate(calibration_of(certificate=record), outputs)
    assert "\n" not in str(error.value)
