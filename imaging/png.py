"""Of a PNG file, the parts that its pixels depend on.

Pillow refuses a whole file for more than a mebibyte of compressed text in it, for a large colour
profile, or for damage in a chunk that no viewer looks at. So it is given the others only.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Profiles of printers take some mebibytes; a hostile one inflates to a thousand times its size.
MAX_PROFILE_BYTES = 16 * 1024 * 1024
# Of a sound file of 20 MiB each would have 320 bytes; writers make them of 4 KiB and more.
MAX_CHUNKS = 65_536
_HEADER, _PROFILE, _TRANSPARENT, _END = b"IHDR", b"iCCP", b"tRNS", b"IEND"
_KEPT = (_TRANSPARENT, b"eXIf")  # of the chunks that a reader may pass over; eXIf says what is up
_GREY, _RGB = 0, 2


def shown_parts(data: bytes) -> tuple[bytes, bytes]:
    """Leave out text, times, animations and whatever else shows nothing.

    Args:
        data: a PNG file; it may be damaged or cut off, which is left to who decodes it.

    Returns:
        A PNG file of the same pixels, and the ICC profile of their colours; empty where there is
        none, or one that is damaged or inflates to more than `MAX_PROFILE_BYTES`.

    Raises:
        ValueError: more than `MAX_CHUNKS`.
    """
    parts, profile, depth, colour = [SIGNATURE], b"", 8, _RGB
    for kind, body, whole in _chunks(data):
        if kind == _PROFILE:
            profile = profile or _inflated(body)
        elif kind == _TRANSPARENT:
            parts.append(_scaled(body, depth, colour) or whole)
        elif kind in _KEPT or not kind[:1].islower():  # a small letter: may be passed over
            parts.append(whole)
        if kind == _HEADER and len(body) >= 10:
            depth, colour = body[8], body[9]
    return b"".join(parts), profile


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Kind, body and the chunk as a whole, up to the end; one that is cut off comes as it is."""
    place, count = len(SIGNATURE), 0
    while place < len(data):
        count += 1
        if count > MAX_CHUNKS:
            raise ValueError(f"the image has more than {MAX_CHUNKS:,} chunks; save it anew")
        size = int.from_bytes(data[place : place + 4], "big")
        whole = data[place : place + size + 12]
        kind = whole[4:8]
        yield kind, whole[8 : 8 + size], whole
        place += len(whole)
        if kind == _END:
            return


def _inflated(body: bytes) -> bytes:
    """The profile of an iCCP chunk: a name, NUL, the method 0, then zlib's stream."""
    packed = body[body.find(b"\0") + 2 :]
    stream = zlib.decompressobj()
    try:
        profile = stream.decompress(packed, MAX_PROFILE_BYTES)
    except zlib.error:
        return b""
    return profile if stream.eof else b""


def _scaled(body: bytes, depth: int, colour: int) -> bytes | None:
    """A tRNS chunk in the scale that Pillow gives the pixels, 0..255; None: it is so already."""
    if colour == _GREY and depth in (2, 4) and len(body) == 2:
        values = [int.from_bytes(body, "big") * (255 // (2**depth - 1))]
    elif colour == _RGB and depth == 16 and len(body) == 6:
        values = [value >> 8 for value in struct.unpack(">3H", body)]
    else:
        return None
    fresh = _TRANSPARENT + struct.pack(f">{len(values)}H", *(v & 0xFFFF for v in values))
    return struct.pack(">I", len(fresh) - 4) + fresh + struct.pack(">I", zlib.crc32(fresh))
