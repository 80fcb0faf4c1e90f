import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bundle.graphs import GraphSet
from calibration import metrics
from calibration.certify import (
    CertifyError,
    Goal,
    allowed_errors,
    candidate_thresholds,
    one_per_group,
)
from calibration.fidelity import Fidelity, oracle_l2
from calibration.fit import (
    EscalationRate,
    FitError,
    Options,
    Threshold,
    cross_validated_costs,
    fit,
)
from calibration.held_out import HeldOut
from calibration.outputs import OutputsError
from calibration.record import Fit
from calibration.splits import SplitError
from routing import Calibration
from tests.unit.calibration_outputs import (
    CLASS_SIGNALS,
    make_outputs,
    with_losing_high,
    with_reference,
)
from tests.unit.onnx_files import write_graph_set

pytestmark = pytest.mark.usefixtures("remembered_fits")

TOP1 = Options(Fidelity("top1"))
GOAL = Goal(max_risk=0.1, confidence=0.9, method="ltt")


def test_thresholds_are_candidates_of_out_of_fold_scores(graph_set):
    fitted = fit(make_outputs(graph_set, n=600), graph_set, GOAL, TOP1)
    calibration = fitted.calibration
    sign = calibration.score_map.sign
    unseen = calibration.score_map(sign * fitted.values[calibration.signal][fitted.splits["fit"]])
    assert calibration.threshold in candidate_thresholds(unseen)


def test_auto_takes_the_signal_that_cross_validation_prefers(graph_set):
    calibration = fit(make_outputs(graph_set, n=1000), graph_set, GOAL, TOP1).calibration
    costs = {
        name: figures["cv_escalation"]
        for name, figures in calibration.metrics["signals"].items()
        if figures["cv_escalation"] is not None
    }
    assert set(costs) == set(CLASS_SIGNALS)
    assert costs[calibration.signal] == min(costs.values())
    assert calibration.signal in ("margin", "deferral", "layer_lens")  # they see the logits' gap
    assert calibration.metrics["signals"]["cls_path"]["auroc_interval"][0] < 0.5


def test_every_signal_stands_beside_random_and_the_oracle(graph_set):
    metrics_ = fit(make_outputs(graph_set, n=1000), graph_set, GOAL, TOP1).calibration.metrics
    assert set(metrics_["signals"]) == {*CLASS_SIGNALS, "random", "oracle"}
    assert metrics_["signals"]["oracle"]["auroc"] == 1.0  # the oracle is 0 where the answers agree
    assert metrics_["signals"]["oracle"]["spearman"] == pytest.approx(1.0)
    for figures in metrics_["signals"].values():
        if figures["auroc_interval"] is not None:
            low, high = figures["auroc_interval"]
            assert low <= figures["auroc"] <= high


def test_a_signal_no_better_than_random_is_called_so(graph_set):
    outputs = make_outputs(graph_set, n=600)
    poor = fit(outputs, graph_set, GOAL, replace(TOP1, signal="cls_path")).calibration
    good = fit(outputs, graph_set, GOAL, replace(TOP1, signal="margin")).calibration
    assert poor.metrics["no_better_than_random"]
    assert not good.metrics["no_better_than_random"]


@pytest.mark.parametrize("losses", [1, 2, 5, 20])
def test_noise_is_seldom_called_better_than_random(graph_set, losses):
    outputs = make_outputs(graph_set, n=200, group_size=1)
    rows, groups = np.arange(200), np.array(outputs.groups)
    loss = rows < losses
    rng = np.random.default_rng(losses)
    alarms, lost = 0, SimpleNamespace(loss=lambda _: loss, high_loss=lambda _: None)
    for _ in range(30):
        noise = rng.normal(size=200)
        test = HeldOut(outputs, groups, np.float32(noise), 0.0, lost, 0)
        figures = test.signals({"noise": noise}, oracle_l2(outputs), "noise", None, {}, rows)
        alarms += not figures["no_better_than_random"]
    assert alarms <= 4  # Bin(30, 0.025) exceeds this less than once in a thousand


