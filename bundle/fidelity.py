"""When a cheap answer is not acceptable in place of another, as commands and artifacts say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from routing import Calibration
from routing.fidelity import KINDS, LABEL_THRESHOLD, label_cut

if TYPE_CHECKING:
    from typing_extensions import Self

COSINE_TOLERANCE = 0.1
# What a model answers -> the losses that mean something for it, and the words for it.
APPLICABLE = {
    "classes": (("top1", "cosine"), "answers one of several classes"),
    "labels": (("labels", "cosine"), "answers independent labels"),
    "value": (("value", "cosine"), "answers a value"),
    None: (("cosine",), "has no head"),
}


class FidelityError(ValueError):
    """The fidelity loss does not apply to these outputs. One line."""


@dataclass(frozen=True)
class FidelityLoss:
    """When a cheap answer is not acceptable in place of the full one.

    Attributes:
        kind: `top1`, the classes differ; `labels`, the sets of labels differ; `value`, a value
            differs by too much; or `cosine`, the embeddings' cosine is too small.
        tolerance: with `cosine`, a cosine below 1 - tolerance is a loss; with `value`, a
            difference above the tolerance is one.
        relative: with `value`, whether the tolerance is a share of the reference's value.
        label_threshold: with `labels`, the probability from which on a label belongs to the set.
    """

    kind: str
    tolerance: float = COSINE_TOLERANCE
    relative: bool = False
    label_threshold: float = LABEL_THRESHOLD

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FidelityError(f"--fidelity {self.kind!r} is none of {', '.join(KINDS)}")
        if self.kind == "value" and not (0 < self.tolerance and math.isfinite(self.tolerance)):
            raise FidelityError(f"--tolerance {self.tolerance} is not a finite number above 0")
        if self.kind != "value" and not 0 < self.tolerance < 2:
            raise FidelityError(f"--tolerance {self.tolerance} is not between 0 and 2")
        if not 0 < self.label_threshold < 1:
            raise FidelityError(f"--label-threshold {self.label_threshold} is not between 0 and 1")
        if self.relative and self.kind != "value":
            raise FidelityError(f"--relative goes with --fidelity value, not with {self.kind}")
        if self.label_threshold != LABEL_THRESHOLD and self.kind != "labels":
            raise FidelityError(f"--label-threshold goes with --fidelity labels, not {self.kind}")

    @classmethod
    def asked(
        cls,
        task: str | None,
        kind: str | None,
        tolerance: float | None = None,
        relative: bool = False,
        label_threshold: float | None = None,
    ) -> Self:
        """The loss that a command line asks for, or that a model's task has by itself.

        Args:
            task: what the model answers, see `routing.TASKS`.
            kind: one of `KINDS`, or None.
            tolerance: as the attribute; None: the default of the kind.
            relative: as the attribute.
            label_threshold: as the attribute; None: 0.5.

        Raises:
            FidelityError: it means nothing for this task, or lacks what only the user knows.
        """
        if kind is None:
            if task == "value":
                raise FidelityError(
                    "this model answers a value, and only you know which difference matters: give "
                    "--fidelity value --tolerance X (with --relative a share of the value), or "
                    "--fidelity cosine"
                )
            kind = APPLICABLE[task][0][0]
        fidelity = cls.given(kind, tolerance, relative, label_threshold)
        fidelity.check(task)
        return fidelity

    @classmethod
    def given(
        cls, kind: str, tolerance: float | None, relative: bool, label_threshold: float | None
    ) -> Self:
        """The loss that a command line names, whatever the model; arguments as `asked` has them.

        Raises:
            FidelityError: it cannot be meant.
        """
        if kind == "value" and tolerance is None:
            raise FidelityError(
                "--fidelity value needs --tolerance X, the largest difference that does not matter"
            )
        return cls(
            kind,
            COSINE_TOLERANCE if tolerance is None else tolerance,
            relative,
            LABEL_THRESHOLD if label_threshold is None else label_threshold,
        )

    @classmethod
    def of(cls, calibration: Calibration) -> Self:
        """The loss that an artifact was made for."""
        return cls.from_dict(calibration.chosen_by)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, other entries beside it or not."""
        given = {
            name: content[name]
            for name in ("tolerance", "relative", "label_threshold")
            if content.get(name) is not None
        }
        return cls(content["fidelity"], **given)

    def to_dict(self) -> dict[str, Any]:
        """The loss as artifacts hold it: `fidelity`, `tolerance`, and what else its kind has."""
        measured = self.kind in ("value", "cosine")
        return {
            "fidelity": self.kind,
            "tolerance": self.tolerance if measured else None,
            **({"relative": self.relative} if self.kind == "value" else {}),
            **({"label_threshold": self.label_threshold} if self.kind == "labels" else {}),
        }

    @property
    def label_cut(self) -> float:
        """The logit from which on a label belongs to the set."""
        return label_cut(self.label_threshold)

    def check(self, task: str | None) -> None:
        """Refuse a loss that means nothing for what a model answers.

        Raises:
            FidelityError: saying which ones do.
        """
        kinds, words = APPLICABLE[task]
        if self.kind in kinds:
            return
        if task is None:
            raise FidelityError(
                f"--fidelity {self.kind} needs a head, the model has none; use cosine"
            )
        raise FidelityError(
            f"--fidelity {self.kind} means nothing for a model that {words}; use "
            f"{' or '.join(kinds)}, or export it with another --task if that is not what it answers"
        )

    def words(self, reference: str = "full rung") -> str:
        """What a loss is, to be read after "an answer that"."""
        if self.kind == "top1":
            return f"names another class than the {reference}"
        if self.kind == "labels":
            at = f" at probability {self.label_threshold:g}"
            return f"gives another set of labels{at} than the {reference}"
        if self.kind == "value":
            size = f"{100 * self.tolerance:g} %" if self.relative else f"{self.tolerance:g}"
            return f"gives a value that differs by more than {size} from the {reference}'s"
        return f"has a cosine below {1 - self.tolerance:g} to the {reference}'s embedding"

    def agreement(self) -> str:
        """What no loss is, to be read after "an answer that"."""
        if self.kind == "top1":
            return "names the same class"
        if self.kind == "labels":
            return f"gives the same set of labels at probability {self.label_threshold:g}"
        if self.kind == "value":
            size = f"{100 * self.tolerance:g} %" if self.relative else f"{self.tolerance:g}"
            return f"gives a value within {size}"
        return f"has an embedding of cosine {1 - self.tolerance:g} or more"
