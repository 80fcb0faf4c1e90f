"""The sample stream: random crops of the photographs that scikit-image and scikit-learn ship.

Real pixels without a download. A crop is drawn by choosing a photograph, a side between 15 % and
100 % of its shorter edge and a position, all uniformly; its label is the photograph's name, which
makes "which photograph is this a crop of" a task with easy and hard images. Crop `i` of seed `s`
is the same on every machine with the same Pillow; different seeds give independent draws.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from .images import ImagesError, SourceImage

MIN_SIDE, MAX_SIDE = 0.15, 1.0  # of the shorter edge
JPEG_QUALITY = 95  # high enough that compression does not decide what is hard

# Photographs and micrographs; drawings, test charts and one half of the stereo pair are left out.
_SKIMAGE = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "microaneurysms.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
_SKLEARN = ("china.jpg", "flower.jpg")


def photographs() -> list[Path]:
    """The photographs' files, sorted by name.

    Raises:
        ImagesError: a wheel is not installed, or its release no longer ships a photograph.
    """
    files = []
    for package, folder, names in (
        ("skimage", "data", _SKIMAGE),
        ("sklearn", "datasets/images", _SKLEARN),
    ):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ImagesError(f"{package} is not installed; run make, or pass --images DIR")
        root = Path(spec.origin).parent / folder
        files += [root / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ImagesError(f"the installed wheels lack {', '.join(missing)}; pass --images DIR")
    return sorted(files, key=lambda file: file.stem)


@cache
def _load(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


def crops(count: int, seed: int) -> Iterator[SourceImage]:
    """Draw `count` crops as JPEG bytes. Crop i does not depend on `count`.

    Each crop is a group of its own: the crops are independent draws of one stream, and that
    stream, not the set of photographs, is what the sample deployment serves.
    """
    files = photographs()
    rng = np.random.default_rng(seed)
    for index in range(count):
        file = files[rng.integers(len(files))]
        image = _load(file)
        width, height = image.size
        side = max(1, round(min(width, height) * rng.uniform(MIN_SIDE, MAX_SIDE)))
        left = int(rng.integers(width - side + 1))
        top = int(rng.integers(height - side + 1))
        buffer = io.BytesIO()
        crop = image.crop((left, top, left + side, top + side))
        crop.save(buffer, "JPEG", quality=JPEG_QUALITY)
        name = f"{file.stem}/{seed}-{index:05d}.jpg"
        yield SourceImage(name, name, file.stem, buffer.getvalue())


def write(folder: Path, count: int, seed: int) -> None:
    """Write crops below `folder`, one sub-folder per photograph.

    Raises:
        ImagesError: the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ImagesError(f"{folder} is not empty; choose another folder or remove it")
    for crop in crops(count, seed):
        path = folder / crop.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(crop.data)
