"""`rungs.json`: what `export rungs` wrote, read by calibration and by `export repository`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .calibration import RUNGS, RungRecord
from .outputs import TASKS, default_task

NAME = "rungs.json"
REFERENCE = "reference"
SCHEMA_VERSION = 2  # 1 named the images in `fitted_on` by their files, and a head's not at all


class RungSetError(ValueError):
    """The folder holds no usable pair of rungs. One line that says what to run."""


@dataclass(frozen=True)
class RungSet:
    """A pair of exported rungs, and what was exported beside them to compare with.

    Attributes:
        backbone: name of the model.
        image_shape: (3, H, W) of the `image` tensor that both rungs take.
        embedding_dim: D.
        layers: L, the number of transformer blocks of the cheap rung.
        classes: C, or None for a model without a head.
        labels: the C class names, or None.
        preprocessing: fields of `imaging.Preprocessing`.
        rungs: `vit_low` and `vit_high`, with the SHA-256 of their files.
        files: where each rung's ONNX file lies.
        alternatives: the same model made cheaper in other ways, as `static_140`; never served by
            the router, only measured beside it.
        alternative_files: where each alternative's ONNX file lies.
        reference: the full model in FP32, which certificates are about; None: `vit_high` is it.
        reference_file: where its ONNX file lies.
        fitted_on: prints of the images that a graph or its head has learned from, see
            `bundle.prints`; nothing may be certified on those.
        task: what the logits mean, see `outputs.TASKS`; None: no head, or `default_task`.
        release: of this project that exported them; None: an earlier one, which did not say.
    """

    backbone: str
    image_shape: tuple[int, int, int]
    embedding_dim: int
    layers: int
    classes: int | None
    labels: tuple[str, ...] | None
    preprocessing: Mapping[str, Any]
    rungs: Mapping[str, RungRecord]
    files: Mapping[str, Path]
    alternatives: Mapping[str, RungRecord] = field(default_factory=dict)
    alternative_files: Mapping[str, Path] = field(default_factory=dict)
    reference: RungRecord | None = None
    reference_file: Path | None = None
    fitted_on: str = ""
    task: str | None = None
    release: str | None = None

    def __post_init__(self) -> None:
        """Fill the task where it was not said.

        Raises:
            ValueError: an unknown task.
        """
        if self.task is None:
            object.__setattr__(self, "task", default_task(self.classes))
        elif self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is none of {', '.join(TASKS)}")

    @classmethod
    def load(cls, folder: Path) -> RungSet:
        """Read `rungs.json`; the ONNX files are looked for, not hashed.

        Raises:
            RungSetError: a missing or invalid file.
        """
        path = folder / NAME
        try:
            content = json.loads(path.read_text())
            if content["schema_version"] != SCHEMA_VERSION:
                raise RungSetError(
                    f"{path} has schema version {content['schema_version']}, this code reads "
                    f"{SCHEMA_VERSION}; run python -m export rungs again"
                )
            rungs = {name: content["rungs"][name] for name in RUNGS}
            alternatives = content.get("alternatives", {})  # earlier exports have none
            reference = content.get("reference")
            low_layers = rungs["vit_low"].get("layers")
            channels, height, width = content["image"]["shape"]
            rung_set = cls(
                backbone=content["backbone"],
                image_shape=(channels, height, width),
                embedding_dim=content["embedding_dim"],
                layers=content["layers"] if low_layers is None else low_layers,
                classes=content["classes"],
                labels=tuple(content["labels"]) if content["labels"] else None,
                preprocessing=content["preprocessing"],
                rungs=_records(rungs),
                files=_files(folder, rungs),
                alternatives=_records(alternatives),
                alternative_files=_files(folder, alternatives),
                reference=_records({REFERENCE: reference})[REFERENCE] if reference else None,
                reference_file=folder / reference["file"] if reference else None,
                fitted_on=content.get("fitted_on", ""),
                task=content.get("task"),
                release=content.get("release"),
            )
        except OSError:
            raise RungSetError(f"no {NAME} in {folder}; run python -m export rungs first") from None
        except RungSetError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RungSetError(
                f"{path} is not readable ({type(error).__name__} {error}); export again"
            ) from None
        extra = [] if rung_set.reference_file is None else [rung_set.reference_file]
        for file in (*rung_set.files.values(), *rung_set.alternative_files.values(), *extra):
            if not file.is_file():
                raise RungSetError(f"no ONNX file at {file}; run python -m export rungs again")
        return rung_set

    def graphs(self) -> dict[str, tuple[RungRecord, Path]]:
        """What calibration runs: both rungs, and the reference where it is another graph."""
        found = {name: (self.rungs[name], self.files[name]) for name in RUNGS}
        if self.reference is not None and self.reference_file is not None:
            found[REFERENCE] = (self.reference, self.reference_file)
        return found

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each of `graphs`, by name."""
        found = {name: self.rungs[name].fingerprint for name in RUNGS}
        if self.reference is not None:
            found[REFERENCE] = self.reference.fingerprint
        return found

    def preprocessing_sha256(self) -> str:
        """Hex SHA-256 of the preprocessing, whatever the order and spacing of its JSON."""
        canonical = json.dumps(self.preprocessing, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _records(entries: Mapping[str, Any]) -> dict[str, RungRecord]:
    return {
        name: RungRecord(
            entry["px"],
            entry["recipe"],
            entry["sha256"],
            entry.get("weights_sha256"),
            entry.get("layers"),
            entry.get("size_bytes"),
            entry.get("weights_size_bytes"),
        )
        for name, entry in entries.items()
    }


def _files(folder: Path, entries: Mapping[str, Any]) -> dict[str, Path]:
    return {name: folder / entry["file"] for name, entry in entries.items()}