def test_an_interval_of_no_risk_is_the_exact_one(graph_set):
    outputs = make_outputs(graph_set, n=600, group_size=1, unsure_below=-1)
    metrics_ = fit(outputs, graph_set, GOAL, TOP1).calibration.metrics
    assert metrics_["risk"] == 0.0
    # Rule of three, two-sided, of 210 fit images.
    assert metrics_["intervals"]["risk"] == pytest.approx([0.0, 1 - 0.025 ** (1 / 210)])


def test_nothing_certified_means_always_high(graph_set):
    outputs = make_outputs(graph_set, n=300)
    strict = Goal(max_risk=0.001, confidence=0.99, method="ltt")
    calibration = fit(outputs, graph_set, strict, TOP1).calibration
    assert calibration.threshold is None and not calibration.certificate["certified"]
    assert calibration.metrics["escalation_rate"] == 1.0 and calibration.metrics["risk"] == 0.0


def test_where_no_answer_differs_everything_stays_cheap(graph_set):
    outputs = make_outputs(graph_set, n=400, unsure_below=-1)
    calibration = fit(outputs, graph_set, GOAL, TOP1).calibration
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


def test_the_escalation_rate_is_met_on_held_out_images(graph_set):
    outputs = make_outputs(graph_set, n=2000)
    fitted = fit(outputs, graph_set, EscalationRate(0.5), TOP1)
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


def test_a_given_threshold_is_kept(graph_set):
    options = replace(TOP1, signal="cls_path")
    calibration = fit(make_outputs(graph_set), graph_set, Threshold(1.25), options).calibration
    assert (calibration.threshold, calibration.signal) == (1.25, "cls_path")
    assert calibration.chosen_by["threshold"] == 1.25


def test_fit_is_reproducible_and_follows_its_seed(graph_set, tmp_path, remembered_fits):
    outputs = make_outputs(graph_set)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        remembered_fits()
        fit(outputs, graph_set, GOAL, replace(TOP1, seed=seed)).save(tmp_path / name / "c.json")
    a, b, c = ((tmp_path / name / "c.json").read_bytes() for name in "abc")
    assert a == b != c


def test_the_artifact_scores_as_fit_did_after_a_round_trip(graph_set, tmp_path):
    outputs = make_outputs(graph_set, n=600)
    for name in CLASS_SIGNALS:
        fitted = fit(outputs, graph_set, GOAL, replace(TOP1, signal=name))
        fitted.save(tmp_path / "calibration.json")
        loaded = Calibration.load(tmp_path / "calibration.json")
        assert loaded == fitted.calibration
        rest, rows = fitted.splits["certify"], fitted.splits["fit"]
        found = loaded.score(outputs.low)
        np.testing.assert_array_equal(found[rest], fitted.scores[rest])
        # Those of fit images are cross-fitted: of a map and, but for those that learn nothing, of
        # coefficients that learned from others.
        learns = bool(loaded.coefficients)
        assert np.array_equal(found[rows], fitted.scores[rows]) != learns


def test_the_record_belongs_to_its_artifact_and_outputs(graph_set, tmp_path):
    outputs = make_outputs(graph_set)
    artifact = tmp_path / "calibration.json"
    fitted = fit(outputs, graph_set, GOAL, TOP1)
    fitted.save(artifact)
    record = Fit.load(artifact, outputs)
    np.testing.assert_array_equal(record.scores, fitted.scores)
    np.testing.assert_array_equal(record.loss, fitted.loss)
    assert set(record.values) == set(CLASS_SIGNALS) and set(record.splits) == set(fitted.splits)
    with pytest.raises(OutputsError, match="another fit"):
        Fit.load(artifact, make_outputs(graph_set, seed=1))
    content = json.loads(artifact.read_text())
    artifact.write_text(json.dumps({**content, "threshold": 0.0}))
    with pytest.raises(OutputsError, match="another fit"):
        Fit.load(artifact, outputs)
    (tmp_path / "calibration.fit.npz").unlink()
    with pytest.raises(OutputsError, match="fit first"):
        Fit.load(artifact, outputs)


def changed(outputs, **made):
    return replace(outputs, made=replace(outputs.made, **made))


