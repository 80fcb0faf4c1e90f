"""Triton adapter around `routing`: only translates tensors; every decision is made in `routing`.

Input `image` FP32 [B, 3, H, W]. Outputs `embedding` FP32 [B, D], `logits` FP32 [B, C] (models with
a head), `escalated` BOOL [B, 1], `score` FP32 [B, 1] (`routing.UNSCORED` where there is none),
`degraded` BOOL [B, 1]; all numbers finite.
Request parameters: `policy` (auto, low, high) and `threshold` (a float in oracle units, or its
text), as far as config.pbtxt lets clients go. Requests with the id `routing.PROBE_ID` are in no
audit and no figure about images.
"""

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from .evidence import Evidence
from .hold import Hold
from .live_audit import LiveAudit
from .metrics import Metrics
from .reference_check import ReferenceCheck
from .routing import (
    PROBE_ID,
    REFERENCE_MODEL,
    Allowance,
    Calibration,
    CascadeRequest,
    GoneError,
    RequestError,
    RungError,
    answered_score,
    manifest,
    parse_overrides,
    run_cascade,
)
from .routing.journal import live_folder
from .rung_calls import Budgeted, LateError, call_rung
from .settings import RouterSettings
from .waiting import Waiting


def _version_dir():
    return Path(pb_utils.get_model_dir())


class TritonPythonModel:
    """One instance of `router`."""

    @staticmethod
    def auto_complete_config(config):
        """Declare the tensors that the artifact describes."""
        calibration = Calibration.load(_version_dir() / "calibration.json")
        config.add_input(_tensor("image", "TYPE_FP32", calibration.image_shape))
        config.add_output(_tensor("embedding", "TYPE_FP32", [calibration.embedding_dim]))
        if calibration.classes is not None:
            config.add_output(_tensor("logits", "TYPE_FP32", [calibration.classes]))
        config.add_output(_tensor("escalated", "TYPE_BOOL", [1]))
        config.add_output(_tensor("score", "TYPE_FP32", [1]))
        config.add_output(_tensor("degraded", "TYPE_BOOL", [1]))
        return config

    def initialize(self, args):
        """Load the artifact, refuse files that it was not made with, and start the audit."""
        self.settings = RouterSettings.of(json.loads(args["model_config"]))
        self.calibration = _load_artifact(_version_dir())
        repository = _version_dir().parent.parent
        manifest.verify(repository)
        head = ["logits"] if self.calibration.classes is not None else []
        self.low = partial(call_rung, "vit_low", output_names=["embedding", "cls_layers", *head])
        budget_s = self.settings.high_timeout_s
        ask_high = partial(
            call_rung, "vit_high", output_names=["embedding", *head], timeout_s=budget_s
        )
        self.high = Budgeted("vit_high", ask_high, budget_s)
        ask_reference = partial(
            call_rung, REFERENCE_MODEL, output_names=["embedding", *head], timeout_s=budget_s
        )
        self.waiting = Waiting(self.settings.instances)
        self.hold = Hold()
        high_aside = self.hold.keeping(lambda image: ask_high(pb_utils.Tensor("image", image)))
        version = int(args["model_version"])
        # A version that runs in the shadow of another has no shadow itself.
        candidate = self.settings.shadow_version if self.settings.shadow_version != version else 0
        artifact = manifest.sha256_file(_version_dir() / "calibration.json")
        self.metrics = Metrics(
            str(version), self.calibration, artifact, candidate, self.settings.queue_limit
        )
        _tell_of_higher(repository, version)
        folder = live_folder(repository, self.settings.live_folder)
        self.evidence = Evidence(self.calibration, artifact, version, folder, self.metrics)
        self.audit = LiveAudit(
            self.settings,
            self.calibration,
            _load_candidate(_version_dir().parent / str(candidate), self.calibration)
            if candidate
            else None,
            high_aside,
            self.metrics,
            self.hold.keeping(lambda image: ask_reference(pb_utils.Tensor("image", image)))
            if self.calibration.reference is not None and _has_reference(repository)
            else None,
        )

        # Each instance is a process. One is enough to tell; to refuse, each has to know.
        is_first = args["model_instance_name"].endswith("_0")
        self.reference_check = ReferenceCheck(
            self.settings.reference_check,
            self.calibration,
            _version_dir() / "calibration.json",
            low=self.hold.keeping(lambda image: self.low(pb_utils.Tensor("image", image))),
            high=high_aside,
            report=self.metrics.set_reference_outcome if is_first else None,
        )

    def finalize(self):
        """End the threads and hand on the last counts."""
        self.hold.stop()
        self.reference_check.stop()
        self.audit.stop()
        self.evidence.stop()
        self.metrics.stop()

    def execute(self, requests):
        """Answer all requests with at most one call of each rung."""
        with self.hold.answering():
            return self._execute(requests)

    def _execute(self, requests):
        refusal = self.reference_check.refusal  # once: a thread sets it
        if refusal is not None:
            refused = RungError(refusal, is_outage=True)
            self.metrics.count("requests_total", len(requests), outcome=_outcome(refused))
            return [_response(refused) for _ in requests]
        started = time.perf_counter()
        asked, tensors = [], {}
        allowance = Allowance(self.settings.careful_only, self.evidence.calibration.threshold)
        for request in requests:
            tensor = pb_utils.get_input_tensor_by_name(request, "image")
            image = tensor.as_numpy()
            if image.ndim != 4 or len(image) == 0:  # Triton hands on a batch of none without one
                asked.append(RequestError("the request holds no image; send at least one"))
                continue
            tensors[id(image)] = tensor  # `image` lives in `asked`, so its id stays its own
            try:
                parameters = json.loads(request.parameters() or "{}")
                overrides = parse_overrides(parameters, allowance)
                gone, is_probe = partial(_gone, request, started), request.request_id() == PROBE_ID
                asked.append(CascadeRequest(image, overrides, gone, is_probe))
            except ValueError as error:
                asked.append(RequestError(str(error)))
        sound = [request for request in asked if isinstance(request, CascadeRequest)]
        images = sum(len(request.image) for request in sound)
        waiting = self.waiting.images([request.image for request in sound], started)
        self.metrics.count("images_in_flight", images)
        try:
            answers = iter(self._run(sound, tensors, waiting))
        finally:
            self.metrics.count("images_in_flight", -images)
        results = [r if isinstance(r, RequestError) else next(answers) for r in asked]
        self._take_note(asked, results, time.perf_counter() - started)
        responses = [_response(result) for result in results]
        self.waiting.answered(time.perf_counter())
        return responses

    def _run(self, requests, tensors, waiting):
        def low(image):
            # A lone request's tensor is already in shared memory: hand on that one.
            return self.low(tensors.get(id(image)) or pb_utils.Tensor("image", image))

        def high(image):
            # Always a copy: a call that is given up outlives the requests that it was made for.
            try:
                return self.high(pb_utils.Tensor("image", np.array(image)))
            except RungError as error:
                reason = error.reason if isinstance(error, LateError) else "error"
                self.metrics.count("high_failures_total", reason=reason)
                raise

        return run_cascade(
            requests,
            self.evidence.calibration,
            low=low,
            high=high,
            degrade_on_high_failure=self.settings.degrade_on_high_failure,
            relief=self.settings.relief,
            waiting=waiting,
            decided=self.audit.look,
            audit=self.evidence.audit,
        )

    def _take_note(self, asked, results, duration_s):
        for request, result in zip(asked, results, strict=True):
            self.metrics.count("requests_total", outcome=_outcome(result))
            if isinstance(result, Exception):
                continue
            escalated, degraded = int(result.escalated.sum()), int(result.degraded.sum())
            path = "high" if escalated else "low"
            self.metrics.observe("request_duration_seconds", [duration_s], path=path)
            if request.is_probe:
                continue
            relieved = int(result.relieved.sum())
            audited = int((result.escalated & ~result.wanted).sum())
            # Where there is no threshold the cheap rung is asked for the audit's sake alone.
            by_score = result.escalated & result.wanted & np.isfinite(result.score)
            by_score &= self.evidence.calibration.threshold is not None
            images = self.metrics.count
            images("images_total", len(result.score) - escalated - degraded, path="low")
            images("images_total", escalated - audited, path="high")
            images("images_total", audited, path="audited")
            images("answered_twice_images_total", int(by_score.sum()), reason="score")
            alone = int((result.audited & ~by_score).sum())
            images("answered_twice_images_total", alone, reason="audit")
            images("images_total", degraded, path="degraded")
            images("degraded_images_total", relieved, cause="pressure")
            images("degraded_images_total", degraded - relieved, cause="high_failed")
            self.metrics.observe("score", result.score[np.isfinite(result.score)].tolist())


