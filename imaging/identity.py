"""What makes an image the same image, and what makes its tensor the same tensor."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image


def pixels_sha256(image: Image.Image) -> str:
    """Hex SHA-256 over the size and the pixels of a decoded image.

    Two files that decode to the same pixels are one image, whatever else their bytes hold.

    Args:
        image: as `decode` gives it, mode RGB, before any resizing.
    """
    digest = hashlib.sha256(f"{image.mode} {image.width} x {image.height}\0".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def code_sha256(folder: Path | None = None) -> str:
    """Hex SHA-256 over the source files of this package.

    Whoever keeps what was computed from an image keeps this beside it: a changed decoder makes
    another tensor of the same file.

    Args:
        folder: of a copy of the package, such as the one in a deployed `preprocess`; this one if
            not given.
    """
    folder = folder or Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
