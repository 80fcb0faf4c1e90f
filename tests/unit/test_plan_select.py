from dataclasses import replace

import numpy as np
import pytest

from bundle.graphs import GraphSet
from calibration.certify import Goal, allowed_errors, candidate_thresholds, certify
from calibration.fidelity import Fidelity
from planner import select
from planner.select import (
    MOST,
    PLAYS,
    Candidate,
    cascade_ms,
    choose,
    play,
    predict,
    shortlist,
)
from tests.unit.calibration_outputs import CLASS_SIGNALS, make_outputs
from tests.unit.onnx_files import write_graph_set

TOP1 = Fidelity("top1")
GOAL = Goal(0.05, 0.9, "ltt")
CERTIFY_IMAGES = 400
ROWS = np.arange(300)
FULL_MS = 50.0
COSTS = {"small": 5.0, "smaller": 4.0, "full": 50.0, "half": 30.0}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    return GraphSet.load(write_graph_set(tmp_path_factory.mktemp("rungs") / "onnx"))


def predicted(pairs, **changes):
    """Predictions from the fit images of these outputs."""
    pairs = {pair: outputs.rows(ROWS) for pair, outputs in pairs.items()}
    arguments = {
        "groups": np.array(next(iter(pairs.values())).groups),
        "fidelity": TOP1,
        "goal": GOAL,
        "certify_images": CERTIFY_IMAGES,
        "costs_ms": COSTS,
        "full_ms": FULL_MS,
        "seed": 0,
    }
    return predict(pairs, **{**arguments, **changes})


def with_worse_high(outputs, every):
    """A full graph that is not the reference: it loses each so many'th image."""
    lost = np.arange(len(outputs)) % every == 0
    logits = np.where(lost[:, np.newaxis], -1, 1) * outputs.high.logits
    return replace(
        outputs, high=replace(outputs.high, logits=logits), reference=replace(outputs.high)
    )


def candidate(low="a", high="full", signal="margin", ms=10.0, passes=1.0, full_ms=100.0):
    """A cascade that costs `ms` where it is certified: in the first plays, this share of them."""
    plays = np.full((MOST, PLAYS), full_ms)
    plays[:, : round(passes * PLAYS)] = ms
    mean = float(plays[0].mean())
    return Candidate(low, high, signal, 0.2 if passes else np.inf, mean, passes, plays)


def names(candidates):
    return [(c.low, c.high, c.signal) for c in candidates]


def everything(pair):
    return True


def test_every_cascade_is_predicted_the_cheapest_first(graphs):
    outputs = make_outputs(graphs, n=400)
    pairs = {
        ("small", "full"): outputs,
        ("small", "half"): with_worse_high(outputs, every=100),
        ("smaller", "full"): make_outputs(graphs, n=400, unsure_below=2.0),
    }
    never = 60.0  # more than any of them costs
    found = predicted(pairs, full_ms=never)
    assert sorted(names(found)) == sorted(
        (*pair, signal) for pair in pairs for signal in CLASS_SIGNALS
    )
    costs = [c.ms_per_image for c in found]
    assert costs == sorted(costs)
    for c in found:
        assert c.plays.shape == (MOST, PLAYS) and c.ms_per_image == c.plays[0].mean()
        sure = cascade_ms(COSTS[c.low], COSTS[c.high], c.escalation)
        assert c.ms_per_image == pytest.approx(c.chance * sure + (1 - c.chance) * never)
        assert (np.diff(c.plays.mean(axis=1)) >= 0).all()  # a choice has its price
    assert names(predicted(pairs, full_ms=never)) == names(found)


def test_a_play_certifies_as_certify_does(graphs):
    """With each image drawn once it is the test itself, of full graphs that lose images, too."""
    rng = np.random.default_rng(0)
    ranked = rng.integers(0, 40, 120).astype(np.float64)  # ties
    loss = rng.uniform(size=120) < 0.2 * (ranked > 20)
    for high_loss in (None, rng.uniform(size=120) < 0.02):
        for goal in (Goal(0.1, 0.9, "ltt", choices=k) for k in (1, 4)):
            allowed = allowed_errors(120, goal)
            (found,) = play(ranked, loss, high_loss, np.ones((1, 120), np.int64), [allowed])
            verdict = certify(ranked, loss, candidate_thresholds(ranked), goal, high_loss)
            assert verdict.threshold is not None
            assert found[0] == pytest.approx((ranked > verdict.threshold).mean())
    (never,) = play(ranked, ~loss, ~loss, np.ones((1, 120), np.int64), [3])
    assert np.isinf(never).all()


def test_plays_that_are_counted_in_parts_are_those_counted_at_once(monkeypatch):
    rng = np.random.default_rng(1)
    ranked, loss, high_loss = rng.normal(size=50), rng.uniform(size=50) < 0.3, np.arange(50) == 7
    drawn = rng.multinomial(80, np.full(50, 1 / 50), 11)
    found = play(ranked, loss, high_loss, drawn, [12, 6])
    assert np.isfinite(found).any() and len(np.unique(found)) > 5
    monkeypatch.setattr(select, "_AT_ONCE", 150)  # three plays
    np.testing.assert_array_equal(play(ranked, loss, high_loss, drawn, [12, 6]), found)


