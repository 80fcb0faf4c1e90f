"""What `infer` takes for an image, how it names one that is refused, and the answers it keeps."""

import io
import os

import grpc
import numpy as np
import pytest

from client import HttpClient, InvalidRequestError, Retry, UnavailableError
from client.images import as_rows
from client.messages import Request
from tests.unit.client_servers import AwaitedClient, every, image, served

NAMES = ("a.jpg", os.fsdecode(b"caf\xe9.jpg"), "two\nlines.jpg")


def refusing(kind, bad):
    """Refuses the images of these numbers as `preprocess` does."""

    def answer(number, asked, *_):
        for row, one in enumerate(asked.images):
            if one in [image(n) for n in bad]:
                count = len(asked.images)
                text = "the image is damaged or truncated: x"
                text = f"image {row + 1} of {count}: {text}" if count > 1 else text
                code = 400 if kind is HttpClient else grpc.StatusCode.INVALID_ARGUMENT
                return code, text
        return None

    return answer


def files(folder, names=NAMES):
    for number, name in enumerate(names):
        (folder / name).write_bytes(image(number))
    return [folder / name for name in names]


def scores(answers):
    return [answer.score for answer in answers]


@every
def test_bytes_paths_and_open_files_are_images_alone_and_in_lists(kind, tmp_path):
    path, other, third = files(tmp_path)
    data = image(7)
    with served(kind) as (_, url), kind(url) as client:
        for alone in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
            assert scores(client.infer(alone)) == [7]
        assert scores(client.infer(path)) == [0]
        assert scores(client.infer(str(other))) == [1]
        assert scores(client.infer(io.BytesIO(data))) == [7]
        assert scores(client.infer([path, str(other), data, np.frombuffer(data, np.uint8)])) == [
            *(0, 1, 7, 7)
        ]
        assert scores(client.infer(one for one in (third, data))) == [2, 7]
        assert client.infer([]) == []


@every
def test_what_is_no_image_is_one_clear_line_and_nothing_is_sent(kind, tmp_path):
    text = r"it is a text, no path; give the image's bytes, of base64 base64.b64decode\(text\)$"
    gone, (path, *_) = tmp_path / "gone\n.jpg", files(tmp_path)
    cases = [
        (str(gone), rf"^{tmp_path}/gone\\n.jpg: cannot read it: No such file or directory$"),
        (tmp_path, r"it is a folder; give the paths of files"),
        ([path, gone], r"^image 2 of 2 \(.*gone\\n.jpg\): cannot read it: No such file"),
        ([path, 7], r"^image 2 of 2 is of type int; give the bytes of an image file, or its path"),
        (np.zeros((4, 4, 3), np.uint8), r"image 1 of 4 is of type uint8 array \(4, 3\)"),
        (None, r"of type NoneType"),
        ("data:image/png;base64,iVBOR", f"^data:image/png;base64,iVBOR: {text}"),
        ("iVBOR" * 1000, f"^{'iVBOR' * 60}…: {text}"),
        (io.StringIO("text"), "open it with mode 'rb'"),
    ]
    with served(kind) as (asked, url), kind(url) as client:
        for given, message in cases:
            with pytest.raises(InvalidRequestError, match=message) as error:
                client.infer(given)
            assert "\n" not in str(error.value)
        assert not any(request.images for request in asked)


@every
def test_a_refused_image_is_named_by_its_place_in_the_whole_call_and_answers_are_kept(kind):
    """32 go in the first request, 8 in the second."""
    with served(kind, refusing(kind, [35])) as (asked, url), kind(url) as client:
        with pytest.raises(
            InvalidRequestError, match=r"^image 36 of 40: the image is dam"
        ) as error:
            client.infer([image(n) for n in range(40)])
        assert scores(error.value.answers) == list(range(32))
        assert "the 32 before" in str(error.value)
        with pytest.raises(InvalidRequestError, match=r"^image 36 of 36: the image is") as error:
            client.infer([image(n) for n in [*range(32), 36, 37, 38, 35]])
        with pytest.raises(InvalidRequestError, match=r"^image 33 of 33: the image is") as error:
            client.infer([image(n) for n in [*range(32), 35]])  # a request of one names no place
        with pytest.raises(InvalidRequestError, match=r"^the image is damaged") as error:
            client.infer(image(35))
        assert error.value.answers == ()


@every
def test_a_refused_file_is_named_by_its_path_too(kind, tmp_path):
    paths = files(tmp_path)
    with served(kind, refusing(kind, [1])) as (_, url), kind(url) as client:
        with pytest.raises(InvalidRequestError) as error:
            client.infer(paths)
        said = "the image is damaged or truncated: x"
        piece = Request("adaptive_vit", "image_bytes", as_rows(paths[1]), {"policy": "no"})
        assert piece.about("policy 'no' is none of x", 0, 1) == "policy 'no' is none of x"
        assert str(error.value) == f"image 2 of 3 ({tmp_path}/caf\\xe9.jpg): {said}"
        with pytest.raises(InvalidRequestError) as error:
            client.infer(paths[1])
        assert str(error.value) == f"{tmp_path}/caf\\xe9.jpg: {said}"


@every
def test_a_file_that_vanishes_meanwhile_costs_no_answer(kind, tmp_path):
    paths = files(tmp_path, [f"{n:02}.jpg" for n in range(40)])

    def answer(number, asked, *_):
        if len(asked.images) == 32:
            paths[35].unlink()

    with served(kind, answer) as (_, url), kind(url) as client:
        with pytest.raises(
            InvalidRequestError, match=r"^image 36 of 40 \(.*35.jpg\): can"
        ) as error:
            client.infer(paths)
    assert scores(error.value.answers) == list(range(32))


@every
def test_answers_are_kept_whatever_ends_the_call(kind):
    def answer(number, asked, *_):
        if len(asked.images) == 8:
            return (503 if kind is HttpClient else grpc.StatusCode.UNAVAILABLE), "gone"
        return None

    with served(kind, answer) as (_, url), kind(url, retry=Retry(attempts=1)) as client:
        with pytest.raises(UnavailableError, match="gone .answers to the 32 before") as error:
            client.infer([image(n) for n in range(40)])
    assert scores(error.value.answers) == list(range(32))


@every
def test_rows_of_a_tensor_are_named_by_their_place_in_the_whole_call(kind):
    def answer(number, asked, *_):
        sent.append(1)
        if len(sent) == 2:
            code = 400 if kind is HttpClient else grpc.StatusCode.INVALID_ARGUMENT
            return code, "image 1 of 1 holds NaN or Inf; send finite pixels"
        return None

    sent = []
    tensor = np.zeros((2, 3, 2, 2), np.float32)
    with served(kind, answer) as (_, url), kind(url) as client:
        core = client.client if kind is AwaitedClient else client
        core._max_batch = {"adaptive_tensor": 1}
        with pytest.raises(InvalidRequestError) as error:
            client.infer_tensor(tensor)
    assert str(error.value).startswith("image 2 of 2 holds NaN or Inf; send finite pixels (answers")
    assert len(error.value.answers) == 1
    piece = Request("adaptive_tensor", "image", np.zeros((8, 3, 2, 2), np.float32), {})
    assert piece.about("image 4 of 8 holds NaN", 32, 40) == "image 36 of 40 holds NaN"
    assert piece.about("image 9 of 8: odd", 32, 40) == "image 9 of 8: odd"
