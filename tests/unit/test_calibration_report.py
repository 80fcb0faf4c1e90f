import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.pages import readings
from calibration.pages.decisions import Decisions, UnitBin, unit_bins
from calibration.pages.figures import MAX_POINTS, thinned
from calibration.pages.galleries import MIN_ROWS
from calibration.pages.page import GALLERY
from calibration.pages.report import write_report
from calibration.record import FitRecord
from tests.unit.fakes import make_calibration
from tests.unit.pages import FakeSource, Page, make_outputs, squeeze

LTT = {
    "certified": True,
    "method": "ltt",
    "epsilon": 0.05,
    "confidence": 0.9,
    "fidelity": "top1",
    "tolerance": None,
    "signal": "cls_path",
    "n": 240,
    "errors": 3,
    "allowed": 7,
    "statement": "With confidence 90 %, at most 5 % of images get another answer.",
}
REFUSED = {**LTT, "certified": False, "errors": 11, "statement": "No threshold is certified."}
HOPELESS = {**REFUSED, "n": 20, "errors": 0, "allowed": -1}
CRC = {**LTT, "method": "crc", "confidence": None, "statement": "On average at most 5 %."}


def decide(scores, loss, threshold, oracle=None):
    scores = np.asarray(scores, np.float64)
    loss = np.asarray(loss, np.bool_)
    escalated = np.ones(len(scores), np.bool_) if threshold is None else scores > threshold
    oracle = scores if oracle is None else np.asarray(oracle, np.float64)
    return Decisions("cls_path", threshold, scores, oracle, loss, escalated, {"cls_path": scores})


def signal_metrics(auroc=0.8, interval=(0.7, 0.9)):
    return {
        "auroc": auroc,
        "auroc_interval": None if interval is None else list(interval),
        "spearman": 0.4,
        "spearman_interval": [0.3, 0.5],
        "needed_escalation": 0.25,
        "cv_escalation": 0.3,
    }


def make_metrics(names, auroc=0.8, interval=(0.7, 0.9), epsilon=0.05, **more):
    signals = {name: signal_metrics(auroc, interval) for name in (*names, "oracle")}
    signals["random"] = {**signal_metrics(0.5, None), "spearman_interval": None}
    return {
        "images": 10,
        "groups": 10,
        "escalation_rate": 0.2,
        "risk": 0.1,
        "intervals": {"escalation_rate": [0.1, 0.3], "risk": [0.0, 0.2]}
        | {name: [0.0, 1.0] for name in more},
        "needed_for": epsilon,
        "signals": signals,
        "no_better_than_random": interval is None or interval[0] <= 0.5,
        **more,
    }


