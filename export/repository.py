"""Assemble a deployable model repository from code, rungs and artifact.

    build/onnx/*.onnx, graphs.json                 ─┐
    build/calibration/calibration.json ─────────────┼─► build/model_repository/ + MANIFEST.json
    model_repository/, routing/, imaging/ ──────────┘

Assembling twice from the same inputs gives identical bytes. The new repository is built beside the
old one and takes its place only when it is complete.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from bundle import config, labels, manifest
from bundle.graphs import HIGH, LOW, Graph, GraphSet
from bundle.placing import folder_beside, link_or_copy
from export.errors import UsageError
from imaging import Preprocessing, PreprocessingError, code_sha256
from routing import (
    REFERENCE_MODEL,
    RUNGS,
    WEIGHTS,
    AnswersError,
    Calibration,
    ReferenceAnswers,
    answers_path,
    threshold_text,
)
from routing.fidelity import LABEL_THRESHOLD
from routing.reference import NONE_STORED

ROOT = Path(__file__).resolve().parent.parent
# Batch sizes the rungs run before they report ready: a lone request, and a batch as it forms
# under load. Larger ones cost seconds of start-up on a CPU.
WARMUP_BATCHES = (1, 8)
AUDIT_BATCHES = (1,)  # the audit asks about one image at a time
NO_BYTECODE = shutil.ignore_patterns("__pycache__", "*.pyc")
MAX_BATCH_SIZE = 32  # of every model, as written in model_repository/
# Triton's classification extension takes a class's name from the very model that is asked.
ANSWERING = ("adaptive_vit", "adaptive_tensor", "router")


class RepositoryError(ValueError):
    """The repository cannot be assembled. One line that says what to do."""


@dataclass(frozen=True)
class RepositorySettings:
    """How an assembled repository behaves: what an operator chooses.

    Each becomes a number or a word in a `config.pbtxt` of `model_repository/`, whose comments say
    what it does.

    Attributes:
        intra_op_threads: CPU threads of each rung's instance.
        instances: of each rung, where it runs on a CPU.
        max_queue: requests that may wait, in front of each model.
        on_high_failure: answer of an image whose full rung failed.
        high_timeout_ms: how long one call of the full rung may take.
        client_parameters: what a request's own `policy` and `threshold` may change.
        degrade_queue_depth: images of one batch of the router that had to wait from which on the
            threshold rises, at most `MAX_BATCH_SIZE`; 0: never.
        degrade_threshold: where it arrives when a full batch has waited; oracle units, above the
            calibrated one.
        audit_fraction: share of the images that the full rung checks, 0..1.
        reference_check: what becomes of reference answers that the server does not give.
        live_folder: where a router that live traffic certifies writes its evidence; empty: in a
            folder beside the repository, of its name and `.live`.
    """

    intra_op_threads: int = 1
    instances: int = 1
    max_queue: int = 64
    on_high_failure: Literal["error", "low"] = "error"
    high_timeout_ms: int = 10_000
    client_parameters: Literal["careful", "any"] = "careful"
    degrade_queue_depth: int = 0
    degrade_threshold: float | None = None
    audit_fraction: float = 0.0
    reference_check: Literal["off", "warn", "refuse"] = "warn"
    live_folder: str = ""

    def check(self, calibration: Calibration) -> None:
        """Refuse what makes no sense with an artifact.

        Raises:
            UsageError: naming the option.
        """
        if self.reference_check == "refuse" and calibration.reference_answers is None:
            raise UsageError(f"--reference-check refuse: {NONE_STORED}; fit again")
        if calibration.is_live:
            if self.client_parameters != "careful":
                raise UsageError(
                    "--client-parameters any would let clients choose what is evidence; live "
                    "certificates need careful"
                )
            if self.audit_fraction:
                raise UsageError("--audit-fraction: a live repository audits by itself")
        elif self.live_folder:
            raise UsageError("--live-folder goes with --live")
        raised, threshold = self.degrade_threshold, calibration.threshold
        if (self.degrade_queue_depth > 0) != (raised is not None):
            raise UsageError("--degrade-queue-depth and --degrade-threshold go together")
        if raised is None:
            return
        if threshold is None:
            raise UsageError(
                "--degrade-threshold needs an artifact with a threshold; this one always escalates"
            )
        if not (math.isfinite(raised) and raised > threshold):
            raise UsageError(
                f"--degrade-threshold {threshold_text(raised)} must be finite and above the "
                f"calibrated threshold {threshold_text(threshold)}: under pressure fewer images "
                "escalate"
            )

    def configure(self, model: str, message: ModelConfig) -> None:
        """Write these settings into a model's configuration."""
        if message.HasField("dynamic_batching"):  # an ensemble queues nothing itself
            message.dynamic_batching.default_queue_policy.max_queue_size = self.max_queue
        if model in (*RUNGS, REFERENCE_MODEL):
            config.set_parameter(message, "intra_op_thread_count", str(self.intra_op_threads))
        if model in RUNGS:
            message.instance_group[0].count = self.instances
        if model == "router":
            raised = self.degrade_threshold
            for key, value in {
                "on_high_failure": self.on_high_failure,
                "high_timeout_ms": str(self.high_timeout_ms),
                "client_parameters": self.client_parameters,
                "degrade_queue_depth": str(self.degrade_queue_depth),
                "degrade_threshold": "" if raised is None else repr(raised),
                "audit_fraction": f"{self.audit_fraction:g}",
                "reference_check": self.reference_check,
                "live_folder": self.live_folder,
            }.items():
                config.set_parameter(message, key, value)