def test_what_costs_more_than_the_full_model_would_not_be_served(graphs):
    found = predicted({("small", "full"): make_outputs(graphs)}, full_ms=6.0)
    assert max(c.plays.max() for c in found) == 6.0
    assert any(c.chance == 1 for c in found) and min(c.ms_per_image for c in found) > 5.0


def test_groups_are_drawn_and_not_images():
    groups = np.repeat(["a", "b", "c"], [1, 9, 90])
    drawn = select._draws(groups, 300, 0)
    assert (drawn.sum(axis=1) == 300).all()
    by_group = [drawn[:, groups == name].sum() / drawn.sum() for name in "abc"]
    assert by_group == pytest.approx([1 / 3] * 3, abs=0.01)


def test_a_headless_model_is_predicted_by_the_signals_of_its_cls_token(graphs):
    outputs = make_outputs(graphs, head=False)
    found = predicted({("small", "full"): outputs}, fidelity=Fidelity("cosine"))
    assert {c.signal for c in found} == {"cls_path", "cls_regression"}


def test_a_full_graph_that_loses_as_much_as_is_allowed_has_little_chance(graphs):
    outputs = make_outputs(graphs, n=400)
    pairs = {
        ("small", "full"): outputs,
        ("small", "half"): with_worse_high(outputs, every=25),
        ("small", "bad"): with_worse_high(outputs, every=5),
    }
    found = [c for c in predicted(pairs, costs_ms={**COSTS, "bad": 1.0}) if c.signal == "margin"]
    chance = {c.high: c.chance for c in found}
    assert chance["full"] == 1 > chance["half"] > 0 == chance["bad"]
    bad = next(c for c in found if c.high == "bad")
    assert (bad.escalation, bad.ms_per_image) == (np.inf, FULL_MS)
    assert bad not in shortlist(found, everything)  # though its graph is the cheapest of all


def test_progress_is_told_once_for_each_cheap_graph(graphs):
    outputs = make_outputs(graphs)
    pairs = {(low, high): outputs for low in ("small", "smaller") for high in ("full", "half")}
    steps = []
    predicted(pairs, progress=lambda: steps.append(1))
    assert len(steps) == 2


def test_one_that_is_sure_and_cheapest_is_tested_alone():
    offered = [candidate("a", ms=10.0), candidate("b", ms=10.1), candidate("c", ms=12.0)]
    assert shortlist(offered, everything) == offered[:1]


def test_one_that_passes_where_a_cheaper_one_does_not_is_tested_beside_it():
    cheap, sure = candidate("a", ms=10.0, passes=0.5), candidate("b", ms=30.0)
    also_unsure = candidate("c", ms=11.0, passes=0.5)  # in the same plays as the first
    assert shortlist([cheap, also_unsure, sure], everything) == [sure, cheap]  # adds most first
    assert shortlist([cheap, also_unsure, sure], everything, most=1) == [sure]


def test_a_test_more_is_not_paid_for_where_it_costs_more_than_it_brings():
    cheap, sure = candidate("a", ms=10.0, passes=0.5), candidate("b", ms=30.0)
    plays = sure.plays.copy()
    plays[1:] += 40.0  # at half of δ it escalates more
    assert shortlist([cheap, replace(sure, plays=plays)], everything)[0].low == "b"


def test_the_shortlist_has_each_pair_once():
    offered = [
        candidate("a", signal="margin", ms=10.0, passes=0.5),
        candidate("a", signal="entropy", ms=10.1),
        candidate("a", "half", "cls_path", ms=10.4),
    ]
    listed = shortlist(offered, everything)
    assert len({(c.low, c.high) for c in listed}) == len(listed)


def test_what_may_not_be_served_is_not_listed():
    offered = [candidate("slow", ms=1.0), candidate("a", ms=10.0)]
    assert [c.low for c in shortlist(offered, lambda pair: pair[0] != "slow")] == ["a"]


def test_a_pair_that_is_never_certified_is_not_listed():
    hopeless = candidate("b", passes=0.0)
    assert shortlist([candidate("a"), hopeless], everything) == [candidate("a")]
    assert shortlist([hopeless], everything) == []
    assert shortlist([], everything) == []


def entry(low, ms, certified=True):
    # Outputs and artifact are of no account in the choice.
    return select.Tested(candidate(low), None, None, certified, 0.2, ms)


def test_the_cheapest_certified_cascade_is_chosen():
    dear, cheap, unproved = entry("a", 12.0), entry("b", 11.0), entry("c", 9.0, certified=False)
    assert choose([dear, cheap, unproved]) is cheap
    assert choose([dear, unproved]) is dear


def test_nothing_is_chosen_where_nothing_is_certified():
    assert choose([entry("a", 9.0, certified=False)]) is None
    assert choose([]) is None


def test_a_cascade_costs_the_cheap_graph_for_all_and_the_full_one_for_some():
    assert cascade_ms(5.0, 50.0, 0.1) == pytest.approx(10.0)
    assert cascade_ms(5.0, 50.0, 0.0) == 5.0
    assert cascade_ms(5.0, 50.0, float("inf")) == float("inf")
