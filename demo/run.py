"""Serve what a road left, ask it about unseen crops, measure it, write what came of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bundle.graphs import GraphSet
from client import GrpcClient, HttpClient
from perf.cascade import Measured, one_in_flight, saturated
from perf.environment import environment
from perf.figures import cheapest_rival
from perf.harness import Answer, Asker, cut, is_a_loss
from perf.images import load_pool
from perf.repository import undisturbed, with_alternatives
from perf.systems import ADAPTIVE, ESCALATION, HIGH, LOW, System, model_section, systems
from perf.target import Target
from report.terminal import Bars
from routing import Calibration
from server import TritonServer

from .roads import TEST_CROPS, TEST_SEED, Road
from .show import write_page
from .steps import OUT, DemoError, begin

START_S = 300.0  # every instance of every graph of a plan is loaded
SHARES = 5  # of the crops; a figure is the median of theirs
TURNS = 3  # of saturated spans, each a part of the crops
IN_FLIGHT = 16
NEVER = "adaptive-0"  # the router told never to escalate

bars = Bars(Console(stderr=True))


def serve_and_measure(road: Road) -> dict[str, Any]:
    """Do it, and write summary.json and index.html.

    Returns:
        The content of summary.json, see `summarise`.

    Raises:
        DemoError: the server's answers are not the same over every protocol.
    """
    begin(len(road.steps) + 1, road.steps, "Serve, query and measure")
    graphs = GraphSet.load(road.folder / "onnx")
    calibration = Calibration.load(road.folder / "calibration.json")
    pool = load_pool(graphs, "sample", TEST_CROPS, TEST_SEED, bars.stage)
    labels = graphs.labels or ()
    truth = [labels.index(label or "") for label in pool.labels]
    repository = _served(road, graphs)
    every = asked(graphs, calibration.threshold)
    alone = [s for s in every if s.name in (LOW, HIGH, ESCALATION, ADAPTIVE, NEVER)]
    measured = []
    server = TritonServer(repository, free_ports=True, timeout_s=START_S, stop_patience_s=0)
    with server, Target(server.grpc_url, server.http_url, server) as target:
        asker, rows = Asker(target, pool, True, target.meter()), range(len(pool))
        with bars.stage("one at a time", len(pool) * len(alone)) as bar:
            measured.append(one_in_flight(target, asker, alone, cut(rows, SHARES), bar))
        query(target, pool.encoded, measured[0].paired.answers(ADAPTIVE))
        if road.plan is not None:
            busy = [system for system in every if system.name != NEVER]
            with bars.stage("saturated", TURNS * len(busy)) as bar:
                spans = cut(rows, TURNS)
                measured.append(saturated(target, asker, busy, spans, IN_FLIGHT, bar))
        machine = environment(target.version, None)
    summary = summarise(graphs, calibration, every, measured, truth)
    summary |= {"triton_version": machine["triton_version"], "environment": machine}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    paired, threshold = measured[0].paired, calibration.threshold
    write_page(road, graphs, summary, paired, threshold, pool.encoded, labels)
    return summary


def _served(road: Road, graphs: GraphSet) -> Path:
    """The road's repository so that nothing runs beside what is measured, with what rivals it."""
    repository, served = road.folder / "model_repository", road.folder / "served"
    if road.plan is not None:
        return with_alternatives(repository, graphs, served)
    shutil.rmtree(served, ignore_errors=True)
    return undisturbed(repository, served)


def asked(graphs: GraphSet, threshold: float | None) -> list[System]:
    """The cascade, the router told never to escalate, and every graph that could answer alone.

    Static high is the full FP32 model, which certificates are about; where the router escalates to
    another graph, that is a system of its own, and so is what was exported beside them.
    """
    every = systems(graphs, [*graphs.beside], threshold, threshold_30=0.0)
    return [s for s in every if s.is_static or s.name in (ADAPTIVE, NEVER)]


def query(target: Target, crops: Sequence[bytes], answers: Sequence[Answer]) -> None:
    """Ask for every crop by its bytes, one request each, over gRPC and over HTTP.

    Args:
        target: the server.
        crops: N encoded ones.
        answers: the router's to their image tensors.

    Raises:
        DemoError: a crop got another class, or another decision, than its image tensor.
    """
    for client in (GrpcClient(target.url("grpc")), HttpClient(target.url("http"))):
        name = type(client).__name__
        with client, bars.stage(f"image bytes, {name}", len(crops)) as bar:
            for crop, answer in zip(crops, answers, strict=True):
                (found,) = client.infer([crop])
                assert found.logits is not None and answer.logits is not None
                same = found.logits.argmax() == answer.logits.argmax()
                if not same or found.escalated != answer.escalated:
                    raise DemoError(f"{name} and image tensors gave a crop different answers")
                bar.advance()


