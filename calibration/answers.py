"""What each graph answers for each image, kept in a folder from which every later run takes it.

Graphs run here with ONNX Runtime, or where they are served: int8 answers depend on the runtime.
Answers are kept under a hash of everything that decides them, so that none is ever out of date.
What is there is not run again: whoever was stopped continues with the file that was not finished,
and whoever asks for one graph more runs that graph only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from bundle.graphs import HIGH, LOW, Graph, GraphsError, GraphSet
from bundle.prints import looks_sha256
from client.files import shown
from imaging import Preprocessing, code_sha256
from routing import RungOutputs

from .chunks import (
    Answered,
    Arrays,
    Pictures,
    answer_arrays,
    chunks,
    picture_arrays,
    read_answers,
    rung_outputs,
    write_chunk,
)
from .images import ImagesError, ImageSource
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

BATCH = 16
CHUNK = 256  # images, a multiple of the batch: what stopping may cost
MAX_UNREADABLE = 0.05  # above this share something is wrong with the folder, not with a file

Run = Callable[[NDArray[np.float32]], RungOutputs]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Wanted:
    """A graph whose answers are wanted, and whether its `cls_layers` is wanted with them."""

    graph: Graph
    layers: bool = False


class AnswerCache:
    """The answers of one model's graphs for the images of one source.

    Args:
        folder: any number of models and sources share it.
        source: gives all N images.
        graphs: their preprocessing and labels apply.
        served: asks the graphs that play low and high of a server, and no other graph; None: every
            graph runs here.

    Attributes:
        folder, source, graphs: as given.
        runtime: what answers for low and high: its `name`, and its `processor` where that is known.
        preprocessing: how images become tensors.
        pictures_key: the name of the folder that holds the pictures.
    """

    def __init__(
        self,
        folder: Path,
        source: ImageSource,
        graphs: GraphSet,
        served: ServedRungs | None = None,
    ) -> None:
        self.folder, self.source, self.graphs, self._served = folder, source, graphs, served
        self.runtime = local_runtime() if served is None else served.runtime
        self.preprocessing = Preprocessing.from_dict(graphs.preprocessing)
        self._server: str | None = None  # what the server answers, once it was asked
        self.pictures_key = _hash(
            source.fingerprint(),
            graphs.preprocessing_sha256(),
            code_sha256(),
            looks_sha256(),
            np.__version__,
            PIL.__version__,
        )

    def key(self, graph: Graph) -> str:
        """The name of the folder that holds a graph's answers; of a server's, after `fill`."""
        runtime: list[Any] = [local_runtime()]
        if self._served is not None and self._where_served(graph) is not None:
            runtime = [self.runtime, self._served.url, self._server]
        return _hash(self.pictures_key, graph.record.fingerprint, BATCH, runtime)

    def fill(
        self,
        asked: Sequence[Wanted],
        rows: Sequence[int] | None = None,
        progress: Progress = lambda count: None,
    ) -> list[str]:
        """Let graphs answer for the images for which no earlier run has.

        While the graphs run on one batch, the next one is decoded. Whatever the number of images,
        memory holds at most four batches of tensors, one photograph being decoded in each of up to
        8 threads, and each graph's answers for 256 images; only row numbers grow with it.

        Args:
            asked: the graphs.
            rows: the places of the images in the source; None: all N.
            progress: called with a number of images that are done, by earlier runs or by this one;
                the numbers add up to that of the rows.

        Returns:
            A line for each image that cannot be read, or on which a graph overflows.

        Raises:
            ImagesError: there is no image, or more than 5 % of them are such ones, as soon as that
                is certain. What was answered is kept; a rerun reads again what could not be read,
                where that was more than 5 %.
            GraphsError: an ONNX file is not the one that was exported.
            ServedError: the server does not answer, serves other graphs, or others than before.
            OSError: the folder cannot be written.
        """
        wanted = list(range(len(self.source)) if rows is None else rows)
        if not wanted:
            raise ImagesError("there is no image to run the graphs on")
        for item in asked:
            if (fault := item.graph.fault()) is not None:
                folder = item.graph.file.parent
                raise GraphsError(f"{folder}: {fault}; run python -m export rungs again")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._one_server():
            filling = _Filling(self, asked, wanted)
            filling.run(progress)
        return [filling.lines[row] for row in wanted if row in filling.lines]

    @contextmanager
    def _one_server(self) -> Iterator[None]:
        """Make sure that one model answers throughout; what another may have answered goes.

        Raises:
            ServedError: the server serves other graphs, or at last answers otherwise.
        """
        probe = None if self._served is None else self._first_images()
        if self._served is None or probe is None:
            yield
            return
        asked = _hash(self._served.url, self.pictures_key, self.graphs.fingerprints())
        answers = check_answers(self._served, self.graphs, probe)
        before = remembered(self.folder / "served" / f"{asked}.npz", answers)
        digest = hashlib.sha256()
        for _, answer in sorted(before.items()):
            for values in (answer.embedding, answer.logits):
                digest.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
        self._server = digest.hexdigest()
        try:
            yield
        except BaseException:  # What was answered until then is kept, so it is looked at, too.
            with suppress(Exception):
                self._check_server(self._served, probe, before)
            raise
        self._check_server(self._served, probe, before)

    def _check_server(
        self, served: ServedRungs, probe: NDArray[np.float32], before: Answers
    ) -> None:
        now = {name: graph(probe) for name, graph in served.graphs().items()}
        if same_server(now, before):
            return
        for graph in (self.graphs.low, self.graphs.high):
            for path, _ in chunks(self.folder / self.key(graph)):
                path.unlink(missing_ok=True)
        raise ServedError(
            f"the server at {served.url} answers otherwise than when it was first asked: another "
            "model was deployed meanwhile; collect again"
        )

    def _first_images(self) -> NDArray[np.float32] | None:
        """The first images that can be read, FP32 (B, 3, H, W); None where none can."""
        found: list[NDArray[np.float32]] = []
        rows = ([row] for row in range(len(self.source)))
        with closing(decode_ahead(self.source, rows, self.preprocessing)) as decoded:
            for batch in decoded:
                found += [item.tensor for item in batch if isinstance(item, DecodedImage)]
                if len(found) == PROBES:
                    break
        return np.stack(found) if found else None

    def read(self, asked: Sequence[Wanted], rows: Sequence[int] | None = None) -> Answered:
        """The images that graphs have answered, in the order of the rows; arguments as of `fill`.

        Images that cannot be read, or on which one of the graphs overflows, are left out.

        Raises:
            MissingAnswersError: for some of the rows an answer is not there.
        """
        places: dict[str, tuple[str, bool]] = {}
        for item in asked:  # One graph may be asked for in two roles.
            layers = item.layers or places.get(item.graph.name, ("", False))[1]
            places[item.graph.name] = (self.key(item.graph), layers)
        wanted = range(len(self.source)) if rows is None else rows
        return read_answers(self.folder, self.pictures_key, places, wanted, self.graphs.labels)

    def pictures(self, rows: Sequence[int] | None = None) -> Pictures:
        """The images that can be read, without answers; arguments and errors as `read` has them."""
        return self.read([], rows).pictures

    def size_mib(self) -> float:
        """The size of everything in the folder, in MiB."""
        return sum(file.stat().st_size for file in self.folder.rglob("*.npz")) / 2**20

    def open(self, item: Wanted) -> Run:
        """A graph as a function of `image`, FP32 (B, 3, H, W)."""
        if (served := self._where_served(item.graph)) is not None:
            return served
        session = open_session(item.graph.file)
        return lambda image: run_session(session, image, item.layers)

    def _where_served(self, graph: Graph) -> Run | None:
        """A graph as the server answers for it; None where it runs here."""
        rungs = {LOW: self.graphs.low, HIGH: self.graphs.high} if self._served else {}
        models = [model for model, rung in rungs.items() if rung.name == graph.name]
        return self._served.graphs()[models[0]] if self._served and models else None


class _Filling:
    """One run of `AnswerCache.fill`.

    Attributes:
        lines: for each row that cannot be used, the line that says why.
    """

    def __init__(self, cache: AnswerCache, asked: Sequence[Wanted], rows: Sequence[int]) -> None:
        self._cache, self._rows, self._wanted = cache, rows, set(rows)
        self._pictures = cache.folder / cache.pictures_key
        # By the folder of its answers, since one graph may be asked for under two names.
        self._asked: dict[Path, Wanted] = {}
        for item in asked:
            folder = cache.folder / cache.key(item.graph)
            earlier = self._asked.get(folder, item)
            self._asked[folder] = Wanted(earlier.graph, item.layers or earlier.layers)
        self._seen: set[int] = set()  # rows whose images were read
        self.lines: dict[int, str] = {}
        bad: dict[Path, list[int]] = {}
        for path, arrays in chunks(self._pictures):
            self._seen.update(arrays["rows"].tolist())
            said = zip(
                arrays["unreadable_rows"].tolist(), arrays["unreadable"].tolist(), strict=True
            )
            if found := {row: line for row, line in said if row in self._wanted}:
                self.lines |= found
                bad[path] = arrays["rows"].tolist()
        # What another run could read can be read.
        self.lines = {row: line for row, line in self.lines.items() if row not in self._seen}
        if len(self.lines) > MAX_UNREADABLE * len(rows):
            # That is what stopped an earlier run, and they may have been mended.
            for path, read in bad.items():
                path.unlink(missing_ok=True)
                self._seen.difference_update(read)
            self.lines = {}
        self._unreadable = set(self.lines)
        self._answered: dict[Path, set[int]] = {folder: set() for folder in self._asked}
        for folder, item in self._asked.items():
            for _, arrays in chunks(folder, item.layers):
                self._note(folder, arrays["rows"].tolist(), rung_outputs(arrays, item.layers))

    def run(self, progress: Progress) -> None:
        """Answer what is missing; arguments and errors as of `AnswerCache.fill`."""
        self._check()
        missing = []
        for piece in _pieces(self._rows, CHUNK):
            todo = [row for row in piece if self._is_missing(row)]
            if len(todo) < len(piece):
                progress(len(piece) - len(todo))
            missing += [todo] * bool(todo)
        graphs = {
            folder: self._cache.open(item)
            for folder, item in self._asked.items()
            if any(row not in self._answered[folder] for todo in missing for row in todo)
        }
        batches = [batch for todo in missing for batch in _pieces(todo, BATCH)]
        source, preprocessing = self._cache.source, self._cache.preprocessing
        with closing(decode_ahead(source, batches, preprocessing)) as decoded:
            for todo in missing:
                pictures: list[Arrays] = []
                answers: dict[Path, list[Arrays]] = {folder: [] for folder in graphs}
                for batch in _pieces(todo, BATCH):
                    found = dict(zip(batch, next(decoded), strict=True))
                    pictures.append(picture_arrays(found))
                    self.lines |= {row: i for row, i in found.items() if isinstance(i, str)}
                    images = {row: i.tensor for row, i in found.items() if not isinstance(i, str)}
                    for folder, graph in graphs.items():
                        rows = [row for row in images if row not in self._answered[folder]]
                        if rows:
                            outputs = graph(np.stack([images[row] for row in rows]))  # (B, 3, H, W)
                            answers[folder].append(answer_arrays(rows, outputs))
                            self._note(folder, rows, outputs)
                    if batch[-1] == todo[-1]:
                        for folder, parts in answers.items():
                            write_chunk(folder, parts)
                        write_chunk(self._pictures, pictures)
                    progress(len(batch))
                self._check()

    def _is_missing(self, row: int) -> bool:
        if row in self._unreadable:
            return False
        return row not in self._seen or any(row not in known for known in self._answered.values())

    def _note(self, folder: Path, rows: Sequence[int], outputs: RungOutputs) -> None:
        """Remember which rows a graph has answered, and on which it overflows."""
        self._answered[folder].update(rows)
        names, graph = self._cache.source.names, self._asked[folder].graph.name
        for row in np.array(rows)[~outputs.finite()].tolist():
            if row in self._wanted:
                self.lines.setdefault(row, f"{shown(names[row])}: {graph} answers with NaN or Inf")

    def _check(self) -> None:
        if len(self.lines) > MAX_UNREADABLE * len(self._rows):
            first = next(self.lines[row] for row in self._rows if row in self.lines)
            raise ImagesError(
                f"{len(self.lines)} of {len(self._rows)} images could not be read or answered, "
                f"more than {MAX_UNREADABLE:.0%}; first: {first}; mend or remove them and run this "
                "again"
            )


def _pieces(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _hash(*content: Any) -> str:
    """A name for a folder: the first half of the SHA-256 over the content as JSON."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
