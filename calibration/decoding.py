"""Decode the next batch of images in threads while the rungs run on this one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bundle.prints import Looks, look_of, no_looks
from imaging import ImageError, Preprocessing, decode, pixels_sha256

from .source import ImageSource

THREADS = min(8, os.cpu_count() or 1)  # each may hold a photograph of 50 megapixels


@dataclass(frozen=True)
class DecodedImage:
    """An image as the rungs take it.

    Attributes:
        name: unique within its source.
        group: images of one group stay in one split.
        label: the class name, or None.
        sha256: of the decoded pixels, `imaging.pixels_sha256`.
        look: what finds it again re-encoded, resized or mirrored, `bundle.prints.look_of`; of an
            independent draw none.
        tensor: FP32 (3, H, W).
    """

    name: str
    group: str
    label: str | None
    sha256: str
    look: Looks
    tensor: NDArray[np.float32]


def decode_ahead(
    source: ImageSource, batches: Iterable[Sequence[int]], preprocessing: Preprocessing
) -> Generator[tuple[list[DecodedImage], list[str]], None, None]:
    """Yield each batch's images, and a line for each that cannot be read, in order.

    Not more than one batch is decoded ahead of the one yielded. Close the generator to stop.
    """
    ahead: deque[list[Future[DecodedImage | str]]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        for batch in batches:
            ahead.append([pool.submit(_read, source, index, preprocessing) for index in batch])
            if len(ahead) > 1:
                yield _results(ahead.popleft())
        while ahead:
            yield _results(ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _results(batch: list[Future[DecodedImage | str]]) -> tuple[list[DecodedImage], list[str]]:
    found = [future.result() for future in batch]
    images = [item for item in found if isinstance(item, DecodedImage)]
    return images, [item for item in found if isinstance(item, str)]


def _read(source: ImageSource, index: int, preprocessing: Preprocessing) -> DecodedImage | str:
    try:
        image = source[index]
        decoded = decode(image.data)
        tensor = preprocessing(decoded)
    except ImageError as error:
        name = source.names[index]
        return f"{name if name.isprintable() else ascii(name)}: {error}"
    sha256 = pixels_sha256(decoded)
    look = no_looks(1)[0] if image.independent else look_of(decoded)
    return DecodedImage(image.name, image.group, image.label, sha256, look, tensor)