def assemble(
    graphs: GraphSet,
    calibration_file: Path,
    out: Path,
    settings: RepositorySettings | None = None,
) -> Path:
    """Assemble the repository.

    Args:
        graphs: the exported graphs.
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
    settings = settings or RepositorySettings()
    is_assembled = (out / manifest.NAME).is_file()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not is_assembled)):
        raise RepositoryError(f"{out} exists and is no assembled repository; choose another --out")
    calibration = Calibration.load(calibration_file)
    calibration.check_rungs(graphs.files)
    settings.check(calibration)
    # Whether there is an audit, and it must ask another model than the rungs.
    audits = settings.audit_fraction > 0 and calibration.threshold is not None
    audits_by_reference = audits and not calibration.is_about_full_rung
    if audits_by_reference:
        _check_reference(graphs, calibration)
    if calibration.task != graphs.task:
        raise RepositoryError(
            f"the artifact was calibrated for a model that answers {calibration.task}, and "
            f"graphs.json says {graphs.task}; collect and fit again"
        )
    answers = checked_answers(calibration_file, calibration)
    preprocessing = _preprocessing(graphs, calibration)
    with folder_beside(out) as folder:
        fresh = folder / "repository"
        shutil.copytree(ROOT / "model_repository", fresh, ignore=NO_BYTECODE)
        shutil.copytree(ROOT / "imaging", fresh / "preprocess/1/imaging", ignore=NO_BYTECODE)
        path = fresh / "preprocess/1/preprocessing.json"
        path.write_text(json.dumps(preprocessing.to_dict(), indent=2) + "\n")
        complete_router(fresh / "router/1", calibration, answers)
        if graphs.labels:
            for folder_of_labels in (fresh, *(fresh / model for model in ANSWERING)):
                labels.write(folder_of_labels, graphs.labels)
        for name, graph in ((LOW, graphs.low), (HIGH, graphs.high)):
            _place(graph, fresh / name / "1", fresh)
            # The ensembles' stay: an empty version directory would not survive git.
            (fresh / name / "1" / ".gitkeep").unlink(missing_ok=True)
        if audits_by_reference:
            _place(graphs.reference, fresh / REFERENCE_MODEL / "1", fresh)
            # It is configured as the full rung is.
            shutil.copyfile(fresh / HIGH / "config.pbtxt", fresh / REFERENCE_MODEL / "config.pbtxt")
        _configure(fresh, graphs, calibration, settings)
        manifest.write(fresh, live=1)
        if out.exists():
            out.rename(folder / "replaced")
        fresh.rename(out)
    return out


def _check_reference(graphs: GraphSet, calibration: Calibration) -> None:
    if calibration.reference is None:
        raise RepositoryError(
            "--audit-fraction: the artifact is about the full model and, being of an earlier "
            "release, does not say which file that is; run python -m calibration fit again"
        )
    if graphs.reference_record is None:
        raise RepositoryError(
            "--audit-fraction: the artifact is about the full model, and graphs.json names no "
            "reference; give the --onnx folder that it was calibrated with"
        )
    calibration.check_rungs({**graphs.files, REFERENCE_MODEL: graphs.reference.file})


def _preprocessing(graphs: GraphSet, calibration: Calibration) -> Preprocessing:
    try:
        preprocessing = Preprocessing.from_dict(graphs.preprocessing)
    except PreprocessingError as error:
        raise RepositoryError(
            f"the preprocessing in graphs.json cannot be carried out ({error}); run "
            "python -m export rungs again"
        ) from None
    if graphs.preprocessing_sha256() != calibration.preprocessing_sha256:
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


def _configure(
    repository: Path, graphs: GraphSet, calibration: Calibration, settings: RepositorySettings
) -> None:
    for path in repository.glob("*/config.pbtxt"):
        model, message = path.parent.name, config.read(path)
        settings.configure(model, message)
        if model in (*RUNGS, REFERENCE_MODEL):
            for batch in AUDIT_BATCHES if model == REFERENCE_MODEL else WARMUP_BATCHES:
                sample = message.model_warmup.add(name=f"batch of {batch}", batch_size=batch)
                image = sample.inputs["image"]
                image.data_type, image.zero_data = DataType.TYPE_FP32, True
                image.dims.extend(graphs.image_shape)
        if message.HasField("ensemble_scheduling") and graphs.classes is None:
            _drop_logits(message)
        if model == "adaptive_tensor":
            message.input[0].dims[:] = graphs.image_shape
        if model in ANSWERING and graphs.labels:
            _name_classes(message, graphs)
        if model == "router":
            for key, value in answer_parameters(calibration).items():
                config.set_parameter(message, key, value)
        path.write_text(config.text(message))


def _name_classes(message: ModelConfig, graphs: GraphSet) -> None:
    """Give the logits the file of their names; the router's are declared here for its sake."""
    logits = next((output for output in message.output if output.name == "logits"), None)
    if logits is None:
        logits = message.output.add(name="logits", data_type=DataType.TYPE_FP32)
        logits.dims.append(graphs.classes)
    logits.label_filename = labels.NAME


def answer_parameters(calibration: Calibration) -> dict[str, str]:
    """What the router's config tells clients about its answers."""
    threshold = calibration.chosen_by.get("label_threshold", LABEL_THRESHOLD)
    return {"task": calibration.task or "", "label_threshold": repr(float(threshold))}


def complete_router(version: Path, calibration: Calibration, answers: Path | None) -> None:
    """Put what `model.py` needs beside it: the core as it is now, the artifact and its answers."""
    shutil.copytree(ROOT / "routing", version / "routing", ignore=NO_BYTECODE)
    calibration.save(version / "calibration.json")
    if answers is not None:
        shutil.copyfile(answers, answers_path(version / "calibration.json"))


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


def _drop_logits(ensemble: ModelConfig) -> None:
    """Take what a model without a head does not answer out of an ensemble."""
    kept = [output for output in ensemble.output if output.name != "logits"]
    del ensemble.output[:]
    ensemble.output.extend(kept)
    for step in ensemble.ensemble_scheduling.step:
        step.output_map.pop("logits", None)
