"""What is asked for of an export, and the images that a head or the ranges of int8 learn from.

Needs no torch, which takes seconds to import.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.prints import Looks, encode, look_of
from bundle.recipe import Recipe
from client.files import FilesError, find_files, shown
from export.errors import UsageError
from imaging import ImageError, Preprocessing, decode, pixels_sha256

DEFAULT_OPSET = 20  # the first with Gelu as one node, which int8 rungs gain a tenth from
# Parity with torch: FP32 rounding through a dozen blocks, summed in another order, is about 3e-5 at
# worst on outputs near 20 (static-vit), 1.5e-5 for DINOv2 ViT-S.
DEFAULT_RTOL = 1e-4
DEFAULT_ATOL = 1e-4
# Scale and centre of the published gates, by --model; of a file, only its name says them.
AVIT_GATES = {"avit-tiny": (10, 30), "avit-small": (10, 75)}
MOST = 64  # ranges settle after some tens of images, and each costs a run of the model


@dataclass(frozen=True, eq=False)
class LearnedImages:
    """Images as the model sees them.

    Attributes:
        tensors: FP32 (n, 3, H, W), n at least 1.
        prints: of these images, `bundle.prints.encode`, so that calibration leaves them out.
    """

    tensors: NDArray[np.float32]
    prints: str

    @classmethod
    def read(
        cls,
        folder: Path,
        preprocessing: Preprocessing,
        say: Callable[[str], None] = lambda line: None,
    ) -> LearnedImages:
        """Read at most `MOST` images, evenly spread over a folder and the folders in it.

        What is skipped there is told to `say`; see `client.files.find_files`.

        Raises:
            UsageError: no such folder, or none of its files is an image.
        """
        if not folder.is_dir():
            raise UsageError(f"--fit-images {shown(folder)}: no such directory")
        try:
            files = find_files(folder)
        except FilesError as error:
            raise UsageError(f"--fit-images: {error}") from None
        chosen = [files.names[row] for row in spread(len(files.names))] if files.names else []
        found = cls.of(((folder / name).read_bytes() for name in chosen), preprocessing)
        if found is None:
            said = f"no image there can be read{'; ' if files.note else ''}{files.note}"
            raise UsageError(f"--fit-images {shown(folder)}: {said}")
        if files.note:
            say(files.note)
        return found

    @classmethod
    def of(cls, images: Iterable[bytes], preprocessing: Preprocessing) -> LearnedImages | None:
        """Decode images, those that are none left out; None where not one is an image."""
        found = []
        for data in images:
            with contextlib.suppress(ImageError):
                found.append(see(data, preprocessing))
        if not found:
            return None
        tensors, hashes, looks = zip(*found, strict=True)
        return cls(np.stack(tensors), encode(hashes, np.stack(looks)))


@dataclass(frozen=True)
class Texts:
    """Labels in words, of which CLIP and SigLIP make a zero-shot head.

    Attributes:
        labels: at least two, each another.
        prompt: the sentence around a label, which stands for its `{}`; None: the family's usual.

    Raises:
        UsageError: labels or a prompt of which no head can be made.
    """

    labels: tuple[str, ...]
    prompt: str | None = None

    def __post_init__(self) -> None:
        """Refuse before a model is loaded."""
        if len(self.labels) < 2:
            raise UsageError(
                f'--labels names {len(self.labels)}; give two or more, as "cat,dog", or a file '
                "with one on each line"
            )
        twice = [label for label, count in Counter(self.labels).items() if count > 1]
        if twice:
            raise UsageError(f"--labels names {twice[0]!r} twice; once is enough")
        if self.prompt is not None and "{}" not in self.prompt:
            raise UsageError(f"--prompt {self.prompt!r} has no {{}}, where the label goes")

    @classmethod
    def read(cls, labels: str, prompt: str | None) -> Texts:
        """Labels with commas between them, or the name of a file with one on each line.

        Raises:
            UsageError: as above, or the file cannot be read.
        """
        file = Path(labels)
        with contextlib.suppress(OSError, ValueError):  # a text may be too long for a name
            if file.is_file():
                return cls(_labels(file.read_text("utf-8-sig").splitlines()), prompt)
        if "," not in labels and file.suffix:
            raise UsageError(f"--labels {labels}: no such file, or it is no text in UTF-8")
        return cls(_labels(labels.split(",")), prompt)


def _labels(parts: Iterable[str]) -> tuple[str, ...]:
    """Spaces around and between words count once; what is empty does not count."""
    return tuple(filter(None, (" ".join(part.split()) for part in parts)))


def read_gate(*texts: str) -> tuple[float, float] | None:
    """Scale and centre of a gate by their texts; None: they are not two numbers that make one."""
    try:
        scale, centre = map(float, texts)
    except ValueError:
        return None
    return (scale, centre) if 0 < scale < math.inf and math.isfinite(centre) else None


def spread(count: int, most: int = MOST) -> NDArray[np.intp]:
    """Which of `count` images to take where at most so many are wanted: evenly spread ones."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.intp))


def see(data: bytes, preprocessing: Preprocessing) -> tuple[NDArray[np.float32], str, Looks]:
    """The tensor of an encoded image, and the hash of its pixels and its look.

    Raises:
        ImageError: it cannot be read, or not be preprocessed.
    """
    image = decode(data)
    return preprocessing(image), pixels_sha256(image), look_of(image)


@dataclass(frozen=True)
class GraphsRequest:
    """Graphs to be exported together; None where the backbone's own default applies.

    Attributes:
        out: directory to write to.
        low: recipe of the cheap rung.
        high: recipe of the full rung; its resolution is that of `image`.
        beside: recipes of graphs to compare with, exported too.
        head_images: one folder per class, to fit a linear head on.
        fit_images: what `int8=static` learns from; the head's images by default.
        task: what the model's own head answers, see `routing.TASKS`.
        adds: whether graphs that lie in `out` stay, and only those are exported that are missing
            there, or that learned from other images. No weights are shared then, so that what a
            graph is does not depend on those beside it. That the folder is of this model and head,
            exported by these libraries, is up to the caller.
        opset: ONNX opset, 18 to 21.
        rtol: parity tolerance, relative.
        atol: parity tolerance, absolute.

    Raises:
        UsageError: something that is refused whatever the model.
    """

    out: Path
    low: Recipe | None = None
    high: Recipe | None = None
    beside: tuple[Recipe, ...] = ()
    head_images: Path | None = None
    fit_images: Path | LearnedImages | None = None
    task: str | None = None
    adds: bool = False
    opset: int = DEFAULT_OPSET
    rtol: float = DEFAULT_RTOL
    atol: float = DEFAULT_ATOL

    def __post_init__(self) -> None:
        """Refuse before a model is loaded."""
        if self.task is not None and self.head_images is not None:
            raise UsageError("--task is about the model's own head; --head linear answers classes")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out} is a file; give a directory")
        for recipe in (self.low, self.high, *self.beside):
            if recipe is None:
                continue
            if recipe.precision == "int8=static" and not (self.fit_images or self.head_images):
                raise UsageError(
                    f"recipe {recipe}: int8=static learns ranges from images; give --fit-images DIR"
                )
            if recipe.align:
                raise UsageError(
                    f"recipe {recipe}: align is fitted on what the graph answers; export without "
                    "it, then python -m calibration collect, python -m calibration align and "
                    "python -m export align"
                )
