"""An adapted state: the weights of a cheap graph that was trained to answer as the full model.

`adaptation` writes it, `export` bakes it into a graph by the recipe `adapted=DIR`. The folder holds
the weights as safetensors, under the names of the torch module, and `adapted.json`, which says what
they are of and what they were trained on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bundle import manifest
from bundle.prints import decode
from bundle.recipe import Recipe

NAME = "adapted.json"
WEIGHTS = "adapted.safetensors"
SCHEMA_VERSION = 1
DIGITS = 12  # of the weights' SHA-256 that stand for them in the recipe of a graph
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class AdaptedError(ValueError):
    """There is no such state, or it is of something else. One line that says what to do."""


@dataclass(frozen=True)
class Adapted:
    """A trained state of one recipe of one model.

    Attributes:
        folder: where it lies.
        recipe: whose torch module it is: resolution, depth and merging, without precision.
        teacher: SHA-256 of the full model's weights, which it was started from and trained by.
        image_px: H = W of the full model's input.
        sha256: of the file of weights.
        image_prints: of the images that it has learned from, as `bundle.prints.encode`, those that
            chose among its states included: nothing is fitted, certified or tested on them.
        about: how it was trained (seed, settings, curve, environment), for people to read.
    """

    folder: Path
    recipe: Recipe
    teacher: str
    image_px: int
    sha256: str
    image_prints: str
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Its weights."""
        return self.folder / WEIGHTS

    @property
    def key(self) -> str:
        """What stands for it in the recipe of a graph."""
        return self.sha256[:DIGITS]

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe of a graph with these weights, whichever folder it named.

        Args:
            recipe: with its resolution written out.

        Raises:
            AdaptedError: the graph would be of another module.
        """
        body = replace(recipe, adapted=None, precision="fp32", align=False)
        if body != self.recipe:
            raise AdaptedError(
                f"the state in {self.folder} is of {self.recipe}, not of {body}; adapt that recipe "
                "with python -m adaptation distil"
            )
        return replace(recipe, adapted=self.key)

    def check_teacher(self, teacher: str, image_px: int) -> None:
        """Refuse another full model than the one it was trained by.

        Raises:
            AdaptedError: its weights or its resolution are others.
        """
        if teacher != self.teacher:
            raise AdaptedError(
                f"the state in {self.folder} was trained by another model ({self.teacher[:DIGITS]}…"
                f", this one is {teacher[:DIGITS]}…); adapt this one"
            )
        if image_px != self.image_px:
            raise AdaptedError(
                f"the state in {self.folder} was trained by the full model at {self.image_px} px, "
                f"not at {image_px} px; adapt it again"
            )

    def save(self, weights: Path | None = None) -> Adapted:
        """Write the record beside the weights in the folder; returns it with their hash.

        Args:
            weights: a file in the folder that takes the place of those; None: they stay.

        Raises:
            OSError: a file cannot be written; what lay there still does.
        """
        known = replace(self, sha256=manifest.sha256_file(weights or self.file))
        content = {
            "schema_version": SCHEMA_VERSION,
            "recipe": str(self.recipe),
            "teacher": self.teacher,
            "image_px": self.image_px,
            "sha256": known.sha256,
            **self.about,
            "image_prints": self.image_prints,  # long: people read what stands above it
        }
        fresh = self.folder / f".{NAME}"
        try:
            fresh.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        if weights is not None:
            os.replace(weights, self.file)
        os.replace(fresh, self.folder / NAME)
        return known

    @classmethod
    def load(cls, folder: Path) -> Adapted:
        """Read the record and check the weights against it.

        Raises:
            AdaptedError: a file is missing, damaged or of an earlier release.
        """
        path = folder / NAME
        again = "run python -m adaptation distil again"
        try:
            content = json.loads(path.read_text("utf-8"))
            if content.pop("schema_version") != SCHEMA_VERSION:
                raise ValueError("another schema version")
            prints = content.pop("image_prints")
            decode(prints)
            found = cls(
                folder=folder,
                recipe=Recipe.parse(content.pop("recipe")),
                teacher=str(content.pop("teacher")),
                image_px=int(content.pop("image_px")),
                sha256=str(content.pop("sha256")),
                image_prints=prints,
                about=content,
            )
            if manifest.sha256_file(found.file) != found.sha256:
                raise AdaptedError(f"{found.file} differs from its SHA-256 in {NAME}; {again}")
            with safe_open(found.file, "numpy") as file:
                file.keys()
        except FileNotFoundError as error:
            raise AdaptedError(
                f"adapted={folder}: no {error.filename or NAME}; give a folder that "
                "python -m adaptation distil has written"
            ) from None
        except AdaptedError:
            raise
        except (*_DAMAGE, SafetensorError) as error:
            words = " ".join(f"{type(error).__name__} {error}".split())
            raise AdaptedError(f"{path} is not readable ({words}); {again}") from None
        return found
