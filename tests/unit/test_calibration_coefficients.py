import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from calibration.coefficients import (
    FitSample,
    applicable,
    fit_coefficients,
    out_of_fold,
    signal_values,
)
from calibration.fidelity import disagrees, oracle_l2
from routing import SIGNALS, RungOutputs, features
from tests.unit.calibration_outputs import CLASS_SIGNALS, make_outputs


def sample_of(outputs):
    loss = disagrees(outputs)
    if loss is None:
        loss = oracle_l2(outputs) > 1
    return FitSample(outputs.low, oracle_l2(outputs), loss, np.array(outputs.groups))


def test_every_signal_gets_exactly_the_coefficients_it_reads(graph_set):
    fitted = fit_coefficients(sample_of(make_outputs(graph_set)), 0)
    assert list(fitted) == CLASS_SIGNALS
    for name, coefficients in fitted.items():
        assert sorted(coefficients) == sorted(SIGNALS[name].coefficients)
        assert all(np.isfinite(array).all() for array in coefficients.values())


def test_a_headless_model_has_the_signals_of_its_cls_token(graph_set):
    outputs = make_outputs(graph_set, head=False)
    assert applicable(outputs.low) == ["cls_path", "cls_regression"]
    assert list(fit_coefficients(sample_of(outputs), 0)) == ["cls_path", "cls_regression"]


def test_cls_regression_finds_a_linear_oracle(graph_set):
    outputs = make_outputs(graph_set, n=600)
    sample = sample_of(outputs)
    rows = features.path_features(outputs.low)
    target = rows @ np.random.default_rng(1).normal(size=rows.shape[1]) + 3
    sample = FitSample(sample.low, target, sample.loss, sample.groups)
    found = signal_values(
        "cls_regression", outputs.low, fit_coefficients(sample, 0)["cls_regression"]
    )
    np.testing.assert_allclose(found, target, atol=0.05 * target.std())


def test_the_lens_finds_a_linear_head(graph_set):
    outputs = make_outputs(graph_set, n=600)
    head = np.random.default_rng(1).normal(size=outputs.low.logits.shape[1:] + (6,)).T
    low = RungOutputs(
        outputs.low.embedding,
        outputs.low.cls_layers,
        (outputs.low.cls_layers[:, -2] @ head + 2).astype(np.float32),
    )
    lens = fit_coefficients(
        FitSample(low, oracle_l2(outputs), disagrees(outputs), np.array(outputs.groups)), 0
    )["layer_lens"]
    np.testing.assert_allclose(lens["lens_weights"][-1], head, atol=0.02)
    np.testing.assert_allclose(lens["lens_bias"][-1], 2, atol=0.02)
    # With the very head, the layer before the last always predicts the final class.
    logarithms = features.log_softmax(low.logits)
    rows = features.lens_features(low, logarithms, lens["lens_weights"], lens["lens_bias"])
    assert rows[:, 2].mean() < 0.02


def test_learned_signals_rank_the_loss_on_unseen_images(graph_set):
    train, test = make_outputs(graph_set, n=800), make_outputs(graph_set, n=800, seed=1)
    fitted = fit_coefficients(sample_of(train), 0)
    values = signal_values("deferral", test.low, fitted["deferral"])
    assert roc_auc_score(disagrees(test), values) > 0.95  # the loss is a function of the logits


def test_out_of_fold_values_promise_no_more_than_chance_where_there_is_nothing_to_learn(graph_set):
    outputs = make_outputs(graph_set, n=300)
    noise = np.random.default_rng(3).uniform(size=300) < 0.3
    sample = FitSample(outputs.low, oracle_l2(outputs), noise, np.array(outputs.groups))
    unseen = out_of_fold(sample, 0)["deferral"]
    seen = signal_values("deferral", outputs.low, fit_coefficients(sample, 0)["deferral"])
    assert roc_auc_score(noise, seen) > 0.58  # learned by heart
    assert 0.35 < roc_auc_score(noise, unseen) < 0.55


def test_cross_validation_never_divides_a_group(graph_set):
    sample = sample_of(make_outputs(graph_set, group_size=7))
    for train, held_out in sample.folds(0):
        assert set(sample.groups[train]).isdisjoint(sample.groups[held_out])


@pytest.mark.parametrize("losses", [0, 1, 400])
def test_signals_that_have_nothing_to_learn_are_left_out(graph_set, losses):
    outputs = make_outputs(graph_set)
    loss = np.arange(400) < losses
    sample = FitSample(outputs.low, oracle_l2(outputs), loss, np.array(outputs.groups))
    expected = ["margin", "entropy", "cls_path", "cls_regression"]
    assert list(fit_coefficients(sample, 0)) == expected
    assert list(out_of_fold(sample, 0)) == expected


def test_values_do_not_depend_on_how_many_rows_are_computed_at_once(graph_set):
    outputs = make_outputs(graph_set, n=1300)
    fitted = fit_coefficients(sample_of(outputs), 0)
    for name, coefficients in fitted.items():
        whole = SIGNALS[name].compute(outputs.low, coefficients)
        np.testing.assert_allclose(signal_values(name, outputs.low, coefficients), whole, rtol=1e-4)
