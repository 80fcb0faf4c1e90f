import json
from dataclasses import replace

import numpy as np
import pytest

from calibration.fidelity import Fidelity
from calibration.metrics import needed_escalation
from planner.early import BLS_HOP_MS, early_decision
from routing import RungOutputs, RungSet, features
from tests.unit.calibration_outputs import make_outputs
from tests.unit.onnx_files import CLASSES, D, write_rung_set

TOP1 = Fidelity("top1")
BLOCKS = 6
HEAD = np.linalg.qr(np.random.default_rng(0).normal(size=(D, CLASSES)))[0]


@pytest.fixture(scope="module")
def rung_set(tmp_path_factory):
    return RungSet.load(write_rung_set(tmp_path_factory.mktemp("rungs") / "onnx"))


def outputs_with_prefix(rung_set, noise, n=400, blocks=BLOCKS):
    """The final margin decides the loss, and each block's token shows the logits through noise."""
    outputs = make_outputs(rung_set, n=n)
    rng = np.random.default_rng(1)
    tokens = (outputs.low.logits @ HEAD.T)[:, np.newaxis] + noise * rng.normal(
        size=(n, blocks + 1, D)
    )
    low = replace(outputs.low, cls_layers=tokens.astype(np.float32))
    return replace(outputs, low=low)


def decide(outputs, low_ms=10.0, high_ms=60.0, allowed_risk=0.05, signal="margin", fidelity=TOP1):
    rows = np.arange(len(outputs))
    groups = np.array(outputs.groups)
    return early_decision(
        outputs, rows, groups, fidelity, low_ms, high_ms, signal, allowed_risk, seed=0
    )


def late_rate(outputs, allowed_risk=0.05):
    """The loss is where two logits are close, so the margin escalates next to nothing in vain."""
    return TOP1.loss(outputs).mean() - allowed_risk


def test_a_prefix_that_knows_everything_saves_the_rest_of_the_rung_for_all_that_escalate(rung_set):
    outputs = outputs_with_prefix(rung_set, noise=0)
    found = decide(outputs)
    rate = late_rate(outputs)
    assert 0.05 < rate < 0.6
    assert found["escalation_rate"] == pytest.approx(rate, abs=0.01)
    assert found["ms_per_image"] == pytest.approx(10 + 60 * found["escalation_rate"])
    assert [split["after_block"] for split in found["splits"]] == [2, 3, 4]
    for split in found["splits"]:
        skipped = 10 * (1 - split["after_block"] / BLOCKS) * found["escalation_rate"]
        assert split["blocks"] == BLOCKS
        assert split["perfect_gain"] == pytest.approx(skipped / found["ms_per_image"])
        # Within the half per cent between two of the thresholds tried.
        assert split["escalated_early"] == pytest.approx(found["escalation_rate"], abs=0.011)
        assert split["gain"] == pytest.approx(split["perfect_gain"], rel=0.05)
    assert found["best"] == found["splits"][0]  # the earlier, the more is skipped


def test_it_pays_where_more_is_saved_than_one_more_call_costs(rung_set):
    outputs = outputs_with_prefix(rung_set, noise=0)
    rate = late_rate(outputs)
    enough = BLS_HOP_MS / (rate * (1 - 2 / BLOCKS))
    dear, cheap = (decide(outputs, enough * factor, 100.0) for factor in (1.15, 0.85))
    assert dear["pays"] and dear["saved_ms"] > BLS_HOP_MS
    assert dear["verdict"].startswith("Worth building: deciding after block 2 of 6 saves ")
    assert not cheap["pays"] and 0 < cheap["saved_ms"] < BLS_HOP_MS
    assert cheap["verdict"].startswith("Not worth it: deciding after block 2 of 6 saves ")
    assert cheap["verdict"].endswith("; 2 images would have to share it.")
    assert dear["saved_ms"] == pytest.approx(
        dear["ms_per_image"] - dear["best"]["ms_per_image"], rel=1e-9
    )


def test_a_prefix_that_knows_nothing_saves_nothing(rung_set):
    outputs = outputs_with_prefix(rung_set, noise=1e6)
    found = decide(outputs)
    assert not found["pays"]
    assert found["best"]["gain"] < 0.01 < found["best"]["perfect_gain"]
    assert found["best"]["escalated_early"] < 0.02
    assert found["verdict"].startswith("Not worth it: ")


def test_the_dearer_escalation_is_the_surer_an_early_decision_must_be(rung_set):
    outputs = outputs_with_prefix(rung_set, noise=1.0)
    cheap, dear = (decide(outputs, 10.0, high_ms) for high_ms in (12.0, 600.0))
    assert cheap["best"]["escalated_early"] > dear["best"]["escalated_early"] + 0.05
    assert cheap["best"]["escalation_rate"] > cheap["escalation_rate"]  # some for nothing
    assert dear["best"]["escalation_rate"] == dear["escalation_rate"]
    assert cheap["best"]["gain"] > dear["best"]["gain"]


@pytest.mark.parametrize("noise", [0, 1.0, 1e6])
@pytest.mark.parametrize("high_ms", [12.0, 60.0])
def test_no_gain_is_negative_or_more_than_there_is_to_skip(rung_set, noise, high_ms):
    found = decide(outputs_with_prefix(rung_set, noise, n=200), 10.0, high_ms)
    for split in found["splits"]:
        assert 0 <= split["gain"] <= split["perfect_gain"] + 1e-12
        assert split["escalation_rate"] >= max(found["escalation_rate"], split["escalated_early"])
        prefix = split["after_block"] / split["blocks"]
        run = prefix + (1 - prefix) * (1 - split["escalated_early"])
        cost = 10 * run + high_ms * split["escalation_rate"]
        assert split["ms_per_image"] == pytest.approx(cost)
        assert split["gain"] == pytest.approx(1 - cost / found["ms_per_image"])


