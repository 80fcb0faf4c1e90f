"""The sample stream: random crops of the photographs that scikit-image and scikit-learn ship.

Real pixels without a download. Crop `i` of seed `s` is drawn by a generator of its own, numpy's
default one seeded with `(s, i)`: it chooses a photograph, a side between 15 % and 100 % of its
shorter edge and a position, all uniformly. So it depends on no other crop, and is the same on every
machine with the same Pillow; different seeds give independent draws. Its label is the photograph's
name, which makes "which photograph is this a crop of" a task with easy and hard images.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from .source import ImagesError, SourceImage

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


class SampleImages:
    """The first `count` crops of a seed's stream, cut when they are asked for.

    Each crop is a group of its own: the crops are independent draws of one stream, and that
    stream, not the set of photographs, is what the sample deployment serves.
    """

    def __init__(self, count: int, seed: int) -> None:
        """Find the photographs and name the crops.

        Raises:
            ImagesError: no photographs, or a count or a seed out of range.
        """
        if count < 1 or not 0 <= seed < 2**32:  # numpy reads a larger seed as (seed, index)
            raise ImagesError(
                f"no {count} sample crops of seed {seed}; give at least 1 crop and a seed from 0 "
                f"to {2**32 - 1}"
            )
        self._seed = seed
        self._files = photographs()
        self.spec = f"sample:{seed}:{count}"
        self.title = f"sample crops, seed {seed}"
        self.names = tuple(
            f"{self._draw(index)[1].stem}/{seed}-{index:05d}.jpg" for index in range(count)
        )

    def _draw(self, index: int) -> tuple[np.random.Generator, Path]:
        """Crop `index`'s generator after its first draw, and the photograph drawn."""
        rng = np.random.default_rng((self._seed, index))
        return rng, self._files[rng.integers(len(self._files))]

    def __len__(self) -> int:
        """The number of crops."""
        return len(self.names)

    def __getitem__(self, index: int) -> SourceImage:
        """Cut crop `index` and encode it as JPEG.

        Raises:
            IndexError: there is no such crop.
        """
        name = self.names[index]
        rng, file = self._draw(range(len(self))[index])
        image = _load(file)
        width, height = image.size
        side = max(1, round(min(width, height) * rng.uniform(MIN_SIDE, MAX_SIDE)))
        left = int(rng.integers(width - side + 1))
        top = int(rng.integers(height - side + 1))
        buffer = io.BytesIO()
        crop = image.crop((left, top, left + side, top + side))
        crop.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return SourceImage(name, name, file.stem, buffer.getvalue(), independent=True)

    def fingerprint(self) -> str:
        """SHA-256 over the spec, the photographs and the version of Pillow, which encodes."""
        digest = hashlib.sha256(f"{self.spec} {PIL.__version__}".encode())
        for file in self._files:
            digest.update(file.read_bytes())
        return digest.hexdigest()


def crops(count: int, seed: int) -> Iterator[SourceImage]:
    """The first `count` crops of a seed's stream; crop i does not depend on `count`."""
    source = SampleImages(count, seed)
    for index in range(count):
        yield source[index]


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
