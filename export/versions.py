"""Add a version of the router to an assembled repository: another calibration of the same rungs.

    build/calibration/new.json ─┐
    model_repository/, routing/ ┴─► router/<N+1>/, beside the version that answers

The version is built beside and takes its place with one rename. Triton loads it when it is to
answer, with `python -m server rollout --to N`, and not before (see `bundle.versions`).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from bundle import manifest
from bundle.placing import folder_beside
from bundle.versions import Versions, present
from export.repository import (
    NO_BYTECODE,
    ROOT,
    RepositoryError,
    answer_parameters,
    check_imaging,
    checked_answers,
    complete_router,
)
from routing import REFERENCE_MODEL, RUNGS, Calibration


def add_version(repository: Path, calibration_file: Path, shadow_fraction: float = 0.0) -> int:
    """Add a version that answers nobody yet; the one that answers can score in its place.

    Args:
        repository: an assembled repository.
        calibration_file: an artifact made with its rungs.
        shadow_fraction: share of the live images that it scores without answering them, 0..1.

    Returns:
        The number of the version.

    Raises:
        RepositoryError: the artifact has another preprocessing or task, was calibrated with other
            code of `imaging/` than the repository's, is that of a version already, or lacks the
            reference answers that it names.
        CalibrationError: the artifact is invalid or was made with other ONNX files.
        ManifestError: the repository is not as it was assembled.
        OSError: a file cannot be read or written; the repository is as before.
    """
    versions = present(repository)
    version = max(versions) + 1
    place = repository / f"router/{version}"
    if place.exists():
        raise RepositoryError(
            f"{place} is not listed in {manifest.NAME}, as an interrupted command leaves it; "
            "remove it and try again"
        )
    manifest.verify(repository)
    calibration = Calibration.load(calibration_file)
    names = [*RUNGS, *[REFERENCE_MODEL] * (repository / REFERENCE_MODEL).is_dir()]
    calibration.check_rungs({name: repository / name / "1" / "model.onnx" for name in names})
    _check_is_new(repository, calibration, versions)
    check_imaging(calibration, repository / "preprocess/1/imaging")
    answers = checked_answers(calibration_file, calibration)
    after = Versions.load(repository)
    if shadow_fraction > 0:
        after = replace(after, shadow=version, shadow_fraction=shadow_fraction)
    with folder_beside(repository) as beside:
        fresh = beside / "version"
        shutil.copytree(ROOT / "model_repository/router/1", fresh, ignore=NO_BYTECODE)
        complete_router(fresh, calibration, answers)
        try:
            added = (f"router/{version}", fresh)
            manifest.update(repository, after.configs(repository), added=added, live=after.live)
        except BaseException:
            if version not in present(repository):
                shutil.rmtree(place, ignore_errors=True)
            raise
    return version


def _check_is_new(repository: Path, calibration: Calibration, versions: list[int]) -> None:
    for version in versions:
        there = Calibration.load(repository / f"router/{version}/calibration.json")
        if there == calibration:
            raise RepositoryError(f"router/{version} has this artifact already")
        if there.preprocessing_sha256 != calibration.preprocessing_sha256:
            raise RepositoryError(
                "the artifact was calibrated with another preprocessing than the repository's; "
                "collect and fit again, or assemble a new repository"
            )
        if answer_parameters(there) != answer_parameters(calibration):
            raise RepositoryError(
                "the artifact takes the model's answers for others than the repository's does "
                f"({answer_parameters(calibration)}, not {answer_parameters(there)}); assemble a "
                "new repository"
            )
