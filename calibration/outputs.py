"""What the rungs answer for the images to calibrate with, and `outputs.json`, which says where.

`collect` writes the file. It names the folders of the cache of answers in which the pictures and
each graph's answers lie, and says what made them; the answers themselves stay in the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.alignment import Alignment
from bundle.graphs import HIGH, LOW, REFERENCE, Graph, GraphSet
from bundle.head import LinearHead
from bundle.prints import among
from imaging import code_sha256
from routing import Calibration, RungOutputs
from routing.calibration import FULL_RUNG

from .answers import AnswerCache, Progress, Wanted
from .chunks import Answered, MissingAnswersError, Pictures, read_answers
from .splits import GROUPINGS, with_groups

SCHEMA_VERSION = 1
FULL_MODEL = "full FP32 model"  # what answers are held against where it is not the full rung


class OutputsError(ValueError):
    """Stored outputs are missing, unreadable or of other graphs. One line."""


@dataclass(frozen=True)
class Made:
    """How outputs are made, as far as an artifact depends on it.

    Attributes:
        graphs: fingerprint of each graph by its role, `bundle.graphs.GraphSet.fingerprints`.
        preprocessing_sha256: what says how images become tensors, `GraphSet.preprocessing_sha256`.
        imaging_sha256: what says which code makes them, `imaging.code_sha256`.
        task: what the logits mean, see `routing.TASKS`; None: there is no head.
    """

    graphs: Mapping[str, str]
    preprocessing_sha256: str
    imaging_sha256: str
    task: str | None

    @classmethod
    def by(cls, graphs: GraphSet) -> Made:
        """How `collect` makes outputs with these graphs, now."""
        preprocessing_sha256 = graphs.preprocessing_sha256()
        return cls(graphs.fingerprints(), preprocessing_sha256, code_sha256(), graphs.task)

    @classmethod
    def of(cls, calibration: Calibration) -> Made:
        """How the outputs were made that an artifact was fitted on."""
        graphs = {name: record.fingerprint for name, record in calibration.rungs.items()}
        if calibration.reference is not None:
            graphs[REFERENCE] = calibration.reference.fingerprint
        return cls(
            graphs,
            calibration.preprocessing_sha256,
            calibration.imaging_sha256,
            calibration.task,
        )

    @property
    def truth_words(self) -> str:
        """What answers are held against, in words."""
        return FULL_MODEL if REFERENCE in self.graphs else FULL_RUNG

    def difference(self, other: Made) -> str | None:
        """What these outputs are of that those others are not of; None: they are made alike."""
        for name in (*self.graphs, *other.graphs):
            if self.graphs.get(name) != other.graphs.get(name):
                return f"another {name}"
        if self.preprocessing_sha256 != other.preprocessing_sha256:
            return "another preprocessing"
        if self.task != other.task:
            return f"a model that answers {self.task} and not {other.task}"
        if self.imaging_sha256 != other.imaging_sha256:
            return "other code of imaging/"
        return None


@dataclass(frozen=True, eq=False)
class Outputs(Pictures):
    """N images, in the order of their source, and what both rungs answer.

    Attributes:
        low: what the cheap rung answers.
        high: what the full rung answers, without `cls_layers`.
        made: which graphs answered, and how their tensors were made.
        source: opens the images again, see `images.open_images`.
        title: the source in words, without paths.
        reference: what the full model in FP32 answers, which losses are about; None: the full rung
            is that model.
        runtime: what ran the graphs, `name` and `processor`, see `answers.AnswerCache.runtime`.
        taught: which images a graph has learned from without labels, BOOL (N,): they belong to the
            fit split, and an aligned rung's answers for them are cross-fitted, see `usable`; None:
            none has.
    """

    low: RungOutputs
    high: RungOutputs
    made: Made
    source: str
    title: str
    reference: RungOutputs | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)
    taught: NDArray[np.bool_] | None = None

    @property
    def task(self) -> str | None:
        """What the logits mean, see `routing.TASKS`; None: there is no head."""
        return self.made.task

    @property
    def truth(self) -> RungOutputs:
        """What the other answers are held against."""
        return self.high if self.reference is None else self.reference

    @property
    def truth_words(self) -> str:
        """What the other answers are held against, in words."""
        return FULL_RUNG if self.reference is None else FULL_MODEL

    @classmethod
    def of(cls, answered: Answered, graphs: GraphSet, cache: AnswerCache) -> Outputs:
        """The outputs of what `wanted(graphs)` answered, read from a cache."""
        found = {role: answered.outputs[graph.name] for role, graph in graphs.playing().items()}
        source, made = cache.source, Made.by(graphs)
        return cls._of(answered, found, made, source.spec, source.title, cache.runtime)

    @classmethod
    def _of(
        cls,
        answered: Answered,
        found: Mapping[str, RungOutputs],
        made: Made,
        source: str,
        title: str,
        runtime: Mapping[str, Any],
    ) -> Outputs:
        high = found[HIGH]
        return cls(
            **vars(answered.pictures),
            low=found[LOW],
            high=RungOutputs(high.embedding, None, high.logits),
            made=made,
            source=source,
            title=title,
            reference=found.get(REFERENCE),
            runtime=runtime,
        )

    def rows(self, index: NDArray[np.intp]) -> Outputs:
        """The outputs of some of the images."""
        return replace(
            self.only(index),
            low=self.low.rows(index),
            high=self.high.rows(index),
            reference=None if self.reference is None else self.reference.rows(index),
            taught=None if self.taught is None else self.taught[index],
        )

    def fingerprint(self) -> str:
        """SHA-256 over the images' hashes, in order."""
        return hashlib.sha256("\n".join(self.hashes).encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> Outputs:
        """Read `outputs.json` and the answers that it names.

        Raises:
            OutputsError: one of them is missing or damaged, or of an earlier release.
        """
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {content['schema_version']}")
            made = Made(**content["made"])
            places = {role: (key, role == LOW) for role, key in content["answers"].items()}
            answered = read_answers(
                path.parent / content["folder"],
                content["pictures"],
                places,
                range(content["images"]) if content["rows"] is None else content["rows"],
                content["labels"],
            )
            return cls._of(
                answered,
                answered.outputs,
                made,
                content["source"],
                content["title"],
                content["runtime"],
            )
        except FileNotFoundError:
            raise OutputsError(f"no {path}; run python -m calibration collect first") from None
        except MissingAnswersError as error:
            raise OutputsError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise OutputsError(f"{path} is not readable ({words}); collect again") from None


def usable(outputs: Outputs, graphs: GraphSet, group_by: str = GROUPINGS[0]) -> Outputs:
    """The outputs that a fit may use, of those that `collect` found.

    Images that a graph has learned from without labels, by its ranges or its alignment, are marked
    as `taught`. On those that an alignment has learned the rung answers better than on any other,
    so its answers for them give way to cross-fitted ones. Left out are images for which nothing
    says what a graph that had not learned them would answer: those that a head was fitted on or
    weights were adapted to, with their whole groups, and other forms of an image that an alignment
    has learned.

    Args:
        outputs: what `collect` found.
        graphs: of which they are.
        group_by: what belongs together, see `splits.group_keys`.
    """
    learned = among(outputs.hashes, outputs.looks, graphs.learned())
    if not learned.any():
        return outputs
    low = outputs.low
    out = with_groups(among(outputs.hashes, outputs.looks, graphs.left_out()), outputs, group_by)
    if graphs.low.recipe.align:
        alignment = graphs.low.alignment()
        prints = graphs.low.fitted_on if alignment is None else alignment.image_prints
        seen = among(outputs.hashes, outputs.looks, prints)
        if alignment is not None:
            low, known = _cross_fitted(outputs, alignment, graphs.low)
            seen[known] = False
        out |= seen
    found = replace(outputs, low=low, taught=learned)
    return found.rows(np.flatnonzero(~out))


def _cross_fitted(
    outputs: Outputs, alignment: Alignment, graph: Graph
) -> tuple[RungOutputs, NDArray[np.intp]]:
    """The answers with cross-fitted ones for images that an alignment learned, and their rows."""
    places = {sha256: place for place, sha256 in enumerate(alignment.image_hashes.tolist())}
    known = np.flatnonzero([sha256 in places for sha256 in outputs.hashes])
    found = alignment.cross_fitted[[places[outputs.hashes[row]] for row in known]]
    head = None if outputs.low.logits is None else LinearHead.read(graph.file)
    return with_embedding(outputs.low, known, found, head), known


def with_embedding(
    low: RungOutputs,
    rows: NDArray[np.intp],
    embedding: NDArray[np.float32],
    head: LinearHead | None,
) -> RungOutputs:
    """Answers of B images, of which some have another embedding, and the logits that follow.

    Args:
        low: the answers.
        rows: k of the B images.
        embedding: of these k, FP32 (k, D).
        head: embeddings to logits; None: there are none.
    """
    embeddings, logits = low.embedding.copy(), low.logits
    embeddings[rows] = embedding
    if logits is not None:
        assert head is not None  # `export align` refuses another
        logits = logits.copy()
        logits[rows] = head(embedding)
    return RungOutputs(embeddings, low.cls_layers, logits)


def wanted(graphs: GraphSet) -> list[Wanted]:
    """What `Outputs` hold of the graphs that play a role."""
    return [Wanted(graph, role == LOW) for role, graph in graphs.playing().items()]


def collect(cache: AnswerCache, out: Path, progress: Progress = lambda count: None) -> list[str]:
    """Let the graphs that play a role answer for all images, and write `outputs.json`.

    Progress, result and errors are those of `AnswerCache.fill`.

    Raises:
        OutputsError: the file cannot be written.
    """
    try:
        if out.is_dir():
            raise OutputsError(f"{out} is a folder; name a file to write")
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputsError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    lines = cache.fill(wanted(cache.graphs), progress=progress)
    refer(out, cache, cache.graphs)
    return lines


def refer(
    path: Path,
    cache: AnswerCache,
    graphs: GraphSet,
    rows: Sequence[int] | None = None,
    made: Made | None = None,
) -> None:
    """Write `outputs.json` of answers that lie in a cache.

    Args:
        path: of the file.
        cache: of answers.
        graphs: which graph plays which role.
        rows: the places of the images in the source; None: all.
        made: of which graphs they are, where those have other files by now; None: `graphs`.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "made": asdict(made or Made.by(graphs)),
        "source": cache.source.spec,
        "title": cache.source.title,
        "runtime": cache.runtime,
        "folder": os.path.relpath(cache.folder, path.parent),
        "pictures": cache.pictures_key,
        "answers": {role: cache.key(graph) for role, graph in graphs.playing().items()},
        "labels": None if graphs.labels is None else list(graphs.labels),
        "images": len(cache.source),
        "rows": None if rows is None else list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(json.dumps(content), "utf-8")
    fresh.replace(path)
