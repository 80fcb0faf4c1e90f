"""Images that are drawn to be answered by both rungs: who they are, what they get, what is told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing import (
    Audit,
    CascadeAnswer,
    CascadeRequest,
    GoneError,
    Overrides,
    Policy,
    Relief,
    RequestError,
    RungError,
    run_cascade,
)
from tests.unit.fakes import FakeRung, images, make_calibration

LOW, HIGH = 100.0, 200.0


class Coins:
    """An audit whose coins fall as told, and what it is told; the last one falls for all others.

    Attributes:
        diary: `draw` and the tags of rungs, in the order in which they were asked.
        seen: what both rungs said, for each request.
    """

    def __init__(self, *falls):
        self.falls, self.diary, self.seen = list(falls), [], []
        self.audit = Audit(self._draw, self.seen.append)

    def _draw(self, count):
        self.diary.append("draw")
        fall = self.falls.pop(0) if len(self.falls) > 1 else self.falls[0]
        return np.broadcast_to(np.array(fall, np.bool_), count).copy()

    def rung(self, tag, **options):
        rung = FakeRung(tag, **options)

        def ask(image):
            self.diary.append(tag)
            return rung(image)

        ask.batches = rung.batches
        return ask


def ask(image, **overrides):
    return CascadeRequest(image, Overrides(**overrides))


def run(requests, coins, threshold=0.5, low_fails=False, high_fails=False, **options):
    low, high = coins.rung(LOW, fail=low_fails), coins.rung(HIGH, fail=high_fails)
    calibration = make_calibration(threshold)
    answers = run_cascade(requests, calibration, low, high, audit=coins.audit, **options)
    return answers, low, high


def first_pixels(batches):
    return [round(float(image[0, 0, 0]), 3) for batch in batches for image in batch]


def test_drawn_images_get_the_full_answer_with_one_call_of_each_rung():
    coins = Coins([True, False, True], [False])
    answers, low, high = run([ask(images(0.1, 0.2, 0.9)), ask(images(0.3))], coins)
    assert len(low.batches) == len(high.batches) == 1
    assert first_pixels(low.batches) == [0.1, 0.2, 0.9, 0.3]
    assert first_pixels(high.batches) == [0.1, 0.9]
    first, second = answers
    np.testing.assert_allclose(first.embedding[:, 0], [HIGH + 0.1, LOW + 0.2, HIGH + 0.9])
    np.testing.assert_allclose(first.logits[:, 0], [HIGH, LOW, HIGH])
    assert first.escalated.tolist() == [True, False, True]
    assert first.wanted.tolist() == [False, False, True]
    assert first.audited.tolist() == [True, False, True]
    assert not first.degraded.any() and not second.audited.any() and not second.escalated.any()


def test_what_is_told_are_the_answers_of_both_rungs_to_the_drawn_images_alone():
    coins = Coins([True, False, True, False])
    run([ask(images(0.1, 0.9, 0.8, 0.2))], coins)
    (told,) = coins.seen
    np.testing.assert_allclose(told.score, [0.1, 0.8])
    np.testing.assert_allclose(told.low.embedding[:, 0], [LOW + 0.1, LOW + 0.8])
    np.testing.assert_allclose(told.high.embedding[:, 0], [HIGH + 0.1, HIGH + 0.8])


def test_the_coin_is_drawn_before_any_rung_is_asked():
    coins = Coins(True)
    run([ask(images(0.1)), ask(images(0.9, 0.2)), ask(images(0.3))], coins)
    assert coins.diary == ["draw", "draw", "draw", LOW, HIGH]


def test_without_a_threshold_the_cheap_rung_is_asked_about_requests_with_a_drawn_image_alone():
    coins = Coins([True], [False], [False, True])
    answers, low, high = run(
        [ask(images(0.1)), ask(images(0.2)), ask(images(0.3, 0.4))], coins, threshold=None
    )
    assert first_pixels(low.batches) == [0.1, 0.3, 0.4]
    assert first_pixels(high.batches) == [0.1, 0.2, 0.3, 0.4]
    assert len(low.batches) == len(high.batches) == 1
    assert all(answer.escalated.all() and answer.wanted.all() for answer in answers)
    assert [told.score.round(3).tolist() for told in coins.seen] == [
        pytest.approx([0.1]),
        pytest.approx([0.4]),
    ]
    assert np.isnan(answers[1].score).all()


def test_where_nothing_is_drawn_nothing_is_different():
    requests = [ask(images(0.1, 0.9)), ask(images(0.2))]
    coins = Coins(False)
    audited, low, high = run(requests, coins)
    plain = run_cascade(requests, make_calibration(0.5), FakeRung(LOW), FakeRung(HIGH))
    assert coins.seen == [] and first_pixels(high.batches) == [0.9]
    for one, other in zip(audited, plain, strict=True):
        np.testing.assert_array_equal(one.embedding, other.embedding)
    coins = Coins(False)
    _, low, _ = run(requests, coins, threshold=None)
    assert low.batches == [] and coins.seen == []


@pytest.mark.parametrize(
    "request_of",
    [
        lambda image: ask(image, policy=Policy.HIGH),
        lambda image: ask(image, policy=Policy.LOW),
        lambda image: ask(image, threshold=0.5),
        lambda image: ask(image, threshold=0.0),
        lambda image: CascadeRequest(image, Overrides(), is_probe=True),
    ],
)
@pytest.mark.parametrize("threshold", [0.5, None])
def test_requests_with_parameters_and_probes_are_never_drawn(request_of, threshold):
    coins = Coins(True)
    (answer,), _, _ = run([request_of(images(0.1, 0.2))], coins, threshold)
    assert "draw" not in coins.diary and coins.seen == [] and not answer.audited.any()


def test_a_request_with_bad_pixels_is_not_drawn_and_takes_no_neighbour_along():
    coins = Coins(True)
    answers, low, _ = run([ask(images(np.nan)), ask(images(0.1))], coins)
    assert isinstance(answers[0], RequestError) and coins.diary.count("draw") == 1
    assert answers[1].audited.all() and len(coins.seen) == 1
    assert first_pixels(low.batches) == [0.1]


# --- failures ------------------------------------------------------------------------------------


def test_a_kept_image_gets_its_cheap_answer_where_the_full_rung_fails_and_is_no_record():
    coins = Coins([True, False])
    (answer,), _, _ = run([ask(images(0.1, 0.2))], coins, high_fails=True)
    np.testing.assert_allclose(answer.embedding[:, 0], [LOW + 0.1, LOW + 0.2])
    assert not (answer.escalated | answer.degraded | answer.audited).any()
    assert coins.seen == []


@pytest.mark.parametrize("degrade", [True, False])
def test_an_escalating_image_fails_with_the_full_rung_drawn_or_not(degrade):
    coins = Coins([True, False, True], [True])
    answers, _, _ = run(
        [ask(images(0.1, 0.9, 0.8)), ask(images(0.2))],
        coins,
        high_fails=True,
        degrade_on_high_failure=degrade,
    )
    assert coins.seen == []
    assert isinstance(answers[1], CascadeAnswer) and not answers[1].degraded.any()
    if degrade:
        assert answers[0].degraded.tolist() == [False, True, True]
        assert not answers[0].escalated.any() and not answers[0].audited.any()
    else:
        assert isinstance(answers[0], RungError)


def test_a_failing_cheap_rung_costs_the_audit_alone_where_there_is_no_threshold():
    coins = Coins([True], [False])
    answers, _, high = run(
        [ask(images(0.1)), ask(images(0.2))], coins, threshold=None, low_fails=True
    )
    assert coins.seen == [] and first_pixels(high.batches) == [0.1, 0.2]
    for answer, pixel in zip(answers, (0.1, 0.2), strict=True):
        np.testing.assert_allclose(answer.embedding[:, 0], [HIGH + pixel])
        assert answer.escalated.all() and not answer.audited.any() and not answer.degraded.any()


def test_a_failing_cheap_rung_fails_drawn_requests_too_where_there_is_a_threshold():
    coins = Coins(True)
    (answer,), _, high = run([ask(images(0.1))], coins, low_fails=True)
    assert isinstance(answer, RungError) and high.batches == [] and coins.seen == []


def test_a_client_that_hung_up_is_no_record_and_costs_no_full_call():
    coins = Coins(True)
    gone = CascadeRequest(images(0.1), Overrides(), lambda: GoneError("gone", cancelled=True))
    answers, _, high = run([gone, ask(images(0.2))], coins)
    assert isinstance(answers[0], GoneError) and first_pixels(high.batches) == [0.2]
    assert [told.score.round(3).tolist() for told in coins.seen] == [pytest.approx([0.2])]


# --- pressure ------------------------------------------------------------------------------------

RELIEF = Relief(depth=1, full=1, highest=0.85)


def test_pressure_changes_neither_who_is_drawn_nor_what_they_get():
    coins = Coins([True, True, False, True])
    (answer,), _, high = run([ask(images(0.1, 0.8, 0.7, 0.9))], coins, relief=RELIEF, waiting=4)
    assert first_pixels(high.batches) == [0.1, 0.8, 0.9]
    assert answer.escalated.tolist() == [True, True, False, True]
    assert answer.degraded.tolist() == answer.relieved.tolist() == [False, False, True, False]
    assert answer.wanted.tolist() == [False, True, True, True]
    np.testing.assert_allclose(coins.seen[0].score, [0.1, 0.8, 0.9])


def test_a_drawn_image_that_pressure_kept_low_is_degraded_where_the_full_rung_fails():
    coins = Coins(True)
    (answer,), _, _ = run([ask(images(0.1, 0.8))], coins, relief=RELIEF, waiting=2, high_fails=True)
    np.testing.assert_allclose(answer.embedding[:, 0], [LOW + 0.1, LOW + 0.8])
    assert answer.degraded.tolist() == [False, True] and coins.seen == []


# --- any of it -----------------------------------------------------------------------------------

PIXELS = st.integers(0, 8).map(lambda eighths: eighths / 8)  # scores are exact then


@given(
    groups=st.lists(st.lists(st.tuples(PIXELS, st.booleans()), min_size=1, max_size=4), max_size=4),
    threshold=st.one_of(st.none(), PIXELS),
)
def test_each_image_is_answered_by_the_rung_that_its_coin_and_its_score_say(groups, threshold):
    coins = Coins(*[[drawn for _, drawn in group] for group in groups], [False])
    requests = [ask(images(*[pixel for pixel, _ in group])) for group in groups]
    answers, low, high = run(requests, coins, threshold)
    assert len(low.batches) <= 1 and len(high.batches) <= 1
    told = [float(score) for each in coins.seen for score in each.score]
    assert told == [pixel for group in groups for pixel, drawn in group if drawn]
    for group, answer in zip(groups, answers, strict=True):
        for row, (pixel, drawn) in enumerate(group):
            wanted = threshold is None or pixel > threshold
            assert answer.wanted[row] == wanted and answer.audited[row] == drawn
            assert answer.escalated[row] == (wanted or drawn)
            rung = HIGH if wanted or drawn else LOW
            assert answer.embedding[row, 0] == rung + pixel
