"""What the full model answers for views of images, kept on disk for every recipe that is adapted.

A view is an image as it is served (number 0), or a square crop of at least half its shorter edge,
flipped or not, that is drawn by a generator seeded with the image's bytes, the seed and the number.
Views and answers lie in one SQLite file for each full model, some 0.2 MB a view at 224 px: what is
there is neither drawn nor answered again, whatever else is adapted, and memory holds one batch.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bundle.prints import Looks, look_of, looks_sha256, no_looks
from bundle.recipe import Recipe
from calibration.chunks import Pictures
from calibration.images import ImageSource
from client.files import shown
from export.backbones import Backbone
from imaging import ImageError, Preprocessing, code_sha256, decode, pixels_sha256
from report.terminal import Bars

from .device import Device
from .patches import Patches
from .request import AdaptationError

BATCH = 16
LEAST_SIDE = 0.5  # of the shorter edge
MAX_UNREADABLE = 0.05  # above this share something is wrong with the folder, not with a file
THREADS = 2
_SCHEMA = """
create table if not exists view (
  image blob, seed integer, number integer, sha256 text, look blob,
  planes blob, embedding blob, layers blob, patches blob, logits blob,
  primary key (image, seed, number)
)
"""


class View(NamedTuple):
    """One view of one image.

    Attributes:
        image: SHA-256 of the bytes of its file.
        number: 0 is the image as it is served.
    """

    image: bytes
    number: int


class Batch(NamedTuple):
    """Views, and what the full model answers for them.

    Attributes:
        image: FP32 (B, 3, H, W), normalised.
        embedding: FP32 (B, D).
        cls_layers: FP32 (B, L + 1, W).
        patches: FP32 (B, S, S, W), normalised, averaged to a grid of S x S; S is 0 where the full
            model halts tokens.
        logits: FP32 (B, C); None: there is no head.
    """

    image: torch.Tensor
    embedding: torch.Tensor
    cls_layers: torch.Tensor
    patches: torch.Tensor
    logits: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Images:
    """The images that can be read.

    Attributes:
        pictures: their names, groups and prints.
        keys: SHA-256 of the bytes of each file.
    """

    pictures: Pictures
    keys: tuple[bytes, ...]


@dataclass(frozen=True, eq=False)
class _Read:
    row: int
    name: str
    group: str
    key: bytes
    sha256: str
    look: Looks
    independent: bool  # nothing that looks alike is a copy of it
    planes: NDArray[np.uint8] | None  # None: its answer is there


def _looks(reads: Sequence[_Read]) -> Looks:
    """What is like what: an image of which nothing else is a copy has an empty look."""
    looks = no_looks(len(reads))
    for row, read in enumerate(reads):
        if not read.independent:
            looks[row] = read.look
    return looks


class Teacher:
    """The full model, and the file of its answers.

    Attributes:
        file: where they lie.

    Args:
        backbone: the model, with its head.
        px: its resolution.
        folder: of such files.
        seed: of the views.
        device: runs it.
        batch: images that it answers at once, but for more than `BATCH`.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        backbone: Backbone,
        px: int,
        folder: Path,
        seed: int,
        device: Device,
        batch: int = BATCH,
    ) -> None:
        self._module = device.take(backbone.rung(Recipe(px)))
        head = backbone.linear_head
        self._head = None if head is None else device.take(head).requires_grad_(False)
        self._preprocessing = backbone.preprocessing(px)
        self._width, self._px = backbone.layer_dim, px
        self._patches = Patches(self._module.model, px)
        side = -(-self._patches.side // 2)  # cheap graphs see half of the full resolution, or less
        # A model that halts tokens has none at its end for every patch, and so no grid.
        side = side if backbone.gate is None else 0
        self._grid = (side, side, backbone.layer_dim)
        self._seed, self._device, self._batch = seed, device, min(batch, BATCH)
        content = {
            "weights": backbone.weights_sha256,
            "head": None if backbone.aligns else backbone.source,
            "px": px,
            "preprocessing": self._preprocessing.to_dict(),
            "imaging": code_sha256(),
            "looks": looks_sha256(),
            "views": [LEAST_SIDE, self._grid],
            **({"patches": "layer_norm"} if self._patches.bare else {}),
        }
        text = json.dumps(content, sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.sqlite"
        with self._open() as database:
            database.execute(_SCHEMA)

    def read_images(self, source: ImageSource, rows: Sequence[int], bars: Bars) -> Images:
        """Let the model answer for every image as it is served.

        Args:
            source: of the images.
            rows: places of those that may be used.
            bars: where to show progress, and what cannot be read.

        Raises:
            AdaptationError: too many images cannot be read, or the disk is full.
        """
        found: list[_Read] = []
        lines: list[str] = []
        with bars.stage(f"the full model answers {len(rows):,} images", len(rows)) as bar:
            for batch in self._ahead(source, rows, 0):
                lines += [read for read in batch if isinstance(read, str)]
                reads = [read for read in batch if not isinstance(read, str)]
                self._keep(reads, 0)
                found += [replace(read, planes=None) for read in reads]
                bar.advance(len(batch))
        for line in lines:
            bars.say(f"left out: {line}")
        if len(lines) > MAX_UNREADABLE * len(rows):
            raise AdaptationError(
                f"{len(lines)} of {len(rows)} images cannot be read, as {lines[0]}"
            )
        pictures = Pictures(
            places=np.array([read.row for read in found], np.int64),
            names=tuple(read.name for read in found),
            groups=tuple(read.group for read in found),
            labels=np.full(len(found), -1, np.int64),
            hashes=tuple(read.sha256 for read in found),
            looks=_looks(found),
        )
        return Images(pictures, tuple(read.key for read in found))

    def answer(
        self, source: ImageSource, images: Images, rows: Sequence[int], views: int, bars: Bars
    ) -> None:
        """Let the model answer for crops of some of the images.

        Args:
            source: of the images.
            images: those that can be read.
            rows: which of them.
            views: of each, the image itself among them, which has been answered.
            bars: where to show progress.

        Raises:
            AdaptationError: the disk is full, or images changed meanwhile.
        """
        total = len(rows) * (views - 1)
        with bars.stage(f"the full model answers {total:,} crops of them", total) as bar:
            for number in range(1, views):
                known = self._known(number)
                missing = [row for row in rows if images.keys[row] not in known]
                bar.advance(len(rows) - len(missing))
                keys = {int(images.pictures.places[row]): images.keys[row] for row in missing}
                for batch in self._ahead(source, list(keys), number):
                    reads = [read for read in batch if not isinstance(read, str)]
                    if len(reads) < len(batch) or any(keys[read.row] != read.key for read in reads):
                        raise AdaptationError("images changed while they were read; begin again")
                    self._keep(reads, number)
                    bar.advance(len(batch))

    def batch(self, views: Sequence[View]) -> Batch:
        """The views and their answers, on the device.

        Raises:
            AdaptationError: the file has lost one.
        """
        rows = []
        with self._open() as database:
            for image, number in views:
                row = database.execute(
                    "select planes, embedding, layers, patches, logits from view "
                    "where image = ? and seed = ? and number = ?",
                    (image, self._seed if number else 0, number),
                ).fetchone()
                if row is None:
                    raise AdaptationError(f"{self.file} has lost answers; remove it, begin again")
                rows.append(row)
        planes, embedding, layers, patches, logits = zip(*rows, strict=True)
        side, put = self._px, self._device.put
        there = put(_stacked(embedding, np.float32, (-1,)))
        answered = None if logits[0] is None else put(_stacked(logits, np.float32, (-1,)))
        return Batch(
            put(_normalised(_stacked(planes, np.uint8, (3, side, side)), self._preprocessing)),
            there,
            put(_stacked(layers, np.float16, (-1, self._width)).astype(np.float32)),
            put(_stacked(patches, np.float16, self._grid).astype(np.float32)),
            answered if self._head is None else self._head(there),
        )

    def _ahead(
        self, source: ImageSource, rows: Sequence[int], number: int
    ) -> Iterator[list[_Read | str]]:
        """Read views in batches, or the line that says why one cannot be, one batch ahead."""
        known = self._known(number)
        with ThreadPoolExecutor(THREADS) as pool:
            ahead: deque[list[Future[_Read | str]]] = deque()
            for start in range(0, len(rows), self._batch):
                batch = rows[start : start + self._batch]
                ahead.append([pool.submit(self._read, source, row, number, known) for row in batch])
                if len(ahead) > 1:
                    yield [future.result() for future in ahead.popleft()]
            while ahead:
                yield [future.result() for future in ahead.popleft()]

    def _read(
        self, source: ImageSource, row: int, number: int, known: Mapping[bytes, tuple[str, bytes]]
    ) -> _Read | str:
        try:
            image = source[row]
            key = hashlib.sha256(image.data).digest()
            if key in known:
                sha256, kept = known[key]
                look = np.frombuffer(kept, np.uint8)
                who = row, image.name, image.group, key, sha256
                return _Read(*who, look, image.independent, None)
            decoded = decode(image.data)
            view = drawn(decoded, key, self._seed, number)
            planes = _planes(self._preprocessing(view.picture), self._preprocessing)
        except ImageError as error:
            return f"{shown(source.names[row])}: {error}"
        planes = planes[:, :, ::-1] if view.flipped else planes
        who = row, image.name, image.group, key, pixels_sha256(decoded)
        return _Read(*who, look_of(decoded), image.independent, planes)

    def _keep(self, reads: Sequence[_Read], number: int) -> None:
        """Let the model answer for the views that are new, and keep them."""
        new = [read for read in reads if read.planes is not None]
        if not new:
            return
        planes = np.stack([read.planes for read in new if read.planes is not None])
        try:
            with torch.inference_mode():
                image = self._device.put(_normalised(planes, self._preprocessing))
                answers = self._module(image)
                grid = self._patches.take(self._grid[0])
            if grid is None:
                grid = torch.zeros(len(new), *self._grid)
            patches = grid.cpu().numpy().astype(np.float16)
        except torch.cuda.OutOfMemoryError:
            raise AdaptationError(
                f"the GPU has no room for the full model with {len(new)} images; free its memory, "
                f"or give --batch {max(1, len(new) // 2)}"
            ) from None
        embedding, layers, *logits = (answer.float().cpu().numpy() for answer in answers)
        if not (finite := np.isfinite(embedding).all(axis=1)).all():
            name = shown(new[int(np.argmin(finite))].name)
            raise AdaptationError(f"the full model's answer for {name} is no number; leave it out")
        kept = None if self._head is not None or not logits else logits[0]
        values = [
            (
                *(read.key, self._seed if number else 0, number, read.sha256, read.look.tobytes()),
                *(planes[row].tobytes(), embedding[row].tobytes()),
                *(layers[row].astype(np.float16).tobytes(), patches[row].tobytes()),
                None if kept is None else kept[row].tobytes(),
            )
            for row, read in enumerate(new)
        ]
        with self._open() as database:
            database.executemany("insert or replace into view values (?,?,?,?,?,?,?,?,?,?)", values)

    def _known(self, number: int) -> dict[bytes, tuple[str, bytes]]:
        """The images of which this view is there, with their hashes and looks."""
        with self._open() as database:
            found = database.execute(
                "select image, sha256, look from view where seed = ? and number = ?",
                (self._seed if number else 0, number),
            )
            return {image: (sha256, look) for image, sha256, look in found}

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The file, changes to it kept together.

        Raises:
            AdaptationError: it cannot be written or read.
        """
        try:
            with closing(sqlite3.connect(self.file, timeout=60)) as database, database:
                yield database
        except sqlite3.Error as error:
            raise AdaptationError(
                f"{self.file}: {error}; see that there is room, or remove it and begin again"
            ) from None


class Drawn(NamedTuple):
    """The picture of a view, still to be flipped where it is."""

    picture: Image.Image
    flipped: bool


def drawn(image: Image.Image, key: bytes, seed: int, number: int) -> Drawn:
    """A view of an image; number 0 is the image itself.

    Args:
        image: mode RGB.
        key: SHA-256 of its file's bytes.
        seed: of all views.
        number: of this one.
    """
    if number == 0:
        return Drawn(image, False)
    rng = np.random.default_rng([seed, number, *np.frombuffer(key, np.uint32).tolist()])
    side = max(1, round(rng.uniform(LEAST_SIDE, 1) * min(image.size)))
    left = int(rng.integers(image.width - side + 1))
    top = int(rng.integers(image.height - side + 1))
    return Drawn(image.crop((left, top, left + side, top + side)), bool(rng.integers(2)))


def _planes(tensor: NDArray[np.float32], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The grey levels (3, H, W) that a tensor was made of."""
    mean, std = _channels(preprocessing)
    return np.asarray(np.rint((tensor + mean / std) * (255 * std)), np.uint8)


def _normalised(planes: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """What `Preprocessing` makes of grey levels (B, 3, H, W), to the last bit."""
    mean, std = _channels(preprocessing)
    tensor = planes.astype(np.float32)
    tensor *= 1.0 / (255.0 * std)
    tensor -= mean / std
    return tensor


def _channels(preprocessing: Preprocessing) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    mean, std = (
        np.asarray(values, np.float32)[:, np.newaxis, np.newaxis]
        for values in (preprocessing.mean, preprocessing.std)
    )
    return mean, std


def _stacked(blobs: Sequence[bytes], kind: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    if not all(shape):  # of no bytes there is no buffer
        return np.zeros((len(blobs), *shape), kind)
    return np.stack([np.frombuffer(blob, kind).reshape(shape) for blob in blobs])