def test_what_cannot_be_fitted_is_refused(graph_set, headless, tmp_path):
    outputs = make_outputs(graph_set)
    others = GraphSet.load(write_graph_set(tmp_path / "others", seeds=(3, 4)))
    with pytest.raises(FitError, match="not of these graphs: another vit_low; collect again"):
        fit(outputs, others, GOAL, TOP1)
    with pytest.raises(FitError, match="another preprocessing"):
        fit(changed(outputs, preprocessing_sha256="0" * 64), graph_set, GOAL, TOP1)
    with pytest.raises(FitError, match="other code of imaging/; collect again"):
        fit(changed(outputs, imaging_sha256="0" * 64), graph_set, GOAL, TOP1)
    with pytest.raises(FitError, match="12 images are too few"):
        fit(make_outputs(graph_set, n=12), graph_set, GOAL, TOP1)
    with pytest.raises(FitError, match="'nonsense' is unknown"):
        fit(outputs, graph_set, GOAL, replace(TOP1, signal="nonsense"))
    with pytest.raises(FitError, match="has no head"):
        cosine = Options(Fidelity("cosine"), signal="margin")
        fit(make_outputs(headless, head=False), headless, GOAL, cosine)
    with pytest.raises(FitError, match="too few of either"):
        same = make_outputs(graph_set, unsure_below=-1)
        fit(same, graph_set, GOAL, replace(TOP1, signal="deferral"))
    with pytest.raises(SplitError, match="1 groups are too few"):
        fit(replace(outputs, groups=("same",) * len(outputs)), graph_set, GOAL, TOP1)
    with pytest.raises(SplitError, match="1 groups are too few"):
        fit(replace(outputs, hashes=("ab" * 32,) * len(outputs)), graph_set, GOAL, TOP1)


@pytest.mark.parametrize("number", [-0.1, 1.5, float("nan"), float("inf")])
def test_an_escalation_rate_is_a_share_and_a_threshold_finite(number):
    with pytest.raises(FitError, match="not between 0 and 1"):
        EscalationRate(number)
    if not np.isfinite(number):
        with pytest.raises(FitError, match="not a finite number"):
            Threshold(number)


def test_the_statement_says_how_grouped_images_are_drawn(graph_set):
    grouped = fit(make_outputs(graph_set, n=600), graph_set, GOAL, TOP1).calibration
    single = fit(make_outputs(graph_set, n=600, group_size=1), graph_set, GOAL, TOP1).calibration
    assert "first a group" in grouped.certificate["statement"]
    assert "group" not in single.certificate["statement"]
    assert grouped.certificate["n"] == single.certificate["n"] / 2 == 195


def test_an_embedding_that_is_no_number_is_a_loss(graph_set):
    outputs = make_outputs(graph_set, unsure_below=-1)
    embedding = outputs.low.embedding.copy()
    embedding[3] = np.nan
    loss = Fidelity("cosine").loss(replace(outputs, low=replace(outputs.low, embedding=embedding)))
    assert np.flatnonzero(loss).tolist() == [3]


