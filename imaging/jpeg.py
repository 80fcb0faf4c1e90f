"""Of a JPEG file, the parts that its pixels depend on.

Cameras and editors put much beside them, some of it malformed. No viewer minds; Pillow's parser
refuses the file for some of it.
"""

from __future__ import annotations

import re

SIGNATURE = b"\xff\xd8\xff"
END = b"\xff\xd9"
MAX_SEGMENTS = 4096  # before the pixels; one of four bytes takes as long as one of 64 KiB
_MARKER = re.compile(rb"\xff[^\x00\xff]")  # what lies before one shows nothing
_ALONE = (0x01, *range(0xD0, 0xDA))  # markers without a segment
_START_OF_SCAN, _COMMENT, _EXIF = 0xDA, 0xFE, (0xE1, b"Exif\0\0")
# Of the application segments: how what counts begins, and how long it is at least.
_KEPT = {
    0xE0: (b"JFIF\0", 14),
    0xE2: (b"ICC_PROFILE\0", 14),
    0xEE: (b"Adobe", 12),  # how colours are coded
}


def shown_parts(data: bytes) -> tuple[bytes, bytes]:
    """Leave out comments, previews and whatever else shows nothing.

    Args:
        data: a JPEG file; it may be damaged or cut off, which is left to who decodes it.

    Returns:
        A JPEG file of the same pixels, and its EXIF block, which says how it was held; empty where
        there is none.

    Raises:
        ValueError: more than `MAX_SEGMENTS`.
    """
    parts, exif, place, count = [data[:2]], b"", 2, 0
    while marker := _MARKER.search(data, place):
        place, kind = marker.start(), data[marker.end() - 1]
        size = 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
        if kind not in _ALONE and (place + size > len(data) or kind == _START_OF_SCAN):
            break
        count += 1
        if count > MAX_SEGMENTS:
            raise ValueError(f"the image has more than {MAX_SEGMENTS:,} segments; save it anew")
        if kind in _ALONE:
            place += 2
            continue
        begins, least = _KEPT.get(kind, (b"", 0))
        body = data[place + 4 : place + size]
        other = kind == _COMMENT or (0xE0 <= kind <= 0xEF and kind not in _KEPT)
        if kind == _EXIF[0] and body.startswith(_EXIF[1]):
            exif = exif or body
        elif not other and body.startswith(begins) and len(body) >= least:
            parts.append(data[place : place + size])
        place += size
    else:
        place = len(data)  # no marker, so no pixels either
    return b"".join(parts) + data[place:], exif
