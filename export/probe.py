"""A linear head for a backbone that has none: logistic regression on the full rung's embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from bundle.prints import Looks, encode, look_of
from bundle.recipe import Recipe
from export.backbones import Backbone
from export.errors import UsageError
from export.progress import Steps
from imaging import ImageError, decode, pixels_sha256

# torch is fastest on a CPU at 4 to 16 images of 224 px (51 ms each on 2 cores; ONNX Runtime 56 ms).
BATCH = 16
MAX_UNREADABLE_SHARE = 0.05
# scikit-learn's own defaults; on standardised embeddings C = 1 regularises mildly.
INVERSE_REGULARISATION = 1.0
MAX_ITERATIONS = 2000


@dataclass(frozen=True)
class LabelledImages:
    """The files of a folder with one folder per class.

    Attributes:
        root: the folder.
        labels: class names, sorted: the folders' names.
        files: every file of every class, in the order of the labels.
        classes: index into `labels`, one per file.
    """

    root: Path
    labels: tuple[str, ...]
    files: tuple[Path, ...]
    classes: tuple[int, ...]

    @classmethod
    def scan(cls, root: Path) -> LabelledImages:
        """List a folder; hidden files and folders are left out.

        Raises:
            UsageError: no such folder, fewer than two classes, or a class without files.
        """
        if not root.is_dir():
            raise UsageError(f"--images {root}: no such directory")
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if len(folders) < 2:
            raise UsageError(
                f"--images {root} has {len(folders)} class folders; a linear head needs at least "
                "two, one folder of images per class"
            )
        files: list[Path] = []
        classes: list[int] = []
        for index, folder in enumerate(folders):
            found = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != ".")
            if not found:
                raise UsageError(f"--images: the class folder {folder.name} is empty")
            files += found
            classes += [index] * len(found)
        return cls(root, tuple(folder.name for folder in folders), tuple(files), tuple(classes))


@dataclass(frozen=True)
class Probe:
    """A fitted linear head.

    Attributes:
        linear: FP32, embedding (B, D) to logits (B, C).
        labels: one per class.
        record: how it was fitted, ready for JSON.
        skipped: (file below the images folder, why it could not be read).
        prints: of the images it was fitted on, `bundle.prints.encode`.
    """

    linear: nn.Linear
    labels: tuple[str, ...]
    record: dict[str, Any]
    skipped: tuple[tuple[str, str], ...]
    prints: str


def fit_probe(backbone: Backbone, px: int, images: LabelledImages, steps: Steps) -> Probe:
    """Embed the images with the full rung and fit a logistic regression.

    Args:
        backbone: its own head, if any, is not used.
        px: the full rung's resolution.
        images: what to fit on.
        steps: shows the progress.

    Raises:
        UsageError: more than 5 % of the files cannot be read, or all files of one class.
    """
    reader = _Reader(backbone, px, images, steps)
    embeddings = _embed(backbone, px, reader)
    reader.check_readable()
    classes = np.array(reader.classes)
    with steps.step(f"fit the linear head on {len(classes)} embeddings"):
        weight, bias, accuracy = fit_linear(embeddings, classes)
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        linear.bias.copy_(torch.from_numpy(bias))
    record = {
        "kind": "linear",
        "method": "logistic regression on standardised embeddings",
        "inverse_regularisation": INVERSE_REGULARISATION,
        "px": px,
        "images": len(classes),
        "images_sha256": reader.digest.hexdigest(),
        "skipped": [name for name, _ in reader.skipped],
        "training_accuracy": accuracy,
    }
    return Probe(linear.eval(), images.labels, record, tuple(reader.skipped), reader.prints())


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


class _Reader:
    """Decodes and preprocesses the files in order, noting those that cannot be read."""

    def __init__(self, backbone: Backbone, px: int, images: LabelledImages, steps: Steps) -> None:
        self.images = images
        self.steps = steps
        self.progress_text = f"embed {len(images.files)} images at {px} px"
        self.preprocessing = backbone.preprocessing(px)
        self.classes: list[int] = []
        self.skipped: list[tuple[str, str]] = []
        self.digest = hashlib.sha256()
        self.hashes: list[str] = []
        self.looks: list[Looks] = []

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        labelled = list(zip(self.images.files, self.images.classes, strict=True))
        for file, index in self.steps.track(labelled, self.progress_text, len(labelled)):
            name = file.relative_to(self.images.root).as_posix()
            try:
                data = file.read_bytes()
                image = decode(data)
                pixels = self.preprocessing(image)
            except (ImageError, OSError) as error:
                self.skipped.append((name, str(error)))
                continue
            self.digest.update(f"{name}\0{len(data)}\0".encode() + data)
            self.classes.append(index)
            self.hashes.append(pixels_sha256(image))
            self.looks.append(look_of(image))
            yield pixels

    def prints(self) -> str:
        """Of the images read, at least one."""
        return encode(self.hashes, np.stack(self.looks))

    def check_readable(self) -> None:
        """Raise if too much of the folder could not be read."""
        total = len(self.images.files)
        if len(self.skipped) > MAX_UNREADABLE_SHARE * total:
            name, reason = self.skipped[0]
            raise UsageError(
                f"--images {self.images.root}: {len(self.skipped)} of {total} files cannot be read "
                f"(at most {MAX_UNREADABLE_SHARE:.0%} may be), such as {name}: {reason}"
            )
        empty = set(range(len(self.images.labels))) - set(self.classes)
        if empty:
            names = ", ".join(self.images.labels[index] for index in sorted(empty))
            raise UsageError(f"--images: no readable image of class {names}")


@torch.inference_mode()
def _embed(backbone: Backbone, px: int, reader: _Reader) -> NDArray[np.float32]:
    """Full-rung embeddings of all readable images, (N, D)."""
    module = backbone.rung(Recipe(px)).eval()
    pixels = iter(reader)
    embeddings = [np.empty((0, backbone.embedding_dim), np.float32)]
    while batch := list(islice(pixels, BATCH)):
        embedding, *_ = module(torch.from_numpy(np.stack(batch)))
        embeddings.append(embedding.numpy())
    return np.concatenate(embeddings)
