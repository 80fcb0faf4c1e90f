"""Run both rungs over images once and keep what calibration needs.

One `.npz` holds, for N images: `embedding_low` and `embedding_high` (N, D), `cls_layers_low`
(N, L + 1, D), `logits_low` and `logits_high` (N, C) for models with a head, `labels` (N,) as class
indices or -1, and the strings `names`, `groups` and `hashes` (SHA-256 of the encoded bytes).
`rungs` (the SHA-256 of both ONNX files) ties it to the graphs that made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from imaging import ImageError, Preprocessing, decode
from routing import RUNGS, RungOutputs, RungSet

from .images import ImagesError, SourceImage
from .sessions import open_session, run_session

BATCH = 16
MAX_UNREADABLE = 0.05  # above this share something is wrong with the folder, not with a file


class OutputsError(ValueError):
    """Stored outputs are missing, unreadable or of other rungs. One line."""


@dataclass(frozen=True)
class Outputs:
    """Both rungs' outputs for N images, in the order they were read."""

    low: RungOutputs
    high: RungOutputs
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    hashes: tuple[str, ...]
    rung_hashes: dict[str, str]
    source: str

    def __len__(self) -> int:
        """The number of images N."""
        return len(self.names)

    def fingerprint(self) -> str:
        """SHA-256 over the images' hashes, in order."""
        return hashlib.sha256("\n".join(self.hashes).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the `.npz`, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"labels": self.labels}
        for rung, outputs in (("low", self.low), ("high", self.high)):
            for field in ("embedding", "cls_layers", "logits"):
                if getattr(outputs, field) is not None:
                    arrays[f"{field}_{rung}"] = getattr(outputs, field)
        for field in ("names", "groups", "hashes"):
            arrays[field] = np.array(getattr(self, field), dtype=np.str_)
        arrays["rungs"] = np.array(json.dumps(self.rung_hashes))
        arrays["source"] = np.array(self.source)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Outputs:
        """Read a `.npz`.

        Raises:
            OutputsError: missing or not written by `save`.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            return cls(
                low=_rung_outputs(arrays, "low"),
                high=_rung_outputs(arrays, "high"),
                labels=arrays["labels"],
                names=tuple(arrays["names"].tolist()),
                groups=tuple(arrays["groups"].tolist()),
                hashes=tuple(arrays["hashes"].tolist()),
                rung_hashes=json.loads(str(arrays["rungs"])),
                source=str(arrays["source"]),
            )
        except FileNotFoundError:
            raise OutputsError(f"no {path}; run python -m calibration collect first") from None
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise OutputsError(f"{path} is not readable ({error}); collect again") from None


def _rung_outputs(arrays: dict[str, Any], rung: str) -> RungOutputs:
    return RungOutputs(
        arrays[f"embedding_{rung}"], arrays.get(f"cls_layers_{rung}"), arrays.get(f"logits_{rung}")
    )


def collect(
    rung_set: RungSet,
    images: Iterable[SourceImage],
    source: str,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Outputs, list[str]]:
    """Run both rungs over images.

    Args:
        rung_set: the exported pair.
        images: read lazily, a batch at a time.
        source: where they come from, in words.
        progress: called with the number of images just done.

    Returns:
        The outputs, and a line for each image that could not be read.

    Raises:
        ImagesError: no readable image, or more than 5 % unreadable.
    """
    preprocessing = Preprocessing.from_dict(rung_set.preprocessing)
    sessions = {name: open_session(rung_set.files[name]) for name in RUNGS}
    parts: dict[str, list[RungOutputs]] = {name: [] for name in RUNGS}
    kept: list[SourceImage] = []
    hashes: list[str] = []
    unreadable: list[str] = []
    for batch in _batches(images):
        tensors = []
        for item in batch:
            try:
                tensors.append(preprocessing(decode(item.data)))
            except ImageError as error:
                unreadable.append(f"{item.name}: {error}")
                continue
            kept.append(SourceImage(item.name, item.group, item.label, b""))
            hashes.append(hashlib.sha256(item.data).hexdigest())
        if tensors:
            image = np.stack(tensors)  # (B, 3, H, W)
            for name in RUNGS:
                parts[name].append(run_session(sessions[name], image, layers=name == "vit_low"))
        progress(len(batch))
    _check_readable(len(kept), unreadable)
    outputs = Outputs(
        low=_concatenate(parts["vit_low"]),
        high=_concatenate(parts["vit_high"]),
        labels=_label_indices(kept, rung_set.labels),
        names=tuple(item.name for item in kept),
        groups=tuple(item.group for item in kept),
        hashes=tuple(hashes),
        rung_hashes={name: rung_set.rungs[name].sha256 for name in RUNGS},
        source=source,
    )
    return outputs, unreadable


def _batches(images: Iterable[SourceImage]) -> Iterator[list[SourceImage]]:
    iterator = iter(images)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def _check_readable(kept: int, unreadable: list[str]) -> None:
    total = kept + len(unreadable)
    if not kept:
        raise ImagesError(f"none of {total} images could be read; first: {unreadable[:1]}")
    if len(unreadable) > MAX_UNREADABLE * total:
        raise ImagesError(
            f"{len(unreadable)} of {total} images could not be read, more than "
            f"{MAX_UNREADABLE:.0%}; first: {unreadable[0]}"
        )


def _concatenate(parts: list[RungOutputs]) -> RungOutputs:
    def join(field: str) -> NDArray[np.float32] | None:
        arrays = [getattr(part, field) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    embedding = join("embedding")
    assert embedding is not None
    return RungOutputs(embedding, join("cls_layers"), join("logits"))


def _label_indices(images: list[SourceImage], labels: tuple[str, ...] | None) -> NDArray[np.int64]:
    index = {label: i for i, label in enumerate(labels or ())}
    return np.array([index.get(image.label or "", -1) for image in images], dtype=np.int64)
