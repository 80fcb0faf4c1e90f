"""What the demo measured, for people: on the terminal, and on a page with every crop."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from perf.figures import TOO_BUSY
from perf.harness import Paired
from perf.systems import ADAPTIVE, HIGH, LOW
from report.demo_page import write_demo
from report.page import thumbnail
from report.terminal import table
from report.words import percent, recipe_words, score_texts, times
from routing import threshold_text

from .roads import Road
from .steps import OUT

PAGE = OUT / "index.html"
Summary = Mapping[str, Any]


def print_summary(summary: Summary) -> None:
    """Print accuracy, latency and throughput, what they mean and, of a plan, its alternatives."""
    console, answers, plan = Console(), summary["answers"], summary.get("plan")
    full = f"{_full(summary)} always"
    names = {LOW: "cheap rung always", HIGH: full, ADAPTIVE: "adaptive"}
    rows = [
        (
            name,
            f"{answers[key]['accuracy']:.1%}",
            f"{answers[key]['p50_ms']:.1f} ms",
            f"{1e3 / answers[key]['cost_ms']['median']:.1f}",
            f"{cpu} ms" if (cpu := _cpu_text(answers[key])) != "–" else cpu,
        )
        for key, name in names.items()
    ]
    low_px, high_px = (summary["model"][rung].removeprefix("px=") for rung in ("low", "high"))
    how = "planned" if plan else f"at {low_px}/{high_px} px"
    title = f"{summary['images']['pool']} unseen crops, {summary['model']['backbone']} {how}"
    console.print(table(title, ("", "accuracy", "p50 latency", "images/s", "CPU/image"), rows))
    if plan:
        served = served_rows(summary)
        bold = [number for number, row in enumerate(served) if row["system"] == ADAPTIVE]
        headings = ("", "agrees with full", "images/s", "CPU ms/image", "speed-up")
        title = "the same crops, saturated, each on the same cores"
        cells = [list(row.values())[1:] for row in served]
        console.print(table(title, headings, cells, bold))
    for sentence in sentences(summary):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _full(summary: Summary) -> str:
    """What answers are held against; what the router escalates to may be another graph."""
    return "full model" if "plan" in summary else "full rung"


def _cpu_text(answer: Summary) -> str:
    return "–" if answer["cpu_ms"] is None else f"{answer['cpu_ms']['median']:.1f}"


def served_rows(summary: Summary) -> list[dict[str, str]]:
    """Every system that a plan was measured beside, the fastest first."""
    answers, busy = summary["saturated"]["systems"], bool(summary["doubts"]["saturated"])
    return [
        {
            "system": system,
            "words": answer["title"],
            "agreement": percent(answer["agreement_with_high"]),
            "throughput": f"{1e3 / answer['cost_ms']['median']:.1f}",
            "cpu": _cpu_text(answer),
            "speedup": "–"
            if busy or answer["disturbed"]
            else times(1 / answer["cost_ratio"]["median"]),
        }
        for system, answer in sorted(answers.items(), key=lambda item: item[1]["cost_ms"]["median"])
    ]


def sentences(summary: Summary) -> list[str]:
    """What the figures mean, one line each."""
    full, certificate = _full(summary), summary["certificate"]
    adaptive = summary["answers"][ADAPTIVE]
    said = [
        speed_sentence(summary),
        f"{adaptive['escalation_rate']:.1%} escalated; {adaptive['agreement_with_high']:.1%} "
        f"answered as the {full}",
        f"certified before: risk at most {certificate['epsilon']:.0%} with confidence "
        f"{certificate['confidence']:.0%}; seen on these crops: "
        f"{1 - adaptive['agreement_with_high']:.1%}"
        if certificate["certified"]
        else "nothing is certified: every image goes to the full rung",
    ]
    if "plan" not in summary:
        return said
    low, high = (recipe_words(summary["plan"][rung]) for rung in ("low", "high"))
    chosen = f"planned: {low}, escalating by {certificate['signal']} to {high}"
    return [chosen, *said, *plan_sentences(summary)]


def speed_sentence(summary: Summary) -> str:
    """How much faster the cascade is, or that the machine was too busy to say."""
    if summary["doubts"]["c1"]:
        return f"one request in flight, {TOO_BUSY}: {'; '.join(summary['doubts']['c1'])}"
    by_cpu = ""
    if "cpu_speedup_c1" in summary:
        by_cpu = f", {summary['cpu_speedup_c1']['median']:.2f}x by CPU time"
    return (
        f"{summary['speedup_c1']['median']:.2f}x as fast as the {_full(summary)}{by_cpu} "
        f"(bound {summary['bound_c1']['median']:.2f}x, efficiency "
        f"{summary['cascade_efficiency_c1']['median']:.2f}); router overhead "
        f"{summary['router_overhead_c1']['median']:.2f}"
    )


def plan_sentences(summary: Summary) -> list[str]:
    """How much faster the planned cascade is, saturated, and what it has to beat."""
    plan, doubts = summary["plan"], summary["doubts"]["saturated"]
    answers = summary["saturated"]["systems"]
    if doubts:
        speed = f"Saturated, {TOO_BUSY}: {'; '.join(doubts)}."
    else:
        own, by_cpu = summary["speedup_saturated"], ""
        if "cpu_speedup_saturated" in summary:
            by_cpu = f"; by CPU time {summary['cpu_speedup_saturated']['median']:.2f}"
        speed = (
            f"Saturated, on the same cores, the planned cascade answers {own['median']:.2f} times "
            f"as many images as the full model ({own['min']:.2f} to {own['max']:.2f} over the "
            f"turns{by_cpu})."
        )

    def agrees(entry: Summary, of_what: str) -> str:
        said = f"agrees on {percent(answers[entry['name']]['agreement_with_high'])}"
        if doubts or entry["disturbed"]:
            return said
        return f"{said} and costs {entry['cost_ratio']['median']:.2f} {of_what}"

    rival, low = plan["rival"], plan["cheap_rung"]
    return [
        speed,
        "Of the alternatives that agree with the full model at least as often as the cascade "
        f"({percent(answers[ADAPTIVE]['agreement_with_high'])}), the cheapest is "
        f"{answers[rival['name']]['title']}: it {agrees(rival, 'times as much')}. The cheap rung "
        f"alone, for which nothing is certified, {agrees(low, 'of the cascade')}.",
    ]


def write_page(
    road: Road,
    summary: Summary,
    paired: Paired,
    threshold: float | None,
    crops: Sequence[bytes],
    labels: Sequence[str],
) -> None:
    """Write the page, with links to those of the calibration and of the plan.

    Args:
        road: what was served.
        summary: content of summary.json.
        paired: answers for the crops, one request in flight.
        threshold: in oracle units; None: every crop escalates, unscored.
        crops: the N encoded test crops.
        labels: class names.
    """
    low, high, adaptive = (paired.answers(name) for name in (LOW, HIGH, ADAPTIVE))
    scores = np.array([answer.score for answer in adaptive])
    right = np.array([cheap.top1 == full.top1 for cheap, full in zip(low, high, strict=True)])
    order = np.argsort(scores)
    kept: list[dict[str, Any]] = []
    escalated: list[dict[str, Any]] = []
    for row, score in zip(order, score_texts(scores[order].tolist(), threshold), strict=True):
        mine = adaptive[row]
        if mine.escalated:
            agrees = bool(right[row])
            said = "cheap agreed" if agrees else f"cheap said {labels[low[row].top1]}"
        else:
            agrees = mine.top1 == high[row].top1
            said = "as full" if agrees else f"full says {labels[high[row].top1]}"
        card = {
            "name": labels[mine.top1],
            "image": thumbnail(Image.open(io.BytesIO(crops[row]))),
            "lines": [f"score {score}", said],
            "right": agrees,
        }
        (escalated if mine.escalated else kept).append(card)
    drawn = None
    if threshold is not None:
        drawn = {"right": scores[right], "wrong": scores[~right]}
        drawn |= {"threshold": threshold, "text": threshold_text(threshold)}
    pages = {"report": road.report, "plan": road.plan}
    links = {name: str(page.relative_to(OUT)) for name, page in pages.items() if page is not None}
    planned = None
    if "plan" in summary:
        planned = {"rows": served_rows(summary), "sentences": plan_sentences(summary)}
    write_demo(PAGE, summary, kept, escalated[::-1], drawn, links, planned)
