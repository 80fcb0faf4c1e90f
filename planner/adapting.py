"""Adapting cheap graphs in the middle of a plan: to which images, which recipes, what came of it.

A part of the images is set aside before anything else is divided; nothing but training sees it. So
an adapted graph has seen no other image before, and is a candidate like any other. Trained states
stay in the planner's cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptation.request import LEAST_GROUPS, AdaptationError
from adaptation.request import Request as Lesson
from bundle.adapted import Adapted, AdaptedError
from bundle.graphs import GraphSet
from bundle.prints import decode
from bundle.recipe import Recipe
from calibration.fidelity import Fidelity
from calibration.outputs import Outputs
from calibration.splits import Rows, SplitError
from report.terminal import Bars
from routing.provenance import RELEASE

from .graphs import identity
from .request import Recipes, Request
from .select import Candidate, Pair
from .workshop import Workshop

if TYPE_CHECKING:  # torch takes seconds to import
    from export.backbones import Backbone

    from .parts import Parts

SHARE = (
    0.5  # of the groups: training and certificates both want more, and no study has weighed them
)
MOST_RECIPES = 2  # minutes that more of them share teach each too little
LEAST_MINUTES = 1.0  # of each: below, not even its settings are tried
_VERDICT = "planned.json"  # in the folder of a state, once its training has come to its end


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        recipe: that was trained, without precision and alignment.
        state: what was written; None: it did not help, or could not be.
        line: for people to read.
    """

    recipe: Recipe
    state: Adapted | None
    line: str


def bodies(lows: Recipes, full: Recipe) -> Recipes:
    """The recipes that can be trained, each once: those of cheap graphs with the model's weights.

    Args:
        lows: of the cheap graphs.
        full: of the full model, which has nothing to learn.
    """
    plain = (_body(recipe) for recipe in lows if recipe.adapted is None)
    return tuple(recipe for recipe in dict.fromkeys(plain) if recipe != full)


def problems(request: Request, lows: Recipes, full: Recipe) -> list[str]:
    """Why `--adapt` makes no sense with these recipes; usually nothing."""
    minutes = request.adapt_minutes
    if minutes is None:
        return []
    count = min(MOST_RECIPES, len(bodies(lows, full)))
    if not count:
        return [
            "--adapt has nothing to train: no candidate with the model's own weights has fewer "
            "pixels, blocks or tokens; leave it out"
        ]
    if not count * LEAST_MINUTES <= minutes < float("inf"):
        return [
            f"--adapt {minutes:g} is no time to train in: give {count * LEAST_MINUTES:g} minutes "
            f"or more, {LEAST_MINUTES:g} for each of up to {count} recipes"
        ]
    if "," in str(request.cache):
        return [f"--cache {request.cache} has a comma, and adapted states lie there; leave it out"]
    return []


def set_aside(groups: Sequence[str], seed: int) -> tuple[Rows, Rows]:
    """The images to adapt to, and the others; a group is never divided.

    Args:
        groups: of each image.
        seed: draws them.

    Raises:
        SplitError: too few to adapt to.
    """
    names = np.unique(np.array(groups))
    count = round(SHARE * len(names))
    if count < LEAST_GROUPS:
        raise SplitError(
            f"{len(names)} groups of images are too few for --adapt: it gets {count} of them, "
            f"{LEAST_GROUPS} are needed"
        )
    chosen = np.isin(groups, np.random.default_rng([seed, 1]).permutation(names)[:count])
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def wanted(
    offered: Recipes,
    listed: Sequence[Candidate],
    pairs: Mapping[Pair, Outputs],
    graphs: GraphSet,
    fidelity: Fidelity,
    allowed: Callable[[Pair], bool],
) -> Recipes:
    """The recipes to train, at most `MOST_RECIPES`: those of the shortlist, in its order.

    Where no cascade could be certified there is no shortlist: then those whose graphs, alone,
    answer the fit images acceptably most often. Training may be what they lack.

    Args:
        offered: what can be trained, as `bodies`.
        listed: the shortlist.
        pairs: outputs of all pairs for the fit images.
        graphs: of which they are.
        fidelity: when an answer is a loss.
        allowed: whether a pair may be served.
    """
    names = [candidate.low for candidate in listed]
    if not names:
        lost = {p[0]: fidelity.loss(outputs).mean() for p, outputs in pairs.items() if allowed(p)}
        names = sorted(lost, key=lambda name: float(lost[name]))
    found = [graphs.graphs[name].recipe for name in names]
    plain = dict.fromkeys(_body(recipe) for recipe in found if recipe.adapted is None)
    return tuple(recipe for recipe in plain if recipe in offered)[:MOST_RECIPES]


def twins(lows: Recipes, trained: Sequence[Trained]) -> Recipes:
    """The recipes of cheap graphs, with the states of those that were trained with success."""
    keys = {found.recipe: found.state.key for found in trained if found.state is not None}
    adapted = (replace(r, adapted=keys.get(_body(r))) for r in lows if r.adapted is None)
    return tuple(r for r in adapted if r.adapted is not None and r not in lows)


