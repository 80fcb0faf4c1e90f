"""Assemble a deployable model repository from code, rungs and artifact.

    build/onnx/*.onnx, graphs.json                 ─┐
    build/calibration/calibration.json ─────────────┼─► build/model_repository/ + MANIFEST.json
    model_repository/, routing/, imaging/ ──────────┘

Assembling twice from the same inputs gives identical bytes. The new repository is built beside the
old one and takes its place only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from bundle import config, manifest
from bundle.graphs import HIGH, LOW, Graph, GraphSet
from bundle.placing import folder_beside, link_or_copy
from export.settings import Settings
from imaging import Preprocessing, PreprocessingError, code_sha256
from routing import (
    REFERENCE_MODEL,
    RUNGS,
    WEIGHTS,
    AnswersError,
    Calibration,
    ReferenceAnswers,
    answers_path,
)
from routing.fidelity import LABEL_THRESHOLD

ROOT = Path(__file__).resolve().parent.parent
# Batch sizes the rungs run before they report ready: a lone request, and a batch as it forms
# under load. Larger ones cost seconds of start-up on a CPU.
WARMUP_BATCHES = (1, 8)
AUDIT_BATCHES = (1,)  # the audit asks about one image at a time


class RepositoryError(ValueError):
    """The repository cannot be assembled. One line that says what to do."""


def assemble(
    rung_set: GraphSet,
    calibration_file: Path,
    out: Path,
    settings: Settings | None = None,
) -> Path:
    """Assemble the repository.

    Args:
        rung_set: the exported rungs.
        calibration_file: the artifact made with exactly these rungs.
        out: folder to write; replaced if it is an assembled repository.
        settings: how it behaves; as in `model_repository/` if not given.

    Returns:
        `out`.

    Raises:
        RepositoryError: `out` is something else, the preprocessing is invalid or not the one of
            the artifact, `imaging/` has changed since it was calibrated, the artifact takes the
            model's answers for others, or the reference answers that it names are not there.
        UsageError: a setting makes no sense.
        CalibrationError: the artifact is invalid or was made with other ONNX files.
        OSError: a file cannot be read or written.
    """
    settings = settings or Settings()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _is_assembled(out))):
        raise RepositoryError(f"{out} exists and is no assembled repository; choose another --out")
    calibration = Calibration.load(calibration_file)
    calibration.check_rungs(rung_set.files)
    settings.check(calibration.threshold)
    if _audits_by_reference(calibration, settings):
        _check_reference(rung_set, calibration)
    if calibration.task != rung_set.task:
        raise RepositoryError(
            f"the artifact was calibrated for a model that answers {calibration.task}, and "
            f"graphs.json says {rung_set.task}; collect and fit again"
        )
    settings.check_reference(calibration.reference_answers)
    answers = checked_answers(calibration_file, calibration)
    preprocessing = _preprocessing(rung_set, calibration)
    with folder_beside(out) as folder:
        # A child, because a temporary directory itself is closed to other users.
        fresh = folder / "repository"
        _fill(fresh, rung_set, calibration, preprocessing, settings)
        place_answers(answers, fresh / "router/1")
        manifest.write(fresh, live=1)
        if out.exists():
            out.rename(folder / "replaced")
        fresh.rename(out)
    return out


def _audits_by_reference(calibration: Calibration, settings: Settings) -> bool:
    """Whether there is an audit, and it must ask another model than the rungs."""
    audited = settings.audit_fraction > 0 and calibration.threshold is not None
    return audited and not calibration.is_about_full_rung


def _check_reference(rung_set: GraphSet, calibration: Calibration) -> None:
    if calibration.reference is None:
        raise RepositoryError(
            "--audit-fraction: the artifact is about the full model and, being of an earlier "
            "release, does not say which file that is; run python -m calibration fit again"
        )
    if rung_set.reference_record is None:
        raise RepositoryError(
            "--audit-fraction: the artifact is about the full model, and graphs.json names no "
            "reference; give the --onnx folder that it was calibrated with"
        )
    calibration.check_rungs({**rung_set.files, REFERENCE_MODEL: rung_set.reference.file})


def _is_assembled(folder: Path) -> bool:
    return (folder / manifest.NAME).is_file()


def _preprocessing(rung_set: GraphSet, calibration: Calibration) -> Preprocessing:
    try:
        preprocessing = Preprocessing.from_dict(rung_set.preprocessing)
    except PreprocessingError as error:
        raise RepositoryError(
            f"the preprocessing in graphs.json cannot be carried out ({error}); run "
            "python -m export rungs again"
        ) from None
    if rung_set.preprocessing_sha256() != calibration.preprocessing_sha256:
        raise RepositoryError(
            "the preprocessing in graphs.json is not the one that was calibrated; "
            "collect and fit again, or restore graphs.json"
        )
    check_imaging(calibration, ROOT / "imaging")
    return preprocessing


def check_imaging(calibration: Calibration, folder: Path) -> None:
    """Refuse to serve other tensors than those that were calibrated.

    Args:
        calibration: the artifact.
        folder: of the code that is deployed, `imaging/` or a copy of it.

    Raises:
        RepositoryError: the artifact's tensors were made by other code.
    """
    if calibration.imaging_sha256 != code_sha256(folder):
        raise RepositoryError(
            f"{folder} is not the code that decoded the images for this calibration, so images may "
            "become other tensors; collect and fit again"
        )


def _fill(
    repository: Path,
    rung_set: GraphSet,
    calibration: Calibration,
    preprocessing: Preprocessing,
    settings: Settings,
) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "model_repository", repository, ignore=ignore)
    shutil.copytree(ROOT / "imaging", repository / "preprocess/1/imaging", ignore=ignore)
    complete_router(repository / "router/1", calibration)
    path = repository / "preprocess/1/preprocessing.json"
    path.write_text(json.dumps(preprocessing.to_dict(), indent=2) + "\n")
    if rung_set.labels:
        (repository / "labels.txt").write_text("\n".join(rung_set.labels) + "\n")
    for name, graph in ((LOW, rung_set.low), (HIGH, rung_set.high)):
        version = repository / name / "1"
        _place(graph, version, repository)
        # The ensembles' stay: an empty version directory would not survive git or object stores.
        (repository / name / "1" / ".gitkeep").unlink(missing_ok=True)
    audits = _audits_by_reference(calibration, settings)
    if audits:
        _place(rung_set.reference, repository / REFERENCE_MODEL / "1", repository)
        source, target = repository / HIGH / "config.pbtxt", repository / REFERENCE_MODEL
        shutil.copyfile(source, target / "config.pbtxt")  # it is configured as the full rung is
    for path in repository.glob("*/config.pbtxt"):
        model, message = path.parent.name, config.read(path)
        settings.configure(model, message)
        if model in (*RUNGS, REFERENCE_MODEL):
            batches = AUDIT_BATCHES if model == REFERENCE_MODEL else WARMUP_BATCHES
            _warm_up(message, rung_set.image_shape, batches)
        if message.HasField("ensemble_scheduling") and rung_set.classes is None:
            _drop_logits(message)
        if model == "adaptive_tensor":
            message.input[0].dims[:] = rung_set.image_shape
        if model == "router":
            for key, value in answer_parameters(calibration).items():
                config.set_parameter(message, key, value)
        path.write_text(config.text(message))


def answer_parameters(calibration: Calibration) -> dict[str, str]:
    """What the router's config tells clients about its answers."""
    threshold = calibration.chosen_by.get("label_threshold", LABEL_THRESHOLD)
    return {"task": calibration.task or "", "label_threshold": repr(float(threshold))}


