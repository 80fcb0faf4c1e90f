import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing import (
    UNSCORED,
    CascadeAnswer,
    CascadeRequest,
    GoneError,
    Overrides,
    Policy,
    Relief,
    RequestError,
    RungError,
    answered_score,
    run_cascade,
    score_of_answer,
)
from tests.unit.fakes import FakeRung, images, make_calibration

LOW, HIGH = 100.0, 200.0


def ask(image, **overrides):
    return CascadeRequest(image, Overrides(**overrides))


def run(requests, low=None, high=None, threshold=0.5, classes=5, **options):
    low, high = low or FakeRung(LOW, classes), high or FakeRung(HIGH, classes)
    calibration = make_calibration(threshold, classes)
    return run_cascade(requests, calibration, low, high, **options), low, high


def test_an_easy_batch_makes_no_high_call():
    answers, low, high = run([ask(images(0.1, 0.2)), ask(images(0.3))])
    assert len(low.batches) == 1 and len(low.batches[0]) == 3
    assert high.batches == []
    assert [a.escalated.tolist() for a in answers] == [[False, False], [False]]
    np.testing.assert_allclose(answers[0].embedding[:, 0], [LOW + 0.1, LOW + 0.2])


def test_a_mixed_batch_makes_one_high_call_with_the_hard_rows_of_all_requests():
    answers, low, high = run([ask(images(0.1, 0.9)), ask(images(0.8)), ask(images(0.2))])
    assert len(low.batches) == 1
    assert len(high.batches) == 1
    np.testing.assert_allclose(high.batches[0][:, 0, 0, 0], [0.9, 0.8])
    np.testing.assert_allclose(answers[0].embedding[:, 0], [LOW + 0.1, HIGH + 0.9])
    np.testing.assert_allclose(answers[0].logits[:, 0], [LOW, HIGH])
    np.testing.assert_allclose(answers[0].score, [0.1, 0.9])
    assert [a.escalated.tolist() for a in answers] == [[False, True], [True], [False]]
    assert not any(a.degraded.any() for a in answers)


def test_policies_mix_in_one_batch():
    requests = [
        ask(images(0.9), policy=Policy.LOW),
        ask(images(0.1), policy=Policy.HIGH),
        ask(images(0.9), threshold=2.0),
        ask(images(0.1), threshold=0.0),
    ]
    answers, low, high = run(requests)
    assert [a.escalated.tolist() for a in answers] == [[False], [True], [False], [True]]
    assert len(low.batches[0]) == 3  # policy=high does not pay for the cheap rung
    assert len(high.batches) == 1
    assert np.isnan(answers[1].score).all()
    assert not np.isnan(answers[0].score).any()


def test_without_a_certified_threshold_the_cheap_rung_is_not_asked():
    answers, low, high = run([ask(images(0.1, 0.9))], threshold=None)
    assert low.batches == []
    assert len(high.batches) == 1
    assert answers[0].escalated.all()


def test_a_lone_request_reaches_the_rungs_as_the_very_same_array():
    image = images(0.9, 0.8)
    _, low, high = run([ask(image)])
    assert low.batches[0] is image
    assert high.batches[0] is image


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_request_does_not_fail_its_neighbours(bad):
    broken = images(0.1, 0.1)
    broken[1, 2, 3, 3] = bad
    answers, low, _ = run([ask(images(0.1)), ask(broken), ask(images(0.9))])
    assert isinstance(answers[0], CascadeAnswer) and isinstance(answers[2], CascadeAnswer)
    assert isinstance(answers[1], RequestError)
    assert str(answers[1]) == "image 2 of 2 holds NaN or Inf; send finite pixels"
    assert len(low.batches[0]) == 2


def test_pixels_whose_sum_overflows_are_accepted():
    image = np.full((1, 3, 4, 4), 3e38, np.float32)
    image[:, 0, 0, 0] = 0.0  # the pixel the fake rung computes with
    answers, *_ = run([ask(image, policy=Policy.LOW)])
    assert isinstance(answers[0], CascadeAnswer)


