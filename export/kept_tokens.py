"""What images kept of their tokens in a graph where each keeps its own, for its record."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.graphs import Graph
from bundle.recipe import Recipe


def kept_tokens(
    recipe: Recipe, tokens: NDArray[np.int32], patches: NDArray[np.int32]
) -> dict[str, float]:
    """Figures over the images that a graph was checked on.

    Args:
        recipe: of the graph.
        tokens: its output of that name, (B, L) of `halt` and (B, 1) of `apt`.
        patches: its output of that name, (B, S * S).

    Returns:
        `mean`, `min` and `max` of an image's tokens, the mean over the blocks of the network, and
        `all`, how many there are where none is saved; for `halt` also `blocks_per_patch`, the mean
        number of blocks that a patch ran through before its image was done.
    """
    per_image = tokens.mean(axis=1, dtype=np.float64)
    if recipe.apt:  # a cell of side s stands for s * s patches
        full = per_image + patches.shape[1] - (1 / patches.astype(np.float64) ** 2).sum(axis=1)
    else:
        full = tokens[:, 0].astype(np.float64)
    found = {
        "mean": float(per_image.mean()),
        "min": float(per_image.min()),
        "max": float(per_image.max()),
        "all": float(round(full.max())),
    }
    if recipe.halt is not None:
        found["blocks_per_patch"] = float(patches.mean(dtype=np.float64))
    return found


def nothing_saved(graph: Graph) -> str | None:
    """One line where no checked image lost a token; None: some did, or no graph of that kind."""
    kept: dict[str, Any] | None = graph.notes.get("tokens")
    if kept is None or kept["min"] < kept["all"]:
        return None
    images = graph.notes["fidelity"]["images"]
    if graph.recipe.apt and images.endswith("synthetic"):
        return None  # they are noise, which has no flat areas whatever the graph does
    if graph.recipe.apt:
        return f"no cell of {images} images is flat enough for {graph.name}: nothing is saved"
    return (
        f"no token of {images} images halts before the last block of {graph.name}: nothing is saved"
    )
