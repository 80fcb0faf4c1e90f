"""Disjoint splits that never divide a group and never share a picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from bundle.prints import find_copies, united

from .chunks import Pictures

Rows = NDArray[np.intp]

FIT_SHARE = 0.35  # of what a certificate takes; docs/performance.md, "How images are divided"
TEST_SHARE = 0.2  # where there are enough, or the user asks for a test split by naming its share
ABOUND = 5000  # groups from which on more of them would certify little more
UNCERTIFIED_TEST_SHARE = 0.3  # where no threshold is tested, nothing else is held out
GROUPINGS = ("source", "folder", "content")
MIN_GROUPS = 6  # of each split: what cross-validation in five folds, inside five folds, can do with


class SplitError(ValueError):
    """The images cannot be split as asked. One line that says what to do."""


def check_grouping(grouping: str) -> None:
    """Refuse what `group_keys` does not know.

    Raises:
        SplitError: naming those it knows.
    """
    if grouping not in GROUPINGS:
        raise SplitError(f"--group-by {grouping!r} is none of {', '.join(GROUPINGS)}")


def shares_of(
    groups: Collection[str], certified: bool = True, test: float | None = None
) -> dict[str, float]:
    """The share of the groups that each split gets.

    Args:
        groups: the group of each image.
        certified: whether a threshold is to be certified.
        test: the share of a split that decides nothing; None: `TEST_SHARE` where groups abound,
            else none, and what a test split would say is said by cross-fitted fit images.
    """
    if test is None:
        test = TEST_SHARE if len(set(groups)) >= ABOUND else 0.0
        test = test if certified else UNCERTIFIED_TEST_SHARE
    if not certified:
        return {"fit": 1 - test, "test": test} if test else {"fit": 1.0}
    shares = {"fit": FIT_SHARE * (1 - test), "certify": (1 - FIT_SHARE) * (1 - test)}
    return shares | {"test": test} if test else shares


def group_keys(outputs: Pictures, grouping: str) -> tuple[str, ...]:
    """Each image's group; images that are the same picture are always of one.

    The same picture is the same pixels, or these re-encoded, resized or mirrored.

    Args:
        outputs: hold the names, groups and prints of N images.
        grouping: `source`, as collected: one group for each file; `folder`, one for each folder of
            files, e.g. the frames of one video; `content`, one for each picture.

    Raises:
        SplitError: another grouping.
    """
    check_grouping(grouping)
    keys = outputs.hashes
    if grouping == "source":
        keys = outputs.groups
    elif grouping == "folder":
        keys = tuple(name.rpartition("/")[0] for name in outputs.names)
    copies = find_copies(outputs.hashes, outputs.looks)
    if not len(copies):
        return keys
    groups = united(keys, copies.picture)
    first = dict(zip(reversed(groups.tolist()), reversed(keys), strict=True))
    return tuple(first[group] for group in groups.tolist())  # called as its first image's


def with_groups(chosen: NDArray[np.bool_], pictures: Pictures, grouping: str) -> NDArray[np.bool_]:
    """Which of N images are chosen, or of the group of one that is; see `group_keys`."""
    if not chosen.any():
        return chosen
    groups = np.array(group_keys(pictures, grouping))
    return np.isin(groups, groups[chosen])


def split_by_group(
    groups: tuple[str, ...],
    shares: Mapping[str, float],
    seed: int,
    first: Collection[str] = (),
) -> dict[str, Rows]:
    """Row indices of each split; a group is never divided.

    Groups are shuffled and each split gets its share of them, whatever their sizes: cutting by
    images would favour large groups at the edges.

    Args:
        groups: the group of each image.
        shares: the share of the groups that each split gets.
        seed: draws the shuffle.
        first: groups that all go to the first split, whatever its share.

    Raises:
        SplitError: a split would have fewer than `MIN_GROUPS` groups.
    """
    names, inverse = np.unique(np.array(groups), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    if first:
        order = np.argsort(np.lexsort((order, ~np.isin(names, list(first)))))
    rank = order[inverse]  # of each image's group
    splits: dict[str, Rows] = {}
    start, share = 0, 0.0
    for name, fraction in shares.items():
        share += fraction
        stop = max(round(min(share, 1.0) * len(names)), len(first))
        splits[name] = np.flatnonzero((start <= rank) & (rank < stop))
        if stop - start < MIN_GROUPS:
            raise SplitError(
                f"{len(names)} groups are too few: split {name!r} gets {stop - start} of them, "
                f"{MIN_GROUPS} are needed; collect more images, or use another --group-by"
            )
        start = stop
    return splits
