"""The repository under test: the assembled one, and beside it the static alternatives."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bundle import config, manifest
from bundle.graphs import GraphSet
from bundle.placing import link_or_copy

from .figures import PerfError


def assembled(repository: Path) -> Path:
    """The repository, if `python -m export repository` wrote it.

    Raises:
        PerfError: it did not.
    """
    if not (repository / "MANIFEST.json").is_file():
        raise PerfError(
            f"no assembled model repository at {repository}; run python -m export repository, or "
            "give --repository"
        )
    return repository


def with_alternatives(repository: Path, graph_set: GraphSet, folder: Path) -> Path:
    """Lay out an assembled repository, and one more model for each static alternative, in a folder.

    An alternative is served as the full rung is: same configuration, warm-up and threads. Requests
    may ask for any threshold there, whatever the repository allows. What is in the folder goes.

    Raises:
        PerfError: the repository is not an assembled one, or would be overwritten.
    """
    source, target = assembled(repository).resolve(), folder.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise PerfError(f"{folder} would overwrite the model repository; give another --out")
    if folder.exists() and not (folder / "MANIFEST.json").is_file():
        raise PerfError(f"{folder} is not of an earlier run; give another --out")
    shutil.rmtree(folder, ignore_errors=True)
    undisturbed(repository, folder)
    for model, graph in graph_set.beside.items():
        version = folder / model / "1"
        version.mkdir(parents=True)
        graph.place(version, "model")
        shutil.copyfile(repository / "vit_high" / "config.pbtxt", folder / model / "config.pbtxt")
    manifest.write(folder)  # the rest has just been verified; what is not listed is not served
    return folder


def undisturbed(repository: Path, folder: Path) -> Path:
    """Lay out an assembled repository so that nothing but what is measured runs on its server.

    Its router compares no reference answers at its start, which would run beside the first pass,
    and takes any threshold from requests: the measured rates of escalation are chosen that way.

    Raises:
        PerfError: the repository is not an assembled one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(assembled(repository), folder, copy_function=_link)
    # The copy's file is replaced, so that the original it may be linked to stays as it is.
    name = "router/config.pbtxt"
    router = config.read(folder / name)
    config.set_parameter(router, "client_parameters", "any")
    config.set_parameter(router, "reference_check", "off")
    manifest.update(folder, {name: config.text(router)})
    return folder


def _link(source: str, target: str) -> None:
    """Weights are hundreds of megabytes: a second name, of what a link leads to."""
    link_or_copy(Path(os.path.realpath(source)), Path(target))
