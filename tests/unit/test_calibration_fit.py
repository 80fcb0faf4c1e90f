import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.collect import Outputs
from calibration.fit import (
    FitError,
    Target,
    fit,
    fit_score_map,
    oracle_l2,
    split_by_group,
    threshold_for_rate,
)
from routing import RungOutputs, RungSet
from tests.unit.onnx_files import CLASSES, LAYERS, D, write_rung_set


@pytest.fixture
def rung_set(tmp_path):
    return RungSet.load(write_rung_set(tmp_path / "onnx"))


def make_outputs(rung_set, n=400, seed=0):
    """Images whose low and high answers disagree where the low margin is small."""
    rng = np.random.default_rng(seed)
    low_logits = rng.normal(size=(n, CLASSES)).astype(np.float32) * 3
    ordered = np.sort(low_logits, axis=1)
    unsure = ordered[:, -1] - ordered[:, -2] < 1.0
    high_logits = np.where(unsure[:, None], low_logits[:, ::-1], low_logits)
    low_embedding = rng.normal(size=(n, D)).astype(np.float32)
    return Outputs(
        low=RungOutputs(
            low_embedding, rng.normal(size=(n, LAYERS + 1, D)).astype(np.float32), low_logits
        ),
        high=RungOutputs(low_embedding + unsure[:, None].astype(np.float32), None, high_logits),
        labels=high_logits.argmax(axis=1).astype(np.int64),
        names=tuple(map(str, range(n))),
        groups=tuple(str(i // 2) for i in range(n)),
        hashes=tuple(map(str, range(n))),
        rung_hashes={name: rung.sha256 for name, rung in rung_set.rungs.items()},
        source="made up",
    )


def test_oracle_is_the_distance_of_the_embeddings(rung_set):
    oracle = oracle_l2(make_outputs(rung_set))
    np.testing.assert_allclose(np.unique(oracle.round(4)), [0.0, round(D**0.5, 4)])


@given(st.lists(st.integers(0, 40), min_size=30, max_size=200), st.integers(0, 5))
def test_splits_are_disjoint_complete_and_never_divide_a_group(groups, seed):
    splits = split_by_group(tuple(map(str, groups)), seed)
    rows = np.concatenate(list(splits.values()))
    assert sorted(rows) == list(range(len(groups)))
    where = [{groups[row] for row in index} for index in splits.values()]
    assert where[0].isdisjoint(where[1])


def test_splits_have_their_shares_and_follow_the_seed():
    groups = tuple(map(str, range(1000)))
    splits = split_by_group(groups, 0)
    assert [len(index) for index in splits.values()] == [700, 300]
    assert not np.array_equal(splits["fit"], split_by_group(groups, 1)["fit"])


def test_the_sign_is_learned():
    rng = np.random.default_rng(0)
    raw = rng.uniform(size=500)
    for direction in (1, -1):
        oracle = 5 + direction * raw + rng.normal(scale=0.1, size=500)
        assert fit_score_map(raw, oracle, None).sign == direction
        loss = direction * raw > direction * 0.5
        assert fit_score_map(raw, oracle, loss).sign == direction


def test_the_map_estimates_the_oracle():
    rng = np.random.default_rng(1)
    raw = rng.uniform(size=2000)
    oracle = raw**2 + rng.normal(scale=0.02, size=2000)
    score = fit_score_map(raw, oracle, None)(raw)
    assert np.abs(score - raw**2).mean() < 0.02


@given(st.integers(0, 1000), st.integers(30, 300))
def test_the_map_keeps_the_signals_order(seed, n):
    rng = np.random.default_rng(seed)
    raw, oracle = rng.normal(size=n), rng.uniform(size=n)
    score_map = fit_score_map(raw, oracle, None)
    scores = score_map(raw)[np.argsort(score_map.sign * raw)]
    assert np.all(np.diff(scores) >= 0)
    assert len(np.unique(scores)) > 0.9 * n  # no plateaus beyond FP32's resolution


def test_a_constant_signal_still_gives_a_map():
    scores = fit_score_map(np.ones(50), np.linspace(1, 2, 50), None)(np.ones(50))
    np.testing.assert_allclose(scores, 1.5, atol=1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.333, 0.9, 1.0])
def test_the_threshold_meets_the_rate(rate):
    scores = np.random.default_rng(0).normal(size=300).astype(np.float32)
    threshold = threshold_for_rate(scores, rate)
    assert (scores.astype(np.float64) > threshold).sum() == round(rate * 300)
    assert threshold not in scores


def test_fit_chooses_the_rate_and_measures_on_the_rest(rung_set):
    outputs = make_outputs(rung_set, n=2000)
    calibration = fit(outputs, rung_set, Target(escalation_rate=0.5))
    metrics = calibration.metrics
    assert calibration.signal == "margin"
    assert metrics["images"] == calibration.data["splits"]["test"]
    assert abs(metrics["escalation_rate"] - 0.5) < 0.05
    # Disagreement is exactly "small logit margin", which the margin signal ranks well.
    assert metrics["agreement_with_high"] > metrics["agreement_low"] + 0.15
    assert metrics["accuracy_high"] == 1.0
    assert metrics["accuracy_adaptive"] == pytest.approx(metrics["agreement_with_high"])


def test_a_given_threshold_is_kept(rung_set):
    calibration = fit(make_outputs(rung_set), rung_set, Target(threshold=1.25), "cls_path")
    assert (calibration.threshold, calibration.signal) == (1.25, "cls_path")


def test_fit_is_reproducible(rung_set):
    outputs = make_outputs(rung_set)
    target = Target(escalation_rate=0.2)
    assert fit(outputs, rung_set, target) == fit(outputs, rung_set, target)


def test_what_cannot_be_fitted_is_refused(rung_set, tmp_path):
    target = Target(escalation_rate=0.1)
    outputs = make_outputs(rung_set)
    others = RungSet.load(write_rung_set(tmp_path / "others", seeds=(3, 4)))
    with pytest.raises(FitError, match="other ONNX files"):
        fit(outputs, others, target)
    with pytest.raises(FitError, match="12 images are too few"):
        fit(make_outputs(rung_set, n=12), rung_set, target)
    with pytest.raises(FitError, match="'nonsense' is unknown"):
        fit(outputs, rung_set, target, "nonsense")
    headless = RungSet.load(write_rung_set(tmp_path / "headless", classes=None))
    hashes = {name: rung.sha256 for name, rung in headless.rungs.items()}
    with pytest.raises(FitError, match="has no head"):
        fit(Outputs(**{**outputs.__dict__, "rung_hashes": hashes}), headless, target, "margin")
    one_group = Outputs(**{**outputs.__dict__, "groups": ("same",) * len(outputs)})
    with pytest.raises(FitError, match="groups"):
        fit(one_group, rung_set, target)


@pytest.mark.parametrize(
    ("rate", "threshold"), [(None, None), (0.1, 1.0), (1.5, None), (None, float("nan"))]
)
def test_a_target_is_exactly_one_sensible_number(rate, threshold):
    with pytest.raises(FitError):
        Target(rate, threshold)
