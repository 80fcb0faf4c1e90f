"""Which recipes with fewer tokens, `tome`, `apt` and `halt`, a model can be run by."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bundle.recipe import Recipe
from export.errors import UsageError

if TYPE_CHECKING:
    from export.backbones import Backbone


def check_tokens(backbone: Backbone, recipe: Recipe, trains: bool) -> None:
    """Refuse a way of having fewer tokens that a model has no use for.

    Args:
        backbone: the model.
        recipe: its resolution written out, and one that the model can run at.
        trains: whether its weights will be trained, so that they need not be there yet.

    Raises:
        UsageError: saying which part and why.
    """
    px, patch = recipe.px or 0, backbone.patch_size
    halts = "the model" if backbone.gate else "halt" if recipe.halt is not None else ""
    named = {"tome": bool(recipe.tome), "apt": bool(recipe.apt), halts: bool(halts)}
    ways = [way for way, is_there in named.items() if is_there]
    if len(ways) > 1:
        raise UsageError(
            f"{recipe}: {ways[0]} and {ways[1]} both take tokens away; leave {ways[0]} out"
        )
    if recipe.tome and px < 2 * patch:
        raise UsageError(f"tome={recipe.tome} has one patch at {px} px, none to merge")
    if ways and backbone.family.unmergeable is not None:
        raise UsageError(
            f"{recipe} is not for {backbone.family.title}: {backbone.family.unmergeable}; leave "
            f"{ways[0]} out"
        )
    if recipe.varies and recipe.precision in ("int8", "fp16"):
        why = {
            "int8": "scales of the whole batch would let images that keep other tokens decide",
            "fp16": "what decides which tokens stay needs FP32",
        }
        raise UsageError(f"{recipe}: {why[recipe.precision]}; use int8=static, or none")
    coarsest = patch * 2 ** len(recipe.apt)
    if recipe.apt and px % coarsest:
        sizes = [n * coarsest for n in (px // coarsest, px // coarsest + 1) if n]
        raise UsageError(
            f"{recipe}: cells of {coarsest} px do not divide {px} px; give px="
            f"{' or px='.join(map(str, sizes))}"
        )
    if recipe.halt is not None:
        _check_halting(backbone, recipe, trains)


def _check_halting(backbone: Backbone, recipe: Recipe, trains: bool) -> None:
    depth = recipe.depth or backbone.layers
    if recipe.halt and not 1 <= recipe.halt < depth:
        raise UsageError(f"{recipe}: tokens can halt after 1 to fewer than {depth} blocks")
    if not backbone.aligns:
        raise UsageError(
            f"{recipe} does not reach this model's head, which reads tokens that halt; leave "
            "halt out"
        )
    if trains and not recipe.halt and backbone.gate is None:
        raise UsageError("halt says no depth to train for; give as halt=8")
    if not trains and recipe.adapted is None and (recipe.halt or backbone.gate is None):
        said = replace(recipe, halt=recipe.halt or 8.0, precision="fp32", align=False)
        raise UsageError(
            f"{recipe}: no gate was trained for it; train one with python -m adaptation distil "
            f"--recipe {said}, and give {said},adapted=DIR"
        )