def test_ranking_better_than_the_late_signal_is_no_gain_of_the_split(rung_set):
    # The late signal is worthless, the prefix knows all losses: a late signal could know them too.
    outputs = outputs_with_prefix(rung_set, noise=0)
    found = decide(outputs, signal="cls_path")
    assert found["escalation_rate"] > 0.7
    assert found["best"]["escalation_rate"] >= found["escalation_rate"]
    assert found["best"]["gain"] <= found["best"]["perfect_gain"]


def test_where_nothing_has_to_escalate_there_is_nothing_to_skip(rung_set):
    found = decide(outputs_with_prefix(rung_set, noise=0, n=200), allowed_risk=0.99)
    assert (found["escalation_rate"], found["saved_ms"], found["pays"]) == (0, 0, False)
    assert [split["gain"] for split in found["splits"]] == [0, 0, 0]
    assert found["best"]["signal"] is None
    assert found["verdict"] == (
        "Not worth it: no image has to escalate, so no block is run in vain."
    )


def test_a_rung_of_one_block_cannot_be_split(rung_set):
    found = decide(outputs_with_prefix(rung_set, noise=0, n=200, blocks=1))
    assert (found["best"], found["splits"], found["pays"]) == (None, [], False)
    assert "one block" in found["verdict"]


@pytest.mark.parametrize(("blocks", "places"), [(2, [1]), (3, [1, 2]), (12, [4, 6, 8])])
def test_a_rung_is_split_after_a_third_a_half_and_two_thirds(rung_set, blocks, places):
    found = decide(outputs_with_prefix(rung_set, 0, n=100, blocks=blocks), allowed_risk=0.99)
    assert [split["after_block"] for split in found["splits"]] == places


def test_a_headless_model_decides_early_by_cls_regression(rung_set):
    outputs = outputs_with_prefix(rung_set, noise=0)
    # What the full rung changes can be read off the length of every token.
    lengths = np.random.default_rng(2).uniform(0.5, 3, size=(len(outputs), 1))
    low = outputs.low.embedding / np.linalg.norm(outputs.low.embedding, axis=1, keepdims=True)
    low = (low * lengths).astype(np.float32)
    layers = np.repeat(low[:, np.newaxis], BLOCKS + 1, axis=1)
    away = np.where(lengths > 2, -low, low).astype(np.float32)
    headless = replace(
        outputs, low=RungOutputs(low, layers, None), high=RungOutputs(away, None, None)
    )
    found = decide(headless, signal="cls_regression", fidelity=Fidelity("cosine"))
    assert found["best"]["signal"] == "cls_regression"
    assert found["best"]["gain"] > 0.8 * found["best"]["perfect_gain"]


def test_a_signal_that_falls_where_images_escalate_is_turned_round(rung_set):
    outputs = outputs_with_prefix(rung_set, noise=0)
    # Here the images whose token moves least are lost.
    lengths = np.random.default_rng(2).uniform(0.5, 3, size=(len(outputs), 1))
    steps = np.linspace(0, 1, BLOCKS + 1)[:, np.newaxis] * (lengths * np.eye(D)[0])[:, np.newaxis]
    low, away = steps[:, -1], np.where(lengths < 1, -1, 1) * steps[:, -1]
    layers = steps.astype(np.float32)
    moving = replace(
        outputs,
        low=RungOutputs(low.astype(np.float32), layers, None),
        high=RungOutputs(away.astype(np.float32), None, None),
    )
    found = decide(moving, signal="cls_path", fidelity=Fidelity("cosine"))
    assert found["best"]["signal"] == "cls_path"
    assert found["best"]["gain"] > 0.9 * found["best"]["perfect_gain"] > 0


def test_images_that_the_full_rung_loses_count_against_the_same_risk(rung_set):
    outputs = outputs_with_prefix(rung_set, noise=0)
    lost = np.arange(len(outputs)) % 40 == 0
    high = replace(outputs.high, logits=np.where(lost[:, None], -1, 1) * outputs.high.logits)
    worse = replace(outputs, high=high, reference=outputs.high)
    logarithms = features.log_softmax(outputs.low.logits)
    first, second = features.top_two(logarithms)
    needed = needed_escalation(
        np.exp(second) - np.exp(first), TOP1.loss(worse), 0.05, TOP1.high_loss(worse)
    )
    found = decide(worse)
    assert found["escalation_rate"] == needed > decide(outputs)["escalation_rate"]


def test_only_the_rows_of_the_fit_split_are_looked_at(rung_set):
    outputs = outputs_with_prefix(rung_set, noise=1.0, n=300)
    rows, groups = np.arange(200), np.array(outputs.groups)

    def found(some):
        return early_decision(some, rows, groups, TOP1, 10.0, 60.0, "deferral", 0.05, 0)

    spoilt = outputs.low.cls_layers.copy()
    spoilt[200:] = 7
    other = replace(
        outputs,
        low=replace(outputs.low, cls_layers=spoilt),
        high=replace(outputs.high, logits=np.roll(outputs.high.logits, 1, axis=1)),
    )
    other.high.logits[:200] = outputs.high.logits[:200]
    assert found(other) == found(outputs)


def test_what_is_found_is_json(rung_set):
    found = decide(outputs_with_prefix(rung_set, noise=1.0, n=200))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["signal"] == "margin" and found["allowed_risk"] == 0.05
    assert found["hop_ms"] == BLS_HOP_MS
