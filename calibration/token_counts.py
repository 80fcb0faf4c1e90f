"""How many tokens a graph keeps of each image, where its recipe `varies`, and some to be drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bundle.graphs import Graph, GraphSet
from client.files import shown
from imaging import Preprocessing, decode
from report.token_maps import TokenCounts, TokenMap

from .decisions import Decisions
from .images import ImageSource
from .outputs import Outputs
from .record import Fit, measured_split
from .running import DecodedImage, decode_ahead, open_session, run_counts

COUNTED = 100  # images at most: they run again for this
DRAWN = 8
BATCH = 4

Picture = Callable[[int], tuple[NDArray[np.uint8], str]]
Batch = tuple[Sequence[int], NDArray[np.float32]]


def count_tokens(
    rungs: Mapping[str, Graph],
    images: str,
    batches: Iterable[Batch],
    escalated: NDArray[np.bool_],
    picture: Picture,
) -> list[TokenCounts]:
    """Run rungs for their counts, and choose images to draw.

    Args:
        rungs: graphs by what the page calls them. One whose images keep all tokens is left out, and
            one whose file is not the recorded one any more.
        images: what the images are, in words.
        batches: places of images in `escalated`, and the images, FP32 (B, 3, H, W); not read where
            no rung is left.
        escalated: BOOL (N,), of all images.
        picture: the image at a place as graphs see it, UINT8 (H, W, 3), and its name.
    """
    varying = {name: graph for name, graph in rungs.items() if graph.recipe.varies}
    varying = {name: graph for name, graph in varying.items() if graph.fault() is None}
    sessions = {name: open_session(graph.file) for name, graph in varying.items()}
    places: list[int] = []
    counts: dict[str, list[tuple[NDArray[np.int32], NDArray[np.int32]]]]
    counts = {name: [] for name in sessions}
    for rows, tensors in batches if sessions else ():
        places += rows
        for name, session in sessions.items():
            counts[name] += zip(*run_counts(session, tensors), strict=True)
    above, found = escalated[places], []
    for name, graph in varying.items() if places else ():
        tokens = np.stack([tokens for tokens, _ in counts[name]])
        maps = []
        for row in drawn(tokens.sum(axis=1), above):
            pixels, caption = picture(places[row])
            caption += ", escalated" if above[row] else ", kept low"
            kind = "apt" if graph.recipe.apt else "halt"
            maps.append(TokenMap(kind, pixels, *counts[name][row], caption))
        groups = {"kept low": tokens[~above], "escalated": tokens[above]}
        found.append(TokenCounts(name, graph.record.recipe, images, groups, maps))
    return found


def drawn(totals: NDArray[np.int64], escalated: NDArray[np.bool_]) -> list[int]:
    """Places of the images to draw, from fewest to most tokens.

    They are those with fewest, about the median and most; one in the middle gives way to the median
    of the images that escalate, or of those that do not, where else none of them were there.

    Args:
        totals: tokens of each of N images, over all blocks.
        escalated: which of the images escalate.
    """
    order = np.argsort(totals, kind="stable")
    if len(order) > DRAWN:
        ends, middle = DRAWN * 3 // 8, len(order) // 2
        inner = order[middle - 1 : middle - 1 + DRAWN - 2 * ends]
        chosen = np.concatenate([order[:ends], inner, order[-ends:]])
        for side in (True, False):
            rest = order[escalated[order] == side]
            if len(rest) and not (escalated[chosen] == side).any():
                chosen[ends] = rest[len(rest) // 2]
        order = chosen[np.argsort(totals[chosen], kind="stable")]
    return [int(row) for row in order]


def as_seen(data: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """An encoded image resized and cropped as graphs see it, UINT8 (H, W, 3).

    Raises:
        ImageError: it cannot be read.
    """
    plain = replace(preprocessing, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    return plain(decode(data)).round().astype(np.uint8).transpose(1, 2, 0)


def fit_counts(
    fitted: Fit, outputs: Outputs, source: ImageSource | None, graphs: GraphSet
) -> list[TokenCounts]:
    """What the page of a fit shows: images of the split that its figures are of.

    Nothing for a rung whose images keep all tokens, and of images that are gone or have changed.
    """
    if source is None:
        return []
    split = measured_split(fitted.splits)
    rows = fitted.splits[split]
    images = f"the {split} split"
    if len(rows) > COUNTED:
        rows = np.sort(np.random.default_rng(0).choice(rows, COUNTED, replace=False))
        images += ", drawn by chance (seed 0)"
    where = {name: index for index, name in enumerate(source.names)}
    here = {row: where[name] for row in rows.tolist() if (name := outputs.names[row]) in where}
    preprocessing = Preprocessing.from_dict(graphs.preprocessing)

    def picture(row: int) -> tuple[NDArray[np.uint8], str]:
        image = source[here[row]]
        return as_seen(image.data, preprocessing), shown(image.name)

    escalated = np.zeros(len(outputs), np.bool_)
    escalated[rows] = Decisions.of(fitted, outputs, rows).escalated
    rungs = {"low rung": graphs.low, "full rung": graphs.high}
    batches = _unchanged(here, outputs, source, preprocessing)
    return count_tokens(rungs, images, batches, escalated, picture)


def _unchanged(
    here: Mapping[int, int], outputs: Outputs, source: ImageSource, preprocessing: Preprocessing
) -> Iterator[Batch]:
    """Rows of outputs and their images, where those are still what they were."""
    rows = list(here)
    cut = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    places = [[here[row] for row in some] for some in cut]
    with closing(decode_ahead(source, places, preprocessing)) as decoded:
        for some, images in zip(cut, decoded, strict=True):
            same = [
                (row, image.tensor)
                for row, image in zip(some, images, strict=True)
                if isinstance(image, DecodedImage) and image.sha256 == outputs.hashes[row]
            ]
            if same:
                yield [row for row, _ in same], np.stack([tensor for _, tensor in same])
