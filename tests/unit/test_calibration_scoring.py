import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.certify import Goal
from calibration.fidelity import Fidelity
from calibration.fit import Options, fit
from calibration.scoring import (
    fit_score_map,
    flat_score,
    learn_sign,
    score_spread,
    threshold_for_rate,
)
from calibration.tables import print_fit
from tests.unit.calibration_outputs import make_outputs
from tests.unit.onnx_files import D
from tests.unit.pages import squeeze

GOAL = Goal(max_risk=0.1, confidence=0.9, method="ltt")
NO_LOSS = np.zeros(300, dtype=bool)


def test_the_sign_is_learned_from_the_loss_before_the_oracle():
    raw = np.linspace(0, 1, 300)
    loss = raw < 0.3
    assert learn_sign(raw, oracle=raw, loss=loss) == -1  # against the oracle, which says +1
    assert learn_sign(raw, oracle=raw, loss=~loss) == 1
    assert learn_sign(raw, oracle=-raw, loss=NO_LOSS) == -1
    assert learn_sign(raw, oracle=raw, loss=~NO_LOSS) == 1
    assert learn_sign(np.ones(300), oracle=raw, loss=NO_LOSS) == 1


def test_the_map_predicts_the_oracle():
    rng = np.random.default_rng(1)
    raw = rng.uniform(size=2000)
    oracle = raw**2 + rng.normal(scale=0.02, size=2000)
    score = fit_score_map(raw, oracle, 1)(raw)
    assert np.abs(score - raw**2).mean() < 0.02


@given(st.integers(0, 1000), st.integers(30, 300), st.sampled_from([-1, 1]))
def test_the_map_keeps_the_signals_order(seed, n, sign):
    rng = np.random.default_rng(seed)
    raw, oracle = rng.normal(size=n), rng.uniform(size=n)
    scores = fit_score_map(raw, oracle, sign)(raw)[np.argsort(sign * raw)]
    assert np.all(np.diff(scores) >= 0)
    assert len(np.unique(scores)) > 0.9 * n  # no plateaus beyond FP32's resolution


def test_a_constant_signal_still_gives_a_map():
    scores = fit_score_map(np.ones(50), np.linspace(1, 2, 50), 1)(np.ones(50))
    np.testing.assert_allclose(scores, 1.5, atol=1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.333, 0.9, 1.0])
def test_the_threshold_meets_the_rate(rate):
    scores = np.random.default_rng(0).normal(size=300).astype(np.float32)
    threshold = threshold_for_rate(scores, rate)
    assert (scores.astype(np.float64) > threshold).sum() == round(rate * 300)
    assert threshold not in scores


def test_tied_values_keep_the_mean_of_all_their_images():
    rng = np.random.default_rng(0)
    raw = np.concatenate([np.zeros(600), np.linspace(1, 2, 400)])
    oracle = np.concatenate([rng.normal(10, 1, 600), rng.normal(20, 1, 400)])
    score = fit_score_map(raw, oracle, 1)(np.zeros(1))[0]
    assert score == pytest.approx(oracle[:600].mean(), abs=0.03)


def test_an_oracle_that_says_nothing_still_leaves_the_order_in_fp32():
    raw = np.random.default_rng(0).normal(size=200)
    scores = fit_score_map(raw, np.full(200, 50.0), 1)(raw)
    assert len(np.unique(scores)) > 150
    assert np.all(np.diff(scores[np.argsort(raw)]) >= 0)
    np.testing.assert_allclose(scores, 50, rtol=1e-3)


def unpredictable(graph_set, n=2000, seed=2):
    """What the full rung changes has nothing to do with the cheap one's outputs."""
    outputs, rng = make_outputs(graph_set, n=n, seed=seed), np.random.default_rng(seed)
    embedding = outputs.low.embedding + rng.normal(size=(n, D)).astype(np.float32)
    logits = rng.normal(size=outputs.high.logits.shape).astype(np.float32)
    return replace(outputs, high=replace(outputs.high, embedding=embedding, logits=logits))


def test_a_score_that_hardly_tells_images_apart_is_said(graph_set, capsys):
    fitted = fit(unpredictable(graph_set), graph_set, GOAL, Options(Fidelity("top1")))
    spread = fitted.calibration.metrics["score_spread"]
    measured = fitted.scores[fitted.splits["fit"]]
    assert spread["score"] == pytest.approx(np.ptp(np.quantile(measured, [0.05, 0.95])))
    assert spread["score"] < 0.05 * spread["oracle"]
    print_fit(fitted.calibration)
    assert "The score hardly tells images apart: the middle 90 %" in squeeze(
        capsys.readouterr().out
    )


def test_a_score_that_most_images_share_is_said():
    oracle = np.linspace(0, 5, 100)
    shared = np.where(np.arange(100) < 60, 1.0, oracle)
    assert "60% of the images share one value" in flat_score(score_spread(shared, oracle))
    assert flat_score(score_spread(oracle, oracle)) == ""
    assert flat_score(score_spread(oracle, np.zeros(100))) == ""  # nothing to tell apart


def test_a_score_that_tells_them_apart_is_not_complained_of_and_its_threshold_is_printed(
    graph_set, capsys
):
    fitted = fit(make_outputs(graph_set, n=600), graph_set, GOAL, Options(Fidelity("top1")))
    print_fit(fitted.calibration)
    out = squeeze(capsys.readouterr().out)
    assert "hardly tells" not in out
    (printed,) = re.findall(r"threshold (\S+): images with a larger score", out)
    assert float(printed) == fitted.calibration.threshold
