import numpy as np
import pytest

from routing import SIGNALS, RungOutputs, ScoreMap, features

B, LAYERS, D, CLASSES, DEPTH = 9, 4, 16, 7, 3
RNG = np.random.default_rng(5)
# Coefficients of every signal that has any, for (B, LAYERS, D, CLASSES) outputs.
LENS = {
    "lens_weights": RNG.normal(size=(DEPTH, D, CLASSES)).astype(np.float32),
    "lens_bias": RNG.normal(size=(DEPTH, CLASSES)).astype(np.float32),
}
COEFFICIENTS = {
    "label_margin": {"cut": np.array([0.3])},
    "cls_regression": {"weights": RNG.normal(size=3 * LAYERS + 1 + D), "bias": np.array([0.5])},
    "layer_lens": {**LENS, "weights": RNG.normal(size=3 * DEPTH), "bias": np.array([0.5])},
    "deferral": {**LENS, "weights": RNG.normal(size=4 + 3 * DEPTH), "bias": np.array([0.5])},
}


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


def test_margin_of_a_single_class_is_constant():
    np.testing.assert_array_equal(
        SIGNALS["margin"].compute(outputs(logits=[[3.0], [-1.0]]), {}), [1.0, 1.0]
    )


def test_label_margin_is_the_distance_of_the_nearest_label_to_its_threshold():
    logits = [[3.0, -0.5, -9.0], [1.0, 4.0, 0.0]]
    cut = {"cut": np.array([1.0])}
    np.testing.assert_array_equal(
        SIGNALS["label_margin"].compute(outputs(logits=logits), cut), [-1.5, 0.0]
    )


def test_softmax_survives_large_logits():
    logits = np.array([[1e4, 1e4], [1e4, -1e4]], np.float32)
    np.testing.assert_allclose(features.log_softmax(logits), [[-np.log(2)] * 2, [0, -2e4]])


def test_entropy_is_that_of_the_probabilities():
    logits = np.log([[0.5, 0.5, 1e-30], [0.25, 0.25, 0.5]])
    np.testing.assert_allclose(
        SIGNALS["entropy"].compute(outputs(logits=logits), {}),
        [np.log(2), 1.5 * np.log(2)],
        rtol=1e-6,
    )


def test_path_features_are_steps_cosines_norms_and_the_final_token():
    layers = [[[3, 4], [3, 4], [-4, 3]]]
    found = features.path_features(outputs(layers))
    np.testing.assert_allclose(found, [[0, 50**0.5, 1, 0, 5, 5, 5, 0, 0]], atol=1e-9)


def test_cls_regression_is_linear_in_its_features():
    rows = random_outputs()
    coefficients = COEFFICIENTS["cls_regression"]
    expected = features.path_features(rows) @ coefficients["weights"] + 0.5
    np.testing.assert_allclose(SIGNALS["cls_regression"].compute(rows, coefficients), expected)


def test_softmax_features_by_hand():
    logarithms = features.log_softmax(np.log([[0.7, 0.2, 0.1]]))
    entropy = -(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1))
    found = features.softmax_features(logarithms)
    np.testing.assert_allclose(found, [[0.7, 0.5, entropy, np.log(3.5)]])


def test_lens_features_by_hand():
    # Two classes; of layers 0..3 the lens reads 1 and 2; its map is the identity.
    layers = np.log([[[1, 1], [0.9, 0.1], [0.2, 0.8], [5, 5]]])
    rows = outputs(layers, np.log([[0.25, 0.75]]))
    logarithms = features.log_softmax(rows.logits)
    found = features.lens_features(rows, logarithms, np.stack([np.eye(2)] * 2), np.zeros((2, 2)))
    divergences = [0.25 * np.log(0.25 / p) + 0.75 * np.log(0.75 / (1 - p)) for p in (0.9, 0.2)]
    np.testing.assert_allclose(found, [[1, 0, *divergences, 0.8, 0.6]], rtol=1e-5)


def test_deferral_weighs_softmax_features_before_lens_features():
    rows = random_outputs()
    weights = COEFFICIENTS["deferral"]["weights"]
    logarithms = features.log_softmax(rows.logits)
    lens = features.lens_features(rows, logarithms, LENS["lens_weights"], LENS["lens_bias"])
    expected = features.softmax_features(logarithms) @ weights[:4] + lens @ weights[4:] + 0.5
    np.testing.assert_allclose(
        SIGNALS["deferral"].compute(rows, COEFFICIENTS["deferral"]), expected
    )


def random_outputs():
    rng = np.random.default_rng(0)
    layers = rng.normal(size=(B, LAYERS + 1, D)).astype(np.float32)
    logits = rng.normal(size=(B, CLASSES)).astype(np.float32)
    return RungOutputs(rng.normal(size=(B, D)).astype(np.float32), layers, logits)


@pytest.mark.parametrize("name", sorted(SIGNALS))
def test_a_value_does_not_depend_on_the_batch(name):
    rows, coefficients = random_outputs(), COEFFICIENTS.get(name, {})
    whole = SIGNALS[name].compute(rows, coefficients)
    alone = [SIGNALS[name].compute(rows.rows([i]), coefficients)[0] for i in range(B)]
    # A score is FP32: its bits must not depend on the batch.
    np.testing.assert_array_equal(whole.astype(np.float32), np.float32(alone))
    assert len(set(whole)) == B


@pytest.mark.parametrize("name", sorted(SIGNALS))
def test_a_signal_says_which_output_it_lacks(name):
    bare = RungOutputs(np.zeros((1, D), np.float32), None, None)
    with pytest.raises(ValueError, match="needs"):
        SIGNALS[name].compute(bare, COEFFICIENTS.get(name, {}))


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
