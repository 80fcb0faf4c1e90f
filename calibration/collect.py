"""Run both rungs over images once and keep what calibration needs.

They run here with ONNX Runtime, or where they are served: int8 answers depend on the runtime. A
server must answer as the local graphs do, before the first image and after the last one.

A long run survives being stopped: its rows are written in parts of 256 images, and a rerun with the
same rungs, images and libraries continues after the parts that are whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import PIL
from numpy.typing import NDArray

from bundle.graphs import GraphsError, GraphSet
from bundle.prints import LOOK_BYTES, looks_sha256
from imaging import Preprocessing, code_sha256
from routing import RUNGS, RungOutputs

from .outputs import OutputsError, row_arrays, scalar_arrays
from .parts import Parts
from .running import DecodedImage, decode_ahead, local_runtime, open_session, run_session
from .served import (
    PROBES,
    Answers,
    ServedError,
    ServedRungs,
    check_answers,
    remembered,
    same_server,
)
from .source import ImagesError, ImageSource

BATCH = 16
PART = 256  # images, a multiple of the batch: what stopping may cost
MAX_UNREADABLE = 0.05  # above this share something is wrong with the folder, not with a file

Graphs = Mapping[str, Callable[[NDArray[np.float32]], RungOutputs]]
Progress = Callable[[int, bool], None]


def collect(
    rung_set: GraphSet,
    source: ImageSource,
    out: Path,
    progress: Progress = lambda count, resumed: None,
    served: ServedRungs | None = None,
) -> list[str]:
    """Run both rungs over images and write their outputs to a file.

    While the rungs run on one batch, the next is decoded. Whatever N, memory holds at most four
    batches of tensors, one photograph being decoded in each of up to 8 threads, and two parts'
    rows; only the names grow with N. While the parts are joined the disk
    holds the outputs twice.

    Args:
        rung_set: the exported pair.
        source: of the N images.
        out: the `.npz` to write; the parts lie in a folder beside it until it is written.
        progress: called with a number of images that are done, and whether an earlier run did
            them; the numbers add up to N.
        served: asks the rungs of a server; None: they run here, with ONNX Runtime. A reference that
            is another graph than the full rung is not served and always runs here.

    Returns:
        A line for each image that could not be read, or on which a rung overflows.

    Raises:
        ImagesError: no image, or more than 5 % unreadable; raised once that is certain. The parts
            stay; a rerun reads again those with unreadable images.
        OutputsError: `out` cannot be written.
        GraphsError: an ONNX file is not the one that was exported.
        ServedError: the server does not answer, serves other rungs, or others than before.
    """
    if not len(source):
        raise ImagesError("there is no image to run the rungs on")
    hashes = _check_files(rung_set)
    at_server = {} if served is None else served.graphs()
    sessions = {
        name: open_session(graph.file)
        for name, graph in rung_set.playing().items()
        if name not in at_server
    }
    graphs = {**at_server, **{name: _local(name, session) for name, session in sessions.items()}}
    runtime = local_runtime() if served is None else served.runtime
    preprocessing = Preprocessing.from_dict(rung_set.preprocessing)
    folder = out.with_name(f"{out.name}.parts")
    probe = None if served is None else _probe(source, preprocessing)
    answers = None
    if served is not None and probe is not None:
        answers = check_answers(served, rung_set, probe)
    _make_folder(out, folder)
    if answers is not None:
        answers = remembered(folder / "answers.npz", answers)
    asked = [None if served is None else served.url, runtime, _answers_sha256(answers)]
    parts = Parts(folder, _identity(rung_set, source, sessions, asked))
    ranges = _pieces(range(len(source)), PART)
    unreadable = _resume(parts, ranges)
    for index in unreadable:
        progress(len(ranges[index]), True)
    todo = {index: rows for index, rows in enumerate(ranges) if index not in unreadable}
    batches = [batch for rows in todo.values() for batch in _pieces(rows, BATCH)]
    with closing(decode_ahead(source, batches, preprocessing)) as decoded:
        for index, rows in todo.items():
            done: list[dict[str, NDArray[Any]]] = []
            lines: list[str] = []
            for batch in _pieces(rows, BATCH):
                images, failed = next(decoded)
                lines += failed
                if images:
                    found, overflown = _run(graphs, images, rung_set.labels)
                    done.append(found)
                    lines += overflown
                if batch[-1] == rows[-1]:
                    parts.write(index, _concatenate(done), lines)
                progress(len(batch), False)
            unreadable[index] = lines
            _check_readable(unreadable, len(source))
    if served is not None and probe is not None and answers is not None:
        now = {name: graph(probe) for name, graph in at_server.items()}
        if not same_server(now, answers):
            raise ServedError(
                f"the server at {served.url} answers otherwise than when it was first asked: "
                "another model was deployed meanwhile; collect again"
            )
    preprocessing_sha256 = rung_set.preprocessing_sha256()
    parts.join(
        out,
        scalar_arrays(
            hashes,
            preprocessing_sha256,
            code_sha256(),
            source.spec,
            source.title,
            rung_set.task,
            runtime,
        ),
    )
    parts.remove()
    return [line for index in range(len(ranges)) for line in unreadable[index]]


def _local(
    name: str, session: ort.InferenceSession
) -> Callable[[NDArray[np.float32]], RungOutputs]:
    return lambda image: run_session(session, image, layers=name == "vit_low")


def _check_files(rung_set: GraphSet) -> dict[str, str]:
    """The graphs' fingerprints; the files must be those in graphs.json."""
    for graph in rung_set.playing().values():
        if (fault := graph.fault()) is not None:
            raise GraphsError(f"{graph.file.parent}: {fault}; run python -m export rungs again")
    return rung_set.fingerprints()


