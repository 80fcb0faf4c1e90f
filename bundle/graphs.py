"""The exported graphs of one model as they lie on disk: `graphs.json` and the files it names.

`export rungs` writes them. Which graph is the cheap rung, which the full one and which the full
model in FP32 are roles that a graph plays; every other graph lies beside those, to be measured or
to take a role later. What a graph is is said by its recipe, never by its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bundle import labels
from bundle.alignment import Alignment
from bundle.placing import folder_beside, link_or_copy
from bundle.prints import joined, without
from bundle.recipe import Recipe
from routing import RUNGS, TASKS, WEIGHTS, RungRecord, default_task

NAME = "graphs.json"
SCHEMA_VERSION = 3  # 1 and 2 were those of rungs.json
EARLIER = "rungs.json"
# Roles of graphs. The rungs have the names of the models that they are deployed as, which an
# artifact calls them by, too.
LOW, HIGH = RUNGS
REFERENCE = "reference"


class GraphsError(ValueError):
    """The folder holds no usable graphs. One line that says what to run."""


@dataclass(frozen=True)
class Graph:
    """One exported graph.

    Attributes:
        name: what people call it; its file is this and `.onnx`.
        record: its recipe, hashes and sizes, as an artifact holds them.
        file: where its ONNX file lies.
        fitted_on: prints of the images that this graph has learned from by its ranges or by its
            alignment, see `bundle.prints`.
        adapted_on: prints of the images that its weights were adapted to, see `bundle.adapted`.
        notes: what its export measured (`checks`, `fidelity`, `tokens`), for people to read.
    """

    name: str
    record: RungRecord
    file: Path
    fitted_on: str = ""
    adapted_on: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """How it makes itself cheap.

        Raises:
            RecipeError: the record was made by a release that knows other recipes.
        """
        return Recipe.parse(self.record.recipe)

    @property
    def alignment_file(self) -> Path:
        """Where the alignment lies that was baked in, if one was."""
        return self.file.with_suffix(".npz")

    def alignment(self) -> Alignment | None:
        """The alignment that was baked in; None: none was, or its file is gone.

        Raises:
            AlignmentError: the file cannot be read.
        """
        return Alignment.load(self.alignment_file) if self.alignment_file.is_file() else None

    def fault(self) -> str | None:
        """Which of its files is not the recorded one, and why; None: all are."""
        return self.record.fault(self.file, f"differs from its SHA-256 in {NAME}")

    def place(self, folder: Path, stem: str) -> Graph:
        """Give its file, and the weights it shares, a second name in another folder.

        Files are linked, or copied where that cannot be.

        Args:
            folder: an existing folder. Shared weights that lie there already are left as they are.
            stem: of the file's new name, without `.onnx`.

        Returns:
            The graph there.

        Raises:
            OSError: a file cannot be written.
        """
        file = folder / f"{stem}.onnx"
        link_or_copy(self.file, file)
        if self.record.weights_sha256 is not None and not (folder / WEIGHTS).exists():
            link_or_copy(self.file.with_name(WEIGHTS), folder / WEIGHTS)
        return replace(self, file=file)


@dataclass(frozen=True)
class GraphSet:
    """The graphs of one model, and the roles that some of them play.

    Attributes:
        backbone: name of the model.
        image_shape: (3, H, W) of the `image` tensor that every graph takes.
        embedding_dim: D.
        layers: L, the number of transformer blocks of the whole model.
        classes: C, or None for a model without a head.
        labels: the C class names, or None.
        preprocessing: fields of `imaging.Preprocessing`.
        graphs: by name, those that play a role first.
        roles: the names of the graphs that are `LOW`, `HIGH` and `REFERENCE`, the full model in
            FP32, which certificates are about; it may be the graph that is `HIGH`.
        task: what the logits mean, see `routing.TASKS`; None: no head, or `default_task`.
        fitted_on: prints of the images that a head was fitted on, which is in every graph.
        release: of this project that exported them; None: not known.
        about: where the model comes from and how it was exported, for people to read.
        layer_dim: width of `cls_layers`; None: D, as of every model without a projection.
    """

    backbone: str
    image_shape: tuple[int, int, int]
    embedding_dim: int
    layers: int
    classes: int | None
    labels: tuple[str, ...] | None
    preprocessing: Mapping[str, Any]
    graphs: Mapping[str, Graph]
    roles: Mapping[str, str]
    task: str | None = None
    fitted_on: str = ""
    release: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    layer_dim: int | None = None

    def __post_init__(self) -> None:
        """Fill the task where it was not said.

        Raises:
            ValueError: an unknown task, or a role that no graph plays.
        """
        if self.task is None:
            object.__setattr__(self, "task", default_task(self.classes))
        elif self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is none of {', '.join(TASKS)}")
        for role in (*RUNGS, REFERENCE):
            if self.roles.get(role) not in self.graphs:
                raise ValueError(f"no graph plays {role}")

    @property
    def low(self) -> Graph:
        """The cheap rung."""
        return self.graphs[self.roles[LOW]]

    @property
    def high(self) -> Graph:
        """What images are escalated to."""
        return self.graphs[self.roles[HIGH]]

    @property
    def reference(self) -> Graph:
        """The full model in FP32, which certificates are about."""
        return self.graphs[self.roles[REFERENCE]]

    @property
    def low_layers(self) -> int:
        """The number of transformer blocks of the cheap rung."""
        return self.layers if self.low.record.layers is None else self.low.record.layers

    @property
    def rungs(self) -> dict[str, RungRecord]:
        """The records of the two rungs by role, as an artifact holds them."""
        return {LOW: self.low.record, HIGH: self.high.record}

    @property
    def files(self) -> dict[str, Path]:
        """The ONNX files of the two rungs by role."""
        return {LOW: self.low.file, HIGH: self.high.file}

    @property
    def reference_record(self) -> RungRecord | None:
        """The record of the reference; None where the full rung is it."""
        same = self.roles[REFERENCE] == self.roles[HIGH]
        return None if same else self.reference.record

    @property
    def beside(self) -> dict[str, Graph]:
        """The graphs that are no rung, by name; a reference that is neither is among them."""
        rungs = (self.low.name, self.high.name)
        return {name: graph for name, graph in self.graphs.items() if name not in rungs}

    def playing(self) -> dict[str, Graph]:
        """The graphs that calibration runs by role: both rungs, and a reference that is neither."""
        found = {LOW: self.low, HIGH: self.high}
        if self.reference_record is not None:
            found[REFERENCE] = self.reference
        return found

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each graph of `playing`, by role."""
        return {role: graph.record.fingerprint for role, graph in self.playing().items()}

    def learned(self, names: Iterable[str] | None = None) -> str:
        """Prints of the images that graphs, by default those in a role, or their head learned from.

        Nothing may be certified on those images.
        """
        names = list(self.roles.values() if names is None else names)
        prints = self.left_out(names)
        for name in names:
            prints = joined(prints, without(self.graphs[name].fitted_on, prints))
        return prints

    def left_out(self, names: Iterable[str] | None = None) -> str:
        """Prints of the images that the head, or the weights of graphs, learned from.

        Nothing says what graphs would answer that had not learned them, so nothing may be fitted on
        them either. The graphs are by default those in a role.
        """
        prints = self.fitted_on
        for name in self.roles.values() if names is None else names:
            prints = joined(prints, without(self.graphs[name].adapted_on, prints))
        return prints

    def cast(self, low: str, high: str) -> GraphSet:
        """The same graphs, two of them as the rungs.

        Raises:
            GraphsError: no graph of that name.
        """
        self._check((low, high))
        return replace(self, roles={**self.roles, LOW: low, HIGH: high})

    def adding(self, graph: Graph) -> GraphSet:
        """The same graphs and one more, or one instead of the graph of that name."""
        return replace(self, graphs={**self.graphs, graph.name: graph})

    def preprocessing_sha256(self) -> str:
        """Hex SHA-256 of the preprocessing, whatever the order and spacing of its JSON."""
        canonical = json.dumps(self.preprocessing, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> GraphSet:
        """Read `graphs.json`; the ONNX files are looked for, not hashed.

        Raises:
            GraphsError: a missing or invalid file, or one of an earlier release.
        """
        path = folder / NAME
        try:
            content = json.loads(path.read_text("utf-8"))
            version = content["schema_version"]
            if version != SCHEMA_VERSION:
                raise GraphsError(
                    f"{path} has schema version {version}, this code reads {SCHEMA_VERSION}; run "
                    "python -m export rungs again"
                )
            channels, height, width = content["image"]["shape"]
            graphs = cls(
                image_shape=(channels, height, width),
                labels=tuple(content["labels"]) if content["labels"] else None,
                graphs={n: _graph(n, folder, entry) for n, entry in content["graphs"].items()},
                roles=dict(content["roles"]),
                layer_dim=content.get("layer_dim"),
                about={name: content.get(name) for name in _ABOUT if name in content},
                **{name: content[name] for name in _PLAIN},
            )
        except OSError:
            if (folder / EARLIER).is_file():
                raise GraphsError(
                    f"{folder / EARLIER} is of an earlier release; make the graphs again with "
                    "python -m export rungs, or with a new plan where one chose them"
                ) from None
            raise GraphsError(f"no {NAME} in {folder}; run python -m export rungs first") from None
        except GraphsError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise GraphsError(
                f"{path} is not readable ({type(error).__name__} {error}); export again"
            ) from None
        for graph in graphs.graphs.values():
            if not graph.file.is_file():
                raise GraphsError(f"no ONNX file at {graph.file}; run python -m export rungs again")
        return graphs

    def save(self, folder: Path) -> None:
        """Write `labels.txt`, where there are labels, and `graphs.json` beside the graphs.

        Raises:
            OSError: a file cannot be written.
        """
        if self.labels:
            labels.write(folder, self.labels)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        fresh = folder / f".{NAME}"
        # What is no Unicode in a name is escaped, which JSON reads as what it was.
        fresh.write_text(text + "\n", "utf-8", "backslashreplace")
        os.replace(fresh, folder / NAME)

    def place(self, folder: Path, names: Iterable[str] | None = None) -> GraphSet:
        """Let these graphs be what a folder holds, in place of an earlier set.

        The record comes last: a folder without one is unfinished.

        Args:
            folder: made where it is missing; not the one that the graphs lie in.
            names: of the graphs that lie there besides those that play a role; None: all.

        Returns:
            The set there.

        Raises:
            GraphsError: no graph of that name.
            OSError: a file cannot be written.
        """
        kept = [*self.roles.values(), *(self.graphs if names is None else names)]
        self._check(kept)
        with folder_beside(folder) as staging:
            for name in dict.fromkeys(kept):
                graph = self.graphs[name]
                there = graph.place(staging, name)
                if graph.alignment_file.is_file():
                    link_or_copy(graph.alignment_file, there.alignment_file)
            graphs = {
                name: replace(self.graphs[name], file=folder / f"{name}.onnx")
                for name in self.graphs
                if name in kept
            }
            placed = replace(self, graphs=graphs)
            placed.save(staging)
            folder.mkdir(exist_ok=True)
            for name in _earlier(folder):
                (folder / name).unlink(missing_ok=True)
            for file in sorted(staging.iterdir(), key=lambda file: file.name == NAME):
                os.replace(file, folder / file.name)
        return placed

    def _check(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.graphs:
                known = ", ".join(self.graphs)
                raise GraphsError(f"no graph {name!r} was exported; there are {known}")

    def to_dict(self) -> dict[str, Any]:
        """The content of `graphs.json`, as JSON types."""
        return {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
            "image": {"shape": list(self.image_shape)},
            "labels": list(self.labels) if self.labels else None,
            **({} if self.layer_dim is None else {"layer_dim": self.layer_dim}),
            **self.about,
            "roles": dict(self.roles),
            "graphs": {
                name: {
                    **asdict(graph.record),
                    "file": graph.file.name,
                    "fitted_on": graph.fitted_on,
                    **({"adapted_on": graph.adapted_on} if graph.adapted_on else {}),
                    **graph.notes,
                }
                for name, graph in self.graphs.items()
            },
        }


_PLAIN = (
    *("release", "backbone", "embedding_dim", "layers", "classes", "task", "preprocessing"),
    "fitted_on",
)
_ABOUT = ("source", "head", "opset", "ir_version", "parity")
_NOTES = ("fidelity", "checks", "tokens")


def _graph(name: str, folder: Path, entry: Mapping[str, Any]) -> Graph:
    record = RungRecord(
        entry["px"],
        entry["recipe"],
        entry["sha256"],
        entry["weights_sha256"],
        entry["layers"],
        entry["size_bytes"],
        entry["weights_size_bytes"],
    )
    notes = {key: entry[key] for key in _NOTES if key in entry}
    learned = entry["fitted_on"], entry.get("adapted_on", "")
    return Graph(name, record, folder / entry["file"], *learned, notes)


def _earlier(folder: Path) -> list[str]:
    """Names of the files that an earlier set left in a folder, its record first."""
    found = [NAME, EARLIER, labels.NAME, WEIGHTS]
    if (folder / EARLIER).exists():
        found += [f"{name}.onnx" for name in (*RUNGS, REFERENCE)]
        found += [file.name for file in folder.glob("static_*.onnx")]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        graphs = json.loads((folder / NAME).read_text("utf-8"))["graphs"]
        files = [Path(entry["file"]) for entry in graphs.values()]
        found += [name for file in files for name in (file.name, file.with_suffix(".npz").name)]
    return found
