"""What the clients put on the wire and read from it."""

import numpy as np
import pytest
import tritonclient.grpc as grpc_protocol
from tritonclient.grpc._utils import _get_inference_request

import routing
from client import InvalidRequestError, Prediction, ServerError
from client.images import as_rows
from client.messages import (
    UNSCORED,
    Request,
    as_batch,
    predictions,
    request_parameters,
)


class FakeResult:
    """The part of tritonclient's results that is used."""

    def __init__(self, **outputs):
        self.outputs = outputs

    def as_numpy(self, name):
        return self.outputs.get(name)


def outputs(count, **changes):
    arrays = {
        "embedding": np.arange(count * 4, dtype=np.float32).reshape(count, 4),
        "logits": np.arange(count * 3, dtype=np.float32).reshape(count, 3),
        "escalated": np.arange(count).reshape(count, 1) % 2 == 1,
        "score": np.linspace(0, 1, count, dtype=np.float32).reshape(count, 1),
        "degraded": np.zeros((count, 1), dtype=bool),
    }
    return FakeResult(**{**arrays, **changes})


def test_each_image_gets_its_own_row_in_order():
    found = predictions(outputs(3), 3)
    assert [p.embedding.tolist() for p in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [p.logits.tolist() for p in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [p.escalated for p in found] == [False, True, False]
    assert [p.score for p in found] == [0.0, 0.5, 1.0]
    assert all(type(p.degraded) is bool and type(p.score) is float for p in found)


def test_where_the_cheap_rung_was_not_asked_there_is_no_score():
    assert UNSCORED == routing.UNSCORED
    answered = np.array([[0.5], [UNSCORED], [np.nan]], np.float32)  # NaN: a router before this one
    found = [p.score for p in predictions(outputs(3, score=answered), 3)]
    assert found[0] == 0.5 and np.isnan(found[1:]).all()


def answer(*logits):
    given = np.array([logits], np.float32) if logits else None
    (found,) = predictions(outputs(1, logits=given), 1)
    return found


def test_labels_are_judged_each_by_itself():
    found = answer(0.0, -800.0, 800.0, -1.0)
    assert found.label_set() == [(2, 1.0), (0, 0.5)]
    assert found.label_set(0.25) == [(2, 1.0), (0, 0.5), (3, pytest.approx(0.268941, abs=1e-5))]
    assert [index for index, _ in found.probabilities()] == [2, 0, 3, 1]
    assert found.probabilities()[-1] == (1, 0.0)


def test_without_a_head_there_are_no_classes_or_labels_and_one_output_is_no_class():
    assert answer().logits is None
    for ask, said in (
        (answer().top, "no head"),
        (answer().label_set, "no head"),
        (answer(3.0).top, "one output, a value or a label"),
    ):
        with pytest.raises(ValueError, match=said):
            ask()


@pytest.mark.parametrize(
    ("changes", "count", "said"),
    [
        *(({n: None}, 2, n) for n in ("embedding", "escalated", "score", "degraded")),
        ({}, 3, "2 rows for 3 images"),
        ({"logits": np.zeros((3, 1))}, 2, "'logits' has 3 rows for 2 images"),
    ],
)
def test_an_answer_without_an_output_or_for_another_number_of_images_is_refused(
    changes, count, said
):
    with pytest.raises(ServerError, match=said):
        predictions(outputs(2, **changes), count)


def test_top_gives_softmax_probabilities_likeliest_first():
    logits = np.log(np.array([0.2, 0.5, 0.3], dtype=np.float32)) + 1000  # overflows a naive exp
    found = Prediction(np.zeros(4, np.float32), logits, False, 0.1, False)
    assert [index for index, _ in found.top(2)] == [1, 2]
    assert [p for _, p in found.top(9)] == pytest.approx([0.5, 0.3, 0.2], abs=1e-4)


def test_images_become_one_bytes_element_each_whatever_they_end_in():
    images = [b"a\x00\x00", b"", b"\xff\xd8" * 3]  # numpy's own bytes dtype would cut the zeros
    rows = as_rows(images)
    assert rows.shape == (3, 1)
    assert rows.dtype == np.object_
    assert rows[:, 0].tolist() == images
    assert as_rows([]).shape == (0, 1)


def test_a_single_image_tensor_gets_a_batch_axis_and_keeps_its_dtype():
    assert as_batch(np.zeros((3, 8, 8), np.float64)).shape == (1, 3, 8, 8)
    assert as_batch(np.zeros((2, 3, 8, 8))).shape == (2, 3, 8, 8)
    assert as_batch(np.zeros((3, 8, 8), np.float64)).dtype == np.float64


def test_a_calibrated_threshold_is_not_sent():
    assert request_parameters("auto", None) == {"policy": "auto"}


@pytest.mark.parametrize("threshold", [1, 1.0, np.float32(1), np.int64(1)])
def test_every_number_is_sent_as_a_float(threshold):
    sent = request_parameters("low", threshold)["threshold"]
    assert sent == 1.0
    assert type(sent) is float


@pytest.mark.parametrize("threshold", ["much", True])
def test_what_is_no_number_is_left_for_the_server_to_refuse(threshold):
    assert request_parameters("auto", threshold)["threshold"] is threshold


def request(rows=None, version=None, **parameters):
    rows = np.zeros((1, 3, 2, 2), np.float32) if rows is None else rows
    return Request("router", "image", rows, {"policy": "auto", **parameters}, version)


def test_batches_are_cut_in_order_with_the_rest_last():
    pieces = [piece.rows.tolist() for piece in request(np.arange(7), version=2).split(3)]
    assert pieces == [[0, 1, 2], [3, 4, 5], [6]]
    assert {piece.version for piece in request(np.arange(7), version=2).split(3)} == {2}


def test_a_message_is_what_tritonclient_would_send():
    rows = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    asked = request(rows, 3, threshold=0.5, traced=True, number=7)
    message = asked.message(left_s=1.5)
    whole = {"model_name": "router", "model_version": "3", "request_id": message.id}
    inputs = [grpc_protocol.InferInput("image", [1, 3, 2, 2], "FP32").set_data_from_numpy(rows)]
    unset = {"outputs": None, "sequence_id": 0, "sequence_start": False, "sequence_end": False}
    assert message == _get_inference_request(
        **whole, inputs=inputs, priority=0, timeout=1_500_000, parameters=asked.parameters, **unset
    )
    images = Request("adaptive_vit", "image_bytes", as_rows([b"a\x00", b""]), {})
    (tensor,), (content,) = (images.message(1).inputs, images.message(1).raw_input_contents)
    assert (tensor.datatype, list(tensor.shape)) == ("BYTES", [2, 1])
    assert content == b"\x02\0\0\0a\0" + b"\0\0\0\0"
    (tensor,) = images.arguments(1)["inputs"]
    assert (tensor.name(), tensor.datatype(), tensor.shape()) == ("image_bytes", "BYTES", [2, 1])


@pytest.mark.parametrize(("left_s", "told"), [(1.5, 1_500_000), (None, None), (1e-9, 1)])
def test_the_server_is_told_the_time_that_is_left_and_no_version_of_its_own_accord(left_s, told):
    """A deadline that is all but over is not sent as no limit."""
    message, arguments = request().message(left_s), request().arguments(left_s)
    assert message.model_version == "" and ("timeout" in message.parameters) == (told is not None)
    assert arguments["timeout"] == (message.parameters["timeout"].int64_param or None) == told
    assert arguments["inputs"][0].name() == "image"
    assert arguments["request_id"] != request().arguments(left_s)["request_id"]


def test_a_parameter_that_is_neither_text_nor_number_is_refused():
    with pytest.raises(InvalidRequestError, match="threshold must be text or a number"):
        request(threshold=[1]).message(None)


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", True])
def test_a_version_that_no_model_has_is_refused(version):
    with pytest.raises(InvalidRequestError, match="version must be a whole number from 1"):
        request(version=version)
