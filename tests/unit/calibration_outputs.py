"""Made-up outputs of both rungs, of the shape that `onnx_files` exports."""

import hashlib

import numpy as np

from calibration.outputs import Outputs
from routing import RungOutputs
from tests.unit.onnx_files import CLASSES, LAYERS, D


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def make_outputs(rung_set, n=400, seed=0, head=True, group_size=2, unsure_below=1.0):
    """Images whose low and high answers disagree where the low margin is small.

    There the embeddings differ too, by 1 in every dimension; elsewhere they are equal.
    """
    rng = np.random.default_rng(seed)
    low_logits = rng.normal(size=(n, CLASSES)).astype(np.float32) * 3
    ordered = np.sort(low_logits, axis=1)
    unsure = ordered[:, -1] - ordered[:, -2] < unsure_below
    # Another class wins: the largest and the smallest change places.
    high_logits = np.where(unsure[:, None], -low_logits, low_logits)
    low_embedding = rng.normal(size=(n, D)).astype(np.float32)
    layers = rng.normal(size=(n, LAYERS + 1, D)).astype(np.float32)
    layers[:, -1] = low_embedding
    return Outputs(
        low=RungOutputs(low_embedding, layers, low_logits if head else None),
        high=RungOutputs(
            low_embedding + unsure[:, None].astype(np.float32), None, high_logits if head else None
        ),
        labels=high_logits.argmax(axis=1).astype(np.int64),
        names=tuple(f"{i // group_size}/{i}.png" for i in range(n)),
        groups=tuple(str(i // group_size) for i in range(n)),
        hashes=tuple(sha256(f"{seed}-{i}") for i in range(n)),
        rung_hashes={name: rung.sha256 for name, rung in rung_set.rungs.items()},
        preprocessing_sha256=rung_set.preprocessing_sha256(),
        source="/nowhere",
        title="made up",
    )
