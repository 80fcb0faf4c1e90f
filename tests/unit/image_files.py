"""Image files, well made and odd, and sources of them."""

import io
import os
import struct
import zlib

from PIL import Image

from calibration.images import SourceImage
from imaging import ImageError


def encode(image, form, **options):
    """The bytes of a file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(colour=(10, 50, 200), size=(10, 12)):
    return encode(Image.new("RGB", size, colour), "PNG")


def chunk(kind, body):
    """One part of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(rows, width, depth, colour, *chunks):
    """The bytes of a PNG of these rows; `chunks` lie before its data."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff_of(values, bits, photometric=1, sample_format=1, **tags):
    """The bytes of a TIFF of one row of grey values; a tag is named `t` and its number."""
    data = values.tobytes()
    entries = {256: len(values), 257: 1, 258: bits, 259: 1, 262: photometric, 273: None, 277: 1}
    entries |= {278: 1, 279: len(data), 339: sample_format}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    body = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + data


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


def forbid_listing(folder, monkeypatch):
    """Let a folder refuse to be listed, which the superuser's rights would not."""
    scan = os.scandir

    def refuse(path):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
