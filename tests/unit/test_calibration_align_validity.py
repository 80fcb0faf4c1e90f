"""Does a certificate about an aligned rung keep its promise, and do fit images tell the truth?

Repeated alignments from few images; the true risk of each is measured on many others. Asked is
whether exactly that risk is certified: a valid test says so in at most δ of them.
"""

import logging
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from calibration.certify import Goal, certify
from calibration.fidelity import Fidelity
from tests.unit.test_calibration_align import align, make_outputs
from tests.unit.test_calibration_validity import SURE

LOG = logging.getLogger("validity")
FIT, CERTIFY, OTHERS = 40, 60, 3000
DRAWS = 150
CONFIDENCE = 0.9
LOSS = Fidelity("cosine", 0.1)
NOTHING_ESCALATES = np.array([1.0])


@pytest.fixture(scope="module")
def draws():
    """Outputs, and the rows that teach, that test, and that say what is true."""
    splits = np.split(np.arange(FIT + CERTIFY + OTHERS), [FIT, FIT + CERTIFY])
    return [
        (make_outputs(len(np.concatenate(splits)), 0.4, 0.2, seed), *splits)
        for seed in range(DRAWS)
    ]


def loss_of(embedding, outputs):
    return LOSS.loss(replace(outputs, low=replace(outputs.low, embedding=embedding)))


def proved(draws, taught):
    """In which draws the risk that an alignment has is certified of it.

    `taught` gives the rows that it learns from, of those that teach and those that test.
    """
    found = []
    for seed, (outputs, fit, tests, others) in enumerate(draws):
        alignment = align(outputs, taught(fit, tests), LOSS, seed=seed).alignment
        lost = {}
        for name, rows in (("tests", tests), ("others", others)):
            sample = outputs.rows(rows)
            lost[name] = loss_of(alignment.embedding(sample.low), sample)
        goal = Goal(float(lost["others"].mean()), CONFIDENCE, "ltt")
        scores = np.zeros(len(tests), np.float32)
        verdict = certify(scores, lost["tests"], NOTHING_ESCALATES, goal)
        found.append(verdict.threshold is not None)
    LOG.info(
        "its true risk certified as too small in %.1f %% of %d draws", 100 * np.mean(found), DRAWS
    )
    return np.array(found)


def test_what_is_certified_on_images_that_taught_nothing_is_seldom_wrong(draws):
    found = proved(draws, lambda fit, tests: fit)
    assert found.sum() <= binom.ppf(SURE, DRAWS, 1 - CONFIDENCE)
    assert found.any()  # not by never certifying


def test_an_alignment_that_learned_from_certify_images_is_caught(draws):
    found = proved(draws, lambda fit, tests: np.concatenate([fit, tests]))
    assert found.sum() > binom.ppf(SURE, DRAWS, 1 - CONFIDENCE)


def test_cross_fitted_answers_do_not_flatter_and_those_of_the_map_itself_do(draws):
    told = []
    for seed, (outputs, fit, _, others) in enumerate(draws):
        alignment = align(outputs, fit, LOSS, seed=seed).alignment
        sample, rest = outputs.rows(fit), outputs.rows(others)
        told.append(
            [
                loss_of(alignment.cross_fitted, sample).mean(),
                loss_of(alignment.embedding(sample.low), sample).mean(),
                loss_of(alignment.embedding(rest.low), rest).mean(),
            ]
        )
    cross_fitted, in_fold, true = np.mean(told, axis=0)
    LOG.info(
        "risk by cross-fitted answers %.3f, in fold %.3f, true %.3f", cross_fitted, in_fold, true
    )
    error = 3 * np.std([row[0] - row[2] for row in told]) / np.sqrt(DRAWS)
    # Each was fitted on four fifths of the images only, so it may be a little worse.
    assert true - error <= cross_fitted <= true + 0.1
    assert in_fold < true - 0.2
