import json
from dataclasses import replace

import numpy as np
import pytest

from calibration import metrics
from calibration.certify import Goal, allowed_errors, binomial_p_value
from calibration.fidelity import Fidelity, FidelityError, disagrees, oracle_cosine, oracle_l2
from calibration.fit import EscalationRate, FitError, Options, Threshold, fit
from calibration.outputs import OutputsError
from calibration.record import FitRecord
from calibration.splits import SplitError
from routing import SIGNALS, Calibration, RungSet
from tests.unit.calibration_outputs import make_outputs
from tests.unit.onnx_files import D, write_rung_set

TOP1 = Options(Fidelity("top1"))
GOAL = Goal(max_risk=0.1, confidence=0.9, method="ltt")


@pytest.fixture
def rung_set(tmp_path):
    return RungSet.load(write_rung_set(tmp_path / "onnx"))


@pytest.fixture
def headless(tmp_path):
    return RungSet.load(write_rung_set(tmp_path / "headless", classes=None))


def test_the_oracle_is_the_distance_of_the_embeddings(rung_set):
    outputs = make_outputs(rung_set)
    np.testing.assert_allclose(np.unique(oracle_l2(outputs).round(4)), [0.0, round(D**0.5, 4)])
    low, high = outputs.low.embedding[0], outputs.high.embedding[0]
    expected = low @ high / np.linalg.norm(low) / np.linalg.norm(high)
    assert oracle_cosine(outputs)[0] == pytest.approx(expected, abs=1e-6)


def test_the_fidelity_losses(rung_set, headless):
    outputs = make_outputs(rung_set)
    np.testing.assert_array_equal(Fidelity("top1").loss(outputs), disagrees(outputs))
    for tolerance in (0.01, 0.5):
        expected = oracle_cosine(outputs) < 1 - tolerance
        np.testing.assert_array_equal(Fidelity("cosine", tolerance).loss(outputs), expected)
    with pytest.raises(FidelityError, match="has none; use cosine"):
        Fidelity("top1").loss(make_outputs(headless, head=False))
    with pytest.raises(FidelityError, match="'top5' is none of top1, cosine"):
        Fidelity("top5")
    with pytest.raises(FidelityError, match="--tolerance 0"):
        Fidelity("cosine", 0)


def test_a_certified_fit_keeps_its_splits_apart(rung_set):
    outputs = make_outputs(rung_set, n=2000)
    fitted = fit(outputs, rung_set, GOAL, TOP1)
    calibration, certificate = fitted.calibration, fitted.calibration.certificate
    assert calibration.data["splits"] == {"fit": 800, "certify": 800, "test": 400}
    # The certificate's own figures, from scratch. Groups hold two images: one of each is tested.
    assert certificate["certified"] and certificate["n"] == 400
    assert certificate["allowed"] == allowed_errors(400, GOAL)
    assert binomial_p_value(certificate["errors"], 400, 0.1) <= 0.1
    kept = fitted.scores <= calibration.threshold
    certify, test = fitted.splits["certify"], fitted.splits["test"]
    lost = (kept & fitted.loss)[certify].sum()
    assert certificate["errors"] <= lost <= 2 * certificate["errors"] + 20
    assert calibration.metrics["risk"] == pytest.approx((kept & fitted.loss)[test].mean())
    assert calibration.metrics["escalation_rate"] == pytest.approx(1 - kept[test].mean())
    assert calibration.metrics["agreement_with_high"] == pytest.approx(
        1 - calibration.metrics["risk"]
    )


def test_the_certify_split_teaches_nothing(rung_set):
    """Whatever lies in the certify split, signal, coefficients and score map stay the same."""
    outputs = make_outputs(rung_set, n=600)
    fitted = fit(outputs, rung_set, GOAL, TOP1)
    rows = fitted.splits["certify"]
    logits = outputs.high.logits.copy()
    logits[rows] = -logits[rows]
    changed = replace(outputs, high=replace(outputs.high, logits=logits))
    other = fit(changed, rung_set, GOAL, TOP1).calibration
    assert other.certificate["errors"] != fitted.calibration.certificate["errors"]
    assert (other.signal, other.score_map) == (
        fitted.calibration.signal,
        fitted.calibration.score_map,
    )
    for name, array in fitted.calibration.coefficients.items():
        np.testing.assert_array_equal(other.coefficients[name], array)


