import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from calibration.analyse import EXTREMES, QUANTILES, Distribution, analyse, tenths
from calibration.fidelity import Fidelity, FidelityError, oracle_cosine, oracle_l2
from calibration.pages.analysis import (
    extreme_reading,
    l2_reading,
    spearman_reading,
    tenths_reading,
    write_analysis,
)
from tests.unit.pages import FakeSource, Page, make_outputs, squeeze

TOP1, COSINE = Fidelity("top1"), Fidelity("cosine", 0.3)


def some_outputs(n=100, head=True, seed=0):
    rng = np.random.default_rng(seed)
    oracle = rng.uniform(0.1, 5, size=n)
    return make_outputs(oracle, oracle + rng.normal(size=n) > 4, head)


def test_the_distribution_has_the_quantiles_of_numpy():
    values = np.arange(101.0)
    assert Distribution.of(values).mean == 50
    assert Distribution.of(values).quantiles == {percent: percent for percent in QUANTILES}


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=60))
def test_tenths_are_ordered_and_lose_no_image(images):
    oracle = np.array([float(o) for o, _ in images])
    loss = np.array([lost for _, lost in images])
    groups = tenths(oracle, loss)
    assert len(groups) == min(10, len(images))
    assert sum(g.images for g in groups) == len(images)
    assert sum(g.losses for g in groups) == loss.sum()
    assert [g.upper for g in groups] == sorted(g.upper for g in groups)
    assert max(g.images for g in groups) - min(g.images for g in groups) <= 1
    assert all(g.interval[0] - 1e-9 <= g.rate <= g.interval[1] + 1e-9 for g in groups)


def test_tenths_by_hand():
    groups = tenths(np.arange(20.0)[::-1], np.arange(20)[::-1] >= 17)
    assert [g.losses for g in groups] == [0] * 8 + [1, 2]
    assert [g.upper for g in groups] == list(range(1, 20, 2))
    assert groups[-1].interval == pytest.approx((0.3424, 1.0), abs=1e-4)  # Wilson, 2 of 2


def test_the_oracle_is_related_to_both_losses_of_a_head():
    outputs = some_outputs()
    analysis = analyse(outputs, TOP1)
    assert [loss.kind for loss in analysis.losses] == ["top1", "cosine"]
    assert [loss.kind for loss in analyse(outputs, COSINE).losses] == ["cosine", "top1"]
    oracle = oracle_l2(outputs)
    for relation in analysis.losses:
        loss = Fidelity(relation.kind, TOP1.tolerance).loss(outputs)
        assert relation.rate == loss.mean()
        assert relation.auroc == pytest.approx(roc_auc_score(loss, oracle))
        assert relation.auroc_interval[0] <= relation.auroc <= relation.auroc_interval[1]


def test_without_a_head_there_is_the_cosine_loss_only():
    outputs = some_outputs(head=False)
    analysis = analyse(outputs, COSINE)
    assert [loss.kind for loss in analysis.losses] == ["cosine"]
    assert "margin" not in analysis.spearman and "cls_path" in analysis.spearman
    with pytest.raises(FidelityError, match="needs a head"):
        analyse(outputs, TOP1)


def test_spearman_is_that_of_scipy():
    outputs = some_outputs()
    found = analyse(outputs, TOP1).spearman
    oracle = oracle_l2(outputs)
    for name, values in (
        ("cosine", oracle_cosine(outputs)),
        ("norm of the low embedding", np.linalg.norm(outputs.low.embedding, axis=1)),
    ):
        assert found[name] == pytest.approx(spearmanr(values, oracle).statistic, abs=1e-6)
    assert set(found) >= {"margin", "entropy", "cls_path", "norm of the full embedding"}


def test_the_extremes_are_the_largest_and_the_smallest_changes():
    outputs = make_outputs(np.arange(1, 101), np.zeros(100))
    analysis = analyse(outputs, TOP1)
    assert analysis.most == tuple(range(99, 99 - EXTREMES, -1))
    assert analysis.least == tuple(range(EXTREMES))
    few = analyse(make_outputs([3, 1, 2], [0, 0, 1]), TOP1)
    assert (few.most, few.least) == ((0,), (1,))


def test_an_analysis_is_json_and_a_table():
    analysis = analyse(make_outputs([2.0] * 30, [0] * 30), TOP1)  # no loss: no AUROC
    content = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    assert content["images"] == 30 and content["losses"][0]["auroc"] is None
    assert content["l2"]["quantiles"]["50"] == pytest.approx(2.0, rel=1e-5)
    rows = dict(analysis.rows())
    assert rows["images"] == "30" and rows["top1: AUROC of the L2"] == "–"
    assert rows["top1: share with a loss"] == "0.000"


def test_readings_are_true_in_the_corners():
    same = analyse(make_outputs([0.0] * 20, [0] * 20), TOP1)
    assert "times the median" not in l2_reading(same)
    assert tenths_reading(same.losses[0]).startswith("No image gets a low answer that names")
    assert "is constant here" in spearman_reading(same)
    every = analyse(make_outputs(np.arange(20), [1] * 20), TOP1)
    assert tenths_reading(every.losses[0]).startswith("Every image gets")
    analysis = analyse(make_outputs(np.arange(1, 21), np.arange(20) >= 15), TOP1)
    text = squeeze(tenths_reading(analysis.losses[0]))
    assert "for 25.0 % of the images: 0.0 % of the group that changes least, 100.0 %" in text
    assert "Half of the 20 images change by 10.5 or less" in l2_reading(analysis)
    reading = extreme_reading(np.array([3.0, 2.0]), np.array([True, False]), analysis.losses[0])
    assert reading.startswith("These 2 images change by 2 to 3; for 1 of them the low answer names")


@pytest.mark.parametrize(
    ("outputs", "fidelity"),
    [
        (some_outputs(), TOP1),
        (some_outputs(), COSINE),
        (some_outputs(head=False), COSINE),
        (make_outputs([0.0] * 2, [0, 0]), TOP1),
        (make_outputs([1.0], [1]), TOP1),
        (make_outputs(np.arange(9), [1] * 9), TOP1),
    ],
)
def test_every_kind_of_outputs_makes_a_self_contained_page(tmp_path, outputs, fidelity):
    path = tmp_path / "new" / "analysis.html"
    analysis = analyse(outputs, fidelity)
    write_analysis(path, analysis, outputs, FakeSource(len(outputs)))
    page = Page(path)
    page.assert_self_contained()
    assert squeeze(fidelity.words()) in page.text
    for name in analysis.spearman:
        assert name in page.sections["What goes with it"]
    assert outputs.names[analysis.most[0]] in page.sections["Where the full rung matters most"]
    assert outputs.names[analysis.least[0]] in page.sections["Where it matters least"]
    assert "missing" not in page.classes


def test_a_vanished_source_leaves_boxes(tmp_path):
    outputs = some_outputs()
    path = tmp_path / "analysis.html"
    write_analysis(path, analyse(outputs, TOP1), outputs, None, ("a", "b", "c", "d", "e"))
    page = Page(path)
    assert page.classes.count("missing") == 2 * EXTREMES
    assert "48 of the 48 images in the galleries cannot be shown" in page.text
    assert "low: b full: a" in page.text
