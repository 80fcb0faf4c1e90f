"""The page of a live certificate: it says what the data says, at every stage of a service."""

import json
import math

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from report import live_page
from report.live_page import border, boxes, state, write_live
from report.page import RED
from tests.unit.live_content import (
    FIGURES,
    OPEN,
    ROLLOUTS,
    STATEMENT,
    event,
    evidence,
    live_content,
    nothing_certified,
    point,
    points,
    retreated,
)
from tests.unit.pages import Page, drawn_words, squeeze


def write(tmp_path, content):
    path = tmp_path / "live.html"
    write_live(path, json.loads(json.dumps(content)))  # as it comes out of a file
    return Page(path)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The page of a service that came down in four steps."""
    return write(tmp_path_factory.mktemp("live"), live_content())


def test_the_page_begins_with_what_is_guaranteed_and_what_it_costs(usual):
    usual.assert_self_contained()
    top = usual.sections["Live certificate"]
    assert "certified" in usual.classes and STATEMENT in top
    assert "dinov2-small, served from build/model_repository" in top
    assert "27.5 % escalated, of the audited images 20.0 % audited, of all images" in top
    assert "3.2 % (2.1 % to 4.6 %) risk seen" in top
    assert "5 % ε: limit on the risk 90 % confidence 1,200 audited images" in top
    assert "where its score is above 0.7273" in top and "5 router version" in top
    assert "names another class than the full rung's" in top and "loud" not in usual.classes


def test_the_promise_is_said_with_what_it_is_not(usual):
    words = usual.sections["What is promised, and what is not"]
    assert words.count(". ") + 1 == 3
    assert "about images like those audited so far" in words
    assert "nothing is promised until the test notices" in words
    assert "Somebody who chooses what is sent chooses the evidence." in words


def test_a_service_at_its_start_has_nothing_certified_and_no_fault(tmp_path):
    page = write(tmp_path, nothing_certified())
    top = page.sections["Live certificate"]
    assert "unasked" in page.classes and "loud" not in page.classes
    assert "Nothing certified yet E" + OPEN[1:] in top
    assert "Every image gets the answer of the full rung" in top
    assert "100.0 % escalated" in top and "– risk seen" in top and "none threshold" in top
    assert "so nothing was lost" in page.sections["The risk"]
    assert len(page.loaded) == 2
    assert "0.0083 100.0 % 0 / 40" in page.sections["The evidence"]


def test_a_service_without_one_image_has_a_page(tmp_path):
    page = write(tmp_path, nothing_certified(0, points=[], evidence=[], events=[]))
    assert page.loaded == []
    assert page.sections["The way down"] == "No image has been audited yet."
    assert "No thresholds are tested yet." in page.sections["The evidence"]
    assert page.sections["Events"] == "None yet."


def test_a_single_look_is_a_point_with_its_interval(tmp_path, monkeypatch):
    page = write(tmp_path, live_content(points=[point(12, 0.5)], events=[]))
    page.assert_self_contained()
    assert len(page.loaded) == 3
    down, risk = drawn(monkeypatch, live_content(points=[point(12, 0.5)]))[:2]
    assert [(s.x, s.y) for s in down if s.marker == "o"] == [([12], [0.5])]
    (last,) = (s for s in risk if s.marker == "o")
    assert last.x == [12] and last.y_spread[0][0] == 0 < last.y_spread[0][1]


def test_after_a_retreat_the_page_is_red_and_says_what_happened(tmp_path):
    page = write(tmp_path, retreated())
    top = page.sections["Live certificate"]
    assert "refused" in page.classes and "Gone back to the full rung" in top
    assert "Every image gets the answer of the full rung" in top
    newest = page.sections["Events"].partition("when audited images what in words ")[2]
    assert newest.startswith("2024-05-01 13:10:50 UTC 1,325 test begins the next share of δ")
    assert "1,325 retreat 109 of 1,325 audited images were lost" in newest
    assert "Test 2, with a share of 25 % of δ = 10 %" in page.sections["The evidence"]


def test_having_gone_back_ends_with_the_next_threshold_that_is_served():
    again = retreated()
    again["events"].append(event(1325, "rollout", "router version 6: every image escalates"))
    assert state(retreated()) == state(again) == "refused"
    again["events"].append(event(1600, "rollout", "router version 7: 40% escalate"))
    assert state(again | {"certified": True}) == "certified"
    again["points"].append(point(1610, 0.4))
    assert state(again) == "unasked"  # another score is tested since


def test_a_retreat_that_is_not_rolled_out_is_no_certificate(tmp_path):
    turned = event(1200, "retreat", "traffic contradicts the certificate")
    stuck = live_content(events=[*live_content()["events"], turned])
    page = write(tmp_path, stuck)
    assert "refused" in page.classes and "certified" not in page.classes
    assert "Contradicted by live traffic" in page.sections["Live certificate"]
    assert "no version without its threshold is rolled out yet" in page.text


def test_the_events_stand_newest_first_and_old_ones_are_folded_away(usual, tmp_path):
    listed = usual.sections["Events"]
    order = [listed.index(f"router version {version}:") for version in (5, 4, 3, 2)]
    assert order == sorted(order) and listed.endswith("thresholds at quantiles of the scores")
    many = [event(n, "failed" if n % 2 else "rollout", f"try no. {n}.") for n in range(30)]
    listed = write(tmp_path, live_content(events=many)).sections["Events"]
    shown, folded = listed.split("10 earlier events")
    assert "try no. 10." in shown and "try no. 9." in folded and "rollout failed" in folded


def test_what_somebody_must_look_at_is_loud(tmp_path):
    failed = live_content()
    failed["events"].append(event(1200, "failed", "the disk is full"))
    page = write(tmp_path, failed)
    assert page.classes.count("loud") == 1
    assert "tries it again: the disk is full" in page.sections["Live certificate"]
    stale = write(tmp_path, live_content(certified=False))
    assert "version 5 still serves a threshold that nothing certifies" in stale.text
    worse = live_content(served_figures=FIGURES | {"realised_risk": 0.07})
    worse["now"] |= {"risk": 0.09, "interval": [0.06, 0.13]}
    page = write(tmp_path, worse)
    assert page.classes.count("loud") == 2
    assert "risk seen is 9.0 % and, with its confidence, ABOVE the limit of 5 %" in page.text
    assert "7.0 % got a loss, ABOVE the limit" in page.text


def test_what_is_certified_and_not_rolled_out_is_said(tmp_path):
    content = live_content(served={"version": 1, "threshold": None, "audit_share": 1.0})
    assert "certified, and not rolled out yet" in write(tmp_path, content).text
    assert dict(boxes(content))["threshold"] == "none"


def test_the_table_shows_the_border_of_what_is_certified(usual):
    rows = border(evidence())
    assert [row["certified"] for row in rows] == [True] * 4 + [False] * 4
    assert len({row["text"] for row in rows}) == 8
    assert [row["certified"] for row in border(evidence(certified=0))] == [False] * 4
    assert [row["certified"] for row in border(evidence(certified=120))] == [True] * 4
    table = usual.sections["The evidence"]
    assert "0.7273 27.5 % 55 / 1,200 1.34 yes" in table and "0.7355 26.7 %" in table
    assert usual.classes.count("chosen") == 1 and "Not counted" not in table


def test_records_that_were_no_evidence_are_counted(tmp_path):
    page = write(tmp_path, live_content(ignored={"other": 1200, "damaged": 1}))
    said = "Not counted: 1,200 records of another score or version, and 1 damaged line"
    assert said in page.sections["The evidence"]


def test_what_all_requests_got_is_shown_where_it_was_counted(usual, tmp_path):
    assert "What all requests got" not in usual.sections
    page = write(tmp_path, live_content(served_figures=FIGURES))
    got = page.sections["What all requests got"]
    assert "the cheap answer 2,336 58.4 %" in got
    assert "it was audited 600 15.0 %" in got and "audit alone 600 15.0 %" in got
    assert (
        "4,000 requests with 4,000 images. 2.9 % of the images got a loss, of 5 % allowed." in got
    )
    assert "would escalate 21.4 %" in got
    assert "21.4 % would be enough, if the risk were known" in page.sections["Live certificate"]
    none = {"low": 0, "high": 0, "audited": 0, "degraded": 0}
    unknown = FIGURES | {"images": none, "realised_risk": None, "oracle_escalation": None}
    page = write(tmp_path, live_content(served_figures=unknown))
    assert "the cheap answer 0 –" in page.text and "would be enough" not in page.text


def drawn(monkeypatch, content, rules=False):
    """The series, or the rules, of the way down, the risk and the evidence."""
    charts = []
    monkeypatch.setattr(
        live_page,
        "chart",
        lambda series, x, y, lines=(), **_: charts.append(lines if rules else series) or "",
    )
    live_page._way_down(content, 0.2)
    live_page._risk(content)
    live_page._evidence(content)
    return charts


def test_the_way_down_falls_in_steps_and_marks_each_rollout_on_them(monkeypatch):
    down = drawn(monkeypatch, live_content())[0]
    full, escalated = (series for series in down if series.line)
    assert (90, 1.0) in zip(escalated.x, escalated.y, strict=True)
    assert set(escalated.y) == {1.0, *(share for _, share in ROLLOUTS)}
    assert full.y[-1] == pytest.approx(0.27 + 0.73 * 0.2)
    (marked,) = (series for series in down if series.name == "rollout")
    assert list(zip(marked.x, marked.y, strict=True)) == list(ROLLOUTS)


def test_turns_limit_and_oracle_are_lines(monkeypatch):
    down, risk, needed = drawn(monkeypatch, retreated(), rules=True)
    assert [(rule.at, rule.across) for rule in down] == [(1325, False), (0.2, True)]
    assert (risk[0].at, risk[0].colour, risk[1].name) == (0.05, RED, "retreat")
    assert [rule.at for rule in needed] == [1.6]
    more = retreated()
    more["events"].append(event(1500, "start", "a score learnt from traffic"))
    assert [rule.at for rule in drawn(monkeypatch, more, rules=True)[0]] == [1325, 1500, 0.2]


def test_the_risk_has_a_gap_where_no_threshold_is_served(monkeypatch):
    _, (line, last), _ = drawn(monkeypatch, retreated())
    assert [math.isnan(value) for value in line.y[:9]] == [True] * 8 + [False]
    assert all(math.isnan(ends[0]) for ends in line.band[-8:])
    assert last.x == [1320]


def test_evidence_beyond_the_figure_stands_on_its_edge(monkeypatch):
    content = live_content()
    content["evidence"][0]["log10_wealth"] = 1e300
    content["evidence"][-1]["log10_wealth"] = -1e300
    certified, open_, served = drawn(monkeypatch, content)[2]
    assert max(certified.y) < 10 and min(open_.y) > -10
    assert len(certified.x) == 88 and len(open_.x) == 32
    assert served.x == [content["now"]["escalation"]]


def test_an_event_beyond_the_last_look_is_in_the_figure(monkeypatch):
    content = live_content(points=[point(0, 1.0)], events=[event(23, "rollout", "")])
    assert live_page._audited(content).limits[1] > 23
    long = live_content(events=[event(0, "failed", ""), event(10**6, "rollout", "")])
    down = drawn(monkeypatch, long)[0]
    assert [series.x for series in down if series.marker in "vX" and series.marker] == [
        [10**6],
        [10],
    ]


def test_a_long_way_down_is_drawn_by_factors(tmp_path):
    page = write(tmp_path, live_content(points=points(90_000, step=500)))
    assert "audited images (logarithmic)" in drawn_words(page.loaded[0])
    assert "audited images" in drawn_words(write(tmp_path, live_content()).loaded[0])


def test_what_users_name_is_escaped(tmp_path):
    nasty = "<script>alert(1)</script>"
    content = live_content(backbone=nasty, repository=nasty, statement=nasty)
    content["goal"]["answer"] = nasty
    content["events"].append(event(7, "failed", nasty))
    page = write(tmp_path, content)
    assert "<script" not in (tmp_path / "live.html").read_text(encoding="utf-8")
    assert page.text.count(squeeze(nasty)) >= 6


shares = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 1e-300])
counts = st.integers(0, 10**12)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def looks(draw):
    has_risk = draw(st.booleans())
    low, risk, high = sorted(draw(st.tuples(shares, shares, shares)))
    return {
        "audited": draw(counts),
        "threshold": draw(numbers),
        "escalation": draw(shares),
        "risk": risk if has_risk else None,
        "low": low if has_risk else None,
        "high": high if has_risk else None,
        "audit_share": draw(shares),
        "at": draw(numbers),
    }


tested = st.fixed_dictionaries(
    {
        "threshold": numbers,
        "escalation": shares,
        "lost": counts,
        "n": counts,
        "log10_wealth": numbers,
        "certified": st.booleans(),
    }
)
happened = st.fixed_dictionaries(
    {
        "at": numbers,
        "audited": counts,
        "kind": st.sampled_from(["start", "rollout", "retreat", "failed"]),
        "words": st.text(max_size=8),
    }
)


@pytest.mark.filterwarnings("error")
@settings(
    max_examples=15,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # three figures each: none to shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    looks=st.lists(looks(), max_size=5),
    tests=st.lists(tested, max_size=5),
    events=st.lists(happened, max_size=5),
    threshold=st.none() | numbers,
    epsilon=shares,
    needed=st.floats(0, 1e300),
    certified=st.booleans(),
)
def test_a_page_is_made_of_the_most_extreme_values(
    tmp_path, looks, tests, events, threshold, epsilon, needed, certified
):
    content = live_content(
        points=looks, evidence=tests, events=events, needed=needed, certified=certified
    )
    content["served"]["threshold"] = threshold
    content["goal"]["epsilon"] = epsilon
    page = write(tmp_path, content)
    figures = [looks, any(look["risk"] is not None for look in looks), tests]
    assert len(page.loaded) == sum(map(bool, figures))
    assert page.sections["Events"]
