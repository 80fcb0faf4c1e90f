"""A linear head for a backbone that has none: logistic regression on the full rung's embeddings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from bundle.graphs import GraphSet
from bundle.head import LinearHead
from bundle.prints import Looks, encode
from bundle.recipe import Recipe
from client.files import FilesError, FoundFiles, find_files, shown
from export.backbones import Backbone
from export.errors import UsageError
from export.request import see
from imaging import ImageError
from report.terminal import Bars

# torch is fastest on a CPU at 4 to 16 images of 224 px (51 ms each on 2 cores; ONNX Runtime 56 ms).
BATCH = 16
MAX_UNREADABLE_SHARE = 0.05
# scikit-learn's own defaults; on standardised embeddings C = 1 regularises mildly.
INVERSE_REGULARISATION = 1.0
MAX_ITERATIONS = 2000


@dataclass(frozen=True)
class Probe:
    """A fitted linear head.

    Attributes:
        linear: FP32, embedding (B, D) to logits (B, C).
        labels: one per class.
        record: how it was fitted, ready for JSON.
        prints: of the images it was fitted on, `bundle.prints.encode`.
    """

    linear: nn.Linear
    labels: tuple[str, ...]
    record: dict[str, Any]
    prints: str


def fit_probe(backbone: Backbone, px: int, root: Path, bars: Bars) -> Probe:
    """Embed images with the full rung and fit a logistic regression.

    Args:
        backbone: its own head, if any, is not used.
        px: the full rung's resolution.
        root: folder of one folder per class, whose names are the labels; all images below it are
            of that class. See `client.files.find_files`.
        bars: shows the progress, and which files cannot be read.

    Raises:
        UsageError: no such folder, fewer than two classes, a class without a readable image, or
            more than 5 % of the files cannot be read.
    """
    found = _found(root)
    labels, files = _labelled(root, found)
    loose = sum("/" not in name for name in found.names)
    for note in (found.note, f"skipped {loose} images in no class folder" if loose else ""):
        if note:
            bars.say(note)
    preprocessing, module = backbone.preprocessing(px), backbone.rung(Recipe(px)).eval()
    digest = hashlib.sha256()
    embeddings = [np.empty((0, backbone.embedding_dim), np.float32)]
    classes: list[int] = []
    hashes: list[str] = []
    looks: list[Looks] = []
    skipped: list[tuple[str, str]] = []
    with bars.stage(f"embed {len(files)} images at {px} px", len(files)) as bar:
        for first in range(0, len(files), BATCH):
            tensors = []
            for name, index in files[first : first + BATCH]:
                try:
                    data = (root / name).read_bytes()
                    tensor, pixels, look = see(data, preprocessing)
                except (ImageError, OSError) as error:
                    skipped.append((shown(name), str(error)))
                    continue
                head = f"{name}\0{len(data)}\0".encode("utf-8", "surrogateescape")
                digest.update(head + data)
                classes.append(index)
                hashes.append(pixels)
                looks.append(look)
                tensors.append(tensor)
            if tensors:
                with torch.inference_mode():
                    embedding, *_ = module(torch.from_numpy(np.stack(tensors)))
                embeddings.append(embedding.numpy())
            bar.advance(BATCH)
    if len(skipped) > MAX_UNREADABLE_SHARE * len(files):
        name, reason = skipped[0]
        raise UsageError(
            f"--images {root}: {len(skipped)} of {len(files)} files cannot be read (at most "
            f"{MAX_UNREADABLE_SHARE:.0%} may be), such as {name}: {reason}"
        )
    if lost := [label for index, label in enumerate(labels) if index not in set(classes)]:
        raise UsageError(f"--images: no readable image of class {', '.join(lost)}")
    weight, bias, accuracy = fit_linear(np.concatenate(embeddings), np.array(classes))
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        linear.bias.copy_(torch.from_numpy(bias))
    if backbone.classes is not None:
        bars.say(f"the linear head takes the place of the model's own {backbone.classes} classes")
    for name, reason in skipped:
        bars.say(f"skipped {name}: {reason}")
    bars.say(
        f"the linear head knows {len(weight)} classes and gets {accuracy:.1%} of its own training "
        "images right"
    )
    record = {
        "kind": "linear",
        "method": "logistic regression on standardised embeddings",
        "inverse_regularisation": INVERSE_REGULARISATION,
        "px": px,
        "images": len(classes),
        "images_sha256": digest.hexdigest(),
        "skipped": [name for name, _ in skipped],
        "training_accuracy": accuracy,
    }
    return Probe(linear.eval(), labels, record, encode(hashes, np.stack(looks)))


def earlier_probe(graphs: GraphSet) -> Probe:
    """The head that was fitted for earlier graphs, so that others get the same one."""
    head = LinearHead.read(graphs.reference.file)
    assert head is not None and graphs.labels is not None  # as `with_probe` made it
    width, classes = head.weights.shape
    linear = nn.Linear(width, classes)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(head.weights.T.copy()))
        linear.bias.copy_(torch.from_numpy(head.bias))
    return Probe(linear.eval(), graphs.labels, graphs.about["head"], graphs.fitted_on)


def _found(root: Path) -> FoundFiles:
    """The images below a folder."""
    if not root.is_dir():
        raise UsageError(f"--images {shown(root)}: no such directory")
    try:
        return find_files(root)
    except FilesError as error:
        raise UsageError(f"--images: {error}") from None


def _labelled(root: Path, found: FoundFiles) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The classes, and the images below their folders, each with its class's number."""
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
    if len(folders) < 2:
        raise UsageError(
            f"--images {shown(root)} has {len(folders)} class folders; a linear head needs at "
            "least two, one folder of images per class"
        )
    numbers = {name: number for number, name in enumerate(folders)}
    files = [(name, numbers[name.split("/")[0]]) for name in found.names if "/" in name]
    held = {number for _, number in files}
    for folder, number in numbers.items():
        if number not in held:
            why = f"; {found.note}" if found.note else ""
            raise UsageError(f"--images: the class folder {shown(folder)} holds no image{why}")
    return tuple(map(shown, folders)), files


def fit_linear(
    embeddings: NDArray[np.float32], classes: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Fit on standardised embeddings and fold the standardisation into the matrix.

    With z = (e - m) / s, the fitted W z + b equals (W / s) e + (b - (W / s) m).

    Args:
        embeddings: (N, D).
        classes: (N,), each of 0..C-1 at least once.

    Returns:
        weight (C, D) and bias (C,) on raw embeddings, and the accuracy on these same embeddings.
    """
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=INVERSE_REGULARISATION, max_iter=MAX_ITERATIONS)
    )
    raw = embeddings.astype(np.float64)
    model.fit(raw, classes)
    scaler, regression = model[0], model[1]
    weight, bias = regression.coef_, regression.intercept_
    if len(weight) == 1:
        # Two classes share one decision value d; softmax over (-d/2, d/2) is its sigmoid.
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_  # (C, D)
    bias = bias - weight @ scaler.mean_  # (C,)
    return weight, bias, float(model.score(raw, classes))
