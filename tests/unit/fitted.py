"""A fit made by hand, and pages of it, for the tests of what shows one."""

import hashlib
from dataclasses import replace

import numpy as np

from calibration.decisions import Decisions
from calibration.fidelity import Fidelity
from calibration.page_data import analysis_data, fit_data
from calibration.record import Fit
from report.calibration_page import write_calibration
from tests.unit.fakes import make_calibration
from tests.unit.pages import FakeSource, Page, make_outputs

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
        "split": "test",
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


def make_fit(**changes):
    """What `page_data` is given of a fit in which image i has score i.

    Changes: n, test (rows; None: there is no test split), threshold, loss (rows), high_loss (rows:
    there is a reference), certificate, head, source, class_names, metrics, chosen_by, values.
    """
    n = changes.get("n", 240)
    test = changes.get("test", range(n // 2, n))
    rest = np.setdiff1d(np.arange(n), [] if test is None else test)
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
    splits = {"fit": rest}
    chosen_by = {"fidelity": "top1", "tolerance": None, "escalation_rate": 0.1, "signal": "auto"}
    if certificate is not None:
        splits = {"fit": rest[::2], "certify": rest[1::2]}
        goal = {"max_risk": 0.05, "confidence": 0.9, "method": certificate["method"]}
        chosen_by = {"fidelity": "top1", "tolerance": None, **goal, "signal": "auto"}
    if test is not None:
        splits["test"] = np.array(test)
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
    fit = Fit(
        calibration,
        splits,
        {name: scores.astype(np.float64) for name in names},
        scores,
        loss,
        high_loss,
        artifact_sha256=hashlib.sha256(b"artifact").hexdigest(),
    )
    return fit, outputs, changes.get("source", FakeSource(n)), changes.get("class_names")


def write(tmp_path, **changes):
    """The report of such a fit."""
    path = tmp_path / "new" / "report.html"
    write_calibration(path, *data_of(**changes))
    return Page(path)


def data_of(**changes):
    """What that report is given."""
    fit, outputs, source, names = given = make_fit(**changes)
    analysis = analysis_data(outputs, Fidelity.of(fit.calibration), source, names)
    return fit_data(*given), analysis