def test_auto_takes_the_signal_that_cross_validation_prefers(rung_set):
    calibration = fit(make_outputs(rung_set, n=1000), rung_set, GOAL, TOP1).calibration
    costs = {
        name: figures["cv_escalation"]
        for name, figures in calibration.metrics["signals"].items()
        if figures["cv_escalation"] is not None
    }
    assert set(costs) == set(SIGNALS)
    assert costs[calibration.signal] == min(costs.values())
    assert calibration.signal in ("margin", "deferral", "layer_lens")  # they see the logits' gap
    assert calibration.metrics["signals"]["cls_path"]["auroc_interval"][0] < 0.5


def test_every_signal_stands_beside_random_and_the_oracle(rung_set):
    metrics_ = fit(make_outputs(rung_set, n=1000), rung_set, GOAL, TOP1).calibration.metrics
    assert set(metrics_["signals"]) == {*SIGNALS, "random", "oracle"}
    assert metrics_["signals"]["oracle"]["auroc"] == 1.0  # the oracle is 0 where the answers agree
    assert metrics_["signals"]["oracle"]["spearman"] == pytest.approx(1.0)
    for figures in metrics_["signals"].values():
        if figures["auroc_interval"] is not None:
            low, high = figures["auroc_interval"]
            assert low <= figures["auroc"] <= high


def test_a_signal_no_better_than_random_is_called_so(rung_set):
    outputs = make_outputs(rung_set, n=600)
    poor = fit(outputs, rung_set, GOAL, replace(TOP1, signal="cls_path")).calibration
    good = fit(outputs, rung_set, GOAL, replace(TOP1, signal="margin")).calibration
    assert poor.metrics["no_better_than_random"]
    assert not good.metrics["no_better_than_random"]


def test_nothing_certified_means_always_high(rung_set):
    outputs = make_outputs(rung_set, n=300)
    strict = Goal(max_risk=0.001, confidence=0.99, method="ltt")
    calibration = fit(outputs, rung_set, strict, TOP1).calibration
    assert calibration.threshold is None and not calibration.certificate["certified"]
    assert calibration.metrics["escalation_rate"] == 1.0 and calibration.metrics["risk"] == 0.0


def test_where_no_answer_differs_everything_stays_cheap(rung_set):
    outputs = make_outputs(rung_set, n=400, unsure_below=-1)
    calibration = fit(outputs, rung_set, GOAL, TOP1).calibration
    assert calibration.certificate["certified"] and calibration.certificate["errors"] == 0
    assert calibration.metrics["escalation_rate"] < 0.05
    assert calibration.metrics["no_better_than_random"]


def test_a_headless_model_is_certified_for_its_cosine(headless):
    outputs = make_outputs(headless, n=1200, head=False)
    options = Options(Fidelity("cosine", 0.3))
    calibration = fit(outputs, headless, GOAL, options).calibration
    assert calibration.signal in ("cls_path", "cls_regression")
    assert calibration.certificate["fidelity"] == "cosine"
    assert set(calibration.metrics["signals"]) == {
        *("cls_path", "cls_regression", "random", "oracle")
    }
    assert "agreement_with_high" not in calibration.metrics


def test_the_escalation_rate_is_met_on_held_out_images(rung_set):
    outputs = make_outputs(rung_set, n=2000)
    fitted = fit(outputs, rung_set, EscalationRate(0.5), TOP1)
    calibration = fitted.calibration
    assert calibration.certificate is None
    assert calibration.data["splits"] == {"fit": 1400, "test": 600}
    assert abs(calibration.metrics["escalation_rate"] - 0.5) < 0.05
    assert calibration.metrics["agreement_with_high"] > calibration.metrics["agreement_low"] + 0.1
    assert calibration.metrics["accuracy_high"] == 1.0
    # auto took the signal that loses least at that rate.
    rows = fitted.splits["fit"]
    risks = {}
    for name, values in fitted.values.items():
        rates, risk = metrics.risk_curve(values[rows], fitted.loss[rows])
        risks[name] = risk[np.searchsorted(rates, 0.5, side="right") - 1]
    assert risks[calibration.signal] == min(risks.values())


def test_a_given_threshold_is_kept(rung_set):
    options = replace(TOP1, signal="cls_path")
    calibration = fit(make_outputs(rung_set), rung_set, Threshold(1.25), options).calibration
    assert (calibration.threshold, calibration.signal) == (1.25, "cls_path")
    assert calibration.chosen_by["threshold"] == 1.25


