"""`live.html`: how a service earns its threshold from its own traffic, and what it promises now.

One self-contained file. Its way down begins where every image is answered by the full rung, and
ends at the threshold that is served; each figure is over the images that were audited.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import GREY, INK, OTHERS, Axis, Rule, Series, chart
from .page import HIGH_COLOUR, LOW_COLOUR, RED, render
from .words import interval, percent, score_texts, setting

Content = Mapping[str, Any]
_SIZE = (8.8, 3.6)
_CROWDED = 5_000  # audited images, from which on equal steps would hide the way down
_BORDER = 4  # thresholds on each side of the border that the table shows
_LATEST = 20  # events that are not folded away
_KINDS = {
    "start": "test begins",
    "rollout": "rollout",
    "retreat": "retreat",
    "failed": "rollout failed",
}


def write_live(path: Path, data: Mapping[str, Any]) -> None:
    """Write the page of a test on live traffic.

    Args:
        path: file to write, whole or not at all.
        data: as `python -m calibration live` gathers it. `backbone`, `repository`, `statement` and
            `certified` say what is promised; `goal` holds ε, the confidence and the words for a
            loss; `served` the router's version, threshold and audit share; `now` the counts of
            that threshold over the running test; `points` what was served at each look;
            `evidence` every threshold of the running test, the careful ones first, of which those
            are certified whose `log10_wealth` reaches `needed`; `tests` the running test's number
            and its share of δ; `events` and `ignored` what else happened; `served_figures`, None
            or missing where nobody counted, what all requests got. Shares are between 0 and 1,
            moments are seconds since 1970.
    """
    points, served = data["points"], data.get("served_figures")
    oracle = served and served["oracle_escalation"]
    render(
        path,
        "live.html.j2",
        data=data,
        state=state(data),
        doubts=list(doubts(data)),
        boxes=boxes(data),
        threshold=threshold_text(data),
        way=_way_down(data, oracle) if points else None,
        risk=_risk(data) if any(point["risk"] is not None for point in points) else None,
        evidence=_evidence(data) if data["evidence"] else None,
        border=border(data["evidence"]),
        events=[{**event, "kind": _KINDS[event["kind"]]} for event in data["events"]][::-1],
        latest=_LATEST,
        served=served,
    )


def state(data: Content) -> str:
    """The class of the verdict: `certified`, `refused` after a retreat, else `unasked`.

    A retreat is over once another threshold was served.
    """
    events, certified = data["events"], data["certified"]
    back = [row for row, event in enumerate(events) if event["kind"] == "retreat"][-1:]
    for row in back:
        if certified and not any(event["kind"] == "rollout" for event in events[row:]):
            return "refused"
        later = (point for point in data["points"] if point["audited"] > events[row]["audited"])
        if not certified and all(point["threshold"] is None for point in later):
            return "refused"
    return "certified" if certified else "unasked"


def doubts(data: Content) -> Iterator[str]:
    """What somebody should look at now, a sentence each."""
    events, now, served = data["events"], data["now"], data.get("served_figures")
    limit, version = data["goal"]["epsilon"], data["served"]["version"]
    if data["certified"] and state(data) == "refused":
        yield (
            f"Live traffic contradicts the certificate of router version {version}, and no version "
            "without its threshold is rolled out yet."
        )
    if events and events[-1]["kind"] == "failed":
        yield f"The last rollout failed, and the next look tries it again: {events[-1]['words']}"
    if not data["certified"] and data["served"]["threshold"] is not None:
        yield f"Router version {version} still serves a threshold that nothing certifies any more."
    if data["certified"] and now["interval"] is not None and now["interval"][0] > limit:
        yield (
            f"The risk seen is {percent(now['risk'])} and, with its confidence, ABOVE the limit of "
            f"{setting(limit)}: the images have changed."
        )
    if served and served["realised_risk"] is not None and served["realised_risk"] > limit:
        yield (
            f"Of all images that were served {percent(served['realised_risk'])} got a loss, ABOVE "
            f"the limit of {setting(limit)}."
        )


def boxes(data: Content) -> list[tuple[str, str]]:
    """The figures of the headline, as pairs of name and value."""
    goal, served, now = data["goal"], data["served"], data["now"]
    escalation = 1.0 if served["threshold"] is None else now["escalation"]
    risk = percent(now["risk"])
    ends = now["interval"]
    seen = risk if ends is None else f"{risk} ({interval(tuple(ends), percent)})"
    figures = data.get("served_figures")
    oracle = figures and figures["oracle_escalation"]
    rows = [("escalated, of the audited images", percent(escalation))]
    if oracle is not None:
        rows.append(("would be enough, if the risk were known", percent(oracle)))
    return [
        *rows,
        ("audited, of all images", percent(served["audit_share"])),
        ("risk seen (confidence sequence)", seen),
        ("ε: limit on the risk", setting(goal["epsilon"])),
        ("confidence", setting(goal["confidence"])),
        ("audited images", f"{now['audited']:,}"),
        ("threshold", threshold_text(data)),
        ("router version", str(served["version"])),
    ]


def threshold_text(data: Content) -> str:
    """The threshold that is served; `none` where every image escalates."""
    threshold = data["served"]["threshold"]
    return "none" if threshold is None else score_texts([threshold], threshold)[0]


def border(evidence: Sequence[Content]) -> list[dict[str, Any]]:
    """The boldest certified thresholds and those that come next, each with its `text`."""
    certified = [row for row, found in enumerate(evidence) if found["certified"]]
    end = certified[-1] + 1 if certified else 0
    shown = evidence[max(0, end - _BORDER) : end + _BORDER]
    texts = score_texts([found["threshold"] for found in shown])
    return [{**found, "text": text} for found, text in zip(shown, texts, strict=True)]


def _audited(data: Content) -> Axis:
    """The axis of both figures over time, with room for every event."""
    most = max(each["audited"] for each in (*data["points"], *data["events"]))
    if most <= _CROWDED:
        return Axis("audited images", limits=(0, 1.02 * max(most, 10)))
    return Axis("audited images (logarithmic)", log=True, limits=(10, 1.1 * most))


def _places(some: Sequence[Content], x: Axis) -> list[float]:
    """Where points or events stand on that axis; the first ones at its end, if it begins later."""
    least = (x.limits and x.limits[0]) or 0
    return [max(each["audited"], least) for each in some]


def _turns(data: Content) -> list[Rule]:
    """Where it went back, and where a later test began on its own."""
    kinds = ("retreat", "start")
    at = {kind: [e["audited"] for e in data["events"] if e["kind"] == kind] for kind in kinds}
    later = [begun for begun in at["start"][1:] if begun not in at["retreat"]]
    looks = (("retreat", at["retreat"], RED, "-"), ("another test begins", later, GREY, ":"))
    found: list[Rule] = []
    for name, places, colour, line in looks:
        names = [name] + [""] * len(places)  # named once
        found += [Rule(x, n, colour=colour, line=line) for x, n in zip(places, names, strict=False)]
    return found


def _way_down(data: Content, oracle: float | None) -> str:
    """The share that the served threshold escalates, by audited images, with what was rolled out.

    A step falls where the look was made that found the new threshold served.
    """
    points, x = data["points"], _audited(data)
    audited = _places(points, x)
    escalated = [point["escalation"] for point in points]
    full = [e + (1 - e) * point["audit_share"] for e, point in zip(escalated, points, strict=True)]
    series = [
        Series("answered by the full rung, audit included", *_steps(audited, full), GREY, line="-"),
        Series("escalated", *_steps(audited, escalated), HIGH_COLOUR, line="-", width=2),
        Series("", audited[-1:], escalated[-1:], HIGH_COLOUR, "o", size=7),
    ]
    for kind, marker, colour in (("rollout", "v", LOW_COLOUR), ("failed", "X", INK)):
        some = _places([event for event in data["events"] if event["kind"] == kind], x)
        heights = [_at(at, audited, escalated) for at in some]
        if some:
            series.append(Series(_KINDS[kind], some, heights, colour, marker, size=8, above=True))
    rules = _turns(data)
    if oracle is not None:
        rules.append(Rule(oracle, "enough, if the risk were known", across=True, line=":"))
    y = Axis("share of images", percent=True, limits=(0, 1.03))
    return chart(series, x, y, rules, size=_SIZE)


def _steps(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The corners of a line that keeps its height until the next point."""
    corners = [*zip(x[:1], y[:1], strict=True)]
    for right, before, after in zip(x[1:], y, y[1:], strict=False):
        corners += [(right, before), (right, after)]
    return [corner[0] for corner in corners], [corner[1] for corner in corners]


