import numpy as np
import pytest

from routing import SIGNALS, RungOutputs, ScoreMap, softmax


def outputs(cls_layers=None, logits=None):
    rows = len(cls_layers if cls_layers is not None else logits)
    return RungOutputs(
        np.zeros((rows, 2), np.float32),
        None if cls_layers is None else np.asarray(cls_layers, np.float32),
        None if logits is None else np.asarray(logits, np.float32),
    )


def test_cls_path_is_the_mean_step_length():
    # Steps of length 5 and 13 (a 3-4-5 and a 5-12-13 triangle); the second image stands still.
    layers = [[[0, 0], [3, 4], [8, 16]], [[1, 1], [1, 1], [1, 1]]]
    np.testing.assert_allclose(SIGNALS["cls_path"].compute(outputs(layers), {}), [9.0, 0.0])


def test_margin_is_one_minus_the_gap_of_the_two_best():
    logits = np.log([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]])
    np.testing.assert_allclose(
        SIGNALS["margin"].compute(outputs(logits=logits), {}), [0.5, 1.0], atol=1e-6
    )


def test_margin_of_a_single_class_is_zero():
    np.testing.assert_array_equal(
        SIGNALS["margin"].compute(outputs(logits=[[3.0], [-1.0]]), {}), [0.0, 0.0]
    )


def test_softmax_survives_large_logits():
    np.testing.assert_allclose(softmax(np.array([[1e4, 1e4]], np.float32)), [[0.5, 0.5]])


@pytest.mark.parametrize("name", sorted(SIGNALS))
def test_a_value_does_not_depend_on_the_batch(name):
    rng = np.random.default_rng(0)
    layers = rng.normal(size=(9, 5, 16)).astype(np.float32)
    logits = rng.normal(size=(9, 7)).astype(np.float32)
    whole = SIGNALS[name].compute(outputs(layers, logits), {})
    alone = [
        SIGNALS[name].compute(outputs(layers[i : i + 1], logits[i : i + 1]), {})[0]
        for i in range(9)
    ]
    np.testing.assert_array_equal(whole, alone)  # bit for bit
    assert len(set(whole)) == 9


@pytest.mark.parametrize("name", sorted(SIGNALS))
def test_a_signal_says_which_output_it_lacks(name):
    with pytest.raises(ValueError, match="needs"):
        SIGNALS[name].compute(RungOutputs(np.zeros((1, 2), np.float32), None, None), {})


def test_score_map_interpolates_and_goes_on_beyond_the_outer_knots():
    score_map = ScoreMap(-1, (-2.0, 0.0, 1.0), (1.0, 2.0, 4.0))
    raw = np.array([3.0, 2.0, 1.0, 0.0, -0.5, -1.0, -2.0])
    np.testing.assert_allclose(score_map(raw), [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert score_map(raw).dtype == np.float32


@pytest.mark.parametrize(
    ("sign", "knots", "values", "message"),
    [
        (0, (0.0, 1.0), (0.0, 1.0), "sign"),
        (1, (0.0,), (0.0,), "at least 2"),
        (1, (0.0, 1.0), (0.0, 1.0, 2.0), "same length"),
        (1, (0.0, 0.0), (0.0, 1.0), "knots"),
        (1, (0.0, 1.0), (1.0, 1.0), "values"),
        (1, (0.0, float("inf")), (0.0, 1.0), "knots"),
    ],
)
def test_score_map_refuses_what_is_not_strictly_monotone(sign, knots, values, message):
    with pytest.raises(ValueError, match=message):
        ScoreMap(sign, knots, values)