class Adapting:
    """The trainings of one plan.

    Args:
        request: of the plan.
        backbone: the model.
        full: recipe of the full model.
        graphs: the full model's among them, with its head.
        parts: of the images.
        fidelity: when an answer is a loss.
        asked: the recipes of all candidates, which decide which of them are trained.
    """

    def __init__(
        self,
        request: Request,
        backbone: Backbone,
        full: Recipe,
        graphs: GraphSet,
        parts: Parts,
        fidelity: Fidelity,
        asked: Sequence[Recipes],
    ) -> None:
        self._request, self._backbone, self._full = request, backbone, full
        self._graphs, self._places, self._fidelity = graphs, parts.set_aside, fidelity
        self._depends = {
            "graphs": identity(request, full, backbone),
            "images": parts.cache.pictures(parts.set_aside).hashes,
            "group_by": request.group_by,
            "seed": request.seed,
            "fidelity": fidelity.to_dict(),
            "release": RELEASE,
        }
        goal = [request.goal.max_risk, request.goal.confidence, request.latency_budget_ms]
        chosen_by = [[list(map(str, recipes)) for recipes in asked], goal, request.adapt_minutes]
        self._choice = request.cache / f"adapting-{_hash(self._depends, chosen_by)}.json"

    def remembered(self) -> Recipes | None:
        """Which recipes an earlier plan for the same has chosen; None: there was none.

        Prices, and with them a shortlist, differ a little each time; a plan that is made again, or
        goes on where it was stopped, trains what it did.
        """
        try:
            return tuple(map(Recipe.parse, json.loads(self._choice.read_text("utf-8"))))
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def remember(self, recipes: Recipes) -> None:
        """Let later plans for the same train these.

        Raises:
            OSError: it cannot be written.
        """
        _write(self._choice, [str(recipe) for recipe in recipes])

    def train(self, recipes: Recipes, workshop: Workshop, bars: Bars) -> list[Trained]:
        """Train recipes, sharing the minutes equally, but for those that earlier plans did.

        A training that was stopped goes on.

        Raises:
            ExportError: a recipe is not for this model.
            OSError: a file cannot be written.
        """
        found = []
        for recipe in recipes:
            found.append(self._train(recipe, len(recipes), workshop, bars))
            bars.say(found[-1].line)
        return found

    def _train(self, recipe: Recipe, sharing: int, workshop: Workshop, bars: Bars) -> Trained:
        minutes = (self._request.adapt_minutes or 0) / sharing
        key = _hash(self._depends, [str(recipe), minutes])
        folder = self._request.cache / f"adapted-{recipe.slug(0)}-{key}"
        if (known := _known(folder, recipe)) is not None:
            return known
        lesson = Lesson(
            recipe=recipe,
            source=self._request.source,
            out=folder,
            px=self._full.px,
            minutes=minutes,
            places=self._places,
            group_by=self._request.group_by,
            seed=self._request.seed,
            cache=self._request.cache / "teacher",
        )
        bars.say(f"adapt {recipe} to {len(self._places):,} images in {minutes:g} minutes")
        try:
            result = workshop.adapt(self._backbone, self._graphs, lesson, self._fidelity, bars)
        except AdaptationError as error:
            # As it is called here; a training that was stopped goes on by itself.
            words = str(error).replace("--minutes", "--adapt").replace(" with --resume", " again")
            if sharing > 1:
                words += f" (of --adapt {self._request.adapt_minutes:g} each of {sharing} recipes"
                words += f" gets {minutes:g})"
            return Trained(recipe, None, f"{recipe} is not adapted: {words}")
        said = result.lines()[0]
        if result.adapted is None:
            line = f"{recipe}: adapting does not help ({said}); the plan goes on without"
        else:
            line = f"{described(result.adapted)} ({said})"
        _write(folder / _VERDICT, {"helps": result.adapted is not None, "line": line})
        return Trained(recipe, result.adapted, line)


def described(state: Adapted) -> str:
    """A state in words: of which recipe, from how many images, in how many minutes."""
    minutes = figures(state)["minutes"]
    took = "" if minutes is None else f" in {minutes:.1f} minutes"
    return (
        f"{replace(state.recipe, adapted=state.key)}: adapted{took} to "
        f"{figures(state)['images']:,} images without labels, which have no other part"
    )


def figures(state: Adapted) -> dict[str, Any]:
    """`minutes` that a state was trained in, None where its record has none, and its `images`."""
    minutes = state.about.get("minutes")
    images = len(decode(state.image_prints)[1])
    return {"minutes": minutes, "images": images}


def _known(folder: Path, recipe: Recipe) -> Trained | None:
    """What an earlier training came to; None: there was none, or its state is not whole."""
    try:
        verdict = json.loads((folder / _VERDICT).read_text("utf-8"))
        state = Adapted.load(folder) if verdict["helps"] else None
        return Trained(recipe, state, str(verdict["line"]))
    except (OSError, ValueError, KeyError, TypeError, AdaptedError):
        return None


def _body(recipe: Recipe) -> Recipe:
    return replace(recipe, adapted=None, precision="fp32", align=False)


def _hash(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(json.dumps(content), "utf-8")
    fresh.replace(path)
