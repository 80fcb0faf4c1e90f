"""What each graph answers for which images, put together as calibration takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bundle.graphs import GraphSet
from bundle.prints import among, find_copies
from calibration.align import ALIGN_SHARE
from calibration.fidelity import Fidelity
from calibration.outputs import Made, Outputs
from calibration.running import local_runtime
from calibration.splits import CERTIFIED, Rows, group_keys, split_by_group
from routing import RungOutputs

from .bars import Bars
from .candidates import FULL, Graph, shelf_graphs
from .graph_outputs import GraphOutputs, OutputsCache
from .request import Request
from .select import Pair
from .subprocesses import PlanError


@dataclass(frozen=True, eq=False)
class Parts:
    """Which image plays which part.

    Attributes:
        reference: the full model's answers for every readable image.
        align: positions among those.
        rest: positions among those, of fit, certify and test together.
        splits: positions within `rest`.
        groups: of `rest`.
    """

    reference: GraphOutputs
    align: Rows
    rest: Rows
    splits: Mapping[str, Rows]
    groups: NDArray[np.str_]


def pair_rung_set(rung_set: GraphSet, low: Graph, high: Graph) -> GraphSet:
    """Two graphs of a shelf as a pair of rungs."""
    return rung_set.adding(low).cast(low.name, high.name)


def divide(
    request: Request, rung_set: GraphSet, cache: OutputsCache, aligns: bool, bars: Bars
) -> Parts:
    """Give each image its part, once the full model has answered all of them.

    Args:
        request: of the plan.
        rung_set: of the shelf.
        cache: of answers.
        aligns: whether images are needed to align on.
        bars: where to show progress.

    Raises:
        ImagesError: not one image can be read.
        SplitError: the images are too few to divide.
    """
    everything = range(len(request.source))
    full = shelf_graphs(rung_set)[FULL]
    with bars.stage("the full model answers every image", len(everything)) as advance:
        reference = cache.get(full.record, full.file, everything, False, advance)
    taught = among(reference.hashes, reference.looks, rung_set.learned(rung_set.graphs))
    if taught.any():
        bars.say(f"{taught.sum()} images taught a graph or its head: nothing is certified on them")
    copies = find_copies(reference.hashes, reference.looks)
    if len(copies):
        bars.say(copies.sentence)
    groups = group_keys(reference, request.group_by)
    if aligns:
        shares = {"align": ALIGN_SHARE, "rest": 1 - ALIGN_SHARE}
        taught[split_by_group(groups, shares, request.seed)["align"]] = True
    rest = np.flatnonzero(~taught)
    # As `fit` will see them: a group whose first image was taught is called by another.
    rest_groups = group_keys(reference.only(rest), request.group_by)
    splits = split_by_group(rest_groups, CERTIFIED, request.seed)
    return Parts(reference, np.flatnonzero(taught), rest, splits, np.array(rest_groups))


def give_back(parts: Parts, request: Request, rung_set: GraphSet) -> Parts:
    """Let the images play a part again that only alignments which are not served have seen.

    Whether those alignments help was judged by these images, so they may not test what is served
    instead: all of them go to the fit split, and certify and test have others, in their full share.

    Args:
        parts: with images to align on.
        request: of the plan.
        rung_set: of the shelf, without those alignments.
    """
    reference = parts.reference
    taught = among(reference.hashes, reference.looks, rung_set.learned(rung_set.graphs))
    rest = np.flatnonzero(~taught)
    rest_groups = group_keys(reference.only(rest), request.group_by)  # as `divide` says
    tried = set(parts.align.tolist())
    seen = {group for i, group in zip(rest.tolist(), rest_groups, strict=True) if i in tried}
    splits = split_by_group(rest_groups, CERTIFIED, request.seed, seen)
    return Parts(parts.reference, np.flatnonzero(taught), rest, splits, np.array(rest_groups))


def answers_of(
    graph: Graph, cache: OutputsCache, parts: Parts, positions: Rows, layers: bool, bars: Bars
) -> RungOutputs:
    """A graph's answers for images of the reference, at these positions."""
    if graph.name == FULL and not layers:
        return parts.reference.outputs.rows(positions)
    rows = parts.reference.rows[positions].tolist()
    with bars.stage(f"{graph.name} answers", len(rows)) as advance:
        found = cache.get(graph.record, graph.file, rows, layers, advance)
    if len(found.rows) < len(rows):
        raise PlanError(
            f"{graph.name} ({graph.record.recipe}) overflows on {len(rows) - len(found.rows)} "
            "images; leave it out"
        )
    return found.outputs


