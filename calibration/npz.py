"""`.npz` files that appear whole or not at all, and joining many into one in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


class NpzError(ValueError):
    """The file is torn or is no `.npz`. A few words that say how."""


def save_npz(path: Path, arrays: Arrays) -> None:
    """Write a `.npz`, uncompressed."""
    partial = _partial(path)
    np.savez(partial, **arrays)
    partial.replace(path)


def load_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read every array of a `.npz`, once, and compare each with its checksum.

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


def join_npz(path: Path, parts: Sequence[Path], rows: Iterable[str], scalars: Arrays) -> None:
    """Write a `.npz` of the rows of all parts, one part's array in memory at a time.

    Args:
        path: the file to write, uncompressed.
        parts: whole files, each with every array of `rows`.
        rows: names of the arrays to join along their first axis. Strings get the longest's width.
        scalars: arrays to add.
    """
    partial = _partial(path)
    with ZipFile(partial, "w") as archive:
        for name in rows:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _join(member, parts, name)
        for name, array in scalars.items():
            with archive.open(f"{name}.npy", "w") as member:
                npy.write_array(member, array, allow_pickle=False)
    partial.replace(path)


def _join(member: Any, parts: Sequence[Path], name: str) -> None:
    headers = [_read_header(part, name) for part in parts]
    dtype = np.result_type(*(dtype for _, dtype in headers))
    count = sum(shape[0] for shape, _ in headers)
    header = {
        "descr": npy.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (count, *headers[0][0][1:]),
    }
    npy.write_array_header_1_0(member, header)
    for part in parts:
        with np.load(part, allow_pickle=False) as file:
            member.write(np.ascontiguousarray(file[name], dtype=dtype).tobytes())


def _read_header(part: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with ZipFile(part) as archive, archive.open(f"{name}.npy") as member:
        npy.read_magic(member)
        shape, _, dtype = npy.read_array_header_1_0(member)
    return shape, dtype


def _partial(path: Path) -> Path:
    """Beside `path`, where a file is written before it gets its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.partial.npz")
