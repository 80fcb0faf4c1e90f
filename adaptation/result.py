"""What a training came to, in words and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from bundle.adapted import WEIGHTS, Adapted
from export.errors import first_line

from .halting import MOST_DEPTH
from .request import AdaptationError
from .training import Held, Weights


@dataclass(frozen=True, eq=False)
class Result:
    """What a training came to.

    Attributes:
        adapted: the state that was written; None: it did not help, and nothing was.
        plain: what the recipe is worth as it is, on the held-out images.
        start: what training began with: that, or aligned.
        best: what the best state is worth.
        minutes: that search and training took.
        about: the record, ready for JSON.
    """

    adapted: Adapted | None
    plain: Held
    start: Held
    best: Held
    minutes: float
    about: dict[str, Any]

    def lines(self) -> list[str]:
        """For people to read."""
        held_out = self.about["images"]["held_out"]
        plain = "as it is" if self.plain.depth is None else "with its gate as it begins"
        said = f"on {held_out} held-out images: {in_words(self.plain)} {plain}; "
        said += f"{in_words(self.start)} at the start; {in_words(self.best)} adapted"
        if self.adapted is None:
            late = late_words(self.about)
            return [said, late or "it did not help: nothing is written"]
        folder = self.adapted.folder
        return [
            said,
            f"wrote {folder} in {self.minutes:.1f} minutes of training",
            f'next: python -m export rungs --low "{self.adapted.recipe},adapted={folder}" …',
        ]


def in_words(held: Held) -> str:
    """What a student is worth, for people to read."""
    said = f"{held.acceptable:.1%} acceptable, cosine {held.cosine:.3f}"
    return said if held.depth is None else f"{said}, {held.depth:.1f} blocks a token"


def late_words(about: Mapping[str, Any]) -> str | None:
    """Why nothing is written where tokens halt too late; None: that is not why."""
    depths = [look["held_out"]["depth"] for look in about["curve"]]
    asked, layers = about["depth"], about["layers"]
    if None in depths:
        return None
    if min(depths) > layers - 0.05:
        return "no token halts, the gate never opens: nothing is saved by it, and nothing written"
    if asked is None or min(depths) <= MOST_DEPTH * asked:
        return None
    return (
        f"tokens ran through {min(depths):.1f} blocks at the least where {asked:g} were asked for: "
        "nothing is written; give more minutes, or a larger depth"
    )


def written(state: Adapted, weights: Weights, resumable: bool) -> Adapted:
    """Write a state and its weights in place of one that lay there; returns it with their hash.

    Args:
        state: what to write.
        weights: of it.
        resumable: whether training can go on to its end without beginning again.

    Raises:
        AdaptationError: the files cannot be written; what lay there still does.
    """
    fresh = state.folder / f".{WEIGHTS}"
    try:
        save_file({k: value.cpu().clone() for k, value in weights.items()}, fresh)
        return state.save(fresh)
    except (OSError, SafetensorError) as error:
        fresh.unlink(missing_ok=True)
        raise AdaptationError(
            f"the state cannot be written to {state.folder} ({first_line(error)}); see that there "
            "is room, then give the same command " + ("with --resume" if resumable else "again")
        ) from None