def test_a_logit_that_is_no_number_is_an_error_too():
    def overflowing(image):
        outputs = FakeRung(1.0)(image)
        outputs.logits[-1, 0] = np.inf
        return outputs

    answers, *_ = run([ask(images(0.1)), ask(images(0.2, 0.3))], low=overflowing)
    assert isinstance(answers[0], CascadeAnswer)
    assert isinstance(answers[1], RequestError) and "NaN or Inf" in str(answers[1])


def test_every_score_is_answered_as_a_number_that_any_json_parser_reads():
    scores = np.array([0.25, -1.5, np.nan, np.inf, -np.inf], np.float32)
    answered = answered_score(scores)
    assert answered.dtype == np.float32 and np.isfinite(answered).all()
    assert answered[:2].tolist() == [0.25, -1.5]
    # What has no score escalates: it is above any threshold that a request may bring.
    assert answered[2] == answered[3] == UNSCORED and answered[4] == -UNSCORED
    back = score_of_answer(answered)
    assert back.dtype == np.float32 and back[:2].tolist() == [0.25, -1.5]
    assert np.isnan(back[2:4]).all()


def test_an_answer_that_is_no_number_is_an_error_of_its_own_request():
    requests = [ask(images(0.9)), ask(images(0.1))]
    answers, *_ = run(requests, high=FakeRung(np.nan))
    assert isinstance(answers[0], RequestError) and "NaN or Inf" in str(answers[0])
    assert isinstance(answers[1], CascadeAnswer)


def test_a_failing_low_rung_fails_only_those_that_need_it():
    requests = [ask(images(0.1)), ask(images(0.1), policy=Policy.HIGH)]
    answers, *_ = run(requests, low=FakeRung(LOW, fail=True))
    assert isinstance(answers[0], RungError)
    assert isinstance(answers[1], CascadeAnswer)


def test_a_failing_high_rung_fails_only_those_that_escalate():
    requests = [ask(images(0.1)), ask(images(0.1, 0.9))]
    answers, *_ = run(requests, high=FakeRung(HIGH, fail=True))
    assert isinstance(answers[0], CascadeAnswer)
    assert isinstance(answers[1], RungError)


def test_a_failing_high_rung_can_degrade_to_the_low_answer():
    requests = [ask(images(0.1, 0.9)), ask(images(0.1), policy=Policy.HIGH)]
    answers, *_ = run(requests, high=FakeRung(HIGH, fail=True), degrade_on_high_failure=True)
    assert answers[0].degraded.tolist() == [False, True]
    assert answers[0].escalated.tolist() == [False, False]
    np.testing.assert_allclose(answers[0].embedding[:, 0], [LOW + 0.1, LOW + 0.9])
    assert isinstance(answers[1], RungError)  # policy=high has no low answer to fall back on


def test_a_headless_model_has_no_logits():
    answers, *_ = run([ask(images(0.1, 0.9))], classes=None)
    assert answers[0].logits is None


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4), max_size=5))
def test_grouping_into_requests_changes_nothing(groups):
    grouped, *_ = run([ask(images(*scores)) for scores in groups])
    for scores, answer in zip(groups, grouped, strict=True):
        for row, score in enumerate(scores):
            (alone,), *_ = run([ask(images(score))])
            assert alone.escalated[0] == answer.escalated[row]
            assert alone.score[0] == answer.score[row]
            np.testing.assert_array_equal(alone.embedding[0], answer.embedding[row])


# --- clients that are gone -----------------------------------------------------------------------


def gone_request(image, cancelled=True):
    return CascadeRequest(image, Overrides(), lambda: GoneError("gone", cancelled))


def test_a_client_that_is_gone_costs_no_full_call():
    answers, low, high = run([gone_request(images(0.9)), gone_request(images(0.8))])
    assert all(isinstance(answer, GoneError) for answer in answers)
    assert len(low.batches) == 1 and high.batches == []


def test_a_client_that_is_gone_takes_no_neighbour_along():
    answers, _, high = run([gone_request(images(0.9)), ask(images(0.8)), ask(images(0.1))])
    assert isinstance(answers[0], GoneError)
    np.testing.assert_allclose(high.batches[0][:, 0, 0, 0], [0.8])
    assert [a.escalated.tolist() for a in answers[1:]] == [[True], [False]]