def complete_router(version: Path, calibration: Calibration) -> None:
    """Put what `model.py` needs beside it: the core, as it is now, and the artifact."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "routing", version / "routing", ignore=ignore)
    calibration.save(version / "calibration.json")


def checked_answers(artifact: Path, calibration: Calibration) -> Path | None:
    """The file of reference answers that belongs to an artifact; None where it names none.

    Raises:
        RepositoryError: it is missing, or not the one that the artifact names.
    """
    if calibration.reference_answers is None:
        return None
    try:
        ReferenceAnswers.load(answers_path(artifact), calibration)
    except AnswersError as error:
        raise RepositoryError(str(error)) from None
    return answers_path(artifact)


def place_answers(answers: Path | None, version: Path) -> None:
    """Put reference answers, where there are any, beside the artifact of a router's version."""
    if answers is not None:
        shutil.copyfile(answers, answers_path(version / "calibration.json"))


def _place(graph: Graph, version: Path, repository: Path) -> None:
    """A graph as a model's version; weights that several share lie once on disk."""
    version.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(graph.file, version / "model.onnx")
    if graph.record.weights_sha256 is None:
        return
    placed = [repository / name / "1" / WEIGHTS for name in RUNGS]
    there = next((file for file in placed if file.exists()), None)
    if there is None:
        shutil.copyfile(graph.file.with_name(WEIGHTS), version / WEIGHTS)
    else:
        link_or_copy(there, version / WEIGHTS)  # Triton refuses a symbolic link out of the version


def _warm_up(
    message: ModelConfig, image_shape: tuple[int, int, int], batches: tuple[int, ...]
) -> None:
    for batch in batches:
        sample = message.model_warmup.add(name=f"batch of {batch}", batch_size=batch)
        image = sample.inputs["image"]
        image.data_type, image.zero_data = DataType.TYPE_FP32, True
        image.dims.extend(image_shape)


def _drop_logits(ensemble: ModelConfig) -> None:
    """Take what a model without a head does not answer out of an ensemble."""
    kept = [output for output in ensemble.output if output.name != "logits"]
    del ensemble.output[:]
    ensemble.output.extend(kept)
    for step in ensemble.ensemble_scheduling.step:
        step.output_map.pop("logits", None)