def _identity(
    rung_set: GraphSet,
    source: ImageSource,
    sessions: Mapping[str, ort.InferenceSession],
    asked: Sequence[Any],
) -> str:
    """SHA-256 over everything that decides what the parts hold."""
    content = {
        "rungs": rung_set.fingerprints(),
        "source": source.fingerprint(),
        "preprocessing": rung_set.preprocessing_sha256(),
        "imaging": code_sha256(),
        "looks": looks_sha256(),
        "labels": rung_set.labels,
        "sizes": [BATCH, PART],
        "providers": {name: session.get_providers() for name, session in sessions.items()},
        "versions": [np.__version__, ort.__version__, PIL.__version__],
        "asked": asked,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _probe(source: ImageSource, preprocessing: Preprocessing) -> NDArray[np.float32] | None:
    """The first images that can be read, FP32 (B, 3, H, W); None where none can."""
    tensors: list[NDArray[np.float32]] = []
    with closing(decode_ahead(source, ([i] for i in range(len(source))), preprocessing)) as decoded:
        for images, _ in decoded:
            tensors += [image.tensor for image in images]
            if len(tensors) == PROBES:
                break
    return np.stack(tensors) if tensors else None


def _answers_sha256(answers: Answers | None) -> str | None:
    """Of what `remembered` returns, which is the same for each run that one server answers."""
    if answers is None:
        return None
    digest = hashlib.sha256()
    for name in RUNGS:
        for values in (answers[name].embedding, answers[name].logits):
            digest.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _make_folder(out: Path, folder: Path) -> None:
    try:
        if out.is_dir():
            raise OutputsError(f"{out} is a folder; name a file to write")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputsError(
            f"cannot write {folder}: {error.strerror}; choose another --out"
        ) from None


def _pieces(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _resume(parts: Parts, ranges: Sequence[range]) -> dict[int, list[str]]:
    """The unreadable images' lines of each part that need not be made again."""
    found = {index: parts.find(index) for index in range(len(ranges))}
    whole = {index: lines for index, lines in found.items() if lines is not None}
    if _too_many(whole, sum(map(len, ranges))):  # that stopped the earlier run; it may be mended
        whole = {index: lines for index, lines in whole.items() if not lines}
    return whole


def _too_many(unreadable: Mapping[int, Sequence[str]], total: int) -> bool:
    return sum(map(len, unreadable.values())) > MAX_UNREADABLE * total


def _check_readable(unreadable: Mapping[int, Sequence[str]], total: int) -> None:
    if _too_many(unreadable, total):
        lines = [line for index in sorted(unreadable) for line in unreadable[index]]
        raise ImagesError(
            f"{len(lines)} of {total} images could not be read, more than {MAX_UNREADABLE:.0%}; "
            f"first: {lines[0]}; mend or remove them and collect again"
        )


def _run(
    graphs: Graphs, images: Sequence[DecodedImage], labels: tuple[str, ...] | None
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """A batch's rows, and a line for each image on which a rung overflows."""
    image = np.stack([item.tensor for item in images])  # (B, 3, H, W)
    answers = {name.removeprefix("vit_"): graph(image) for name, graph in graphs.items()}
    finite = np.logical_and.reduce([outputs.finite() for outputs in answers.values()])
    lines = [f"{images[i].name}: a rung answers with NaN or Inf" for i in np.flatnonzero(~finite)]
    kept = [item for item, sound in zip(images, finite, strict=True) if sound]
    index = {label: i for i, label in enumerate(labels or ())}
    rows = row_arrays(
        {name: outputs.rows(np.flatnonzero(finite)) for name, outputs in answers.items()},
        labels=np.array([index.get(item.label or "", -1) for item in kept], dtype=np.int64),
        names=[item.name for item in kept],
        groups=[item.group for item in kept],
        hashes=[item.sha256 for item in kept],
        looks=np.array([item.look for item in kept]).reshape(len(kept), LOOK_BYTES),
    )
    return rows, lines


def _concatenate(batches: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    names = batches[0] if batches else ()
    return {name: np.concatenate([batch[name] for batch in batches]) for name in names}