def outputs_to_align_on(
    graph: Graph, rung_set: GraphSet, taught: str, cache: OutputsCache, parts: Parts, bars: Bars
) -> Outputs:
    """What a graph and the full model answer for the images to align on.

    Not for those that ranges or a head were learned from: on them a graph answers better than on
    others, and whether an alignment helps is judged by these images.

    Args:
        graph: without alignment.
        rung_set: of the shelf.
        taught: prints of what the export learned from, `shelf.taught_by_export`.
        cache: of answers.
        parts: of the images.
        bars: where to show progress.
    """
    found = parts.reference.only(parts.align)
    rows = parts.align[~among(found.hashes, found.looks, taught)]
    low = answers_of(graph, cache, parts, rows, True, bars)
    full = shelf_graphs(rung_set)[FULL]
    high = parts.reference.outputs.rows(rows)
    return _outputs(low, high, None, parts, rows, pair_rung_set(rung_set, graph, full))


def pair_outputs(
    low: str,
    high: str,
    rung_set: GraphSet,
    graphs: Mapping[str, Graph],
    answers: Mapping[str, RungOutputs],
    parts: Parts,
    request: Request,
) -> Outputs:
    """What two graphs, and the full model where it is neither, answer for the rest."""
    reference = None if high == FULL else parts.reference.outputs.rows(parts.rest)
    pair = pair_rung_set(rung_set, graphs[low], graphs[high])
    full = answers[high]
    outputs = _outputs(
        answers[low],
        RungOutputs(full.embedding, None, full.logits),
        reference,
        parts,
        parts.rest,
        pair,
    )
    return replace(outputs, source=request.source.spec, title=request.source.title)


def _outputs(
    low: RungOutputs,
    high: RungOutputs,
    reference: RungOutputs | None,
    parts: Parts,
    positions: Rows,
    pair: GraphSet,
) -> Outputs:
    found = parts.reference
    return Outputs(
        low=low,
        high=high,
        reference=reference,
        labels=found.labels[positions],
        names=tuple(found.names[i] for i in positions),
        groups=tuple(found.groups[i] for i in positions),
        hashes=tuple(found.hashes[i] for i in positions),
        looks=found.looks[positions],
        made=Made.by(pair),
        source="",
        title="",
        runtime=local_runtime(),
    )


def agreements(
    names: Sequence[str],
    graphs: Mapping[str, Graph],
    answers: Mapping[str, RungOutputs],
    cache: OutputsCache,
    parts: Parts,
    fidelity: Fidelity,
    pairs: Mapping[Pair, Outputs],
    bars: Bars,
) -> dict[str, float]:
    """Share of test images without a loss if one graph answers alone."""
    test = parts.splits["test"]
    truth = parts.reference.outputs.rows(parts.rest[test])
    some = next(iter(pairs.values())).rows(test)
    found = {}
    for name in dict.fromkeys([*names, FULL]):
        own = answers[name].rows(test) if name in answers else None
        own = own or answers_of(graphs[name], cache, parts, parts.rest[test], False, bars)
        lost = fidelity.loss(replace(some, low=own, high=truth, reference=None))
        found[name] = float(1 - lost.mean())
    return found
