"""What `python -m calibration live` hands to its page, made up for tests."""

import copy
import math

STATEMENT = (
    "With confidence 90 %, at most 5 % of images like the 1,200 audited ones get an answer that "
    "names another class than the full rung's."
)
OPEN = "every image escalates; nothing is certified in this test, at least 45 more are needed"
BEGUN = 1_714_555_800.0  # 2024-05-01 09:30:00 UTC
NEEDED = 1.3
ROLLOUTS = ((90, 0.52), (200, 0.37), (420, 0.31), (900, 0.27))  # audited images, escalation


def point(audited, escalation, risk=0.03, share=0.2):
    """One look; without a threshold where everything escalates."""
    width = 0.9 / math.sqrt(1 + audited)
    is_served = escalation < 1
    return {
        "audited": audited,
        "threshold": round(1 - escalation, 4) if is_served else None,
        "escalation": escalation,
        "risk": risk if is_served else None,
        "low": max(0.0, risk - width) if is_served else None,
        "high": min(1.0, risk + width) if is_served else None,
        "audit_share": share if is_served else 1.0,
        "at": BEGUN + 10.0 * audited,
    }


def points(last=1200, step=10):
    """Looks from the first images on."""
    found = []
    for audited in range(step, last + 1, step):
        escalation = min([1.0, *(e for at, e in ROLLOUTS if at <= audited)])
        found.append(point(audited, escalation, risk=0.04 - 10 / (400 + audited)))
    return found


def evidence(n=1200, count=120, certified=88):
    """The careful thresholds first, of which so many are certified."""
    return [
        {
            "threshold": round((row + 1) / (count + 1), 4),
            "escalation": round(1 - row / count, 4),
            "lost": round(n * 0.12 * (row / count) ** 3),
            "n": n,
            "log10_wealth": round(NEEDED + (certified - row - 0.5) / 12, 3),
            "certified": row < certified,
        }
        for row in range(count)
    ]


def event(audited, kind, words):
    return {"at": BEGUN + 10.0 * audited, "audited": audited, "kind": kind, "words": words}


def live_content(**changes):
    """A service that came down in four steps, as plain types."""
    tested = evidence()
    served = next(row for row in reversed(tested) if row["certified"])
    rollouts = [
        event(audited, "rollout", f"router version {version}: {escalation:.0%} escalate")
        for version, (audited, escalation) in enumerate(ROLLOUTS, 2)
    ]
    content = {
        "backbone": "dinov2-small",
        "repository": "build/model_repository",
        "statement": STATEMENT,
        "certified": True,
        "goal": {
            "epsilon": 0.05,
            "confidence": 0.9,
            "answer": "an answer that names another class than the full rung's",
        },
        "served": {"version": 5, "threshold": served["threshold"], "audit_share": 0.2},
        "now": {
            "audited": 1200,
            "lost": 38,
            "escalation": served["escalation"],
            "risk": 0.0317,
            "interval": [0.021, 0.0463],
        },
        "points": points(),
        "evidence": tested,
        "needed": NEEDED,
        "tests": {"number": 1, "share": 0.5},
        "events": [event(0, "start", "thresholds at quantiles of the scores"), *rollouts],
        "ignored": {"other": 0, "damaged": 0},
        "served_figures": None,
    }
    return copy.deepcopy(content | changes)


def nothing_certified(audited=40, **changes):
    """The same service a moment after its start."""
    looks = [point(n, 1.0) for n in range(5, audited + 1, 5)]
    begun = {
        "statement": OPEN,
        "certified": False,
        "served": {"version": 1, "threshold": None, "audit_share": 1.0},
        "now": {
            "audited": audited,
            "lost": 0,
            "escalation": None,
            "risk": None,
            "interval": None,
        },
        "points": looks,
        "evidence": evidence(audited, certified=0),
        "events": [event(0, "start", "thresholds at quantiles of the scores")],
    }
    return live_content(**begun | changes)


def retreated(**changes):
    """The same service after its traffic has changed."""
    before = live_content()
    after = [point(n, 1.0) for n in range(1330, 1401, 10)]
    worse = [point(n, 0.27, risk=0.03 + (n - 1200) / 1500) for n in range(1210, 1321, 10)]
    turned = [
        event(1325, "retreat", "109 of 1,325 audited images were lost"),
        event(1325, "start", "the next share of δ"),
    ]
    found = {
        "points": before["points"] + worse + after,
        "events": before["events"] + turned,
        "tests": {"number": 2, "share": 0.25},
        "needed": 1.6,
        "evidence": evidence(75, certified=0),
    }
    return nothing_certified(75, **found | changes)


FIGURES = {
    "requests": 4_000,
    "images": {"low": 2_336, "high": 1_064, "audited": 600, "degraded": 0},
    "answered_twice": {"score": 1_064, "audit": 600},
    "realised_risk": 0.0286,
    "oracle_escalation": 0.214,
}