def test_fit_is_reproducible_and_follows_its_seed(rung_set, tmp_path):
    outputs = make_outputs(rung_set)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(outputs, rung_set, GOAL, replace(TOP1, seed=seed)).save(tmp_path / name / "c.json")
    a, b, c = ((tmp_path / name / "c.json").read_bytes() for name in "abc")
    assert a == b != c


def test_the_artifact_scores_as_fit_did_after_a_round_trip(rung_set, tmp_path):
    outputs = make_outputs(rung_set, n=600)
    for name in SIGNALS:
        fitted = fit(outputs, rung_set, GOAL, replace(TOP1, signal=name))
        fitted.save(tmp_path / "calibration.json")
        loaded = Calibration.load(tmp_path / "calibration.json")
        assert loaded == fitted.calibration
        first = outputs.low.rows(slice(0, 512))  # as many rows at once as fit computed
        np.testing.assert_array_equal(loaded.score(first), fitted.scores[:512])


def test_the_record_belongs_to_its_artifact_and_outputs(rung_set, tmp_path):
    outputs = make_outputs(rung_set)
    artifact = tmp_path / "calibration.json"
    fitted = fit(outputs, rung_set, GOAL, TOP1)
    fitted.save(artifact)
    record = FitRecord.load(tmp_path / "fit.npz", outputs, artifact)
    np.testing.assert_array_equal(record.scores, fitted.scores)
    np.testing.assert_array_equal(record.loss, fitted.loss)
    assert set(record.values) == set(SIGNALS) and set(record.splits) == set(fitted.splits)
    with pytest.raises(OutputsError, match="another fit"):
        FitRecord.load(tmp_path / "fit.npz", make_outputs(rung_set, seed=1), artifact)
    content = json.loads(artifact.read_text())
    artifact.write_text(json.dumps({**content, "threshold": 0.0}))
    with pytest.raises(OutputsError, match="another fit"):
        FitRecord.load(tmp_path / "fit.npz", outputs, artifact)
    with pytest.raises(OutputsError, match="fit first"):
        FitRecord.load(tmp_path / "none.npz", outputs, artifact)


def test_what_cannot_be_fitted_is_refused(rung_set, headless, tmp_path):
    outputs = make_outputs(rung_set)
    others = RungSet.load(write_rung_set(tmp_path / "others", seeds=(3, 4)))
    with pytest.raises(FitError, match="other ONNX files"):
        fit(outputs, others, GOAL, TOP1)
    with pytest.raises(FitError, match="another preprocessing"):
        fit(replace(outputs, preprocessing_sha256="0" * 64), rung_set, GOAL, TOP1)
    with pytest.raises(FitError, match="12 images are too few"):
        fit(make_outputs(rung_set, n=12), rung_set, GOAL, TOP1)
    with pytest.raises(FitError, match="'nonsense' is unknown"):
        fit(outputs, rung_set, GOAL, replace(TOP1, signal="nonsense"))
    with pytest.raises(FitError, match="has no head"):
        cosine = Options(Fidelity("cosine"), signal="margin")
        fit(make_outputs(headless, head=False), headless, GOAL, cosine)
    with pytest.raises(FitError, match="too few of them"):
        same = make_outputs(rung_set, unsure_below=-1)
        fit(same, rung_set, GOAL, replace(TOP1, signal="deferral"))
    with pytest.raises(SplitError, match="groups are too few"):
        fit(replace(outputs, groups=("same",) * len(outputs)), rung_set, GOAL, TOP1)
    with pytest.raises(SplitError, match="in two splits"):
        fit(replace(outputs, hashes=("same",) * len(outputs)), rung_set, GOAL, TOP1)


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_an_escalation_rate_is_a_share(rate):
    with pytest.raises(FitError, match="not between 0 and 1"):
        EscalationRate(rate)


def test_a_threshold_is_finite():
    with pytest.raises(FitError, match="not a finite number"):
        Threshold(float("inf"))


def test_the_statement_says_how_grouped_images_are_drawn(rung_set):
    grouped = fit(make_outputs(rung_set, n=600), rung_set, GOAL, TOP1).calibration
    single = fit(make_outputs(rung_set, n=600, group_size=1), rung_set, GOAL, TOP1).calibration
    assert "first a group" in grouped.certificate["statement"]
    assert "group" not in single.certificate["statement"]
    assert grouped.certificate["n"] == single.certificate["n"] / 2 == 120
