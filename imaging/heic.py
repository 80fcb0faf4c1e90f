"""Of a HEIC file, the parts that its pixels depend on.

How it was held is told beside the picture, and libheif applies that. EXIF blocks are not read: of a
damaged one pi-heif 1.4.0 ends the process.
"""

from __future__ import annotations

MAX_BOXES = 4096  # of the file itself, not inside of others; a photograph has some five
_DESCRIBES = b"cdsc"  # the reference by which a block is found to be about a picture


def shown_parts(data: bytes) -> bytes:
    """The file with no reference from a block about a picture.

    Args:
        data: a HEIC file; it may be damaged or cut off, which is left to who decodes it.

    Raises:
        ValueError: more than `MAX_BOXES`.
    """
    parts, place = list[bytes](), 0
    while place < len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if len(parts) == MAX_BOXES:
            raise ValueError(f"the image has more than {MAX_BOXES:,} boxes; save it anew")
        end = place + size if size >= 8 else len(data)
        box = data[place:end]
        parts.append(box if kind == b"mdat" else box.replace(_DESCRIBES, b"skip"))
        place = end
    return b"".join(parts)
