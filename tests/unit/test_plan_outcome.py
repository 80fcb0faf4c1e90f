"""What became of a plan: every way in which nothing is chosen has its sentence."""

import pytest

from planner.result import outcome
from tests.unit.plan_content import STATEMENT, cascade, plan_content

DEAR = cascade("static_tome8", escalation=0.3)
REFUSED = cascade("static_112_int8static_align", certified=False)


def nothing(tested, never=False, **changes):
    content = plan_content(chosen=None, best_alternative=None, tested=tested, **changes)
    content["goal"]["latency_budget_ms"] = 60.0
    if never:
        content["candidates"] = [c for c in content["candidates"] if c["escalation"] is None]
    return content


@pytest.mark.parametrize(
    ("content", "case", "words"),
    [
        (plan_content(), "chosen", STATEMENT),
        (nothing([DEAR], disturbed=True), "doubted", "by CPU time none of them costs less"),
        (nothing([DEAR, REFUSED]), "dearer", "Cascade A is the cheapest that was certified"),
        (nothing([REFUSED]), "nothing_certified", "(1) could be certified for a risk of at most"),
        (nothing([]), "over_budget", "takes longer than the latency budget of 60.0"),
        (nothing([], never=True), "never", "no share of escalated images brought any cascade"),
    ],
)
def test_each_case_has_its_sentence(content, case, words):
    found = outcome(content)
    assert found["case"] == case and words in found["sentence"]
