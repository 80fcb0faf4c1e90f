import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from calibration.analyse import EXTREMES, QUANTILES, analyse, distribution, tenths
from calibration.fidelity import Fidelity, FidelityError, oracle_cosine, oracle_l2
from calibration.page_data import analysis_data
from report.calibration_page import write_calibration
from tests.unit.pages import FakeSource, Page, make_outputs, squeeze

pytestmark = pytest.mark.usefixtures("remembered_figures")

TOP1, COSINE = Fidelity("top1"), Fidelity("cosine", 0.3)


def some_outputs(n=100, head=True, seed=0):
    rng = np.random.default_rng(seed)
    oracle = rng.uniform(0.1, 5, size=n)
    return make_outputs(oracle, oracle + rng.normal(size=n) > 4, head)


def test_the_distribution_has_the_quantiles_of_numpy():
    values = np.arange(101.0)
    found = distribution(values)
    assert found == {"mean": 50, "quantiles": {str(percent): percent for percent in QUANTILES}}


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=60))
def test_tenths_are_ordered_and_lose_no_image(images):
    oracle = np.array([float(o) for o, _ in images])
    loss = np.array([lost for _, lost in images])
    groups = tenths(oracle, loss)
    assert len(groups) == min(10, len(images))
    assert sum(g["images"] for g in groups) == len(images)
    assert sum(g["losses"] for g in groups) == loss.sum()
    assert [g["upper"] for g in groups] == sorted(g["upper"] for g in groups)
    assert max(g["images"] for g in groups) - min(g["images"] for g in groups) <= 1
    assert all(
        g["interval"][0] - 1e-9 <= g["losses"] / g["images"] <= g["interval"][1] + 1e-9
        for g in groups
    )


def test_tenths_by_hand():
    groups = tenths(np.arange(20.0)[::-1], np.arange(20)[::-1] >= 17)
    assert [g["losses"] for g in groups] == [0] * 8 + [1, 2]
    assert [g["upper"] for g in groups] == list(range(1, 20, 2))
    assert groups[-1]["interval"] == pytest.approx((0.3424, 1.0), abs=1e-4)  # Wilson, 2 of 2


def test_the_oracle_is_related_to_both_losses_of_a_head():
    outputs = some_outputs()
    analysis = analyse(outputs, TOP1)
    assert [loss["kind"] for loss in analysis["losses"]] == ["top1", "cosine"]
    assert [loss["kind"] for loss in analyse(outputs, COSINE)["losses"]] == ["cosine", "top1"]
    oracle = oracle_l2(outputs)
    for relation in analysis["losses"]:
        loss = Fidelity(relation["kind"], TOP1.tolerance).loss(outputs)
        assert relation["rate"] == loss.mean()
        assert relation["auroc"] == pytest.approx(roc_auc_score(loss, oracle))
        assert relation["auroc_interval"][0] <= relation["auroc"] <= relation["auroc_interval"][1]


def test_without_a_head_there_is_the_cosine_loss_only():
    outputs = some_outputs(head=False)
    analysis = analyse(outputs, COSINE)
    assert [loss["kind"] for loss in analysis["losses"]] == ["cosine"]
    assert "margin" not in analysis["spearman"] and "cls_path" in analysis["spearman"]
    with pytest.raises(FidelityError, match="needs a head"):
        analyse(outputs, TOP1)


def test_spearman_is_that_of_scipy():
    outputs = some_outputs()
    found = analyse(outputs, TOP1)["spearman"]
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
    assert analysis["most"] == list(range(99, 99 - EXTREMES, -1))
    assert analysis["least"] == list(range(EXTREMES))
    few = analyse(make_outputs([3, 1, 2], [0, 0, 1]), TOP1)
    assert (few["most"], few["least"]) == ([0], [1])


def test_an_analysis_is_json():
    analysis = analyse(make_outputs([2.0] * 30, [0] * 30), TOP1)  # no loss: no AUROC
    content = json.loads(json.dumps(analysis, allow_nan=False))
    assert content["images"] == 30 and content["losses"][0]["auroc"] is None
    assert content["l2"]["quantiles"]["50"] == pytest.approx(2.0, rel=1e-5)
    (top1, _) = analysis["losses"]
    assert (analysis["images"], top1["rate"], top1["auroc"]) == (30, 0.0, None)


def page_of(path, outputs, fidelity, source, names=None):
    data = analysis_data(outputs, fidelity, source, names)
    write_calibration(path, None, data)
    return Page(path), data["found"]


def test_captions_are_true_in_the_corners(tmp_path):
    def text(oracle, loss):
        outputs = make_outputs(oracle, loss)
        return page_of(tmp_path / "page.html", outputs, TOP1, FakeSource(len(outputs)))[0].text

    same = text([0.0] * 20, [0] * 20)
    assert "times the median" not in same and "No image gets a low answer that names" in same
    assert "Every image gets" in text(np.arange(20), [1] * 20)
    usual = text(np.arange(1, 21), np.arange(20) >= 15)
    assert "The low answer names another class than the full rung for 25.0 % of the" in usual
    assert "with probability 1.00 (AUROC, 95 % interval 1.00 to 1.00; 0.5 is chance)" in usual
    assert "Half of the 20 images change by 10.5 or less" in usual
    assert "10 images whose L2 change is 11 to 20; for 5 of them the low answer names" in usual


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
    source = FakeSource(len(outputs))
    page, found = page_of(tmp_path / "new" / "analysis.html", outputs, fidelity, source)
    page.assert_self_contained()
    assert squeeze(fidelity.words()) in page.text
    for name in found["spearman"]:
        assert name in page.sections["What goes with it"]
    assert outputs.names[found["most"][0]] in page.sections["Where the full rung matters most"]
    assert outputs.names[found["least"][0]] in page.sections["Where it matters least"]
    assert "missing" not in page.classes


def test_a_vanished_source_leaves_boxes(tmp_path):
    names = ("a", "b", "c", "d", "e")
    page, _ = page_of(tmp_path / "analysis.html", some_outputs(), TOP1, None, names)
    assert page.classes.count("missing") == 2 * EXTREMES
    assert "48 of the 48 images in the galleries cannot be shown" in page.text
    assert "low: b full: a" in page.text
