"""The images that users send."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from functools import cache

from calibration.images import open_images
from imaging import ImageError, decode

from ..figures import PerfError

SAMPLE_SEED = 21  # crops that calibration's default seeds do not give

logger = logging.getLogger(__name__)


@cache
def image_round(spec: str, limit: int) -> Iterator[bytes]:
    """The images' encoded bytes, round and round.

    All users of a process take from one round, so that each image is sent equally often and the
    escalation rate is that of the images.

    Args:
        spec: a folder, `sample` or `sample:SEED`.
        limit: at most this many images. One that cannot be read is left out, which is logged.

    Raises:
        ImagesError: no such folder, or no image in it.
        PerfError: not one image can be read.
    """
    source = open_images(f"sample:{SAMPLE_SEED}" if spec == "sample" else spec, limit)
    images, unreadable = [], []
    for index, name in enumerate(source.names):
        try:
            data = source[index].data
            decode(data)
            images.append(data)
        except ImageError as error:
            unreadable.append(f"{ascii(name)[1:-1]}: {error}")
    if not images:
        raise PerfError(f"none of the {len(source)} images can be read; first: {unreadable[0]}")
    if unreadable:
        logger.warning(
            "left out %d of %d images; first: %s", len(unreadable), len(source), unreadable[0]
        )
    logger.info("sending %d images: %s", len(images), source.title)
    return itertools.cycle(images)
