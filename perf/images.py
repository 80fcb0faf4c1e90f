"""The images that are sent, and easy, hard and mixed sets of them, by the router's own scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from rich.console import Console

from bundle.graphs import GraphSet
from calibration.images import ImageSource, SourceImage, open_images
from client import GrpcClient
from client.files import shown
from imaging import ImageError, Preprocessing, decode
from report.terminal import Bar, Bars

from .figures import PerfError
from .systems import NEVER

SCORED_TOGETHER = 8
FEWEST = 4  # images of a set; fewer are no set
QUIET = Bars(Console(quiet=True))

Stage = Callable[[str, int], AbstractContextManager[Bar]]


@dataclass(frozen=True, eq=False)
class Pool:
    """N images as they are sent.

    Attributes:
        title: where they come from, in words.
        encoded: the files' bytes.
        tensors: FP32 (3, H, W) each.
        labels: class names, or None.
        unreadable: one line for each image that was left out.
        note: one line about files that are no images; empty where there are none.
    """

    title: str
    encoded: Sequence[bytes]
    tensors: Sequence[NDArray[np.float32]]
    labels: Sequence[str | None]
    unreadable: Sequence[str]
    note: str = ""

    def __len__(self) -> int:
        return len(self.encoded)


def readable(
    source: ImageSource, unreadable: list[str]
) -> Iterator[tuple[SourceImage, Image] | None]:
    """Read and decode the images one by one; None for each that cannot be.

    Args:
        source: the images.
        unreadable: is given one line for each image that is left out.

    Raises:
        PerfError: at the end, where not one image could be read.
    """
    for index, name in enumerate(source.names):
        try:
            image = source[index]
            found = image, decode(image.data)
        except ImageError as error:
            unreadable.append(f"{shown(name)}: {error}")
            yield None
        else:
            yield found
    if len(unreadable) == len(source):
        raise PerfError(f"none of the {len(source)} images can be read; first: {unreadable[0]}")


def load_pool(
    graphs: GraphSet, spec: str, limit: int, seed: int = 0, stage: Stage = QUIET.stage
) -> Pool:
    """Read and decode the images that `--images` names.

    Args:
        graphs: whose preprocessing makes tensors of them.
        spec: `sample` or a folder.
        limit: at most so many images.
        seed: of sample crops.
        stage: shows a bar, see `report.terminal.Bars.stage`.

    Raises:
        ImagesError: no such folder, or no image in it.
        PerfError: not one image can be read.
    """
    source = open_images(f"sample:{seed}" if spec == "sample" else spec, limit)
    with stage("read images", len(source)) as bar:
        pool = read_pool(source, Preprocessing.from_dict(graphs.preprocessing), bar.advance)
    return replace(pool, note=source.note)


def read_pool(
    source: ImageSource, preprocessing: Preprocessing, on_image: Callable[[], None]
) -> Pool:
    """Read and decode the images, calling `on_image` after each; see `load_pool`."""
    encoded, tensors, labels, unreadable = [], [], [], list[str]()
    for found in readable(source, unreadable):
        if found is not None:
            image, decoded = found
            tensors.append(preprocessing(decoded))
            encoded.append(image.data)
            labels.append(image.label)
        on_image()
    return Pool(source.title, encoded, tensors, labels, unreadable)


def choose_sets(
    escalated: NDArray[np.bool_], mixed: int, shares: int, size: int, seed: int = 0
) -> dict[str, list[int]]:
    """Choose the sets at random, the mixed one with about the pool's own escalation rate.

    Args:
        escalated: BOOL (N,), of the pool's images at the calibrated threshold.
        mixed: images of the mixed set, at most.
        shares: into which the mixed set will be cut. Each gets equally many images that escalate,
            at least one where there are enough: shares of different rates have costs that do not
            compare.
        size: images of the easy and the hard set, at most.
        seed: of the choice.

    Returns:
        Rows of the pool by set: `mixed` and, where there are `FEWEST` of them, `easy`, all kept
        low, and `hard`, all escalated.

    Raises:
        PerfError: too few images to measure.
    """
    rng = np.random.default_rng(seed)
    hard, easy = (rng.permutation(np.flatnonzero(side)) for side in (escalated, ~escalated))
    mixed = min(mixed, len(escalated))
    rate = len(hard) / len(escalated)
    per_share = max(min(1, len(hard)), round(mixed * rate / shares))
    hard_share = min(per_share * shares, len(hard), mixed)
    easy_share = min(mixed - hard_share, len(easy))
    rows = {"mixed": spread_evenly(easy[:easy_share].tolist(), hard[:hard_share].tolist())}
    for name, side in (("easy", easy), ("hard", hard)):
        if len(side) >= FEWEST:
            rows[name] = side[:size].tolist()
    if len(rows["mixed"]) < FEWEST:
        raise PerfError(f"{len(escalated)} images are too few to measure, {FEWEST} are needed")
    return rows


def sent_under_load(rows: Sequence[int], escalated: NDArray[np.bool_], size: int) -> list[int]:
    """At most `size` images of a set, as hard as the whole of it, one hard one where it has any."""
    size = min(size, len(rows))
    hard = [row for row in rows if escalated[row]]
    easy = [row for row in rows if not escalated[row]]
    count = max(min(1, len(hard)), round(size * len(hard) / len(rows)))
    return spread_evenly(easy[: size - count], hard[:count])


def spread_evenly(many: Sequence[int], few: Sequence[int]) -> list[int]:
    """Both in one list, the few spread evenly, so that every run of it has its share of them."""
    total = len(many) + len(few)
    if not few:
        return list(many)
    places = {int((index + 0.5) * total / len(few)) for index in range(len(few))}
    rest, sparse = iter(many), iter(few)
    return [next(sparse) if place in places else next(rest) for place in range(total)]


def score_pool(grpc_url: str, pool: Pool, advance: Callable[[int], None]) -> NDArray[np.float32]:
    """Scores of a pool's N images in oracle units, FP32 (N,); `advance` is told how many more.

    Raises:
        ClientError: the server did not answer as it should.
    """
    scores: list[float] = []
    with GrpcClient(grpc_url) as client:
        for start in range(0, len(pool), SCORED_TOGETHER):
            batch = np.stack(pool.tensors[start : start + SCORED_TOGETHER])
            # Nothing escalates: a score needs the cheap rung only.
            answers = client.infer_tensor(batch, threshold=float(NEVER))
            scores += [answer.score for answer in answers]
            advance(len(batch))
    return np.asarray(scores, dtype=np.float32)
