"""Work on a folder of exported graphs: align one of them, or make a pair of two.

`python -m planner plan` exports many graphs at once, aligns some and serves two.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from bundle.prints import joined
from export import onnx_graph
from export.errors import ExportError, UsageError
from export.recipes.align import bake_alignment
from export.recipes.recipe import Recipe
from export.rungs import publish, write_record
from export.staging import folder_beside, link_or_copy
from routing import RUNGS, WEIGHTS, Alignment, RungSet, manifest
from routing.rungset import NAME as RECORD
from routing.rungset import REFERENCE

Entry = dict[str, Any]


def align(folder: Path, graph: str, alignment: Alignment, name: str | None = None) -> str:
    """Bake an alignment into a graph of a folder.

    Args:
        folder: what `export rungs` wrote.
        graph: `vit_low` or the name of an alternative.
        alignment: fitted on what this graph answered.
        name: of the aligned graph, an alternative; None: it takes the place of `graph`.

    Returns:
        The name of the aligned graph.

    Raises:
        UsageError: no such graph, an alignment of another one, or a head that cannot follow it.
        RungSetError: no exported graphs in the folder.
    """
    record = _read(folder)
    entries = _entries(record)
    if graph not in entries or graph in ("vit_high", REFERENCE):
        raise UsageError(f"--graph {graph}: no cheap graph of that name in {folder / RECORD}")
    aligned = name or graph
    if not re.fullmatch(r"\w+", aligned) or aligned in ("vit_high", REFERENCE):
        raise UsageError(f"--name {aligned} cannot be a cheap graph's; use one such as static_mine")
    entry = entries[graph]
    recipe = Recipe.parse(entry["recipe"])
    if recipe.align:
        raise UsageError(f"--graph {graph} is aligned already ({recipe}); export it anew without")
    rung_set = RungSet.load(folder)
    rung = {**rung_set.rungs, **rung_set.alternatives}[graph]
    file = folder / entry["file"]
    fault = rung.fault(file, f"differs from its SHA-256 in {RECORD}")
    if fault is not None:
        raise UsageError(f"{folder}: {fault}; run python -m export rungs again")
    if rung.fingerprint != alignment.graph:
        raise UsageError(
            f"the alignment was fitted on another graph than {graph} ({alignment.recipe}); run "
            "python -m calibration collect and python -m calibration align with this one"
        )
    model = bake_alignment(onnx.load(file, load_external_data=False), alignment)
    onnx_graph.check_versions(model)
    place = folder / f"{aligned}.onnx"
    fresh = place.with_suffix(".aligned")  # os.replace puts it in place whole
    fresh.write_bytes(model.SerializeToString(deterministic=True))
    _try(fresh)
    new = {**entry, "recipe": str(replace(recipe, align=True)), "file": place.name}
    new |= {"sha256": manifest.sha256_file(fresh), "fidelity": None}
    new |= {"size_bytes": fresh.stat().st_size}
    section = record["rungs"] if aligned in RUNGS else record["alternatives"]
    section[aligned] = new
    _rename_checks(record, {other: other for other in entries if other != aligned})
    record["fitted_on"] = joined(record.get("fitted_on", ""), alignment.image_prints)
    os.replace(fresh, place)
    write_record(folder, record)
    return aligned


def choose(folder: Path, low: str, high: str, keep: Sequence[str], out: Path) -> None:
    """Make a pair of rungs of two graphs of a folder.

    Args:
        folder: what `export rungs` wrote.
        low: the graph that becomes `vit_low`.
        high: the graph that becomes `vit_high`.
        keep: graphs to lie beside them as alternatives.
        out: folder to write; graphs are linked where that can be.

    Raises:
        UsageError: no such graph, or `out` is `folder`.
        RungSetError: no exported graphs in the folder.
    """
    record = _read(folder)
    entries = _entries(record)
    for option, names in (("--low", [low]), ("--high", [high]), ("--keep", keep)):
        for name in names:
            if name not in entries:
                raise UsageError(f"{option} {name}: no graph of that name in {folder / RECORD}")
    if out.resolve() == folder.resolve():
        raise UsageError(f"--out {out} holds the graphs to choose from; give another folder")
    full = REFERENCE if REFERENCE in entries else "vit_high"
    chosen = {"vit_low": low, "vit_high": high} | ({REFERENCE: full} if high != full else {})
    renamed = {"vit_low": "static_low", "vit_high": "static_full", REFERENCE: "static_full"}
    beside = {renamed.get(name, name): name for name in keep if name not in (low, high)}
    with folder_beside(out) as staging:
        new = {
            name: _link(folder, entries[source], staging, name)
            for name, source in {**chosen, **beside}.items()
        }
        record["rungs"] = {name: new[name] for name in RUNGS}
        record["reference"] = new.get(REFERENCE)
        record["alternatives"] = {name: new[name] for name in beside}
        _rename_checks(record, {**chosen, **beside})
        write_record(staging, record)
        publish(staging, out)


def _try(file: Path) -> None:
    """Open a graph as it will be served; onnx's own checker refuses weights with several links."""
    try:
        ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        file.unlink()
        raise ExportError(f"ONNX Runtime does not load the aligned graph: {error}") from error


def _read(folder: Path) -> dict[str, Any]:
    RungSet.load(folder)  # raises where anything is missing or unreadable
    record = json.loads((folder / RECORD).read_text("utf-8"))
    return {"alternatives": {}, **record}  # earlier exports have none


def _entries(record: dict[str, Any]) -> dict[str, Entry]:
    reference = {REFERENCE: record["reference"]} if record.get("reference") else {}
    return {**record["rungs"], **reference, **record["alternatives"]}


def _link(folder: Path, entry: Entry, staging: Path, name: str) -> Entry:
    """A graph under another name, its shared weights beside it."""
    link_or_copy(folder / entry["file"], staging / f"{name}.onnx")
    if entry.get("weights_sha256") and not (staging / WEIGHTS).exists():
        link_or_copy(folder / WEIGHTS, staging / WEIGHTS)
    return {**entry, "file": f"{name}.onnx"}


def _rename_checks(record: Entry, sources: Mapping[str, str]) -> None:
    """Keep the checks of graphs that are still what they were, by new name -> old name."""
    checks = record["parity"]["checks"]
    record["parity"]["checks"] = [
        {**check, "rung": name}
        for name, source in sources.items()
        for check in checks
        if check["rung"] == source
    ]
