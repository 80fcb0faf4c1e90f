from dataclasses import replace

import numpy as np
import pytest

from bundle.graphs import GraphSet
from calibration.certify import Goal, allowed_errors
from calibration.fidelity import Fidelity
from planner import select
from planner.select import (
    MOST,
    WITHIN,
    Candidate,
    cascade_ms,
    choose,
    predict,
    shortlist,
)
from tests.unit.calibration_outputs import CLASS_SIGNALS, make_outputs
from tests.unit.onnx_files import write_graph_set

TOP1 = Fidelity("top1")
GOAL = Goal(0.05, 0.9, "ltt", choices=MOST)
CERTIFY_IMAGES = 400
ROWS = np.arange(300)
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


def candidate(low="a", high="full", signal="margin", ms=10.0):
    return Candidate(low, high, signal, 0.2, ms)


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
    found = predicted(pairs)
    assert sorted(names(found)) == sorted(
        (*pair, signal) for pair in pairs for signal in CLASS_SIGNALS
    )
    costs = [c.ms_per_image for c in found]
    assert costs == sorted(costs)
    for c in found:
        assert c.ms_per_image == cascade_ms(COSTS[c.low], COSTS[c.high], c.escalation)


def test_a_prediction_is_the_escalation_that_leaves_as_many_losses_as_the_test_allows(graphs):
    outputs = make_outputs(graphs, n=400)
    loss = TOP1.loss(outputs)[ROWS]
    left = int(allowed_errors(CERTIFY_IMAGES, GOAL) / CERTIFY_IMAGES * len(ROWS))
    found = {c.signal: c for c in predicted({("small", "full"): outputs})}
    # The loss is where two logits are close, so the margin escalates next to nothing in vain.
    least = (loss.sum() - left) / len(ROWS)
    assert least <= found["margin"].escalation < least + 0.02
    assert found["margin"].ms_per_image == pytest.approx(5 + 50 * found["margin"].escalation)
    assert found["margin"].escalation < found["cls_path"].escalation
    alone = {
        c.signal: c for c in predicted({("small", "full"): outputs}, goal=replace(GOAL, choices=1))
    }
    assert alone["margin"].escalation < found["margin"].escalation  # a choice has its price


def test_a_headless_model_is_predicted_by_the_signals_of_its_cls_token(graphs):
    outputs = make_outputs(graphs, head=False)
    found = predicted({("small", "full"): outputs}, fidelity=Fidelity("cosine"))
    assert {c.signal for c in found} == {"cls_path", "cls_regression"}


def test_losses_of_the_full_graph_cost_escalation_and_too_many_cannot_be_mended(graphs):
    outputs = make_outputs(graphs, n=400)
    pairs = {
        ("small", "full"): outputs,
        ("small", "half"): with_worse_high(outputs, every=100),
        ("small", "bad"): with_worse_high(outputs, every=5),
    }
    found = predicted(pairs, costs_ms={**COSTS, "bad": 1.0})
    escalation = {c.high: c.escalation for c in found if c.signal == "margin"}
    assert escalation["full"] < escalation["half"] < 1
    bad = [c for c in found if c.high == "bad"]
    assert [(c.escalation, c.ms_per_image) for c in bad] == [(np.inf, np.inf)] * len(CLASS_SIGNALS)
    assert found[-len(bad) :] == bad  # though its graph is the cheapest of all


def test_progress_is_told_once_for_each_cheap_graph(graphs):
    outputs = make_outputs(graphs)
    pairs = {(low, high): outputs for low in ("small", "smaller") for high in ("full", "half")}
    steps = []
    predicted(pairs, progress=lambda: steps.append(1))
    assert len(steps) == 2


def test_the_shortlist_has_the_best_signal_of_each_pair():
    offered = [
        candidate("a", signal="margin", ms=10.0),
        candidate("a", signal="entropy", ms=10.1),
        candidate("b", signal="deferral", ms=10.2),
        candidate("b", signal="margin", ms=10.3),
        candidate("a", "half", "cls_path", ms=10.4),
    ]
    assert names(shortlist(offered, everything)) == [
        ("a", "full", "margin"),
        ("b", "full", "deferral"),
        ("a", "half", "cls_path"),
    ]


def test_the_shortlist_is_no_longer_than_what_the_prediction_paid_for():
    offered = [candidate(str(i), ms=10 + i / 100) for i in range(3 * MOST)]
    assert shortlist(offered, everything) == offered[:MOST]


def test_the_shortlist_leaves_out_what_is_much_dearer_than_the_cheapest():
    offered = [candidate("a", ms=10.0), candidate("b", ms=11.49), candidate("c", ms=11.51)]
    assert WITHIN == 1.15
    assert names(shortlist(offered, everything)) == [
        ("a", "full", "margin"),
        ("b", "full", "margin"),
    ]


def test_what_may_not_be_served_is_neither_listed_nor_the_measure_of_the_others():
    offered = [candidate("slow", ms=1.0), candidate("a", ms=10.0), candidate("b", ms=11.0)]
    asked = []

    def quick(pair):
        asked.append(pair)
        return pair[0] != "slow"

    assert [c.low for c in shortlist(offered, quick)] == ["a", "b"]
    assert ("slow", "full") in asked


def test_a_pair_that_no_escalation_mends_is_not_listed():
    hopeless = replace(candidate("b"), escalation=np.inf, ms_per_image=np.inf)
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
