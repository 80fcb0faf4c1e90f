"""Five ways to spend half of the cost, on pictures of many kinds: which answers as the full model?

Patch sizes by entropy (`apt`), tokens that halt (`halt`), tokens that merge (`tome`), fewer pixels
(`px`) and fewer blocks (`depth`), at about equal cost, as they are and each trained for the same
minutes. Nothing is trained on, or fitted to, the pictures that judge.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.adapted import Adapted
from bundle.fidelity import FidelityLoss
from bundle.graphs import GraphSet
from bundle.prints import among, joined
from bundle.recipe import Recipe
from calibration.answers import AnswerCache, Wanted
from calibration.images import FolderImages
from calibration.running import DecodedImage, decode_ahead, open_session, run_counts
from imaging import Preprocessing
from perf.environment import cpu_name
from perf.token_costs import Costs, Follows, by_tokens, follows, measure
from report.terminal import Bars, table
from report.token_maps import TokenMap
from report.tokens_page import write_tokens
from report.words import percent, ratio
from routing.fidelity import fidelity_loss

from .pictures import divide_in_two, make_pictures
from .steps import DemoError, Step, console, prepare

OUT = Path("build/tokens")
PAGE = OUT / "tokens.html"
CROPS = 2
MINUTES = 4  # of each training; all else takes some twenty minutes on two cores
METHODS = ("apt", "halt", "tome", "px", "depth")
# About 0.46 of the full model's cost each, but for the blocks, of which there are whole ones.
RECIPES = ("apt=4", "halt=5.5", "tome=24", "px=154", "depth=6")
FULL_PX, PATCH_PX = 224, 14
TIMED, ROUNDS, BATCH = 96, 3, 8
ALIKE = 0.1  # costs that differ by less are taken for equal
DRAWN = 6  # images of each method on the page
_MODEL = "--model dinov2-small"


@dataclass(frozen=True)
class Row:
    """One graph of the table.

    Attributes:
        method: the part of its recipe that makes it cheap.
        recipe: without the key of its state.
        adapted: whether its weights were trained.
        cost_ratio: mean over images, of the full model's; None: there is no such graph, or clock
            and CPU time tell different stories of it.
        cpu_cost_ratio: the same by CPU time.
        agreement: share of the test images whose class is the full model's; None: no such graph.
        tokens_mean, tokens_min, tokens_max: over images, of the mean over the full model's blocks
            of the tokens that run through them; None: there is no such graph.
        note: why there is none; empty where there is one.
    """

    method: str
    recipe: str
    adapted: bool
    cost_ratio: float | None = None
    cpu_cost_ratio: float | None = None
    agreement: float | None = None
    tokens_mean: float | None = None
    tokens_min: float | None = None
    tokens_max: float | None = None
    note: str = ""


def run_tokens(bars: Bars) -> dict[str, Any]:
    """Make pictures, train, export, ask, time; write summary.json and the page; the summary.

    Raises:
        DemoError: the pictures cannot be had, or a command failed.
    """
    pictures = OUT / "pictures"
    make_pictures(pictures, CROPS, bars)
    counts = divide_in_two(pictures, OUT / "divided")
    bars.say(f"{counts['learn']} pictures to learn from, {counts['test']} others to judge by")
    prepare([_training(recipe) for recipe in RECIPES], OUT)
    states = {recipe: found for recipe in RECIPES if (found := _state(recipe)) is not None}
    _export(states)
    graphs = GraphSet.load(OUT / "onnx")
    names = _names(graphs, states)
    test = FolderImages(OUT / "divided/test")
    learned = graphs.fitted_on  # what taught the head
    for state in states.values():
        learned = joined(learned, state.image_prints)
    agreements, judging = _agreements(graphs, names, test, learned, bars)
    timed, tensors = _tensors(graphs, test, judging)
    costs, lines = _costs(graphs, names, tensors, bars)
    rows = [
        _row(graphs, names, recipe, adapted, agreements, costs)
        for recipe in RECIPES
        for adapted in (False, True)
    ]
    summary = {
        "command": "make tokens",
        "environment": {"processor": cpu_name(), "threads": 1},
        "images": {"learned": counts["learn"] * CROPS, "test": len(judging), "timed": len(timed)},
        "minutes": MINUTES,
        "alike": ALIKE,
        "rows": [asdict(row) for row in rows],
        "cost_follows_tokens": lines,
        "won": winners(rows),
    }
    OUT.joinpath("summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_tokens(PAGE, summary, _maps(graphs, names, [test.names[row] for row in timed], tensors))
    return summary


def winners(rows: Sequence[Row]) -> list[str]:
    """The methods of which a graph is not beaten by one of another method.

    One beats another that costs as much, or more, and agrees less often; costs within `ALIKE` of
    each other are as much. Of two that agree as often the cheaper one beats the other.
    """
    there = [
        (row.method, row.cpu_cost_ratio, row.agreement)
        for row in rows
        if row.cpu_cost_ratio is not None and row.agreement is not None
    ]
    return list(
        dict.fromkeys(
            method
            for method, cost, agreement in there
            if not any(
                other != method
                and theirs <= (1 + ALIKE) * cost
                and (agrees, -theirs) > (agreement, -cost)
                for other, theirs, agrees in there
            )
        )
    )


def print_tokens(summary: Mapping[str, Any]) -> None:
    """The table, for a terminal."""
    shown = [
        (
            row["recipe"],
            "adapted" if row["adapted"] else "as it is",
            ratio(row["cost_ratio"]),
            percent(row["agreement"]),
            row["note"] or _tokens_words(row),
        )
        for row in summary["rows"]
    ]
    headings = ("recipe", "weights", "cost", "agreement", "tokens a block")
    console.print(table("cost and agreement with the full model", headings, shown, left=(0, 1, 4)))
    for method, line in summary["cost_follows_tokens"].items():
        for batch, found in (line or {}).get("by_batch", {}).items():
            console.print(
                f"{method}: cost against tokens at batch {batch}: r {found['r']:.3f}, slope "
                f"{found['slope']:.2f}",
                highlight=False,
            )


def _tokens_words(row: Mapping[str, Any]) -> str:
    mean, least, most = (row[f"tokens_{name}"] for name in ("mean", "min", "max"))
    return f"{mean:.0f}" if least == most else f"{mean:.0f} ({least:.0f} to {most:.0f})"


def _folder(recipe: str) -> Path:
    return OUT / "states" / Recipe.parse(recipe).slug(0)


def _training(recipe: str) -> Step:
    folder = _folder(recipe)
    return Step(
        f"train {recipe}",
        folder,
        f"adaptation distil {_MODEL} --recipe {recipe} --images {OUT}/divided/learn "
        f"--group-by folder --views 1 --minutes {MINUTES} --head-images {OUT}/pictures/head "
        f"--cache {OUT}/teacher --out {folder}",
        ("adaptation",),
    )


def _state(recipe: str) -> Adapted | None:
    """What a training has written; None: it did not help."""
    folder = _folder(recipe)
    return Adapted.load(folder) if (folder / "adapted.json").is_file() else None


def _export(states: Mapping[str, Adapted]) -> None:
    """All graphs, the cheap rung the first that there is."""
    plain = [recipe for recipe in RECIPES if not recipe.startswith("halt")]
    first, *others = [*plain, *(f"{recipe},adapted={_folder(recipe)}" for recipe in states)]
    beside = " ".join(f"--beside {shlex.quote(recipe)}" for recipe in others)
    command = (
        f"export rungs {_MODEL} --head linear --images {OUT}/pictures/head --out {OUT}/onnx "
        f"--low {first} --high px={FULL_PX} {beside}"
    )
    console.print(f"$ python -m {command}", style="dim", markup=False, highlight=False)
    done = subprocess.run([sys.executable, "-m", *shlex.split(command)])
    if done.returncode != 0:
        raise DemoError(f"the export failed with exit code {done.returncode}")


def _names(graphs: GraphSet, states: Mapping[str, Adapted]) -> dict[tuple[str, bool], str]:
    """The names of the graphs that there are, by recipe and whether they are adapted."""
    px = graphs.image_shape[1]
    found = {}
    for recipe in RECIPES:
        plain = Recipe.parse(recipe).at(px)
        found[recipe, False] = plain.slug(px)
        if recipe in states:
            found[recipe, True] = replace(plain, adapted=states[recipe].key).slug(px)
    return {which: name for which, name in found.items() if name in graphs.graphs}


def _agreements(
    graphs: GraphSet,
    names: Mapping[tuple[str, bool], str],
    test: FolderImages,
    learned: str,
    bars: Bars,
) -> tuple[dict[str, float], list[int]]:
    """Share of the test images whose class each graph and the full model have in common.

    Images that are like one that something was learned from are left out.

    Returns:
        The shares by name, and the places of the images that judge.
    """
    cache = AnswerCache(OUT / "answers", test, graphs)
    wanted = [Wanted(graphs.reference), *(Wanted(graphs.graphs[name]) for name in names.values())]
    with bars.stage("all graphs answer the test images", len(wanted) * len(test)) as bar:
        for one in wanted:
            for line in cache.fill([one], None, bar.advance):
                bars.say(f"left out: {line}")
    answered = cache.read(wanted)
    pictures = answered.pictures
    seen = among(pictures.hashes, pictures.looks, learned)
    if seen.any():
        bars.say(f"{seen.sum()} test images are like one that was learned from, and are left out")
    found = answered.only(np.flatnonzero(~seen))
    fidelity = FidelityLoss.asked(graphs.task, None, None).to_dict()
    truth = found.outputs[graphs.reference.name]
    shares = {
        name: float(1 - fidelity_loss(fidelity, found.outputs[name], truth).mean())
        for name in names.values()
    }
    return shares, found.pictures.places.tolist()


def _tensors(
    graphs: GraphSet, test: FolderImages, judging: Sequence[int]
) -> tuple[list[int], NDArray[np.float32]]:
    """Places of images spread over all kinds, and the images, FP32 (n, 3, H, W)."""
    preprocessing = Preprocessing.from_dict(graphs.preprocessing)
    places = np.unique(np.linspace(0, len(judging) - 1, TIMED).round().astype(int))
    rows = [judging[place] for place in places]
    decoded = next(decode_ahead(test, [rows], preprocessing))  # all of them were answered
    return rows, np.stack([one.tensor for one in decoded if isinstance(one, DecodedImage)])


def _costs(
    graphs: GraphSet,
    names: Mapping[tuple[str, bool], str],
    tensors: NDArray[np.float32],
    bars: Bars,
) -> tuple[dict[str, Costs], dict[str, Any]]:
    """What every graph costs at batch 1; and how the cost of those that vary follows the tokens."""
    full = graphs.reference.name
    files = {name: graphs.graphs[name].file for name in (full, *names.values())}
    with bars.stage("time the graphs in turn", ROUNDS * len(tensors)) as bar:
        costs = measure(files, tensors, 1, ROUNDS, progress=bar.advance)
    lines: dict[str, Any] = {}
    for method in ("apt", "halt"):
        some = [name for (recipe, _), name in names.items() if recipe.startswith(method)]
        if not some:
            lines[method] = None
            continue
        name = some[-1]  # adapted, where it is
        order = by_tokens(costs[name].tokens)
        requests = ROUNDS * (len(tensors) // BATCH)
        with bars.stage(f"time {name} in batches of {BATCH}", requests) as bar:
            pair = {key: files[key] for key in (full, name)}
            batched = measure(pair, tensors[order], BATCH, ROUNDS, progress=bar.advance)
        one, many = (
            follows(found[name], found[full], _patches(FULL_PX) + 1) for found in (costs, batched)
        )
        lines[method] = _line(name, one, many)
    return costs, lines


def _line(name: str, one: Follows | None, many: Follows | None) -> dict[str, Any] | None:
    if one is None or many is None:
        return None
    by_batch = {"1": asdict(one), str(BATCH): asdict(many)}
    return {"r": one.r, "slope": one.slope, "graph": name, "by_batch": by_batch}


def _patches(px: int) -> int:
    return (px // PATCH_PX) ** 2


def _row(
    graphs: GraphSet,
    names: Mapping[tuple[str, bool], str],
    recipe: str,
    adapted: bool,
    agreements: Mapping[str, float],
    costs: Mapping[str, Costs],
) -> Row:
    method = recipe.partition("=")[0]
    name = names.get((recipe, adapted))
    if name is None:
        note = "nothing was written" if adapted else "nothing halts before a gate is trained"
        return Row(method, recipe, adapted, note=note)
    own, full = costs[name], costs[graphs.reference.name]
    tokens = own.tokens
    if np.isnan(tokens).any():
        tokens = np.array([fixed_tokens(Recipe.parse(recipe), graphs)])
    return Row(
        *(method, recipe, adapted, own.ratio_to(full), own.cpu_ratio_to(full), agreements[name]),
        *(float(tokens.mean()), float(tokens.min()), float(tokens.max())),
    )


def fixed_tokens(recipe: Recipe, graphs: GraphSet) -> float:
    """Mean over the full model's blocks of the tokens that run through them, the same for all."""
    tokens = _patches(recipe.px or FULL_PX) + 1
    ran = 0
    for _ in range(recipe.depth or graphs.layers):
        ran += tokens
        tokens -= min(recipe.tome, (tokens - 1) // 2)
    return ran / graphs.layers


def _maps(
    graphs: GraphSet,
    names: Mapping[tuple[str, bool], str],
    titles: Sequence[str],
    tensors: NDArray[np.float32],
) -> list[TokenMap]:
    """Where the tokens of some images went, by each method that tells."""
    preprocessing = Preprocessing.from_dict(graphs.preprocessing)
    scaling = (preprocessing.mean, preprocessing.std)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in scaling)
    rows = np.linspace(0, len(tensors) - 1, DRAWN).round().astype(int)
    found = []
    for method in ("apt", "halt"):
        some = [name for (recipe, _), name in names.items() if recipe.startswith(method)]
        if not some:
            continue
        file = graphs.graphs[some[-1]].file
        session = open_session(file)
        for row in rows:
            tokens, patches = run_counts(session, tensors[row : row + 1])
            pixels = ((tensors[row] * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
            picture = pixels.transpose(1, 2, 0)
            found.append(TokenMap(method, picture, tokens[0], patches[0], titles[row]))
    return found