def _at(audited: float, x: Sequence[float], y: Sequence[float]) -> float:
    """The height of that line where so many images were audited; the whole before it begins."""
    return next((high for at, high in zip(x[::-1], y[::-1], strict=True) if at <= audited), 1.0)


def _risk(data: Content) -> str:
    """The risk seen and its confidence sequence against the limit, by audited images."""
    points, limit, x = data["points"], data["goal"]["epsilon"], _audited(data)
    audited = _places(points, x)
    risk, low, high = ([_or_gap(point[key]) for point in points] for key in ("risk", "low", "high"))
    known = [row for row, value in enumerate(risk) if not math.isnan(value)]
    last = known[-1]
    series = [
        Series(
            "risk seen, with its confidence sequence",
            audited,
            risk,
            OTHERS[0],
            line="-",
            width=2,
            band=list(zip(low, high, strict=True)),
        ),
        Series(
            "",
            [audited[last]],
            [risk[last]],
            OTHERS[0],
            "o",
            size=7,
            y_spread=[(low[last], high[last])],
        ),
    ]
    # An interval begins with everything between 0 and 1; with that in sight nothing else is.
    seen = [limit, *(risk[row] for row in known[len(known) // 10 :])]
    ends = [0.0 if math.isnan(high[last]) else high[last]]
    top = min(1.0, max(2.5 * limit, 1.25 * max(seen), 1.25 * max(ends), 0.02))
    y = Axis("risk: share of all images with a loss", percent=True, limits=(-0.01 * top, top))
    rule = Rule(limit, f"limit ε = {setting(limit)}", across=True, colour=RED)
    return chart(series, x, y, [rule, *_turns(data)], size=_SIZE)


def _or_gap(value: float | None) -> float:
    return math.nan if value is None else value


def _evidence(data: Content) -> str:
    """The evidence for every threshold of the running test by what it escalates."""
    needed, served = data["needed"], data["served"]["threshold"]
    room = max(needed, 1.0)
    floor, ceiling = -room, needed + 2 * room
    series = []
    for is_certified, name, colour in ((True, "certified", LOW_COLOUR), (False, "not yet", GREY)):
        some = [found for found in data["evidence"] if found["certified"] == is_certified]
        series += _thresholds(name, some, colour, floor, ceiling, size=5)
    now = [found for found in data["evidence"] if found["threshold"] == served]
    series += _thresholds("served", now[:1], HIGH_COLOUR, floor, ceiling, size=9)
    x = Axis("share that the threshold escalates", percent=True, limits=(-0.02, 1.02))
    y = Axis("evidence (wealth of the bets, log 10)", limits=(1.03 * floor, ceiling + 0.03 * room))
    rules = [Rule(needed, f"certifies: {needed:.3g}", across=True, colour=RED)]
    return chart(series, x, y, rules, size=_SIZE)


def _thresholds(
    name: str, some: Sequence[Content], colour: str, floor: float, ceiling: float, size: float
) -> list[Series]:
    """One series of thresholds, held within the figure; none of none."""
    if not some:
        return []
    shares = [found["escalation"] for found in some]
    wealth = [min(max(found["log10_wealth"], floor), ceiling) for found in some]
    return [Series(name, shares, wealth, colour, "o", size=size, above=name == "served")]
