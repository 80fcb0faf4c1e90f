"""What one graph answers, kept in a cache under the graph's fingerprint.

A planner runs a dozen graphs over parts of the same images, and the same graphs again for another
risk; each (graph, part) is run once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import PIL
from numpy.typing import NDArray

from bundle.graphs import GraphSet
from bundle.prints import Looks, looks_sha256
from calibration.chunks import NpzError, load_npz, save_npz
from calibration.running import DecodedImage, decode_ahead, local_runtime, open_session, run_session
from calibration.source import ImagesError, ImageSource
from imaging import Preprocessing, code_sha256
from routing import RungOutputs, RungRecord

BATCH = 16
_NO_TENSOR = np.zeros(0, np.float32)  # tensors of thousands of images would fill the memory


@dataclass(frozen=True, eq=False)
class GraphOutputs:
    """One graph's answers for n images.

    Attributes:
        rows: of the source, INT64 (n,): those asked for, without any that cannot be read.
        outputs: of the n images; `cls_layers` where they were asked for.
        names: of the images.
        hashes: SHA-256 of their pixels.
        looks: as in `outputs.Outputs`.
        labels: class indices, or -1.
        groups: of the images.
    """

    rows: NDArray[np.int64]
    outputs: RungOutputs
    names: tuple[str, ...]
    hashes: tuple[str, ...]
    looks: Looks
    labels: NDArray[np.int64]
    groups: tuple[str, ...]

    def only(self, index: NDArray[np.intp]) -> GraphOutputs:
        """The answers for some of the images."""
        texts = {
            name: tuple(getattr(self, name)[i] for i in index)
            for name in ("names", "hashes", "groups")
        }
        outputs, looks = self.outputs.rows(index), self.looks[index]
        return GraphOutputs(
            self.rows[index], outputs, looks=looks, labels=self.labels[index], **texts
        )


class OutputsCache:
    """Runs graphs over images, or remembers what they answered.

    Args:
        folder: of the cache.
        source: of all N images.
        rung_set: whose preprocessing and labels apply.
    """

    def __init__(self, folder: Path, source: ImageSource, rung_set: GraphSet) -> None:
        self._folder, self._source, self._rung_set = folder, source, rung_set
        folder.mkdir(parents=True, exist_ok=True)

    def get(
        self,
        record: RungRecord,
        file: Path,
        rows: Sequence[int],
        layers: bool,
        progress: Callable[[int], None],
    ) -> GraphOutputs:
        """A graph's answers for some of the images, in their order, those it can answer.

        Args:
            record: of the graph.
            file: its ONNX file.
            rows: of the source.
            layers: whether `cls_layers` are kept.
            progress: called with a number of images that are done.

        Raises:
            ImagesError: not one image that can be read.
        """
        path = self._folder / f"{self._identity(record, rows, layers)}.npz"
        try:
            found = _from_arrays(load_npz(path))
        except (FileNotFoundError, NpzError, KeyError):
            found = self._run(file, rows, layers, progress)
            save_npz(path, _to_arrays(found))
            return found
        progress(len(rows))
        return found

    def _identity(self, record: RungRecord, rows: Sequence[int], layers: bool) -> str:
        """SHA-256 over everything that decides what the graph answers."""
        content = {
            "graph": record.fingerprint,
            "source": self._source.fingerprint(),
            "rows": list(rows),
            "layers": layers,
            "preprocessing": self._rung_set.preprocessing_sha256(),
            "imaging": code_sha256(),
            "looks": looks_sha256(),
            "labels": self._rung_set.labels,
            "versions": [np.__version__, ort.__version__, PIL.__version__, BATCH],
            "runtime": local_runtime(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def _run(
        self, file: Path, rows: Sequence[int], layers: bool, progress: Callable[[int], None]
    ) -> GraphOutputs:
        session = open_session(file)
        index = {label: i for i, label in enumerate(self._rung_set.labels or ())}
        picked = _Picked(self._source, rows)
        batches = [range(i, min(i + BATCH, len(rows))) for i in range(0, len(rows), BATCH)]
        preprocessing = Preprocessing.from_dict(self._rung_set.preprocessing)
        kept: list[DecodedImage] = []
        answers: list[RungOutputs] = []
        with closing(decode_ahead(picked, batches, preprocessing)) as decoded:
            for batch, items in zip(batches, decoded, strict=True):
                found = [item for item in items if isinstance(item, DecodedImage)]
                if found:
                    tensors = np.stack([image.tensor for image in found])
                    outputs = run_session(session, tensors, layers)
                    finite = np.flatnonzero(outputs.finite())
                    answers.append(outputs.rows(finite))
                    kept += [replace(found[i], tensor=_NO_TENSOR) for i in finite]
                progress(len(batch))
        if not kept:
            raise ImagesError(f"none of {len(rows)} images can be read and answered")
        row_of = dict(zip(picked.names, rows, strict=True))
        return GraphOutputs(
            rows=np.array([row_of[image.name] for image in kept]),
            outputs=_joined(answers),
            names=tuple(image.name for image in kept),
            hashes=tuple(image.sha256 for image in kept),
            looks=np.array([image.look for image in kept]),
            labels=np.array([index.get(image.label or "", -1) for image in kept]),
            groups=tuple(image.group for image in kept),
        )


class _Picked:
    """Some images of a source as a source."""

    def __init__(self, source: ImageSource, rows: Sequence[int]) -> None:
        self._source, self._rows = source, rows
        self.spec, self.title = source.spec, source.title
        self.names = tuple(source.names[row] for row in rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._source[self._rows[index]]

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def _joined(answers: Sequence[RungOutputs]) -> RungOutputs:
    fields = {}
    for name in ("embedding", "cls_layers", "logits"):
        values = [getattr(answer, name) for answer in answers]
        fields[name] = None if values[0] is None else np.concatenate(values)
    return RungOutputs(**fields)  # type: ignore[arg-type]


def _to_arrays(found: GraphOutputs) -> dict[str, NDArray[Any]]:
    outputs = {name: getattr(found.outputs, name) for name in ("embedding", "cls_layers", "logits")}
    texts = {name: np.array(getattr(found, name)) for name in ("names", "hashes", "groups")}
    kept = {name: values for name, values in outputs.items() if values is not None}
    return {**kept, **texts, "labels": found.labels, "rows": found.rows, "looks": found.looks}


def _from_arrays(arrays: dict[str, NDArray[Any]]) -> GraphOutputs:
    outputs = RungOutputs(arrays["embedding"], arrays.get("cls_layers"), arrays.get("logits"))
    names, hashes, groups = (tuple(arrays[n].tolist()) for n in ("names", "hashes", "groups"))
    looks, labels = arrays["looks"], arrays["labels"]
    return GraphOutputs(arrays["rows"], outputs, names, hashes, looks, labels, groups)
