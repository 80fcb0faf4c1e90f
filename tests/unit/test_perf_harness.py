"""Systems in turn on the same images: order, costs and agreement, with a scripted asker."""

from dataclasses import replace

import numpy as np
import pytest

from perf.harness import (
    ONE_BY_ONE,
    PAIRS,
    Load,
    Paired,
    believed,
    cut,
    is_a_loss,
    take_turns,
)
from tests.unit.perf_measured import make_answer, make_system

NAMES = ["static-low", "static-6", "static-high", "adaptive-0", "adaptive", "ensemble"]
SYSTEMS = [make_system(name) for name in NAMES]


class FakeAsker:
    """Takes as many milliseconds as its script says; logs who was asked about what."""

    def __init__(self, latency_ms=lambda name, row: 1.0):
        self.latency_ms = latency_ms
        self.log = []

    def ask(self, system, rows, load):
        assert load == ONE_BY_ONE
        (row,) = rows
        self.log.append((system.name, row))
        return [make_answer(self.latency_ms(system.name, row), escalated=row == 3)]


def paired(**by_system):
    """Shares of answers, one list of shares per system; `_` stands for `-`."""
    names, shares = [name.replace("_", "-") for name in by_system], by_system.values()
    return Paired([dict(zip(names, share, strict=True)) for share in zip(*shares, strict=True)])


def answers(*latencies, escalated=()):
    return [make_answer(ms, escalated=i in escalated) for i, ms in enumerate(latencies)]


# --- asking ------------------------------------------------------------------------------------


def turns(asker):
    """The order in which the systems were asked, by image in the order of asking."""
    size = len(SYSTEMS)
    log = asker.log
    return [log[start : start + size] for start in range(0, len(log), size)]


def test_every_system_is_asked_about_an_image_before_the_next_one_is_sent():
    asker, steps = FakeAsker(), []
    shares = cut([5, 3, 9, 4], 2) * 3
    take_turns(asker, SYSTEMS, shares, ONE_BY_ONE, lambda: steps.append(len(asker.log)))
    assert [turn[0][1] for turn in turns(asker)] == [5, 3, 9, 4] * 3
    for turn in turns(asker):
        assert sorted(name for name, _ in turn) == sorted(NAMES)
        assert len({row for _, row in turn}) == 1
    assert steps == list(range(1, 12 * len(NAMES) + 1))


def test_a_system_and_what_it_is_compared_with_are_asked_side_by_side_in_either_order():
    asker = FakeAsker()
    take_turns(asker, SYSTEMS, [range(40)], ONE_BY_ONE, lambda: None)
    assert PAIRS == {"adaptive-0": "static-low", "ensemble": "adaptive"}
    for second, first in PAIRS.items():
        steps = []
        for turn in turns(asker):
            order = [name for name, _ in turn]
            steps.append(order.index(second) - order.index(first))
        assert set(steps) == {1, -1}
        assert 10 <= steps.count(1) <= 30  # a coin; 1 in 400 coins lie outside


def test_no_system_keeps_its_place():
    asker = FakeAsker()
    take_turns(asker, SYSTEMS, [range(60)], ONE_BY_ONE, lambda: None)
    for name in NAMES:
        places = {[asked for asked, _ in turn].index(name) for turn in turns(asker)}
        assert places == set(range(len(NAMES)))


def test_a_missing_half_of_a_pair_leaves_the_other_to_itself():
    asker = FakeAsker()
    some = [make_system(name) for name in ("static-low", "static-high", "ensemble")]
    found = take_turns(asker, some, [range(6)], ONE_BY_ONE, lambda: None)
    assert all(len(found.shares[0][system.name]) == 6 for system in some)


def test_neighbours_come_into_the_same_share_and_repeats_are_shares_of_their_own():
    asker = FakeAsker(lambda name, row: float(row))
    found = take_turns(asker, SYSTEMS, cut([1, 2, 3, 4, 5], 2) * 2, ONE_BY_ONE, lambda: None)
    assert [[a.latency_ms for a in share["static-6"]] for share in found.shares] == [
        [1, 2, 3],
        [4, 5],
        [1, 2, 3],
        [4, 5],
    ]
    assert found.escalation_rate("static-6") == pytest.approx(1 / 5)


