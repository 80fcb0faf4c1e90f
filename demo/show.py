"""What the demo measured, for people: on the terminal, and on a page with every crop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from bundle.graphs import GraphSet
from calibration.token_counts import as_seen, count_tokens
from imaging import Preprocessing, decode
from perf.figures import TOO_BUSY
from perf.harness import Paired
from perf.systems import ADAPTIVE, HIGH, LOW
from report.demo_page import write_demo
from report.page import thumbnail
from report.terminal import table
from report.token_maps import TokenCounts
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
    title = f"{summary['images']} unseen crops, {summary['model']['backbone']} {how}"
    console.print(table(title, ("", "accuracy", "p50 latency", "images/s", "CPU/image"), rows))
    if plan:
        headings = ("", "agrees with full", "images/s", "CPU ms/image", "speed-up")
        served = served_rows(summary)
        bold = [number for number, row in enumerate(served) if row[0] == ADAPTIVE]
        title = "the same crops, saturated, each on the same cores"
        console.print(table(title, headings, [cells for _, *cells in served], bold))
    for sentence in sentences(summary):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _full(summary: Summary) -> str:
    """What answers are held against; what the router escalates to may be another graph."""
    return "full model" if "plan" in summary else "full rung"


def _cpu_text(answer: Summary) -> str:
    return "–" if answer["cpu_ms"] is None else f"{answer['cpu_ms']['median']:.1f}"


def served_rows(summary: Summary) -> list[list[str]]:
    """Every system that a plan was measured beside: its name and the cells of its row, in words.

    The fastest stands first.
    """
    answers, busy = summary["saturated"]["systems"], bool(summary["doubts"]["saturated"])
    by_cost = sorted(answers, key=lambda system: float(answers[system]["cost_ms"]["median"]))
    rows = []
    for system in by_cost:
        answer = answers[system]
        speed = times(1 / answer["cost_ratio"]["median"])
        rows.append(
            [
                system,
                answer["title"],
                percent(answer["agreement_with_high"]),
                f"{1e3 / answer['cost_ms']['median']:.1f}",
                _cpu_text(answer),
                "–" if busy or answer["disturbed"] else speed,
            ]
        )
    return rows


def sentences(summary: Summary) -> list[str]:
    """What the figures mean, one line each."""
    full, certificate = _full(summary), summary["certificate"]
    adaptive = summary["answers"][ADAPTIVE]
    said = [
        speed_sentence(summary, "c1"),
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


def speed_sentence(summary: Summary, load: str) -> str:
    """How much faster the cascade is under a load, or that the machine was too busy to say."""
    if summary["doubts"][load]:
        words = {"c1": "one request in flight", "saturated": "saturated"}[load]
        return f"{words}, {TOO_BUSY}: {'; '.join(summary['doubts'][load])}"

    def figure(name: str) -> str:
        return f"{summary[f'{name}_{load}']['median']:.2f}"

    by_cpu = f", {figure('cpu_speedup')}x by CPU time" if f"cpu_speedup_{load}" in summary else ""
    said = (
        f"{figure('speedup')}x as fast as the {_full(summary)}{by_cpu} (bound {figure('bound')}x, "
        f"efficiency {figure('cascade_efficiency')})"
    )
    if load == "c1":
        return f"{said}; router overhead {figure('router_overhead')}"
    spread = summary["speedup_saturated"]
    return f"saturated {said}; {spread['min']:.2f}x to {spread['max']:.2f}x over the turns"


def plan_sentences(summary: Summary) -> list[str]:
    """How much faster the planned cascade is, saturated, and what it has to beat."""
    plan, answers = summary["plan"], summary["saturated"]["systems"]

    def agrees(entry: Summary, of_what: str) -> str:
        said = f"agrees on {percent(answers[entry['name']]['agreement_with_high'])}"
        if summary["doubts"]["saturated"] or entry["disturbed"]:
            return said
        return f"{said} and costs {entry['cost_ratio']['median']:.2f} {of_what}"

    rival, low = plan["best_alternative"], plan["cheap_rung"]
    return [
        speed_sentence(summary, "saturated"),
        "Of the alternatives that agree with the full model at least as often as the cascade "
        f"({percent(answers[ADAPTIVE]['agreement_with_high'])}), the cheapest is "
        f"{answers[rival['name']]['title']}: it {agrees(rival, 'times as much')}. The cheap rung "
        f"alone, for which nothing is certified, {agrees(low, 'of the cascade')}.",
    ]


def write_page(
    road: Road,
    graphs: GraphSet,
    summary: Summary,
    paired: Paired,
    threshold: float | None,
    crops: Sequence[bytes],
    labels: Sequence[str],
) -> None:
    """Write the page, with links to those of the calibration and of the plan.

    Args:
        road: what was served.
        graphs: of it.
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
            "image": thumbnail(decode(crops[row])),
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
    above = np.array([answer.escalated for answer in adaptive])
    names = [labels[answer.top1] for answer in adaptive]
    tokens = _tokens(graphs, crops, names, above)
    write_demo(PAGE, summary, kept, escalated[::-1], drawn, links, planned, tokens)


def _tokens(
    graphs: GraphSet, crops: Sequence[bytes], names: Sequence[str], escalated: NDArray[np.bool_]
) -> list[TokenCounts]:
    """Where the tokens of the crops went, of each rung whose images keep tokens of their own."""
    preprocessing = Preprocessing.from_dict(graphs.preprocessing)

    def picture(row: int) -> tuple[NDArray[np.uint8], str]:
        return as_seen(crops[row], preprocessing), names[row]

    rungs = {"cheap rung": graphs.low, "full rung": graphs.high}
    tensors = (preprocessing(decode(crop))[np.newaxis] for crop in crops)
    batches = (([row], tensor) for row, tensor in enumerate(tensors))
    return count_tokens(rungs, "the crops", batches, escalated, picture)
