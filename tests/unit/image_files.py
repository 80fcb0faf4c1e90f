"""Image files and sources for tests of calibration."""

import io

from PIL import Image

from calibration.images import SourceImage
from imaging import ImageError


def png(colour=(10, 50, 200), size=(10, 12)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder, *names):
    """Write a one-coloured PNG under each name, whatever its suffix."""
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((index % 256, index // 256, 9)))
    return folder


class MemorySource:
    """`count` colours; those in `broken` are no images, the files of those in `gone` are lost."""

    spec, title = "memory", "images in memory"

    def __init__(self, count, broken=(), gone=(), fingerprint="first"):
        self.names = tuple(f"{index}.png" for index in range(count))
        self._broken, self._gone, self._fingerprint = set(broken), set(gone), fingerprint
        self.read = []

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        name = self.names[index]
        self.read.append(index)
        if index in self._gone:
            raise ImageError("cannot be read: No such file or directory")
        data = b"no image" if index in self._broken else png((index % 256, index // 256, 200))
        return SourceImage(name, f"group {index // 2}", f"class {index % 5}", data)

    def fingerprint(self):
        return self._fingerprint