class BlockAsker:
    """Logs each block and how it was asked."""

    def __init__(self):
        self.log = []

    def ask(self, system, rows, load):
        self.log.append((system.name, tuple(rows), load))
        return [make_answer(float(row), cpu_ms=1.0) for row in rows]


def test_saturated_the_systems_take_turns_on_spans_after_they_are_warm():
    asker, steps, load = BlockAsker(), [], Load(in_flight=3, block=None)
    spans = [[1, 2, 3, 4, 5, 6, 7], [8, 9]] * 20
    found = take_turns(asker, SYSTEMS, spans, load, lambda: steps.append(1), warm_up=6)
    warm, asked = asker.log[: len(NAMES)], asker.log[len(NAMES) :]
    assert [entry[:2] for entry in warm] == [(name, (1, 2, 3, 4, 5, 6)) for name in NAMES]
    assert {load for *_, load in asker.log} == {load}
    turns = [asked[start : start + len(NAMES)] for start in range(0, len(asked), len(NAMES))]
    for turn, span in zip(turns, spans, strict=True):
        assert sorted(name for name, *_ in turn) == sorted(NAMES)
        assert {rows for _, rows, _ in turn} == {tuple(span)}
    assert {turn[0][0] for turn in turns} == set(NAMES)  # nobody is always first
    assert len(steps) == len(asked)
    assert found.cost("adaptive").values[:2] == (4.0, 8.5)


def test_every_system_is_asked_about_a_block_before_the_next_block_is_sent():
    asker = BlockAsker()
    found = take_turns(asker, SYSTEMS[:2], [range(7), [7]], Load(block=3), lambda: None)
    rows = [rows for _, rows, _ in asker.log]
    assert rows[::2] == rows[1::2] == [(0, 1, 2), (3, 4, 5), (6,), (7,)]
    assert [a.latency_ms for a in found.shares[0]["static-6"]] == list(range(7))


# --- costs -------------------------------------------------------------------------------------

# Two shares: low 20 and 10, high 100 and 40, adaptive 40 and 25 ms; 1/2 and none escalated.
CASE = paired(
    static_low=[answers(10, 30), answers(10, 10)],
    static_high=[answers(100, 100), answers(30, 50)],
    adaptive_0=[answers(11, 36), answers(14, 11)],
    adaptive=[answers(20, 60, escalated=[1]), answers(25, 25)],
)


def test_the_router_overhead_is_the_median_of_ratios_side_by_side():
    case = paired(
        static_low=[answers(10, 100, 20), answers(10, 10, 10)],
        adaptive_0=[answers(11, 500, 21), answers(12, 13, 14)],
    )
    # One slow image makes the first share's ratio of means 532 / 130 = 4.1.
    assert case.router_overhead().values == (1.1, 1.3)


def test_costs_and_the_cascades_figures_take_each_shares_own_costs_and_rate():
    assert CASE.cost("adaptive").values == (40.0, 25.0)
    assert CASE.cost_ratio("adaptive").values == (0.4, 0.625)  # of static high's
    assert CASE.cost_ratio("adaptive", to="static-low").values == (2.0, 2.5)
    assert CASE.speedup().values == (2.5, 1.6)
    assert CASE.bound().values == pytest.approx((1 / (0.2 + 0.5), 4.0))
    assert CASE.efficiency().values == pytest.approx((2.5 * 0.7, 0.4))
    uneven = paired(adaptive=[answers(1, 1, 1, escalated=[0]), answers(1, escalated=[0])])
    assert uneven.escalation_rate("adaptive") == 0.5  # of images, not of shares


def test_where_nothing_is_certified_the_cheap_rung_is_no_part_of_the_bound():
    everything = [make_answer(100, escalated=True, score=float("nan")) for _ in range(4)]
    case = paired(
        static_low=[answers(*[30] * 4)], static_high=[answers(*[100] * 4)], adaptive=[everything]
    )
    assert case.bound().values == (1.0,) and case.doubts(cpu_counts=True) == []


# --- CPU time, and belief ------------------------------------------------------------------------


def with_cpu(*latencies, cpu_ms):
    return [make_answer(ms, cpu_ms=cpu_ms) for ms in latencies]


