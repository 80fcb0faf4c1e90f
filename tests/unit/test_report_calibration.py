"""The calibration's page: it says what it is given, in every case that is a normal result."""

import hashlib
import re

import jinja2
import numpy as np
import pytest

from calibration.page_data import MIN_ROWS
from report import calibration_page
from report.calibration_page import MAX_POINTS, thinned, write_calibration
from report.page import GALLERY
from tests.unit.fitted import CRC, HOPELESS, LTT, REFUSED, data_of, make_metrics, write
from tests.unit.pages import FakeSource, Page, squeeze

pytestmark = pytest.mark.usefixtures("remembered_figures")

NAMES = ("cls_path", "cls_regression", "entropy", "margin")


@pytest.fixture(scope="module")
def data():
    """What that page is given."""
    return data_of()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a certified fit, as `write` makes it without changes."""
    return write(tmp_path_factory.mktemp("certified"))


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures, which take most of their time."""
    keys = ("curve", "scatter", "l2", "cosine", "tenths")
    for name in ("_fit_figures", "_analysis_figures"):
        monkeypatch.setattr(calibration_page, name, lambda _: dict.fromkeys(keys, "data:image/x"))


def gallery(page, heading):
    """Rows shown under a heading such as "Kept low and wrong: 2"."""
    words = page.sections[heading].split()
    return [int(word[7:12]) for word in words if word.startswith("folder/") and word[-1] == "g"]


def scores_under(page, start):
    """Scores in the captions under headings that start so."""
    text = " ".join(text for name, text in page.sections.items() if name.startswith(start))
    return [float(score) for score in re.findall(r"score (\d+\.\d+) ", text)]


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
        ({"loss": range(240)}, "certified", "Every image gets a low answer that"),
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


@pytest.mark.usefixtures("undrawn")
def test_a_signal_no_better_than_random_is_said_loudly(tmp_path, page):
    unsure = make_metrics(["cls_path", "margin"], interval=(0.4, 0.9))
    assert "loud" in write(tmp_path, metrics=unsure).classes
    assert "loud" not in page.classes


@pytest.mark.usefixtures("undrawn")
def test_accuracies_are_shown_where_they_were_measured(tmp_path, page):
    assert "accuracy" not in page.text
    labelled = make_metrics(["cls_path"], accuracy_low=0.812)
    assert "accuracy, low rung 81.2 % 0.0 % to 100.0 %" in write(tmp_path, metrics=labelled).text


@pytest.mark.usefixtures("undrawn")
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


@pytest.mark.usefixtures("undrawn")
def test_a_small_test_split_is_shown_together_with_certify_and_says_so(tmp_path):
    small = range(240 - MIN_ROWS + 1, 240)
    page = write(tmp_path, test=small)
    assert "Certify and test split together, 169 images" in page.text
    assert "Certify and test" not in write(tmp_path, test=range(240 - MIN_ROWS, 240)).text
    alone = write(tmp_path, test=small, certificate=None)
    assert "Test split, 99 images." in alone.text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("certificate", [LTT, None])
def test_what_is_measured_on_fit_images_is_named_so(tmp_path, page, certificate):
    fit = write(tmp_path, test=None, certificate=certificate, n=400, loss=[200, 202, 399])
    for words in (
        "There is no test split.",
        "Fit split, cross-fitted. A curve shows the risk",
        "fit images were kept low with a loss",
        "of the fit images lowers the risk",
        "Fit split, cross-fitted, one point for each image.",
        f"Fit split, cross-fitted, {200 if certificate else 400} images.",
        "cls_path was chosen by cross-validation on the fit split.",
    ):
        assert words in fit.text and words not in page.text, words
    assert "Measured on fit images, cross-fitted" in fit.sections
    said = fit.text.replace("There is no test split", "")
    assert "test image" not in said.lower() and "test split" not in said.lower()
    assert "Measured on held-out images" in page.sections and "cross-fitted" not in page.text


@pytest.mark.usefixtures("undrawn")
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
    # Kept low and right, escalated in vain, and needed; both ends of the change.
    assert len(jpegs) == GALLERY + 10 + 20 + 2 * GALLERY


def test_the_provenance_names_rungs_splits_and_seed(page):
    text = page.sections["What was measured on what"]
    assert "copies: of equal pixels; re-encoded, resized or mirrored 3; 14; each picture" in text
    for words in ("made up images: 240", "fit 60, certify 60, test 120; seed 7", "0" * 12 + "…"):
        assert words in text
    assert hashlib.sha256(b"artifact").hexdigest()[:12] in text


