"""What the router knows of outages, pressure, audits and shadows, without Triton."""

import math

import numpy as np
import pytest
from scipy.stats import beta

from routing import Relief, RiskTest, RungOutputs, fidelity_loss, is_outage
from routing.audit import compare_decisions
from tests.unit.fakes import FakeRung, images, make_calibration

# As tritonserver 2.51.0 words them, seen by a model that calls another.
OUTAGES = [
    "Failed for execute the inference request. Model 'vit_high' is not ready.",
    "Model vit_low - Error when running inference: Server not ready",
    "Failed to process the request(s) for model 'vit_high_0_0', message: Stub process "
    "'vit_high_0_0' is not healthy.",
    "Exceeds maximum queue size",
    "[request id: <id_unknown>] Exceeds maximum queue size",
    "Request timeout expired",
    "Request for unknown model: 'vit_high' is not found",
    "Request for unknown model: 'vit_high' has no available versions",
]


@pytest.mark.parametrize("message", OUTAGES)
def test_an_outage_is_told_from_its_text(message):
    assert is_outage(message)


@pytest.mark.parametrize(
    "message",
    ["", "onnxruntime: RUNTIME_EXCEPTION: bad Gather", "inference input 'image' has wrong shape"],
)
def test_a_failure_is_no_outage(message):
    assert not is_outage(message)


def test_the_threshold_rises_in_equal_steps_from_the_depth_to_a_full_batch():
    relief = Relief(depth=3, full=6, highest=9.0)
    found = [relief.threshold(1.0, waiting) for waiting in range(9)]
    assert found == [1, 1, 1, 3, 5, 7, 9, 9, 9]


def test_the_threshold_never_falls():
    assert Relief(depth=1, full=2, highest=0.0).threshold(1.0, 2) == 1.0


def test_a_shadow_counts_where_two_artifacts_part():
    low = FakeRung(0.0)(images(0.1, 0.4, 0.6, 0.9))
    live = np.array([False, False, True, True])  # a threshold of 0.5
    assert compare_decisions(make_calibration(0.3), low, live) == {
        "both_low": 1,
        "both_high": 2,
        "only_live_high": 0,
        "only_candidate_high": 1,
    }
    assert compare_decisions(make_calibration(0.7), low, live)["only_live_high"] == 1
    assert compare_decisions(make_calibration(None), low, live)["only_candidate_high"] == 2


def test_a_loss_is_another_class_or_too_small_a_cosine():
    low = RungOutputs(np.eye(2, dtype=np.float32), None, np.float32([[2, 1], [1, 2]]))
    high = RungOutputs(np.float32([[1, 0.1], [1, 0]]), None, np.float32([[2, 1], [2, 1]]))
    assert fidelity_loss({"fidelity": "top1"}, low, high).tolist() == [False, True]
    assert fidelity_loss({"fidelity": "cosine", "tolerance": 0.1}, low, high).tolist() == [
        False,
        True,
    ]
    headless = RungOutputs(low.embedding, None, None)
    with pytest.raises(ValueError, match="does not apply"):
        fidelity_loss({"fidelity": "top1"}, headless, headless)


# --- the risk test: valid at every look, and able to see -----------------------------------------

EPSILON, ALPHA, IMAGES, REPEATS = 0.05, 0.1, 2000, 400


def share_alarmed(risk, seed):
    """Share of repeats in which the test, read after every image, ever raises an alarm."""
    losses = np.random.default_rng(seed).random((REPEATS, IMAGES)) < risk
    alarms = 0
    for row in losses:
        test = RiskTest(EPSILON, ALPHA)
        alarms += bool(first_alarm(test, row))
    return alarms / REPEATS


def first_alarm(test, losses):
    """Images seen at the first alarm; 0: never. Looks after each loss: others only calm it."""
    for seen, lost in enumerate(losses.tolist(), start=1):
        test.observe(lost)
        if lost and test.is_contradicted:
            return seen
    return 0


def test_at_the_certified_risk_it_alarms_no_more_often_than_alpha():
    # Five standard errors of a share of 0.1 over 400 repeats.
    margin = 5 * math.sqrt(ALPHA * (1 - ALPHA) / REPEATS)
    assert share_alarmed(EPSILON, seed=5) <= ALPHA + margin


def test_a_risk_of_twice_the_certified_is_seen():
    assert share_alarmed(2 * EPSILON, seed=6) > 0.95


def test_a_test_that_forgot_the_many_looks_would_be_found_out():
    """A fixed-sample z-test read after every image alarms far too often on the same data."""
    losses = np.random.default_rng(5).random((REPEATS, IMAGES)) < EPSILON
    seen = np.arange(1, IMAGES + 1)
    z = (losses.cumsum(axis=1) - EPSILON * seen) / np.sqrt(EPSILON * (1 - EPSILON) * seen)
    assert (z[:, 50:] > 1.2816).any(axis=1).mean() > 3 * ALPHA


@pytest.mark.parametrize("sound", [200, 5000])
def test_a_long_time_of_sound_images_does_not_hide_that_they_have_changed(sound):
    """By a risk of five times the certified, within 250 images of the change in most repeats."""
    rng, seen = np.random.default_rng(7), []
    for _ in range(20):
        test = RiskTest(EPSILON)
        for lost in rng.random(sound) < 0.02:
            test.observe(bool(lost))
        assert not test.is_contradicted
        seen.append(first_alarm(test, rng.random(1000) < 5 * EPSILON))
    assert 0 < np.median(seen) < 250 and len(test.moments) < 100


def test_evidence_falls_with_sound_images_and_grows_with_losses():
    test = RiskTest(EPSILON)
    assert test.log_evidence == pytest.approx(0)
    for _ in range(50):
        test.observe(False)
    assert test.log_evidence < 0 and not test.is_contradicted
    for _ in range(30):
        test.observe(True)
    assert test.is_contradicted


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -0.1, math.nan])
def test_a_risk_that_nothing_can_contradict_is_refused(epsilon):
    with pytest.raises(ValueError, match="not between 0 and 1"):
        RiskTest(epsilon)


@pytest.mark.parametrize(("allowed", "n"), [(0, 19), (9, 200), (500, 10_000)])
def test_a_certificate_on_average_is_tested_at_what_its_risk_may_be(allowed, n):
    test = RiskTest.of({"method": "crc", "epsilon": 0.05, "allowed": allowed, "n": n})
    assert test.epsilon == pytest.approx(beta.isf(0.005, allowed + 1, n - allowed), rel=1e-9)
    assert test.alpha == 0.005


def test_a_certificate_with_confidence_is_tested_at_its_risk():
    test = RiskTest.of({"method": "ltt", "epsilon": 0.05, "allowed": 9, "n": 200})
    assert (test.epsilon, test.alpha) == (0.05, 0.01)