def test_an_answer_that_is_ready_is_not_withheld_from_a_client_that_may_be_gone():
    answers, _, _ = run([gone_request(images(0.1))])
    assert answers[0].escalated.tolist() == [False]


# --- pressure ------------------------------------------------------------------------------------


def test_pressure_keeps_images_low_and_says_so():
    relief = Relief(depth=2, full=2, highest=0.85)
    answers, _, high = run([ask(images(0.8)), ask(images(0.9))], relief=relief, waiting=2)
    assert [a.escalated.tolist() for a in answers] == [[False], [True]]
    assert [a.degraded.tolist() for a in answers] == [[True], [False]]
    assert [a.relieved.tolist() for a in answers] == [[True], [False]]
    np.testing.assert_allclose(answers[0].embedding[:, 0], [LOW + 0.8])
    np.testing.assert_allclose(high.batches[0][:, 0, 0, 0], [0.9])


def test_without_pressure_the_calibrated_threshold_decides():
    relief = Relief(depth=2, full=2, highest=0.85)
    answers, _, _ = run([ask(images(0.8)), ask(images(0.9))], relief=relief, waiting=1)
    assert [a.escalated.tolist() for a in answers] == [[True], [True]]
    assert not any(a.degraded.any() for a in answers)


def test_pressure_leaves_requests_with_parameters_of_their_own_alone():
    relief = Relief(depth=1, full=1, highest=0.95)
    requests = [ask(images(0.8), threshold=0.4), ask(images(0.1), policy=Policy.HIGH)]
    answers, _, _ = run(requests, relief=relief, waiting=2)
    assert [a.escalated.tolist() for a in answers] == [[True], [True]]


def test_a_failing_full_rung_and_pressure_are_told_apart():
    relief = Relief(depth=2, full=2, highest=0.85)
    answers, _, _ = run(
        [ask(images(0.8)), ask(images(0.9))],
        high=FakeRung(HIGH, fail=True),
        degrade_on_high_failure=True,
        relief=relief,
        waiting=2,
    )
    assert [a.degraded.tolist() for a in answers] == [[True], [True]]
    assert [a.relieved.tolist() for a in answers] == [[True], [False]]
    assert not any(a.escalated.any() for a in answers)


# --- what was decided, whatever was answered -----------------------------------------------------


def decisions(requests, **options):
    told = []
    answers, _, _ = run(requests, decided=told.append, **options)
    return told, answers


def test_every_request_that_was_scored_is_told_with_what_its_threshold_wants():
    requests = [ask(images(0.1, 0.9)), ask(images(0.9), policy=Policy.HIGH), ask(images(0.8))]
    told, _ = decisions(requests)
    assert [d.request for d in told] == [requests[0], requests[2]]
    assert [d.wanted.tolist() for d in told] == [[False, True], [True]]
    np.testing.assert_allclose(told[0].low.embedding[:, 0], [LOW + 0.1, LOW + 0.9])


def test_pressure_changes_answers_and_not_what_was_decided():
    relief = Relief(depth=1, full=1, highest=0.85)
    (told,), (answer,) = decisions([ask(images(0.1, 0.8, 0.9))], relief=relief, waiting=3)
    assert answer.escalated.tolist() == [False, False, True]
    assert told.wanted.tolist() == [False, True, True]


@pytest.mark.parametrize("degrade", [True, False])
def test_a_failing_full_rung_changes_answers_and_not_what_was_decided(degrade):
    high = FakeRung(HIGH, fail=True)
    told, answers = decisions(
        [ask(images(0.1, 0.9)), ask(images(0.2))], high=high, degrade_on_high_failure=degrade
    )
    assert isinstance(answers[0], CascadeAnswer if degrade else RungError)
    assert [d.wanted.tolist() for d in told] == [[False, True], [False]]


def test_what_was_decided_of_a_client_that_is_gone_is_told_too():
    (told,), (answer,) = decisions([gone_request(images(0.1, 0.9))])
    assert isinstance(answer, GoneError) and told.wanted.tolist() == [False, True]
