"""What `collect` stores: both rungs' outputs for N images, in one `.npz`.

The file holds `embedding_low` and `embedding_high` (N, D), `cls_layers_low` (N, L + 1, D),
`logits_low` and `logits_high` (N, C) for models with a head, the same with `_reference` where the
full rung is not the reference, `labels` (N,) as class indices or -1,
the strings `names`, `groups` and `hashes` (SHA-256 of the decoded pixels), and `looks` (N, 29) as
in `bundle.prints`. `rungs` (the SHA-256 of both ONNX files), `preprocessing` and `imaging` (the
SHA-256 of our code that decodes) tie it to the graphs and tensors that made it; `runtime` says what
ran them, `task` what logits mean, where there are any.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.prints import LOOK_BYTES, Looks
from routing import TASKS, RungOutputs, default_task
from routing.calibration import FULL_RUNG

from .npz import NpzError, load_npz, save_npz

FULL_MODEL = "full FP32 model"  # what answers are held against where it is not the full rung

# Every array with a row for each image. N images, D of the embedding, C classes.
AXES = {
    "embedding_low": ("N", "D"),
    "embedding_high": ("N", "D"),
    "cls_layers_low": ("N", "L + 1", "D"),
    "logits_low": ("N", "C"),
    "logits_high": ("N", "C"),
    "embedding_reference": ("N", "D"),
    "logits_reference": ("N", "C"),
    "labels": ("N",),
    "names": ("N",),
    "groups": ("N",),
    "hashes": ("N",),
    "looks": ("N", f"{LOOK_BYTES} bytes"),
}
# A model without a head has no logits, and a full rung that is the reference needs no other.
OPTIONAL = ("logits_low", "logits_high", "embedding_reference", "logits_reference")


class OutputsError(ValueError):
    """Stored outputs are missing, unreadable or of other rungs. One line."""


@dataclass(frozen=True)
class Outputs:
    """Both rungs' outputs for N images, in the order they were read.

    Attributes:
        low: of the cheap rung.
        high: of the full rung, without `cls_layers`.
        reference: of the full model in FP32, which losses are about; None: the full rung is it.
        labels: class indices, or -1 where unknown, INT64 (N,).
        names: unique within the source.
        groups: images of one group stay in one split.
        hashes: SHA-256 of the decoded pixels, `imaging.pixels_sha256`.
        looks: what finds an image again in another form, UINT8 (N, 29), `bundle.prints.look_of`.
        rung_hashes: fingerprint of each graph, `routing.RungRecord.fingerprint`.
        preprocessing_sha256: of how their images were made, see `bundle.graphs`.
        imaging_sha256: of the code that made them, `imaging.code_sha256`.
        source: opens the images again: see `images.open_images`.
        title: the source in words, without paths.
        task: what the logits mean, see `routing.TASKS`; None: no head, or `routing.default_task`.
        runtime: what ran the graphs, `name` and `processor`, as `running.local_runtime` or
            `served.ServedRungs` say it; empty in files of earlier releases.
    """

    low: RungOutputs
    high: RungOutputs
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    hashes: tuple[str, ...]
    looks: Looks
    rung_hashes: dict[str, str]
    preprocessing_sha256: str
    imaging_sha256: str
    source: str
    title: str
    reference: RungOutputs | None = None
    task: str | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Fill the task where it was not said.

        Raises:
            ValueError: an unknown task.
        """
        if self.task is None and self.low.logits is not None:
            object.__setattr__(self, "task", default_task(self.low.logits.shape[1]))
        elif self.task not in (None, *TASKS):
            raise ValueError(f"task {self.task!r} is none of {', '.join(TASKS)}")

    @property
    def truth(self) -> RungOutputs:
        """What the other answers are held against."""
        return self.high if self.reference is None else self.reference

    @property
    def truth_words(self) -> str:
        """The same in words."""
        return FULL_RUNG if self.reference is None else FULL_MODEL

    def __len__(self) -> int:
        """The number of images N."""
        return len(self.names)

    def rows(self, index: NDArray[np.intp]) -> Outputs:
        """The outputs of some of the images."""
        return replace(
            self,
            low=self.low.rows(index),
            high=self.high.rows(index),
            reference=None if self.reference is None else self.reference.rows(index),
            labels=self.labels[index],
            names=tuple(self.names[i] for i in index),
            groups=tuple(self.groups[i] for i in index),
            hashes=tuple(self.hashes[i] for i in index),
            looks=self.looks[index],
        )

    def fingerprint(self) -> str:
        """SHA-256 over the images' hashes, in order."""
        return hashlib.sha256("\n".join(self.hashes).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the `.npz`, whole or not at all."""
        rungs = {"low": self.low, "high": self.high, "reference": self.reference}
        rows = row_arrays(rungs, self.labels, self.names, self.groups, self.hashes, self.looks)
        scalars = scalar_arrays(
            self.rung_hashes,
            self.preprocessing_sha256,
            self.imaging_sha256,
            self.source,
            self.title,
            self.task,
            self.runtime,
        )
        save_npz(path, {**rows, **scalars})

    @classmethod
    def load(cls, path: Path) -> Outputs:
        """Read a `.npz`.

        Raises:
            OutputsError: missing, damaged, not written by `collect`, or its arrays do not belong
                together.
        """
        try:
            arrays = load_npz(path)
        except FileNotFoundError:
            raise OutputsError(f"no {path}; run python -m calibration collect first") from None
        except NpzError as error:
            raise OutputsError(f"{path} is not readable ({error}); collect again") from None
        try:
            _check_rows(arrays)
            _check_finite(arrays)
            return cls(
                low=_rung_outputs(arrays, "low"),
                high=_rung_outputs(arrays, "high"),
                reference=_rung_outputs(arrays, "reference")
                if "embedding_reference" in arrays
                else None,
                labels=arrays["labels"],
                names=tuple(arrays["names"].tolist()),
                groups=tuple(arrays["groups"].tolist()),
                hashes=tuple(arrays["hashes"].tolist()),
                looks=arrays["looks"],
                rung_hashes=json.loads(str(arrays["rungs"])),
                preprocessing_sha256=str(arrays["preprocessing"]),
                imaging_sha256=str(arrays["imaging"]),
                source=str(arrays["source"]),
                title=str(arrays["title"]),
                task=str(arrays["task"]) if "task" in arrays else None,
                runtime=json.loads(str(arrays.get("runtime", "{}"))),
            )
        except KeyError as error:
            raise OutputsError(f"{path} holds no {error}; collect again") from None
        except ValueError as error:
            raise OutputsError(f"{path}: {error}; collect again") from None


def row_arrays(
    rungs: Mapping[str, RungOutputs | None],
    labels: NDArray[np.int64],
    names: Sequence[str],
    groups: Sequence[str],
    hashes: Sequence[str],
    looks: Looks,
) -> dict[str, NDArray[Any]]:
    """The file's arrays that have a row for each image.

    Args:
        rungs: `low`, `high` and `reference`; None: without.
        labels: as in `Outputs`, like all that follow.
        names: of the images.
        groups: of the images.
        hashes: of the images.
        looks: of the images.
    """
    found: dict[str, NDArray[Any]] = {}
    present = {rung: outputs for rung, outputs in rungs.items() if outputs is not None}
    for rung, outputs in present.items():
        for name in ("embedding", "cls_layers", "logits"):
            if (values := getattr(outputs, name)) is not None:
                found[f"{name}_{rung}"] = values
    texts = {"names": names, "groups": groups, "hashes": hashes}
    found |= {name: np.array(text, dtype=np.str_) for name, text in texts.items()}
    return {**found, "labels": labels, "looks": looks}


def scalar_arrays(
    rung_hashes: Mapping[str, str],
    preprocessing_sha256: str,
    imaging_sha256: str,
    source: str,
    title: str,
    task: str | None,
    runtime: Mapping[str, Any],
) -> dict[str, NDArray[Any]]:
    """The file's arrays that are said once; arguments as in `Outputs`."""
    return {
        **({} if task is None else {"task": np.array(task)}),
        "rungs": np.array(json.dumps(rung_hashes)),
        "preprocessing": np.array(preprocessing_sha256),
        "imaging": np.array(imaging_sha256),
        "source": np.array(source),
        "title": np.array(title),
        "runtime": np.array(json.dumps(runtime)),
    }


def _rung_outputs(arrays: dict[str, NDArray[Any]], rung: str) -> RungOutputs:
    return RungOutputs(
        arrays[f"embedding_{rung}"], arrays.get(f"cls_layers_{rung}"), arrays.get(f"logits_{rung}")
    )


def _check_rows(arrays: dict[str, NDArray[Any]]) -> None:
    """Refuse arrays of other dimensions than the module says, or of different N, D or C.

    Raises:
        ValueError: naming the array.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, axes in AXES.items():
        if name not in arrays and name in OPTIONAL:
            continue
        shape = arrays[name].shape
        if len(shape) != len(axes):
            raise ValueError(f"{name} has shape {shape}, not ({', '.join(axes)})")
        for axis, size in zip(axes, shape, strict=True):
            first_size, first = sizes.setdefault(axis, (size, name))
            if size != first_size:
                raise ValueError(f"{name} has {axis} = {size}, {first} has {axis} = {first_size}")
    if arrays["looks"].shape[1] != LOOK_BYTES:
        raise ValueError(f"looks has {arrays['looks'].shape[1]} bytes an image, not {LOOK_BYTES}")
    if ("logits_low" in arrays) != ("logits_high" in arrays):
        raise ValueError("only one of the rungs has logits")


def _check_finite(arrays: dict[str, NDArray[Any]]) -> None:
    """Refuse NaN and Inf, which no comparison would count as a loss.

    Raises:
        ValueError: naming the array and the first image.
    """
    for name in AXES:
        values = arrays.get(name)
        if values is not None and values.dtype.kind == "f" and not np.isfinite(values).all():
            rows = np.isfinite(values).reshape(len(values), -1).all(axis=1)
            raise ValueError(f"{name} of {arrays['names'][rows.argmin()]} holds NaN or Inf")
