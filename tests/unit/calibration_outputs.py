"""Made-up outputs of both rungs, of the shape that `onnx_files` exports."""

import hashlib
from dataclasses import replace

import numpy as np

from bundle import manifest
from bundle.graphs import REFERENCE, Graph
from bundle.prints import no_looks
from calibration.outputs import Made, Outputs
from imaging import code_sha256
from routing import SIGNALS, RungOutputs, RungRecord
from tests.unit.onnx_files import CLASSES, LAYERS, SIZE, D, write_rung

FINGERPRINTS = {"vit_low": "a" * 64, "vit_high": "b" * 64}
CLASS_SIGNALS = [name for name, signal in SIGNALS.items() if signal.applies_to("classes")]


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def outputs_of(low, high, **fields):
    """`Outputs` of what two rungs answer for n images; whatever is not said is made up."""
    names = fields.get("names") or tuple(f"{i}.png" for i in range(len(low)))
    task = None if low.logits is None else "classes"
    made_up = {
        "places": np.arange(len(low)),
        "labels": np.full(len(low), -1),
        "groups": names,
        "hashes": tuple(map(sha256, names)),
        "looks": no_looks(len(low)),
        "made": Made(FINGERPRINTS, "2" * 64, code_sha256(), task),
        "source": "/nowhere",
        "title": "made up",
    }
    return Outputs(low=low, high=high, **{**made_up, **fields, "names": names})


def make_outputs(graph_set, n=400, seed=0, head=True, group_size=2, unsure_below=1.0):
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
    shifted = low_embedding + unsure[:, None].astype(np.float32)
    return outputs_of(
        RungOutputs(low_embedding, layers, low_logits if head else None),
        RungOutputs(shifted, None, high_logits if head else None),
        labels=high_logits.argmax(axis=1).astype(np.int64),
        names=tuple(f"{i // group_size}/{i}.png" for i in range(n)),
        groups=tuple(str(i // group_size) for i in range(n)),
        hashes=tuple(sha256(f"{seed}-{i}") for i in range(n)),
        made=Made.by(graph_set),
    )


def with_reference(graph_set, seed=5):
    """The same rungs, with a third graph as the full model that losses are about."""
    file = graph_set.files["vit_high"].with_name("reference.onnx")
    write_rung(file, seed, graph_set.classes)
    record = RungRecord(SIZE, f"px={SIZE}", manifest.sha256_file(file))
    more = graph_set.adding(Graph("reference", record, file))
    return replace(more, roles={**more.roles, REFERENCE: "reference"})


def with_losing_high(outputs, share, seed=0):
    """What was the full rung becomes the reference; the new one loses this share of images."""
    truth = outputs.high
    lost = np.random.default_rng(seed).uniform(size=len(outputs)) < share
    logits = np.where(lost[:, None], -truth.logits, truth.logits)
    high = RungOutputs(truth.embedding + lost[:, None].astype(np.float32), None, logits)
    return replace(outputs, high=high, reference=truth)
