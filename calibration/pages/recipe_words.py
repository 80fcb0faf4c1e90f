"""A recipe in words, for pages and tables."""

from __future__ import annotations

from .page import count_of

_PRECISIONS = {"int8=static": "int8", "int8": "int8 (dynamic)", "align": "aligned"}


def recipe_words(recipe: str) -> str:
    """How a graph makes itself cheap, for people.

    Args:
        recipe: such as `px=112,depth=9,tome=4,int8=static,align`.

    Returns:
        Such as `112 px, 9 blocks, 4 tokens merged per block, int8, aligned`. A part that is not
        known stays as it is.
    """
    return ", ".join(map(_part_words, recipe.split(",")))


def _part_words(part: str) -> str:
    name, _, value = part.partition("=")
    if name == "px":
        return f"{value} px"
    if name == "depth":
        return count_of(int(value), "block")
    if name == "tome":
        return f"{count_of(int(value), 'token')} merged per block"
    return _PRECISIONS.get(part, part)
