"""The artifact that a repository starts with where live traffic is to certify its threshold.

It has no threshold, so every image goes to the full rung; the cheap one answers beside it, and
`python -m calibration live` certifies from what the router writes of both. The score needs no
images: it is the signal itself, in its own units.
"""

from __future__ import annotations

import numpy as np

from bundle.fidelity import FidelityLoss
from bundle.graphs import GraphSet
from bundle.prints import encode, no_looks
from export.errors import UsageError
from imaging import code_sha256
from routing import Calibration, ScoreMap, answer_depends_on_batch
from routing.calibration import FULL_RUNG, LIVE

# By what the model answers: the simplest signal that needs no coefficients that images teach.
SIGNALS = {"classes": "margin", "labels": "label_margin"}
OTHERWISE = "cls_path"  # its sign and its range differ by model: the first images teach those
AUDIT_FLOOR = 0.02


def live_artifact(
    graphs: GraphSet,
    loss: FidelityLoss,
    max_risk: float,
    confidence: float = 0.9,
    audit_floor: float = AUDIT_FLOOR,
) -> Calibration:
    """Make the artifact.

    Args:
        graphs: the exported graphs.
        loss: when a cheap answer is not acceptable.
        max_risk: ε, the largest share of images with such an answer that is acceptable, 0..1.
        confidence: 1 - δ, of all thresholds that are ever certified, however often one looks.
        audit_floor: the share of the images that both rungs go on answering, 0..1.

    Raises:
        UsageError: a goal that cannot be meant, or graphs about which nothing can be certified so.
    """
    if not 0 < max_risk < 1:
        raise UsageError(f"--max-risk {max_risk} is a share of images: more than 0 and less than 1")
    if not 0.5 <= confidence < 1:
        raise UsageError(
            f"--confidence {confidence} is a probability: at least 0.5 and less than 1"
        )
    if not 0 < audit_floor <= 1:
        raise UsageError(f"--audit-floor {audit_floor} is a share of images: more than 0, up to 1")
    if graphs.reference_record is not None:
        raise UsageError(
            f"--live starts with exact answers, and the full rung is {graphs.high.record.recipe}, "
            "which is not the full model; export rungs whose --high is"
        )
    for name, rung in graphs.rungs.items():
        if (reason := answer_depends_on_batch(rung.recipe)) is not None:
            raise UsageError(
                f"--live: {name} is {rung.recipe}, and {reason}; export it with int8=static"
            )
    signal = SIGNALS.get(graphs.task or "", OTHERWISE)
    goal = {"epsilon": max_risk, "confidence": confidence}
    return Calibration(
        backbone=graphs.backbone,
        rungs=graphs.rungs,
        image_shape=graphs.image_shape,
        preprocessing_sha256=graphs.preprocessing_sha256(),
        imaging_sha256=code_sha256(),
        embedding_dim=graphs.embedding_dim,
        layer_dim=graphs.layer_dim,
        layers=graphs.low_layers,
        classes=graphs.classes,
        signal=signal,
        coefficients={"cut": np.array([loss.label_cut])} if signal == "label_margin" else {},
        score_map=ScoreMap(1, (0.0, 1.0), (0.0, 1.0)),
        threshold=None,
        chosen_by={
            **loss.to_dict(),
            "max_risk": max_risk,
            "confidence": confidence,
            "method": LIVE,
            "signal": signal,
            "audit_share": 1.0,
            "audit_floor": audit_floor,
        },
        certificate={
            "certified": False,
            "method": LIVE,
            **goal,
            **loss.to_dict(),
            "signal": signal,
            "n": 0,
            "errors": 0,
            "reference": FULL_RUNG,
            "statement": "Nothing is certified yet: every image goes to the full rung until "
            "enough of the live traffic has been audited.",
        },
        data={
            "source": "live traffic",
            "images": 0,
            "seed": 0,
            "group_by": "source",
            "exported_by": graphs.release,
            "image_prints": encode([], no_looks(0)),
        },
        task=graphs.task,
    )
