"""Of a JPEG file, the parts that its pixels depend on.

Cameras and editors put much beside them, some of it malformed. No viewer minds; Pillow's parser
refuses the file for some of it.
"""

from __future__ import annotations

SIGNATURE = b"\xff\xd8\xff"
END = b"\xff\xd9"
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
    """
    parts, exif, place = [data[:2]], b"", 2
    while data[place : place + 1] == b"\xff":
        kind = data[place + 1 : place + 2]
        if kind == b"\xff":  # filling
            place += 1
            continue
        size = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if size < 4 or place + size > len(data) or kind[0] == _START_OF_SCAN:
            break
        begins, least = _KEPT.get(kind[0], (b"", 0))
        body = data[place + 4 : place + size]
        other = kind[0] == _COMMENT or (0xE0 <= kind[0] <= 0xEF and kind[0] not in _KEPT)
        if kind[0] == _EXIF[0] and body.startswith(_EXIF[1]):
            exif = exif or body
        elif not other and body.startswith(begins) and len(body) >= least:
            parts.append(data[place : place + size])
        place += size
    return b"".join(parts) + data[place:], exif
