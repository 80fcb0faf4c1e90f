"""Images that were wrapped or changed on their way: what they are now, and what to send."""

from __future__ import annotations

import base64
import binascii
import re

_WAY = (
    "send the file's own bytes: over HTTP as the whole body, with the header "
    "Inference-Header-Content-Length: 0, or after the JSON as Triton's binary data"
)
_MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8|BM|II\*\0|MM\0\*|....ftyp", re.DOTALL)
# As a program puts it there: a data URL, a quoted JSON string, the text of Python's bytes.
_WRAPPING = re.compile(rb"(?:\xef\xbb\xbf)?\s*b?[\"']?(data:[^,]{0,200};base64,)?", re.IGNORECASE)
_HEX = re.compile(rb"\s*(?:0x)?(?:ffd8ff|89504e47|52494646.{8}57454250)", re.IGNORECASE)
# The first bytes of a JPEG or PNG as UTF-8 text: of Latin-1, or with U+FFFD for what is none.
_AS_TEXT = re.compile(
    rb"\xc3\xbf\xc3\x98\xc3\xbf|\xc2\x89PNG|(?:\xef\xbf\xbd){3}|\xef\xbf\xbdPNG", re.DOTALL
)
_FORM = re.compile(rb"--[^\r\n]{1,200}\r\nContent-", re.IGNORECASE)
_HEAD_BYTES = 512  # a data URL's beginning and an image's are in it


def mistaken(data: bytes) -> str | None:
    """What bytes that no decoder knows are, where a usual mistake of callers made them.

    Args:
        data: what was sent as an encoded image.

    Returns:
        One line that says what they are and what to send; None where it cannot be told.
    """
    head = data[:_HEAD_BYTES]
    if _is_base64(head) or _HEX.match(head):
        kind = "hexadecimal" if _HEX.match(head) else "base64"
        return f"the image is {kind} text, which is not decoded here; {_WAY}"
    if _AS_TEXT.match(head):
        return f"the image's bytes were changed by sending them as text; {_WAY}"
    if int.from_bytes(head[:4], "little") == len(data) - 4 and _MAGIC.match(head[4:]):
        return (
            "the image begins with its own length, four bytes too many: they belong before an "
            "element of binary data only, not into a body that is one image"
        )
    if _FORM.match(head):
        return f"the image lies in an HTML form (multipart/form-data); {_WAY}"
    return None


def _is_base64(head: bytes) -> bool:
    wrapping = _WRAPPING.match(head)
    assert wrapping is not None  # it may be empty
    if wrapping[1]:
        return True
    text = b"".join(head[wrapping.end() :].replace(b"\\n", b"").split())[:32]
    text = text.translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return bool(_MAGIC.match(base64.b64decode(text[: len(text) // 4 * 4], validate=True)))
    except binascii.Error:
        return False
