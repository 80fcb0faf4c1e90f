"""Add a version of the router to an assembled repository: another calibration of the same rungs.

    build/calibration/new.json ─┐
    model_repository/, routing/ ┴─► router/<N+1>/, served beside the version that answers

The version is built beside and takes its place with one rename; what serves goes on unchanged until
`python -m server rollout` loads it.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from export.repository import ROOT, RepositoryError, check_imaging, complete_router
from export.settings import check_fraction
from export.staging import folder_beside
from routing import RUNGS, Calibration, manifest
from routing.versions import Versions, present


def add_version(repository: Path, calibration_file: Path, shadow_fraction: float = 0.0) -> int:
    """Add a version that is served, and answers whoever pins it, but nobody else.

    Args:
        repository: an assembled repository.
        calibration_file: an artifact made with its rungs.
        shadow_fraction: share of the live images that it scores without answering them.

    Returns:
        The number of the version.

    Raises:
        UsageError: `shadow_fraction` is no share.
        RepositoryError: the artifact has another preprocessing or was calibrated with other code
            of `imaging/` than the repository's, or is that of a version already.
        CalibrationError: the artifact is invalid or was made with other ONNX files.
        ManifestError: the repository is not as it was assembled.
        OSError: a file cannot be read or written; the repository is as before.
    """
    check_fraction("--shadow", shadow_fraction)
    manifest.verify(repository)
    calibration = Calibration.load(calibration_file)
    calibration.check_rungs({name: repository / name / "1" / "model.onnx" for name in RUNGS})
    versions = present(repository)
    _check_is_new(repository, calibration, versions)
    check_imaging(calibration, repository / "preprocess/1/imaging")
    version = max(versions) + 1
    before = Versions.load(repository)
    after = replace(before, served=(before.live, version))
    if shadow_fraction > 0:
        after = replace(after, shadow=version, shadow_fraction=shadow_fraction)
    configs = after.configs(repository)
    folder = _place(repository, version, calibration)
    try:
        manifest.update(repository, configs, added=folder)
    except BaseException:
        if version not in present(repository):
            shutil.rmtree(repository / folder)
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


def _place(repository: Path, version: int, calibration: Calibration) -> str:
    name = f"router/{version}"
    if (repository / name).exists():
        raise RepositoryError(
            f"{repository / name} is not listed in {manifest.NAME}, as an interrupted command "
            "leaves it; remove it and try again"
        )
    with folder_beside(repository) as beside:
        fresh = beside / "version"
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / "model_repository/router/1", fresh, ignore=ignore)
        complete_router(fresh, calibration)
        fresh.rename(repository / name)
    return name