def test_equal_input_gives_equal_bytes(tmp_path, remembered_figures):
    write(tmp_path / "a")
    remembered_figures()
    write(tmp_path / "b")
    first, second = (tmp_path / side / "new" / "report.html" for side in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_a_scatter_of_many_points_is_thinned():
    assert thinned(MAX_POINTS).tolist() == list(range(MAX_POINTS))
    rows = thinned(5000)
    assert len(set(rows)) == MAX_POINTS and np.array_equal(rows, thinned(5000))


@pytest.mark.parametrize(
    ("certificate", "words"),
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
        ({**LTT, "reference": "full model"}, "(one of each group) got an answer with a loss"),
        (None, "Nothing was tested"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_the_certificate_is_read_as_it_is(tmp_path, certificate, words):
    certified = certificate is None or certificate["certified"]
    threshold = 210.5 if certified else None
    assert words in write(tmp_path, certificate=certificate, threshold=threshold).text


RISKS = {
    "by_construction": "the risk is 0 by construction",
    "none_lost": "exact one of Clopper and Pearson",
    "no_limit": "no limit on the risk was asked for",
    "grouped": "is about one image of each group",
    "within": "the whole 95 % interval lies within the limit ε = 5 %",
    "reaches_beyond": "reaches beyond it",
    "reaches_down": "reaches down to it",
    "contradicts": "ABOVE the limit ε = 5 %",
}
CURVES = {
    "no_loss": "every curve lies at 0",
    "all": "Every test image escalates",
    "none": "No test image escalates",
    "some": "lowers the risk from 16.7 % to",
}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("key", "case", "captions"),
    [("risk_case", case, RISKS) for case in RISKS]
    + [("curve_case", case, CURVES) for case in CURVES],
)
def test_each_case_has_its_caption_and_no_other_one(tmp_path, data, key, case, captions):
    fit, analysis = data
    fit = {**fit, "measured": {**fit["measured"], key: case}}
    write_calibration(tmp_path / "page.html", fit, analysis)
    text = Page(tmp_path / "page.html").text
    assert [name for name, caption in captions.items() if caption in text] == [case]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("key", ["risk_case", "curve_case"])
def test_a_case_without_a_caption_is_an_error(tmp_path, data, key):
    fit, analysis = data
    with pytest.raises(jinja2.UndefinedError, match="undefined_case"):
        new = {**fit["measured"], key: "new"}
        write_calibration(tmp_path / "p", {**fit, "measured": new}, analysis)


@pytest.mark.usefixtures("undrawn")
def test_captions_hold_their_numbers(tmp_path, page):
    assert "20 of 20 images with a loss lie above the threshold of 209.5" in page.text
    assert "Ranked by cls_path, an image with a loss comes above one without with" in page.text
    assert "was chosen by cross-validation" in page.text
    named = write(tmp_path, chosen_by={"signal": "cls_path"}, n=200, test=range(150, 200))
    assert "cls_path was named by the user" in named.text
    nothing = make_metrics(NAMES, auroc=None, interval=None)
    told = write(tmp_path, metrics=nothing, loss=[], threshold=None, certificate=None)
    assert "which the test split does not have" in told.text
    assert "there is no threshold, every image escalates" in told.text
    assert "No image has a loss; 0 of 120 escalations needed it (0.0 %)" in told.text
    assert "no test image has a loss." in write(tmp_path, loss=[]).text


def test_ten_thousand_images_make_no_more_than_three_megabytes(tmp_path):
    n = 10_000
    page = write(tmp_path, n=n, loss=range(0, n, 7), threshold=n - 1000.5)
    assert page.size < 3e6
    assert "Drawn are 2,000 of 5,000 images" in page.text


def test_names_cannot_break_the_page(tmp_path):
    page = write(tmp_path, class_names=("<script>alert(1)</script>", "b", "c", "d", "e"))
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "<script" not in (tmp_path / "new" / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
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


@pytest.mark.usefixtures("undrawn")
def test_a_score_that_hardly_tells_images_apart_is_said_loudly(tmp_path, page):
    assert "hardly tells" not in page.text
    names = ("cls_path", "cls_regression", "entropy", "margin")
    flat = {"score": 0.005, "oracle": 3.0, "tied": 0.1}
    told = write(tmp_path, metrics=make_metrics(names, score_spread=flat))
    assert "The score hardly tells images apart: the middle 90 %" in told.text
    assert told.classes.count("loud") == 1
