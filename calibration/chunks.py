"""The files of the cache of answers: each holds pictures, or one graph's answers for them.

    FOLDER/HASH/FIRST ROW-COUNT-HASH OF THE ROWS.npz

A folder of pictures has the arrays `rows`, `names`, `groups`, `labels` (class names; empty where
none is known), `hashes`, `looks`, and `unreadable_rows` with the lines `unreadable`. A folder of
answers has `rows`, `embedding`, and, where there are such, `cls_layers` and `logits`. A row is the
place of an image in its source. A file that is torn counts as missing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bundle.prints import LOOK_BYTES, Looks, no_looks
from routing import RungOutputs

from .running import DecodedImage

Arrays = Mapping[str, NDArray[Any]]
Some = TypeVar("Some", bound="Pictures")
_OUTPUTS = ("embedding", "cls_layers", "logits")
_TEXTS = ("names", "groups", "labels", "hashes")
_PICTURES = ("rows", *_TEXTS, "looks")


class MissingAnswersError(ValueError):
    """Answers that are asked for are not kept. One line."""


class NpzError(ValueError):
    """A file is torn or is no `.npz`. A few words that say how."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """What n images are.

    Attributes:
        places: of the images in their source, INT64 (n,).
        names: of the images, unique within the source.
        groups: images of one group stay in one split.
        labels: class indices, or -1 where none is known, INT64 (n,).
        hashes: `imaging.pixels_sha256` of each image.
        looks: `bundle.prints.look_of` each image, UINT8 (n, 29).
    """

    places: NDArray[np.int64]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    labels: NDArray[np.int64]
    hashes: tuple[str, ...]
    looks: Looks

    def __len__(self) -> int:
        return len(self.names)

    def only(self: Some, index: NDArray[np.intp]) -> Some:
        """Some of the images, in the order of `index`."""
        names, groups, hashes = (
            tuple(texts[i] for i in index) for texts in (self.names, self.groups, self.hashes)
        )
        return replace(
            self,
            places=self.places[index],
            names=names,
            groups=groups,
            labels=self.labels[index],
            hashes=hashes,
            looks=self.looks[index],
        )


@dataclass(frozen=True, eq=False)
class Answered:
    """n images, and what each graph answers for them, by the name of the graph."""

    pictures: Pictures
    outputs: Mapping[str, RungOutputs]

    def only(self, index: NDArray[np.intp]) -> Answered:
        """The answers for some of the images, in the order of `index`."""
        outputs = {name: found.rows(index) for name, found in self.outputs.items()}
        return Answered(self.pictures.only(index), outputs)


def read_answers(
    folder: Path,
    pictures: str,
    answers: Mapping[str, tuple[str, bool]],
    rows: Sequence[int],
    labels: Sequence[str] | None,
) -> Answered:
    """Read what `AnswerCache.fill` keeps, without the images themselves.

    Args:
        folder: holds the cache.
        pictures: the name of the folder of the pictures.
        answers: for each graph the name of the folder of its answers, and whether its `cls_layers`
            is wanted.
        rows: the places of the images in their source.
        labels: the class names, whose order makes indices of labels; None: there are no classes.

    Returns:
        The images that can be read and that every graph has answered with numbers.

    Raises:
        MissingAnswersError: for some of the rows there is neither a picture nor a line that says
            why, or no answer.
    """
    places = {row: place for place, row in enumerate(rows)}
    known, sound = np.zeros(len(rows), np.bool_), np.zeros(len(rows), np.bool_)
    texts = {name: np.full(len(rows), "", np.object_) for name in _TEXTS}
    looks = no_looks(len(rows))
    for _, arrays in chunks(folder / pictures):
        inside, at = _places(arrays["rows"], places)
        for name in _TEXTS:
            texts[name][at] = arrays[name][inside]
        looks[at] = arrays["looks"][inside]
        known[at] = sound[at] = True
        known[_places(arrays["unreadable_rows"], places)[1]] = True
    nobody = ~sound  # answers images that cannot be read
    outputs: dict[str, dict[str, NDArray[np.float32]]] = {name: {} for name in answers}
    for graph, (key, layers) in answers.items():
        answered, finite = nobody.copy(), np.zeros(len(rows), np.bool_)
        for _, arrays in chunks(folder / key, layers):
            inside, at = _places(arrays["rows"], places)
            found = rung_outputs(arrays, layers)
            for name in _OUTPUTS:
                if (values := getattr(found, name)) is not None:
                    whole = outputs[graph].setdefault(
                        name, np.empty((len(rows), *values.shape[1:]), values.dtype)
                    )
                    whole[at] = values[inside]
            answered[at], finite[at] = True, found.finite()[inside]
        known &= answered
        sound &= finite
    if not known.all() or not sound.any():
        raise MissingAnswersError(
            f"{folder} lacks answers for {int((~known).sum())} of {len(rows)} images; collect again"
        )
    index = {label: i for i, label in enumerate(labels or ())}
    classes = np.array([index.get(label, -1) for label in texts["labels"]], dtype=np.int64)
    names, groups, hashes = (tuple(texts[name]) for name in ("names", "groups", "hashes"))
    everything = Answered(
        Pictures(np.array(rows, np.int64), names, groups, classes, hashes, looks),
        {
            graph: RungOutputs(arrays["embedding"], arrays.get("cls_layers"), arrays.get("logits"))
            for graph, arrays in outputs.items()
        },
    )
    return everything if sound.all() else everything.only(np.flatnonzero(sound))


def write_chunk(folder: Path, parts: Sequence[Arrays]) -> None:
    """Write what was found of some rows into one file of a folder; nothing where nothing was.

    Each part is as `picture_arrays` or `answer_arrays` gives it.
    """
    if not parts:
        return
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rows = np.sort(
        np.concatenate([arrays["rows"], arrays.get("unreadable_rows", np.zeros(0, np.int64))])
    )
    digest = hashlib.sha256(rows.tobytes()).hexdigest()[:8]
    save_npz(folder / f"{rows[0]}-{len(rows)}-{digest}.npz", arrays)


def picture_arrays(found: Mapping[int, DecodedImage | str]) -> Arrays:
    """What is kept of images, given by row, or of the lines that say why one cannot be read."""
    images = {row: item for row, item in found.items() if isinstance(item, DecodedImage)}
    lines = {row: item for row, item in found.items() if isinstance(item, str)}
    kept = images.values()
    return {
        "rows": np.array(list(images), np.int64),
        "names": np.array([item.name for item in kept], np.str_),
        "groups": np.array([item.group for item in kept], np.str_),
        "labels": np.array([item.label or "" for item in kept], np.str_),
        "hashes": np.array([item.sha256 for item in kept], np.str_),
        "looks": np.array([item.look for item in kept], np.uint8).reshape(len(images), LOOK_BYTES),
        "unreadable_rows": np.array(list(lines), np.int64),
        "unreadable": np.array(list(lines.values()), np.str_),
    }


def answer_arrays(rows: Sequence[int], outputs: RungOutputs) -> Arrays:
    """What `write_chunk` keeps of a graph's answers for the images in some rows."""
    found = {name: getattr(outputs, name) for name in _OUTPUTS}
    kept = {name: values for name, values in found.items() if values is not None}
    return {"rows": np.array(rows, np.int64), **kept}