def summarise(
    graphs: GraphSet,
    calibration: Calibration,
    every: Sequence[System],
    measured: Sequence[Measured],
    truth: Sequence[int],
) -> dict[str, Any]:
    """The content of summary.json: a summary as `python -m perf run` writes it, and `headline`.

    Args:
        graphs: what was served.
        calibration: that the router decides by.
        every: system that was asked.
        measured: with one request in flight, and saturated where that was measured, too.
        truth: class index of the photograph each crop was cut from.
    """
    summary: dict[str, Any] = {
        "model": model_section(graphs),
        "certificate": calibration.certificate,
        "images": len(truth),
        "disturbed": any(found.doubts for found in measured),
        "doubts": {found.load: list(found.doubts) for found in measured},
    }
    for found in measured:
        here = [system for system in every if system.name in found.paired.shares[0]]
        summary |= found.sections(here, is_a_loss(calibration.chosen_by), truth)
    summary |= headline(graphs, summary)
    if len(measured) > 1:
        summary["plan"] = plan_section(graphs, calibration, measured[1], summary)
    return summary


def headline(graphs: GraphSet, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that summary.json holds at its top, each a number or a number by system.

    They are of one request in flight, medians over the shares of the crops.

    Args:
        graphs: what was served.
        summary: the sections of `Measured.sections`.
    """
    systems_by_name = {"low": LOW, "high": HIGH, "adaptive": ADAPTIVE}
    answers = {name: summary["answers"][system] for name, system in systems_by_name.items()}
    adaptive = answers["adaptive"]
    cpu_speedup = summary.get("cpu_speedup_c1")
    return {
        "backbone": graphs.backbone,
        "low_px": graphs.low.record.px,
        "high_px": graphs.reference.record.px,
        "escalation_rate": adaptive["escalation_rate"],
        "agreement_with_high": adaptive["agreement_with_high"],
        "realised_risk": 1 - adaptive["agreement_with_high"],
        "accuracy": {name: answer["accuracy"] for name, answer in answers.items()},
        "latency_ms_p50": {name: answer["p50_ms"] for name, answer in answers.items()},
        "throughput_per_s": {
            name: 1e3 / answer["cost_ms"]["median"] for name, answer in answers.items()
        },
        "speedup_vs_high": summary["speedup_c1"]["median"],
        "cpu_speedup_vs_high": None if cpu_speedup is None else cpu_speedup["median"],
        "cascade_bound": summary["bound_c1"]["median"],
        "cascade_efficiency": summary["cascade_efficiency_c1"]["median"],
        "router_overhead": summary["router_overhead_c1"]["median"],
        "protocols": ["grpc", "http"],
    }


def plan_section(
    graphs: GraphSet, calibration: Calibration, measured: Measured, summary: Mapping[str, Any]
) -> dict[str, Any]:
    """What was planned, and its costs beside the cascade's: of its best alternative, of its rung.

    The cheap rung is part of the cascade, and alone not certified, so it is no alternative. The
    full model is one, so there always is one.

    Args:
        graphs: what was served.
        calibration: that the router decides by.
        measured: every system, saturated.
        summary: the sections of `Measured.sections`.
    """
    answers = summary["saturated"]["systems"]
    agreement = {name: answer["agreement_with_high"] for name, answer in answers.items()}
    costs = {name: answer["cost_ms"] for name, answer in answers.items()}
    best = cheapest_rival(agreement, costs, set(answers) - {ADAPTIVE, LOW})
    assert best is not None

    def beside_cascade(name: str) -> dict[str, Any]:
        ratio = measured.paired.cost_ratio(name, to=ADAPTIVE)
        return {
            "name": name,
            "agreement": agreement[name],
            "cost_ratio_to_plan": ratio.median,
            "cost_ratio": ratio.to_dict(),
            "disturbed": measured.paired.disturbed(name, ADAPTIVE, measured.cpu_counts),
        }

    return {
        "low": graphs.low.record.recipe,
        "high": graphs.high.record.recipe,
        "reference": graphs.reference.record.recipe,
        "signal": calibration.signal,
        "speedup_vs_high": summary["speedup_saturated"]["median"],
        "agreement_with_high": agreement[ADAPTIVE],
        "disturbed": bool(measured.doubts),
        "best_alternative": beside_cascade(best[0]),
        "cheap_rung": beside_cascade(LOW),
    }
