"""Recipes of the graphs that a plan combines: as a user writes them, and those tried by default."""

from __future__ import annotations

from dataclasses import replace

from bundle.recipe import Recipe, RecipeError
from routing import answer_depends_on_batch

from .request import PlanError

SHARES_OF_PX = (0.5, 0.4375, 0.375)


def recipes(option: str, text: str) -> tuple[Recipe, ...]:
    """Read recipes with semicolons between them.

    Args:
        option: that holds them, for messages.
        text: what the user wrote.

    Raises:
        PlanError: no recipe, one that no certificate can be about, or one that is aligned and
            not a cheap graph's.
    """
    found: list[Recipe] = []
    for part in text.split(";"):
        if not part.strip():
            continue
        try:
            recipe = Recipe.parse(part)
        except RecipeError as error:
            raise PlanError(f"{option} {part.strip()}: {error}") from None
        if (reason := answer_depends_on_batch(str(recipe))) is not None:
            raise PlanError(
                f"{recipe}: {reason}, so nothing about it can be certified; use int8=static"
            )
        if recipe.align and option != "--candidates":
            raise PlanError(
                f"{option} {recipe}: only cheap graphs, those of --candidates, are aligned; leave "
                "align out"
            )
        found.append(recipe)
    return tuple(found)


def default_candidates(patch_size: int, px: int, aligns: bool) -> tuple[Recipe, ...]:
    """Cheap graphs worth trying where the user names none: fewer pixels, int8, aligned.

    Args:
        patch_size: of the model, in pixels.
        px: its full resolution.
        aligns: whether an alignment reaches its head; else they are not aligned.
    """
    sizes = (max(1, round(share * px / patch_size)) * patch_size for share in SHARES_OF_PX)
    return tuple(
        Recipe(size, precision="int8=static", align=aligns)
        for size in dict.fromkeys(sizes)
        if size < px
    )


def without_align(recipe: Recipe) -> Recipe:
    """The recipe of the graph that an alignment is baked into."""
    return replace(recipe, align=False)