def test_few_folders_are_an_error_and_not_a_crash(graph_set):
    for folders in (1, 2, 5, 10):
        outputs = make_outputs(graph_set, n=200, group_size=200 // folders)
        with pytest.raises(SplitError, match=f"{folders} groups are too few"):
            fit(outputs, graph_set, GOAL, replace(TOP1, group_by="folder"))
    outputs = make_outputs(graph_set, n=300, group_size=5)
    fit(outputs, graph_set, GOAL, replace(TOP1, group_by="folder"))


def test_labels_of_only_some_images_of_a_group_still_give_an_interval(graph_set):
    outputs = make_outputs(graph_set, n=300, group_size=5)
    labels = np.where(np.arange(300) % 5 == 4, outputs.labels, -1)  # the last of each group
    metrics_ = fit(replace(outputs, labels=labels), graph_set, GOAL, TOP1).calibration.metrics
    assert metrics_["accuracy_high"] == 1.0
    assert metrics_["intervals"]["accuracy_high"] == pytest.approx([0.025 ** (1 / 21), 1.0])


@pytest.mark.parametrize("test_share", [None, 0.2])
def test_escalated_losses_count_in_the_certificate_and_in_every_figure(graph_set, test_share):
    rungs = with_reference(graph_set)
    outputs = with_losing_high(make_outputs(rungs, n=2000), 0.04)
    fitted = fit(outputs, rungs, GOAL, replace(TOP1, test_share=test_share))
    calibration, certificate = fitted.calibration, fitted.calibration.certificate
    assert certificate["certified"] and certificate["reference"] == "full FP32 model"
    assert "names another class than the full FP32 model" in certificate["statement"]
    lost = np.where(fitted.scores > calibration.threshold, fitted.high_loss, fitted.loss)
    tested = one_per_group(np.array(outputs.groups), fitted.splits["certify"], TOP1.seed)
    measured = fitted.splits[calibration.metrics["split"]]
    assert certificate["errors"] == lost[tested].sum()
    kept_alone = (fitted.scores <= calibration.threshold) & fitted.loss
    assert lost[tested].sum() > kept_alone[tested].sum()
    assert calibration.metrics["risk"] == pytest.approx(lost[measured].mean())
    assert calibration.metrics["agreement_with_high"] == pytest.approx(1 - lost[measured].mean())
    needed = metrics.needed_escalation(
        *(fitted.values["margin"][measured], fitted.loss[measured], GOAL.max_risk),
        fitted.high_loss[measured],
    )
    assert calibration.metrics["signals"]["margin"]["needed_escalation"] == pytest.approx(needed)


def test_a_full_rung_that_loses_too_much_is_never_certified(graph_set):
    rungs = with_reference(graph_set)
    outputs = with_losing_high(make_outputs(rungs, n=1000, unsure_below=3.0), 0.3)
    calibration = fit(outputs, rungs, GOAL, TOP1).calibration
    assert calibration.threshold is None and not calibration.certificate["certified"]
    # Always-high is no way out: the full rung itself is wrong on three images in ten.
    assert calibration.metrics["risk"] > 0.2
    assert calibration.metrics["signals"]["random"]["needed_escalation"] is None
    assert calibration.metrics["signals"]["oracle"]["needed_escalation"] is None


def test_conformal_risk_control_is_refused_for_a_full_rung_that_is_not_the_reference(graph_set):
    rungs = with_reference(graph_set)
    outputs = with_losing_high(make_outputs(rungs, n=600), 0.05)
    with pytest.raises(CertifyError, match="not the reference, so use ltt"):
        fit(outputs, rungs, replace(GOAL, method="crc"), TOP1)


def test_outputs_without_the_reference_that_the_rungs_have_are_of_other_files(graph_set):
    rungs = with_reference(graph_set)
    with pytest.raises(FitError, match="not of these graphs: another reference; collect again"):
        fit(make_outputs(graph_set), rungs, GOAL, TOP1)
    with pytest.raises(FitError, match="not of these graphs: another reference; collect again"):
        fit(with_losing_high(make_outputs(rungs), 0.1), graph_set, GOAL, TOP1)


def test_the_record_keeps_the_losses_of_the_full_rung(graph_set, tmp_path):
    rungs = with_reference(graph_set)
    outputs = with_losing_high(make_outputs(rungs), 0.1)
    fitted = fit(outputs, rungs, GOAL, TOP1)
    fitted.save(tmp_path / "c.json")
    record = Fit.load(tmp_path / "c.json", outputs)
    np.testing.assert_array_equal(record.high_loss, Fidelity("top1").high_loss(outputs))


def test_the_costs_of_signals_count_escalated_losses():
    loss, high_loss = (np.array(row, bool) for row in ([0, 0, 1, 1] * 25, [0, 0, 0, 1] * 25))
    rising = np.tile([1.0, 2, 3, 4], 25)
    ranking = {"rising": rising}
    goal = Goal(0.3, 0.9, "ltt")
    allowed = allowed_errors(100, goal) / 100
    assert 0 < allowed < 0.25
    free = cross_validated_costs(ranking, loss, None, goal, 100)["rising"]
    assert free == pytest.approx(0.5)
    assert cross_validated_costs(ranking, loss, high_loss, goal, 100)["rising"] == np.inf
    rate = EscalationRate(0.5)
    assert cross_validated_costs(ranking, loss, None, rate, 0)["rising"] == 0
    assert cross_validated_costs(ranking, loss, high_loss, rate, 0)["rising"] == 0.25
