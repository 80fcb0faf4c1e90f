"""Weights that several graphs share, stored once beside them as ONNX external data.

Two resolutions of one model differ in their position table alone, so a second rung need not cost a
second copy on disk; and as ONNX Runtime maps external weights into memory, not in memory either,
where its prepacking is off.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from onnx import numpy_helper
from onnx.external_data_helper import set_external_data

from bundle import manifest
from bundle.graphs import Graph, GraphSet
from bundle.placing import folder_beside
from routing import WEIGHTS, RungRecord

# A mapping starts at a page; weights that start at one as well are mapped without a remainder.
ALIGNMENT = 4096
# Smaller tensors are shapes and scalars, which ONNX Runtime reads while it optimises the graph.
MIN_BYTES = 1024


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the store, in bytes."""

    offset: int
    length: int


def share_weights(
    files: Sequence[Path], store: Path, at_least_bytes: int = MIN_BYTES
) -> dict[Path, bool]:
    """Rewrite ONNX files so that the tensors which two or more of them hold lie in one store.

    Tensors are the same if their type, dimensions and bytes are, whatever their names. Files may
    refer to a store already, this one included: they are read whole and shared anew, so `files`
    has to name every graph that refers to `store`. Where nothing is shared, all files are
    self-contained and there is no store.

    Args:
        files: ONNX files in one folder, rewritten in place.
        store: file for the shared tensors, in the same folder.
        at_least_bytes: smaller tensors stay in their graphs.

    Returns:
        For each file whether it refers to the store.

    Raises:
        OSError: a file cannot be read or written.
    """
    shared = _shared_keys(files, at_least_bytes)
    with folder_beside(store) as folder:
        places = _write_store(files, shared, folder / store.name, at_least_bytes)
        refers = {
            file: _rewrite(file, folder / file.name, store.name, places, at_least_bytes)
            for file in files
        }
        # Until here all are read from what was there before, the old store among it.
        for file in files:
            os.replace(folder / file.name, file)
        if places:
            os.replace(folder / store.name, store)
        else:
            store.unlink(missing_ok=True)
    return refers


def _shared_keys(files: Sequence[Path], at_least_bytes: int) -> set[bytes]:
    counts: Counter[bytes] = Counter()
    for file in files:
        model = onnx.load(file)
        counts.update({key for _, key, _ in _large_tensors(model, at_least_bytes)})
    return {key for key, count in counts.items() if count > 1}


def _write_store(
    files: Sequence[Path], shared: set[bytes], store: Path, at_least_bytes: int
) -> dict[bytes, _Place]:
    """Write each shared tensor where it is met first, so that equal files give an equal store."""
    places: dict[bytes, _Place] = {}
    with store.open("wb") as target:
        for file in files:
            for _, key, content in _large_tensors(onnx.load(file), at_least_bytes):
                if key in shared and key not in places:
                    target.write(b"\0" * (-target.tell() % ALIGNMENT))
                    places[key] = _Place(target.tell(), len(content))
                    target.write(content)
    return places


def _rewrite(
    file: Path, target: Path, location: str, places: dict[bytes, _Place], at_least_bytes: int
) -> bool:
    """Write the graph anew to `target`; returns whether it refers to the store."""
    model = onnx.load(file)
    refers = False
    for tensor, key, content in _large_tensors(model, at_least_bytes):
        place = places.get(key)
        if place is not None:
            outside = onnx.TensorProto(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=content
            )
            set_external_data(outside, location, place.offset, place.length)
            outside.ClearField("raw_data")
            tensor.CopyFrom(outside)
            refers = True
    target.write_bytes(model.SerializeToString(deterministic=True))
    return refers


def _large_tensors(
    model: onnx.ModelProto, at_least_bytes: int
) -> Iterator[tuple[onnx.TensorProto, bytes, bytes]]:
    """Each initializer of at least a size, with its key and its bytes."""
    for tensor in model.graph.initializer:
        content = tensor.raw_data or numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
        if len(content) >= at_least_bytes:
            kind = f"{tensor.data_type} {list(tensor.dims)}".encode()
            yield tensor, hashlib.sha256(kind + b"\0" + content).digest(), content


def share(graphs: GraphSet, folder: Path) -> GraphSet:
    """Store once what graphs in a folder share; what each of them answers stays as it is.

    Args:
        graphs: whose files lie in `folder`, every graph there among them.
        folder: gets the shared weights, and the record anew.

    Returns:
        The graphs with the hashes of their new files.

    Raises:
        OSError: a file cannot be written.
    """
    weights = folder / WEIGHTS
    refers = share_weights([graph.file for graph in graphs.graphs.values()], weights)
    stored = (manifest.sha256_file(weights), weights.stat().st_size) if weights.exists() else None
    shared = {
        name: replace(graph, record=_stored(graph, stored if refers[graph.file] else None))
        for name, graph in graphs.graphs.items()
    }
    found = replace(graphs, graphs=shared)
    found.save(folder)
    return found


def _stored(graph: Graph, weights: tuple[str, int] | None) -> RungRecord:
    """The record of a graph's file as it lies there, with the hash and size of shared weights."""
    sha256, size = weights or (None, None)
    return replace(
        graph.record,
        sha256=manifest.sha256_file(graph.file),
        size_bytes=graph.file.stat().st_size,
        weights_sha256=sha256,
        weights_size_bytes=size,
    )
