"""What each split of a fit teaches, tests and measures, and where images go that taught a graph."""

from dataclasses import replace

import numpy as np
import pytest

from bundle.prints import encode, no_looks
from calibration.certify import Goal, allowed_errors, binomial_p_value, one_per_group
from calibration.fidelity import Fidelity
from calibration.fit import EscalationRate, FitError, Options, fit, without_learned
from calibration.outputs import usable
from calibration.splits import SplitError
from tests.unit.calibration_outputs import make_outputs

pytestmark = pytest.mark.usefixtures("remembered_fits")

TOP1 = Options(Fidelity("top1"))
GOAL = Goal(max_risk=0.1, confidence=0.9, method="ltt")


@pytest.mark.parametrize(
    ("test_share", "images"),
    [
        (None, {"fit": 700, "certify": 1300}),
        (0.2, {"fit": 560, "certify": 1040, "test": 400}),
    ],
)
def test_a_certified_fit_keeps_its_splits_apart(graph_set, test_share, images):
    outputs = make_outputs(graph_set, n=2000)
    fitted = fit(outputs, graph_set, GOAL, replace(TOP1, test_share=test_share))
    calibration, certificate = fitted.calibration, fitted.calibration.certificate
    assert calibration.data["splits"] == images
    assert {name: len(rows) for name, rows in fitted.splits.items()} == images
    # The certificate's own figures, from scratch. Groups hold two images: one of each is tested.
    n = images["certify"] // 2
    assert certificate["certified"] and certificate["n"] == n
    assert certificate["allowed"] == allowed_errors(n, GOAL)
    assert binomial_p_value(certificate["errors"], n, 0.1) <= 0.1
    kept = fitted.scores <= calibration.threshold
    tested = one_per_group(np.array(outputs.groups), fitted.splits["certify"], TOP1.seed)
    assert certificate["errors"] == (kept & fitted.loss)[tested].sum()
    figures = calibration.metrics
    assert figures["split"] == ("fit" if test_share is None else "test")
    measured = fitted.splits[figures["split"]]
    assert figures["images"] == len(measured)
    assert figures["risk"] == pytest.approx((kept & fitted.loss)[measured].mean())
    assert figures["escalation_rate"] == pytest.approx(1 - kept[measured].mean())
    assert figures["agreement_with_high"] == pytest.approx(1 - figures["risk"])


def ranges_of(graph_set, outputs, rows):
    """The graphs whose cheap rung has learned ranges of int8 from these images."""
    prints = encode([outputs.hashes[row] for row in rows], no_looks(len(rows)))
    return graph_set.adding(replace(graph_set.low, fitted_on=prints))


@pytest.mark.parametrize("taught", [range(0), range(100, 250)])
@pytest.mark.parametrize("test_share", [None, 0.2])
def test_only_the_fit_split_teaches(graph_set, taught, test_share):
    """With other images in the certify and test splits all that is learned stays the same."""
    outputs, options = make_outputs(graph_set, n=600), replace(TOP1, test_share=test_share)
    graphs = ranges_of(graph_set, outputs, taught)
    outputs = usable(outputs, graphs)
    others = make_outputs(graph_set, n=600, seed=9, unsure_below=2.5)
    first = fit(outputs, graphs, GOAL, options)
    rows = first.splits["fit"]
    assert set(taught) <= set(rows)
    fits = np.zeros(600, dtype=bool)
    fits[rows] = True

    def mixed(field, rung):
        one, other = (getattr(getattr(o, rung), field) for o in (outputs, others))
        return np.where(fits.reshape(-1, *[1] * (one.ndim - 1)), one, other)

    low = replace(
        outputs.low, **{f: mixed(f, "low") for f in ("embedding", "cls_layers", "logits")}
    )
    high = replace(outputs.high, **{f: mixed(f, "high") for f in ("embedding", "logits")})
    second = fit(replace(outputs, low=low, high=high), graphs, GOAL, options)
    one, two = first.calibration, second.calibration
    assert two.certificate["errors"] != one.certificate["errors"] or two.threshold != one.threshold
    assert (two.signal, two.score_map) == (one.signal, one.score_map)
    for name, array in one.coefficients.items():
        np.testing.assert_array_equal(two.coefficients[name], array)
    for name, figures in one.metrics["signals"].items():
        assert two.metrics["signals"][name]["cv_escalation"] == figures["cv_escalation"]
    np.testing.assert_array_equal(second.scores[rows], first.scores[rows])  # hence the candidates
    for name, values in first.values.items():
        np.testing.assert_array_equal(second.values[name][rows], values[rows])


def test_images_that_taught_a_graph_take_their_groups_to_the_fit_split(graph_set):
    outputs = make_outputs(graph_set, n=600)
    graphs = ranges_of(graph_set, outputs, range(0, 200, 2))  # one of each of 100 groups
    fitted = fit(usable(outputs, graphs), graphs, GOAL, TOP1)
    assert set(range(200)) <= set(fitted.splits["fit"])
    assert {name: len(rows) for name, rows in fitted.splits.items()} == {"fit": 210, "certify": 390}
    plain = fit(outputs, graph_set, GOAL, TOP1)
    assert not set(range(200)) <= set(plain.splits["fit"])
    most = ranges_of(graph_set, outputs, range(590))
    with pytest.raises(SplitError, match="split 'certify' gets 5 of them"):
        fit(usable(outputs, most), most, GOAL, TOP1)


def test_without_a_certificate_nothing_need_be_held_out(graph_set):
    outputs = make_outputs(graph_set, n=200)
    fitted = fit(outputs, graph_set, EscalationRate(0.3), replace(TOP1, test_share=0.0))
    calibration = fitted.calibration
    assert calibration.data["splits"] == {"fit": 200} and calibration.metrics["split"] == "fit"
    assert calibration.metrics["escalation_rate"] == pytest.approx(0.3)
    assert len(fitted.independent) == 0 and len(calibration.reference_scores) == 100
    assert set(calibration.reference_scores) <= set(fitted.scores)


def test_images_that_a_graph_has_learned_from_are_left_out_or_refused(graph_set):
    outputs = make_outputs(graph_set)
    learned = replace(
        graph_set, fitted_on=encode([outputs.hashes[i] for i in (7, 3, 399)], no_looks(3))
    )
    kept = without_learned(outputs, learned)
    out = [2, 3, 6, 7, 398, 399]  # with the others of their groups
    assert kept.hashes == tuple(h for i, h in enumerate(outputs.hashes) if i not in out)
    np.testing.assert_array_equal(kept.low.embedding, np.delete(outputs.low.embedding, out, 0))
    assert without_learned(outputs, graph_set).hashes == outputs.hashes
    with pytest.raises(FitError, match="used to fit a graph; leave them out") as error:
        fit(outputs, learned, GOAL, TOP1)
    assert "\n" not in str(error.value)
    assert fit(kept, learned, GOAL, TOP1).calibration.data["images"] == 394
