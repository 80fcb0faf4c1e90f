"""When an answer is a loss, which losses a model's task has, and the oracle."""

from dataclasses import replace

import numpy as np
import pytest

from calibration.fidelity import Fidelity, FidelityError, disagrees, oracle_cosine, oracle_l2
from routing import RungOutputs, fidelity_loss
from tests.unit.calibration_outputs import make_outputs, with_losing_high
from tests.unit.onnx_files import D


def test_the_oracle_is_the_distance_of_the_embeddings(graph_set):
    outputs = make_outputs(graph_set)
    np.testing.assert_allclose(np.unique(oracle_l2(outputs).round(4)), [0.0, round(D**0.5, 4)])
    low, high = outputs.low.embedding[0], outputs.high.embedding[0]
    expected = low @ high / np.linalg.norm(low) / np.linalg.norm(high)
    assert oracle_cosine(outputs)[0] == pytest.approx(expected, abs=1e-6)


def test_the_fidelity_losses(graph_set, headless):
    outputs = make_outputs(graph_set)
    np.testing.assert_array_equal(Fidelity("top1").loss(outputs), disagrees(outputs))
    for tolerance in (0.01, 0.5):
        expected = oracle_cosine(outputs) < 1 - tolerance
        np.testing.assert_array_equal(Fidelity("cosine", tolerance).loss(outputs), expected)
    with pytest.raises(FidelityError, match="has none; use cosine"):
        Fidelity("top1").loss(make_outputs(headless, head=False))
    with pytest.raises(FidelityError, match="'top5' is none of top1, labels, value, cosine"):
        Fidelity("top5")
    with pytest.raises(FidelityError, match="--tolerance 0"):
        Fidelity("cosine", 0)


def test_losses_are_about_the_reference_and_not_about_the_full_rung(graph_set):
    plain = make_outputs(graph_set)
    outputs = with_losing_high(plain, 0.2)
    for fidelity in (Fidelity("top1"), Fidelity("cosine", 0.05)):
        np.testing.assert_array_equal(fidelity.loss(outputs), fidelity.loss(plain))
        assert fidelity.high_loss(plain) is None
        lost = fidelity.high_loss(outputs)
        truth = outputs.reference
        expected = {
            "top1": outputs.high.logits.argmax(1) != truth.logits.argmax(1),
            "cosine": oracle_cosine(replace(outputs, low=outputs.high)) < 0.95,
        }
        np.testing.assert_array_equal(lost, expected[fidelity.kind])
        assert 0.1 < lost.mean() < 0.3
    np.testing.assert_array_equal(oracle_l2(outputs), oracle_l2(plain))


@pytest.mark.parametrize(
    ("task", "kind", "settings", "message"),
    [
        ("value", None, {}, "give --fidelity value --tolerance X"),
        ("value", "value", {}, "--fidelity value needs --tolerance X"),
        ("value", "top1", {}, "top1 means nothing for a model that answers a value"),
        ("value", "labels", {}, "use value or cosine"),
        ("labels", "top1", {}, "top1 means nothing for a model that answers independent labels"),
        ("labels", "value", {"tolerance": 1}, "use labels or cosine"),
        ("classes", "labels", {}, "labels means nothing for a model that answers one of several"),
        ("classes", "value", {"tolerance": 1}, "use top1 or cosine"),
        (None, "labels", {}, "labels needs a head, the model has none; use cosine"),
        ("value", "value", {"tolerance": 0.0}, "--tolerance 0.0 is not a finite number above 0"),
        ("value", "value", {"tolerance": float("inf")}, "--tolerance inf is not a finite number"),
        ("classes", None, {"relative": True}, "--relative goes with --fidelity value"),
        ("classes", None, {"label_threshold": 0.3}, "--label-threshold goes with"),
        ("labels", None, {"label_threshold": 1.0}, "--label-threshold 1.0 is not between"),
    ],
)
def test_a_loss_that_means_nothing_for_the_task_is_refused(task, kind, settings, message):
    with pytest.raises(FidelityError, match=message.replace("(", r"\(")) as refused:
        Fidelity.asked(task, kind, **settings)
    assert "\n" not in str(refused.value)


def test_each_task_has_its_default_loss():
    found = {task: Fidelity.asked(task, None).kind for task in ("classes", "labels", None)}
    assert found == {"classes": "top1", "labels": "labels", None: "cosine"}


def answers(*logits):
    rows = np.array(logits, np.float32)
    return RungOutputs(np.ones((len(rows), 2), np.float32), None, rows)


def test_a_set_of_labels_differs_where_any_label_crosses_the_threshold():
    low = answers([0.1, -3.0], [0.0, -1.0], [2.0, 5.0], [np.nan, 1.0])
    high = answers([9.0, -0.1], [-0.1, -1.0], [2.0, -5.0], [np.nan, 1.0])
    chosen_by = {"fidelity": "labels", "label_threshold": 0.5}
    assert fidelity_loss(chosen_by, low, high).tolist() == [False, True, True, True]
    # At 0.95 (a logit of 2.94) the first image gains a label, and the second has none either way.
    stricter = {**chosen_by, "label_threshold": 0.95}
    assert fidelity_loss(stricter, low, high).tolist() == [True, False, True, True]


def test_a_value_may_differ_by_the_tolerance_in_every_output():
    low = answers([1.0, 10.0], [1.0, 10.0], [1.0, 10.0], [np.nan, 10.0])
    high = answers([1.5, 10.0], [1.0, 11.0], [1.0, 10.5], [1.0, 10.0])
    absolute = {"fidelity": "value", "tolerance": 0.5, "relative": False}
    assert fidelity_loss(absolute, low, high).tolist() == [False, True, False, True]
    relative = {"fidelity": "value", "tolerance": 0.125, "relative": True}
    assert fidelity_loss(relative, low, high).tolist() == [True, False, False, True]


def test_another_class_is_a_loss_and_so_is_none():
    low = answers([2.0, 1.0], [2.0, 1.0], [np.nan, 1.0], [np.nan, 1.0], [np.inf, 1.0])
    high = answers([3.0, 0.0], [1.0, 2.0], [np.nan, 1.0], [5.0, 1.0], [5.0, 1.0])
    found = fidelity_loss({"fidelity": "top1"}, low, high)
    assert found.tolist() == [False, True, True, True, False]


def test_top1_of_one_output_is_no_loss_but_an_error():
    with pytest.raises(ValueError, match="does not apply"):
        fidelity_loss({"fidelity": "top1"}, answers([1.0]), answers([-1.0]))