def rung_outputs(arrays: Arrays, layers: bool) -> RungOutputs:
    """The answers that a file holds; without `layers`, its `cls_layers` is left out."""
    cls_layers = arrays.get("cls_layers") if layers else None
    return RungOutputs(arrays["embedding"], cls_layers, arrays.get("logits"))


def chunks(folder: Path, layers: bool = False) -> Iterator[tuple[Path, Arrays]]:
    """The whole files in a folder; with `layers`, only those that hold `cls_layers`."""
    for path in sorted(folder.glob("*-*-????????.npz")):
        try:
            arrays = load_npz(path)
        except (FileNotFoundError, NpzError):
            continue
        needed = _PICTURES if "names" in arrays else ("rows", "embedding", *["cls_layers"] * layers)
        lengths = {arrays[name].shape[:1] for name in (*_PICTURES, *_OUTPUTS) if name in arrays}
        if len(lengths) == 1 and () not in lengths and all(name in arrays for name in needed):
            yield path, arrays


def save_npz(path: Path, arrays: Arrays) -> None:
    """Write an uncompressed `.npz`, whole or not at all; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.npz")  # another process may write it too
    try:
        np.savez(partial, **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read every array of a `.npz` once and compare each with its checksum.

    Raises:
        FileNotFoundError: there is none.
        NpzError: it cannot be read to its end.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many types on damaged bytes
        words = " ".join(str(error).split())
        raise NpzError(f"{type(error).__name__}: {words}") from None


def _places(
    rows: NDArray[np.int64], places: Mapping[int, int]
) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Which of a file's rows are asked for, BOOL (rows,), and the place of each of those."""
    found = np.array([places.get(row, -1) for row in rows.tolist()], np.intp)
    return found >= 0, found[found >= 0]
