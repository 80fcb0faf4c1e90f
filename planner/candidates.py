"""What the planner may combine: graphs by their recipes, and their names on the shelf."""

from __future__ import annotations

from bundle.graphs import Graph, GraphSet
from routing import answer_depends_on_batch

from .subprocesses import PlanError

ALIGN = "align"
SHARES_OF_PX = (0.5, 0.4375, 0.375)
FULL = "full"  # on the shelf: the full model in FP32, which every certificate is about


def recipes(text: str) -> list[frozenset[str]]:
    """Recipes with semicolons between them, each as the set of its parts.

    Raises:
        PlanError: a recipe said twice, or one that no certificate can be about.
    """
    found = [frozenset(part.strip() for part in one.split(",")) for one in text.split(";")]
    found = [parts - {"fp32", ""} for parts in found if parts != {""}]
    for parts in found:
        if (reason := answer_depends_on_batch(said(parts))) is not None:
            raise PlanError(
                f"{said(parts)}: {reason}, so nothing about it can be certified; use int8=static"
            )
        if found.count(parts) > 1:
            raise PlanError(f"{said(parts)} is named more than once; once is enough")
    return found


def default_candidates(patch_size: int, px: int, aligns: bool) -> str:
    """Cheap graphs worth trying where the user names none: fewer pixels, int8, aligned.

    Args:
        patch_size: of the model.
        px: its full resolution.
        aligns: whether an alignment reaches its head; else they are not aligned.
    """
    sizes = (max(1, round(share * px / patch_size)) * patch_size for share in SHARES_OF_PX)
    smaller = [size for size in dict.fromkeys(sizes) if size < px]
    return "; ".join(f"px={size},int8=static" + f",{ALIGN}" * aligns for size in smaller)


def written(parts: frozenset[str]) -> str:
    """A recipe as text."""
    return said(parts) + (f",{ALIGN}" if ALIGN in parts else "")


def said(parts: frozenset[str]) -> str:
    """A recipe as text without its alignment, as `export rungs` takes it."""
    numbers = sorted((part for part in parts if part[-1:].isdecimal()), reverse=True)
    return ",".join([*numbers, *sorted(parts - set(numbers) - {ALIGN}, reverse=True)]) or "fp32"


def shelf_graphs(rung_set: GraphSet) -> dict[str, Graph]:
    """Every graph on the shelf by name."""
    return dict(rung_set.graphs)


def find(graphs: dict[str, Graph], parts: frozenset[str]) -> Graph:
    """The graph of a recipe.

    Raises:
        PlanError: the export did not make it.
    """
    own_px = any(part.startswith("px=") for part in parts)
    wanted = parts if own_px else parts | {f"px={graphs[FULL].record.px}"}
    for graph in graphs.values():
        if set(graph.record.recipe.split(",")) == wanted:
            return graph
    raise PlanError(f"no graph of recipe {said(parts)} was exported")