def measured(adaptive_ms, adaptive_cpu_ms, low_ms=10.0):
    """One share of two images that stay cheap; the full rung takes 100 ms."""
    return paired(
        static_low=[with_cpu(low_ms, low_ms, cpu_ms=low_ms)],
        static_high=[with_cpu(100, 100, cpu_ms=90)],
        adaptive_0=[with_cpu(11, 11, cpu_ms=11)],
        adaptive=[with_cpu(adaptive_ms, adaptive_ms, cpu_ms=adaptive_cpu_ms)],
    )


def test_the_speedup_by_cpu_time_is_beside_that_by_the_clock():
    case = measured(20.0, 18.0)
    assert case.cpu_cost("adaptive").values == (18.0,)
    assert case.speedup().values == case.cpu_speedup().values == (5.0,)
    assert CASE.cpu_cost("adaptive") is None and CASE.cpu_speedup() is None


@pytest.mark.parametrize(
    ("case", "reason", "without_cpu"),
    [
        (measured(8.0, 7.2), "its own cheap rung", 2),
        # The router that never escalates took 11 ms.
        (measured(20.0, 18.0, low_ms=13.0), "0.85 of the time of its own cheap rung", 1),
        (measured(20.0, 30.0), "by the clock", 0),
        (measured(20.0, 0.0), "no CPU time", 0),  # and not passed over
    ],
)
def test_what_cannot_be_true_is_doubted_and_cpu_time_where_it_can_be_compared(
    case, reason, without_cpu
):
    assert any(reason in doubt for doubt in case.doubts(cpu_counts=True))
    assert len(case.doubts(cpu_counts=False)) == without_cpu
    assert measured(20.0, 0.0).cpu_speedup() is None
    assert measured(20.0, None).doubts(cpu_counts=True) == []  # not measured


BELIEVED, DISTURBED = measured(20.0, 18.0), measured(5.0, 4.5)


@pytest.mark.parametrize(
    ("results", "kept", "repeats"),
    [
        ([BELIEVED, DISTURBED], BELIEVED, 0),
        ([DISTURBED, BELIEVED], BELIEVED, 1),
        ([DISTURBED] * 5, DISTURBED, 1),
    ],
)
def test_what_cannot_be_true_is_measured_again_and_not_for_ever(results, kept, repeats):
    waiting, again = iter(results), []
    found, reasons = believed(lambda: next(waiting), True, again.append)
    assert found is kept and len(again) == repeats
    assert bool(reasons) is (kept is DISTURBED)


# --- agreement ---------------------------------------------------------------------------------


def test_agreement_is_with_static_highs_answer_to_the_same_image():
    mine = [[make_answer(names=0), make_answer(names=1)], [make_answer(names=2)]]
    full = [[make_answer(names=0), make_answer(names=0)], [make_answer(names=2)]]
    case = paired(static_low=mine, static_high=full)
    assert case.agreement("static-low", is_a_loss({"fidelity": "top1"})) == pytest.approx(2 / 3)
    assert case.agreement("static-high", is_a_loss({"fidelity": "top1"})) == 1.0


def below(limit):
    return is_a_loss({"fidelity": "cosine", "tolerance": 1 - limit})


def test_embeddings_agree_down_to_the_cosine_that_is_asked_for():
    full = make_answer(embedding=(2.0, 0.0), head=False)
    at_60_degrees = make_answer(embedding=(0.5, np.sqrt(0.75)), head=False)
    assert below(0.51)(at_60_degrees, full)
    assert not below(0.49)(at_60_degrees, full)
    assert not below(0.999)(full, full)


def test_an_embedding_of_zeros_agrees_with_nothing():
    zeros = make_answer(embedding=(0.0, 0.0), head=False)
    with np.errstate(invalid="ignore"):
        assert below(0.1)(zeros, make_answer(head=False))


def test_labels_and_values_agree_by_the_calibrations_own_loss():
    def answer(*logits):
        return replace(make_answer(), logits=np.array(logits, np.float32))

    lost = is_a_loss({"fidelity": "labels", "label_threshold": 0.5})
    assert not lost(answer(0.1, -2.0), answer(3.0, -0.1))  # top-1 or not, both name the first
    assert lost(answer(3.0, 0.1), answer(3.0, -0.1))  # the same largest, another set
    lost = is_a_loss({"fidelity": "value", "tolerance": 0.5, "relative": False})
    assert lost(answer(-0.4), answer(0.4)) and not lost(answer(-0.2), answer(0.2))