def write(tmp_path, **changes):
    """Write a report of a fit in which image i has score i; return its page.

    Changes: n, test (rows), threshold, loss (rows), high_loss (rows: there is a reference),
    certificate, head, source, class_names, metrics, chosen_by, values.
    """
    n = changes.get("n", 240)
    test = np.array(changes.get("test", range(n // 2, n)))
    rest = np.setdiff1d(np.arange(n), test)
    scores = changes.get("scores", np.arange(n, dtype=np.float32))
    loss = np.isin(np.arange(n), changes.get("loss", range(n - 20, n)))
    head = changes.get("head", True)
    certificate = changes.get("certificate", LTT)
    outputs = make_outputs(scores + 1, loss, head)
    high_loss = None
    if "high_loss" in changes:
        high_loss = np.isin(np.arange(n), changes["high_loss"])
        outputs = replace(outputs, reference=outputs.high)
    names = ("cls_path", "cls_regression", "entropy", "margin") if head else ("cls_path",)
    splits = {"fit": rest, "test": test}
    chosen_by = {"fidelity": "top1", "tolerance": None, "escalation_rate": 0.1, "signal": "auto"}
    if certificate is not None:
        splits = {"fit": rest[::2], "certify": rest[1::2], "test": test}
        goal = {"max_risk": 0.05, "confidence": 0.9, "method": certificate["method"]}
        chosen_by = {"fidelity": "top1", "tolerance": None, **goal, "signal": "auto"}
    if not head:
        chosen_by |= {"fidelity": "cosine", "tolerance": 0.1}
    calibration = make_calibration(
        threshold=changes.get("threshold", n - 30.5),
        classes=5 if head else None,
        certificate=certificate,
        chosen_by=chosen_by | changes.get("chosen_by", {}),
        metrics=changes.get("metrics") or make_metrics(names),
        data={
            "source": outputs.title,
            "images": n,
            "fingerprint": outputs.fingerprint(),
            "seed": 7,
            "group_by": "source",
            "same_pixels": 3,
            "look_alike": 14,
            "splits": {name: len(rows) for name, rows in splits.items()},
        },
    )
    record = FitRecord(
        splits=splits,
        values={name: scores.astype(np.float64) for name in names},
        scores=scores,
        loss=loss,
        fingerprint=outputs.fingerprint(),
        artifact_sha256=hashlib.sha256(b"artifact").hexdigest(),
        high_loss=high_loss,
    )
    path = tmp_path / "new" / "report.html"
    source = changes.get("source", FakeSource(n))
    write_report(path, calibration, record, outputs, source, changes.get("class_names"))
    return Page(path)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a certified fit, as `write` makes it without changes."""
    return write(tmp_path_factory.mktemp("certified"))


def gallery(page, heading):
    """Rows shown under a heading such as "Kept low and wrong: 2"."""
    words = page.sections[heading].split()
    return [int(word[7:12]) for word in words if word.startswith("folder/") and word[-1] == "g"]


def scores_under(page, start):
    """Scores in the captions under headings that start so."""
    text = " ".join(text for name, text in page.sections.items() if name.startswith(start))
    return [float(score) for score in re.findall(r"score (\d+\.\d+) ", text)]


def test_the_risk_at_the_same_escalation_is_exact_by_hand():
    decisions = decide([4, 3, 2, 1], [1, 0, 1, 0], 2.5)
    assert (decisions.base_risk, decisions.escalation, decisions.risk) == (0.5, 0.5, 0.25)
    assert decisions.random_risk() == 0.25
    assert decisions.risk_when_ranked_by(decisions.loss.astype(float)) == 0.0
    assert decisions.risk_when_ranked_by(np.array([0.0, 1, 0, 1])) == 0.5


def test_among_ties_chance_chooses():
    decisions = decide([4, 3, 2, 1], [1, 1, 0, 0], 3.5)
    assert decisions.risk_when_ranked_by(np.zeros(4)) == pytest.approx(decisions.random_risk())
    # One of the three tied images escalates; two of the three have a loss.
    assert decisions.risk_when_ranked_by(np.array([5.0, 5, 5, 0])) == pytest.approx((2 - 2 / 3) / 4)


@given(st.data())
def test_ranking_by_the_scores_gives_the_risk_of_the_decision(data):
    n = data.draw(st.integers(1, 30))
    scores = data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    loss = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    threshold = data.draw(st.one_of(st.none(), st.integers(-1, 6)))
    decisions = decide(scores, loss, threshold)
    assert decisions.risk_when_ranked_by(decisions.scores) == pytest.approx(decisions.risk)
    cells = decisions.cells()
    assert sorted(np.concatenate(list(cells.values()))) == list(range(n))
    assert len(cells["kept_wrong"]) / n == pytest.approx(decisions.risk)


def test_the_chosen_signal_is_ranked_by_the_scores_that_decide(tmp_path):
    outputs = make_outputs([1, 2, 3], [0, 0, 1])
    values = {"cls_path": np.array([9.0, 8, 7]), "margin": np.array([0.1, 0.2, 0.3])}
    record = FitRecord(
        {}, values, np.array([5, 6, 7], np.float32), np.array([0, 0, 1], bool), "", ""
    )
    decisions = Decisions.of(make_calibration(threshold=5.5), record, outputs, np.array([2, 0]))
    assert decisions.values["cls_path"].tolist() == [7, 5]
    assert decisions.values["margin"].tolist() == [0.3, 0.1]
    assert decisions.escalated.tolist() == [True, False]
    np.testing.assert_allclose(decisions.oracle, [3, 1], rtol=1e-5)


def test_bins_hold_neighbouring_scores_in_equal_count():
    rng = np.random.default_rng(0)
    scores = rng.permutation(200).astype(float)
    bins = unit_bins(scores, 2 * scores)
    assert [b.images for b in bins] == [20] * 10
    assert [b.score for b in bins] == [9.5 + 20 * i for i in range(10)]
    assert [b.oracle for b in bins] == [19.0 + 40 * i for i in range(10)]
    assert bins[0].half_width == pytest.approx(1.96 * np.std(2 * np.arange(20), ddof=1) / 20**0.5)
    assert unit_bins(np.array([3.0]), np.array([5.0])) == [UnitBin(1, 3.0, 5.0, 0.0)]


def test_a_scatter_of_many_points_is_thinned_and_says_so():
    assert thinned(MAX_POINTS).tolist() == list(range(MAX_POINTS))
    rows = thinned(5000)
    assert len(set(rows)) == MAX_POINTS and np.array_equal(rows, thinned(5000))
    many = decide(np.arange(5000), np.zeros(5000), 1.0)
    assert "Drawn are 2,000 of 5,000 images" in readings.scatter(many, 0.3)
    assert "Drawn" not in readings.scatter(decide([1, 2], [0, 1], 1.5), 0.3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LTT, "3 of 240 independent images of the certify split (one of each group) were kept low"),
        (LTT, "up to 7 were allowed; such a statement is wrong for at most 10 % of calibrations"),
        (CRC, "holds on average over repeated calibrations"),
        (REFUSED, "11 of 240 independent images"),
        (REFUSED, "more than the 7 that would have been allowed"),
        (
            HOPELESS,
            "With 20 independent images of the certify split (one of each group), no number",
        ),
        (None, "Nothing was tested"),
    ],
)
def test_the_certificate_is_read_as_it_is(content, words):
    threshold = 2.5 if content is None or content["certified"] else None
    assert words in squeeze(readings.certificate(content, threshold))


@pytest.mark.parametrize(
    ("threshold", "interval", "epsilon", "words"),
    [
        (None, [0, 0], 0.05, "All 10 test images escalate, so the risk is 0 by construction"),
        (
            0.5,
            [0, 0.31],
            0.05,
            "0 of 10 test images were kept low with a loss (0.0 %); the interval",
        ),
        (1.5, [0.0, 0.3], None, "no limit on the risk was asked for"),
        (1.5, [0.0, 0.3], 0.3, "the whole 95 % interval lies within the limit ε = 30 %"),
        (1.5, [0.0, 0.3], 0.2, "within the limit ε = 20 %; the 95 % interval reaches beyond it"),
        (1.5, [0.0, 0.3], 0.05, "above the limit ε = 5 %; the 95 % interval reaches down to it"),
        (1.5, [0.06, 0.3], 0.05, "the whole 95 % interval lies ABOVE the limit ε = 5 %"),
    ],
)
def test_the_measured_risk_is_held_against_its_limit(threshold, interval, epsilon, words):
    decisions = decide(np.arange(10), np.arange(10) == 1, threshold)
    assert words in squeeze(readings.risk(decisions, interval, epsilon))


@pytest.mark.parametrize(
    ("loss", "threshold", "words"),
    [
        ([0, 0, 0, 0], 1.5, "No test image has a loss: every curve lies at 0"),
        ([0, 1, 0, 0], None, "Every test image escalates, so the risk is 0"),
        ([0, 1, 0, 0], None, "with none escalated it would be 25.0 %"),
        ([0, 1, 0, 0], 9.0, "No test image escalates, so the risk is that of the low rung: 25.0 %"),
        ([0, 0, 1, 1], 2.5, "Escalating 25.0 % of the test images lowers the risk from 50.0 % to"),
        ([0, 0, 1, 1], 2.5, "as many drawn at random would leave 37.5 %"),
        ([0, 0, 1, 1], 2.5, "largest oracle L2 50.0 %, and perfect knowledge of the loss 25.0 %"),
    ],
)
def test_the_curve_is_read_at_the_chosen_point(loss, threshold, words):
    decisions = decide([0, 1, 2, 3], loss, threshold, oracle=[3, 2, 1, 0])
    assert words in squeeze(readings.curve(decisions))


def test_the_signals_reading_says_which_signal_ranks_best_and_who_chose():
    metrics = make_metrics(["cls_path", "margin"])
    assert "no signal does better here" in readings.signals(metrics, "cls_path", "auto")
    metrics["signals"]["margin"]["auroc"] = 0.95
    assert "the best signal here, margin, has 0.95" in readings.signals(metrics, "cls_path", "auto")
    assert "chosen by cross-validation" in readings.signals(metrics, "cls_path", "auto")
    assert "named by the user" in readings.signals(metrics, "cls_path", "cls_path")
    nothing = make_metrics(["cls_path"], auroc=None, interval=None)
    assert "which the test split does not have" in readings.signals(nothing, "cls_path", "auto")


def test_a_signal_that_may_be_random_is_called_so_and_no_other():
    assert readings.warning(make_metrics(["cls_path"]), "cls_path") == ""
    unsure = make_metrics(["cls_path"], interval=(0.45, 0.8))
    assert "is not shown to be better than random" in readings.warning(unsure, "cls_path")
    nothing = make_metrics(["cls_path"], auroc=None, interval=None)
    assert "It is unknown whether cls_path" in readings.warning(nothing, "cls_path")


def test_the_scatter_reading_counts_losses_beyond_the_threshold():
    assert "1 of 2 images with a loss lie above the threshold of 2.5" in readings.scatter(
        decide([0, 1, 2, 3], [1, 0, 0, 1], 2.5), 0.4
    )
    assert "no test image has a loss" in readings.scatter(decide([0, 1], [0, 0], 0.5), 0.4)
    assert "there is no threshold" in readings.scatter(decide([0, 1], [0, 1], None), 0.4)
    assert "constant here" in readings.scatter(decide([1, 1], [0, 1], 0.5), None)


def test_the_units_reading_names_the_average_and_the_largest_gap():
    text = squeeze(readings.units([UnitBin(10, 2.0, 1.0, 0.1), UnitBin(30, 4.0, 3.5, 0.1)]))
    assert "lie 0.625 apart on average (21.7 % of the mean change)" in text
    assert "furthest where 2 was predicted and 1 measured" in text
    assert "% of the mean" not in readings.units([UnitBin(5, 1.0, 0.0, 0.0)])


def test_the_deltas_reading_compares_changes_with_and_without_loss():
    decisions = decide([0, 0, 0, 0], [0, 0, 1, 1], 1.0, oracle=[1, 2, 3, 5])
    text = readings.deltas(decisions, 1.0)
    assert "by 2.5 in the median: by 4 where there is a loss, 1.5 where there is none" in text
    assert "no test image has a loss" in readings.deltas(decide([1, 2], [0, 0], 1.0), None)
    assert "every test image has a loss" in readings.deltas(decide([1, 2], [1, 1], 1.0), None)


def test_the_cells_reading_divides_by_nothing():
    both = readings.cells(decide([0, 1, 2, 3], [0, 1, 0, 1], 1.5))
    assert "1 of 2 images with a loss were escalated" in both and "1 of 2 escalations" in both
    assert readings.cells(decide([0, 1], [0, 0], 9.0)) == "No image has a loss; no image escalates."


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        ({}, "certified", LTT["statement"]),
        ({"certificate": CRC}, "certified", "in expectation"),
        (
            {"certificate": REFUSED, "threshold": None},
            "refused",
            "Not certified: nothing is guaranteed: always-high",
        ),
        ({"certificate": HOPELESS, "threshold": None}, "refused", "none certifies"),
        ({"certificate": None}, "unasked", "chosen by an escalation rate of 10 %; nothing is guar"),
        ({"head": False}, "certified", "has a cosine below 0.9 to the full rung's embedding"),
        ({"threshold": -1.0}, "certified", "Every test image escalates"),
        ({"threshold": 1e6}, "certified", "No test image escalates"),
        ({"loss": []}, "certified", "No test image has a loss"),
        ({"loss": range(240)}, "certified", "every test image has a loss"),
    ],
)
def test_every_kind_of_calibration_makes_a_self_contained_page(tmp_path, changes, state, words):
    page = write(tmp_path, **changes)
    page.assert_self_contained()
    assert [name for name in ("certified", "refused", "unasked") if name in page.classes] == [state]
    assert squeeze(words) in page.text
    certificate = changes.get("certificate", LTT)
    if certificate is not None:
        assert certificate["statement"] in page.text
    names = ["cls_path", "random", "oracle"]
    names += [] if "head" in changes else ["cls_regression", "entropy", "margin"]
    for name in names:
        assert name in page.sections["Signals against random and the oracle"]


def test_the_first_thing_under_the_title_is_the_verdict(page):
    assert page.text.index(LTT["statement"]) < page.text.index("Terms.")
    facts = page.text[: page.text.index("Terms.")]
    for fact in ("240 n: independent", "3 errors:", "7 errors allowed", "5 % ε", "90 % confidence"):
        assert fact in facts


def test_a_signal_no_better_than_random_is_said_loudly(tmp_path, page):
    unsure = make_metrics(["cls_path", "margin"], interval=(0.4, 0.9))
    assert "loud" in write(tmp_path, metrics=unsure).classes
    assert "loud" not in page.classes


def test_accuracies_are_shown_where_they_were_measured(tmp_path, page):
    assert "accuracy" not in page.text
    labelled = make_metrics(["cls_path"], accuracy_low=0.812)
    assert "accuracy, low rung 81.2 % 0.0 % to 100.0 %" in write(tmp_path, metrics=labelled).text


def test_galleries_put_each_image_in_its_cell(tmp_path):
    # Test rows 120..239; scores are rows; losses 125, 126 and 235; escalated from 233 on.
    page = write(tmp_path, loss=[1, 125, 126, 235], threshold=232.5)
    assert gallery(page, "Kept low and wrong: 2") == [125, 126]
    assert gallery(page, "Escalated and needed: 1") == [235]
    assert gallery(page, "Escalated in vain: 6") == [233, 234, 236, 237, 238, 239]
    right = gallery(page, "Kept low and right: 111")
    assert len(right) == GALLERY and right == sorted(right)
    assert set(right) <= set(range(120, 233)) - {125, 126}
    table = page.sections["What was kept and what escalated"]
    assert "kept low 111 (92.5 %) 2 (1.7 %) 113 (94.2 %)" in table
    assert "escalated 6 (5.0 %) 1 (0.8 %) 7 (5.8 %)" in table
    assert "1 of 3 images with a loss were escalated (33.3 %); 1 of 7 escalations" in table


def test_a_small_test_split_is_shown_together_with_certify_and_says_so(tmp_path):
    small = range(240 - MIN_ROWS + 1, 240)
    page = write(tmp_path, test=small)
    assert "Certify and test split together, 169 images" in page.text
    assert "Certify and test" not in write(tmp_path, test=range(240 - MIN_ROWS, 240)).text
    alone = write(tmp_path, test=small, certificate=None)
    assert "Test split, 99 images." in alone.text


def test_captions_name_both_answers(tmp_path):
    loss = [125, 239]
    named = write(tmp_path, loss=loss, threshold=200.5, class_names=("cat", "dog", "c", "d", "e"))
    assert "low: dog full: cat" in named.sections["Kept low and wrong: 1"]
    assert "both: cat" in named.sections["Kept low and right: 80"]
    numbered = write(tmp_path, loss=loss, threshold=200.5)
    assert "low: class 1 full: class 0" in numbered.sections["Escalated and needed: 1"]
    headless = write(tmp_path, loss=loss, threshold=200.5, head=False)
    assert "cosine" in headless.sections["Kept low and wrong: 1"]
    assert "full:" not in headless.text


def test_images_that_cannot_be_shown_leave_a_box_with_their_name(tmp_path):
    changes = {"loss": [130, 131, 132], "threshold": 200.5}
    source = FakeSource(240, gone=[130], swapped=[131])
    page = write(tmp_path, source=source, **changes)
    wrong = page.sections["Kept low and wrong: 3"]
    assert "folder/00130.jpg: image not readable: cannot be read" in wrong
    assert "folder/00131.jpg: image has changed since collect" in wrong
    assert "folder/00132.jpg:" not in wrong
    assert page.classes.count("missing") == 2 and "2 of the" in page.text
    nowhere = write(tmp_path, source=None, **changes)
    assert "folder/00132.jpg: image not found" in nowhere.text
    nowhere.assert_self_contained()


def test_images_that_are_as_collected_are_shown(page):
    assert "missing" not in page.classes
    jpegs = [address for address in page.loaded if address.startswith("data:image/jpeg")]
    assert len(jpegs) == GALLERY + 10 + 20  # kept low and right, escalated in vain, and needed


def test_the_provenance_names_rungs_splits_and_seed(page):
    text = page.sections["What was measured on what"]
    assert "copies: of equal pixels; re-encoded, resized or mirrored 3; 14; each picture" in text
    for words in ("made up images: 240", "fit 60, certify 60, test 120; seed 7", "0" * 12 + "…"):
        assert words in text
    assert hashlib.sha256(b"artifact").hexdigest()[:12] in text


def test_equal_input_gives_equal_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    first, second = (tmp_path / side / "new" / "report.html" for side in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_ten_thousand_images_make_no_more_than_three_megabytes(tmp_path):
    n = 10_000
    page = write(tmp_path, n=n, loss=range(0, n, 7), threshold=n - 1000.5)
    assert page.size < 3e6
    assert "Drawn are 2,000 of 5,000 images" in page.text


def test_names_cannot_break_the_page(tmp_path):
    page = write(tmp_path, class_names=("<script>alert(1)</script>", "b", "c", "d", "e"))
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "<script" not in (tmp_path / "new" / "report.html").read_text()


def test_the_risk_of_a_full_rung_that_loses_too_is_read_as_such():
    high_loss = np.array([0, 0, 0, 1], np.bool_)
    decisions = replace(decide([0, 1, 2, 3], [0, 1, 1, 1], 1.5), high_loss=high_loss)
    assert decisions.lost.tolist() == [False, True, False, True]
    assert (decisions.risk, decisions.random_risk()) == (0.5, 0.5 * 0.75 + 0.5 * 0.25)
    assert decisions.best_risk() == 0.25  # escalate the second and the third
    text = squeeze(readings.risk(decisions, [0.1, 0.9], 0.2))
    assert text.startswith("2 of 4 test images got an answer with a loss (50.0 %)")
    assert "perfect knowledge of the loss 25.0 %" in squeeze(readings.curve(decisions))


def test_escalating_every_image_to_a_full_rung_that_loses_is_not_called_riskless():
    high_loss = np.array([0, 0, 0, 1], np.bool_)
    decisions = replace(decide([0, 1, 2, 3], [0, 1, 0, 0], None), high_loss=high_loss)
    assert "by construction" not in readings.risk(decisions, [0.1, 0.9], 0.5)
    assert "so the risk is 25.0 % whatever the signal" in squeeze(readings.curve(decisions))
    plain = decide([0, 1, 2, 3], [0, 1, 0, 0], None)
    assert "the risk is 0 by construction" in readings.risk(plain, [0, 0], 0.5)


def test_the_page_names_the_reference_it_is_about(tmp_path, page):
    words = "names another class than the full FP32 model"
    assert words not in page.text and "kept low and have a loss" in page.text
    changed = write(tmp_path, high_loss=[150, 239])
    assert words in changed.text and "the full FP32 model is the reference" in changed.text
    assert "whose answer, low or escalated, has a loss" in changed.text
    assert "1 of 120 test images got an answer with a loss" in changed.text


def test_what_is_printed_near_the_threshold_is_on_its_side_of_it(tmp_path):
    scores = (15.65 + 2e-6 * np.arange(240)).astype(np.float32)
    threshold = float(scores[200:202].astype(np.float64).mean())
    page = write(tmp_path, scores=scores, threshold=threshold, loss=range(0, 240, 2))
    assert page.text.count(f"{threshold!r}") >= 2
    assert f"At the threshold {threshold!r}, " in page.text
    low, high = (scores_under(page, cell) for cell in ("Kept low and", "Escalated"))
    assert len(low) > 20 and len(high) > 20
    assert max(low) <= threshold < min(high)


def test_a_score_that_hardly_tells_images_apart_is_said_loudly(tmp_path, page):
    assert "hardly tells" not in page.text
    names = ("cls_path", "cls_regression", "entropy", "margin")
    flat = {"score": 0.005, "oracle": 3.0, "tied": 0.1}
    told = write(tmp_path, metrics=make_metrics(names, score_spread=flat))
    assert "The score hardly tells images apart: the middle 90 %" in told.text
    assert told.classes.count("loud") == 1