def _load_artifact(version_dir):
    calibration = Calibration.load(version_dir / "calibration.json")
    repository = version_dir.parent.parent
    names = [*calibration.rungs, *[REFERENCE_MODEL] * _has_reference(repository)]
    calibration.check_rungs({name: repository / name / "1" / "model.onnx" for name in names})
    return calibration


def _tell_of_higher(repository, version):
    # Not refused: a rollout back to a lower version passes through this.
    live = manifest.Manifest.read(repository).live
    if live is not None and version > live:
        pb_utils.Logger.log_warn(
            f"router: router/{version} is loaded above router/{live}, so it answers requests to "
            "the router that pin no version, as an earlier release or an interrupted rollout left "
            "it, or as a rollout that is under way has it"
        )


def _has_reference(repository):
    return (repository / REFERENCE_MODEL).is_dir()


def _load_candidate(version_dir, live):
    candidate = Calibration.load(version_dir / "calibration.json")
    if candidate.rungs != live.rungs:  # the live one's files have been hashed
        raise ValueError(f"router/{version_dir.name}/calibration.json was made with other rungs")
    return candidate


def _tensor(name, data_type, dims):
    return {"name": name, "data_type": data_type, "dims": list(dims)}


def _gone(request, started):
    if request.is_cancelled():
        return GoneError("the client has hung up or its deadline has passed", cancelled=True)
    timeout_us = request.timeout()
    if timeout_us and (time.perf_counter() - started) * 1e6 > timeout_us:
        return GoneError(f"the request's timeout of {timeout_us} microseconds has passed", False)
    return None


def _outcome(result):
    if isinstance(result, RequestError):
        return "invalid"
    if isinstance(result, GoneError):
        return "cancelled" if result.cancelled else "expired"
    if isinstance(result, RungError):
        return "unavailable" if result.is_outage else "failed"
    return "ok"


def _response(result):
    if isinstance(result, Exception):
        codes = pb_utils.TritonError  # not there yet when Triton imports this for auto-complete
        code = {
            "invalid": codes.INVALID_ARG,
            "cancelled": codes.CANCELLED,
            "expired": codes.UNAVAILABLE,
            "unavailable": codes.UNAVAILABLE,
            "failed": codes.INTERNAL,
        }[_outcome(result)]
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(result), code))
    tensors = [pb_utils.Tensor("embedding", result.embedding)]
    if result.logits is not None:
        tensors.append(pb_utils.Tensor("logits", result.logits))
    columns = {
        "escalated": result.escalated,
        "score": answered_score(result.score),
        "degraded": result.degraded,
    }
    for name, column in columns.items():
        tensors.append(pb_utils.Tensor(name, column[:, np.newaxis]))  # (b, 1)
    return pb_utils.InferenceResponse(tensors)
