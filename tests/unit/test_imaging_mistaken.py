"""An image that was wrapped or changed on its way is refused with what it is and what to send."""

import base64
import json

import pytest

from imaging import ImageError, decode
from tests.unit.image_files import encode
from tests.unit.test_imaging import photo

FORMS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
BASE64 = "the image is base64 text, which is not decoded here; send the file's own bytes: "


def refusal(data):
    with pytest.raises(ImageError) as caught:
        decode(data)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "wrap",
    [
        base64.b64encode,
        base64.urlsafe_b64encode,
        base64.encodebytes,  # a line break after 76 characters
        lambda image: b"\r\n".join(base64.b64encode(image)[i : i + 10] for i in range(0, 99, 10)),
        lambda image: b"data:image/jpeg;base64," + base64.b64encode(image),
        lambda image: b"DATA:;base64,\n" + base64.b64encode(image),
        lambda image: json.dumps(base64.b64encode(image).decode()).encode(),
        lambda image: json.dumps(base64.encodebytes(image).decode()).encode(),
        lambda image: str(base64.b64encode(image)).encode(),  # b'...', as Python prints it
        lambda image: b"\xef\xbb\xbf" + base64.b64encode(image),
    ],
)
def test_base64_text_is_told_from_other_bytes(form, wrap):
    line = refusal(wrap(encode(photo(), form)))
    assert line.startswith(BASE64) and "Inference-Header-Content-Length: 0" in line


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("wrap", [bytes.hex, lambda image: "0x" + image.hex().upper()])
def test_hexadecimal_text_is_too(form, wrap):
    assert refusal(wrap(encode(photo(), form)).encode()).startswith("the image is hexadecimal text")


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize(("encoding", "errors"), [("latin-1", "strict"), ("utf-8", "replace")])
def test_bytes_that_went_through_a_string_are_said_to_be_changed(form, encoding, errors):
    text = encode(photo(), form).decode(encoding, errors)
    assert refusal(text.encode()).startswith("the image's bytes were changed by sending them as")


def test_a_length_before_the_image_and_a_form_around_it_are_named():
    image = encode(photo(), "JPEG")
    line = refusal(len(image).to_bytes(4, "little") + image)
    assert line.startswith("the image begins with its own length, four bytes too many")
    head = b'--1f2e\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
    assert refusal(head + b"\r\n" + image + b"\r\n--1f2e--\r\n").startswith(
        "the image lies in an HTML form"
    )


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"A picture of a cat, in words",
        b"data:text/plain,hello",
        base64.b64encode(b"no image, but sixteen bytes and more"),
        bytes(64),
        b"\x05\0\0\0hello",
        b"--dashes",
        "Ünïcode".encode(),
        b"ffd7 is no image",
    ],
)
def test_whatever_else_is_no_image_is_only_said_to_be_none(data):
    assert refusal(data).startswith("not a ")
