"""`report.html`: is it faster, at what agreement, and where does the time go.

Everything comes out of one summary.json. What is missing there is said to be missing; nothing is
filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from report.page import HIGH_COLOUR, LOW_COLOUR
from report.words import count_of

from ..figures import doubts_of
from . import figures, load_tables, readings, tables
from .frontier import frontier
from .words import MISSING, Summary, amount, rung_words, share

_ENVIRONMENT = {
    "device": "device",
    "cpu": "processor",
    "cores": "cores",
    "memory_gib": "memory, GiB",
    "os": "operating system",
    "python": "Python",
    "onnxruntime": "ONNX Runtime",
    "triton_version": "Triton",
    "locust": "Locust",
}
_GPU = {
    "driver": "driver",
    "memory_mib": "memory, MiB",
    "sm_clock_mhz": "SM clock, MHz",
    "memory_clock_mhz": "memory clock, MHz",
}


def write_report(summary: dict[str, Any], path: Path) -> None:
    """Write the page, one self-contained file, creating its folder.

    Args:
        summary: the content of summary.json. Any section may be missing or None.
        path: file to write.
    """
    attribution = summary.get("attribution") or {}
    groups, parts = tables.attribution(attribution)
    loader = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(loader),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(low_colour=LOW_COLOUR, high_colour=HIGH_COLOUR)
    html = environment.get_template("report.html.j2").render(
        title=readings.title(summary),
        complete=bool(summary.get("complete")),
        disturbed=readings.disturbed(summary),
        verdict=readings.verdict(summary),
        promise=readings.promise(summary),
        agreement=readings.agreement(summary),
        facts=tables.facts(summary, readings.FACTS),
        above_one=readings.above_one(summary),
        doubted=bool(doubts_of(summary, "c1")),
        frontier=None if doubts_of(summary, "c1") else frontier(summary),
        frontier_reading=readings.frontier(summary),
        time_bars=figures.time_bars(attribution),
        time_reading=readings.time_spent(attribution),
        derived=tables.derived(summary),
        answers=tables.answers(summary),
        groups=groups,
        parts=parts,
        closed_loop=figures.closed_loop(summary),
        open_loop=figures.open_loop(summary),
        closed=load_tables.loads(summary, "closed"),
        opened=load_tables.loads(summary, "open"),
        server_times=load_tables.server_times(summary),
        memory=tables.memory(summary),
        locust=load_tables.locust(summary),
        standin=tables.standin(summary),
        images=_images(summary),
        environment=_environment(summary),
        run=_run(summary),
        notes=summary.get("notes") or [],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def _environment(summary: Summary) -> list[tuple[str, str]]:
    """Every key of the environment block, GPUs last."""
    found = dict(summary.get("environment") or {})
    gpus = found.pop("gpus", None)
    rows = [
        (_ENVIRONMENT.get(name, name.replace("_", " ")), MISSING if value is None else str(value))
        for name, value in found.items()
    ]
    if gpus == []:
        rows.append(("GPU", "none"))
    return [*rows, *((f"GPU {number}", _gpu(gpu)) for number, gpu in enumerate(gpus or ()))]


def _gpu(gpu: Mapping[str, Any]) -> str:
    rest = [f"{_GPU.get(key, key)} {value}" for key, value in gpu.items() if key != "name"]
    return ", ".join([str(gpu.get("name", "")), *rest])


def _images(summary: Summary) -> list[tuple[str, str]]:
    """What was sent, set by set."""
    images = summary.get("images") or {}
    rows = []
    if "source" in images:
        pool = images.get("pool")
        rows.append(("source", f"{images['source']}{f'; pool of {pool:,}' if pool else ''}"))
    rows += [
        (
            f"set {name}",
            f"{count_of(found['images'], 'image')}, {share(found['escalation_rate'])} escalated",
        )
        for name, found in (images.get("sets") or {}).items()
    ]
    return rows


def _run(summary: Summary) -> list[tuple[str, str]]:
    """The command and what it measured."""
    rows = [("command", str(summary.get("command", MISSING)))]
    rows += [(name, str(summary[name])) for name in ("suite", "started") if summary.get(name)]
    if summary.get("seconds") is not None:
        rows.append(("took", f"{amount(summary['seconds'])} s"))
    model = summary.get("model") or {}
    if model:
        shape = " × ".join(map(str, model["image_shape"]))
        classes = "no head" if model["classes"] is None else f"{model['classes']} classes"
        rows += [
            ("model", f"{model['backbone']}, image {shape}, {classes}"),
            ("embedding", f"{model['embedding_dim']} numbers"),
            ("rungs", f"{rung_words(model['low'])} and {rung_words(model['high'])}"),
        ]
    return rows
