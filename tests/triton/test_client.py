"""The clients and their command line against the real server."""

import asyncio
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import tritonclient.grpc as grpc_protocol
import tritonclient.http as http_protocol
from PIL import Image

from client import (
    AsyncGrpcClient,
    DeadlineError,
    GrpcClient,
    HttpClient,
    InvalidRequestError,
    NotServedError,
)
from client.images import as_rows
from tests.unit.client_servers import AwaitedClient

MODELS = ("adaptive_tensor", "adaptive_vit", "preprocess", "router", "vit_high", "vit_low")


def clients(server):
    return {
        "grpc": GrpcClient(server.grpc_url),
        "http": HttpClient(server.http_url),
        "asyncio": AwaitedClient(server.grpc_url),
    }


@pytest.fixture(params=["grpc", "http", "asyncio"])
def client(request, server):
    return clients(server)[request.param]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-5)
        assert (one.escalated, one.degraded) == (other.escalated, other.degraded)
        assert one.score == pytest.approx(other.score, rel=1e-4, abs=1e-6, nan_ok=True)


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_answers_over_both_protocols(server, crops, images, model, protocol):
    module = grpc_protocol if protocol == "grpc" else http_protocol
    url = server.grpc_url if protocol == "grpc" else server.http_url
    takes_bytes = model in ("adaptive_vit", "preprocess")
    name = "image_bytes" if takes_bytes else "image"
    rows = as_rows(crops[:2]) if takes_bytes else images[:2]
    tensor = module.InferInput(name, list(rows.shape), "BYTES" if takes_bytes else "FP32")
    with module.InferenceServerClient(url) as connection:
        result = connection.infer(model, [tensor.set_data_from_numpy(rows)])
    output = "image" if model == "preprocess" else "embedding"
    assert len(result.as_numpy(output)) == 2


def test_the_protocols_agree(server, crops):
    answers = {name: client.infer(crops[:16]) for name, client in clients(server).items()}
    assert_equal(answers["http"], answers["grpc"])
    assert_equal(answers["asyncio"], answers["grpc"])
    assert {p.escalated for p in answers["grpc"]} == {True, False}


def test_bytes_and_tensors_agree(client, crops, images):
    assert_equal(client.infer_tensor(images[:8]), client.infer(crops[:8]))
    assert_equal(client.infer_tensor(images[0]), client.infer(crops[:1]))


def test_tensors_get_the_routers_own_answers_bit_for_bit_and_no_other_versions(client, images):
    for policy in ("auto", "high"):
        found = client.infer_tensor(images[:8], policy=policy)
        pinned = client.infer_tensor(images[:8], policy=policy, version=1)
        for one, other in zip(found, pinned, strict=True):
            assert np.array_equal(one.embedding, other.embedding)
            assert np.array_equal(one.logits, other.logits)
            assert (one.escalated, one.degraded) == (other.escalated, other.degraded)
            assert np.array_equal(one.score, other.score, equal_nan=True)
    with pytest.raises(NotServedError, match="'router' version 9 is not found"):
        client.infer_tensor(images[:1], version=9)


def test_more_images_than_a_batch_holds(client, crops):
    many = (crops * 2)[:70]
    found = client.infer(many)
    assert_equal(found[:32], client.infer(many[:32]))
    assert_equal(found[64:], client.infer(many[64:]))


def test_a_fractional_threshold_decides(client, crops):
    scores = [p.score for p in client.infer(crops[:8])]
    threshold = float(np.median(scores))
    assert threshold != round(threshold)  # or an integer parameter would pass this test
    found = client.infer(crops[:8], threshold=threshold)
    assert [p.escalated for p in found] == [score > threshold for score in scores]
    assert {p.escalated for p in found} == {True, False}


def test_policies_are_obeyed(client, crops):
    low, high = (client.infer(crops[:4], policy=policy) for policy in ("low", "high"))
    assert not any(p.escalated for p in low)
    assert all(p.escalated for p in high)
    assert all(np.isnan(p.score) for p in high)
    assert not any(p.degraded for p in [*low, *high])


def test_predictions_have_the_backbones_shapes(client, crops):
    (found,) = client.infer(crops[:1])
    assert found.embedding.dtype == np.float32 and found.embedding.ndim == 1
    assert found.logits.shape == (200,)
    top = found.top(5)
    assert top[0][0] == int(found.logits.argmax())
    assert sum(p for _, p in found.top(200)) == pytest.approx(1)


def test_metadata_and_version(client):
    assert client.server_version().count(".") == 2
    found = client.metadata()
    assert [tensor["name"] for tensor in found["inputs"]] == ["image_bytes"]
    expected = {"embedding", "logits", "escalated", "score", "degraded"}
    assert {tensor["name"] for tensor in found["outputs"]} == expected


# --- refusals ----------------------------------------------------------------------------------


def png(width, height):
    """A blank PNG: a few kilobytes, whatever its size."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


OVER_PIXELS = png(9000, 9000)
OVER_A_SIDE = png(1, 100_000)
NARROW = png(1, 60_000)  # within both limits; its shortest edge resized it is not


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda crop: b"this is not an image", {}),
        (lambda crop: crop[: len(crop) // 2], {}),
        (lambda crop: b"", {}),
        (lambda crop: bytes(20 * 1024 * 1024 + 1), {}),
        (lambda crop: OVER_PIXELS, {}),
        (lambda crop: OVER_A_SIDE, {}),
        (lambda crop: NARROW, {}),
        (lambda crop: crop, {"policy": "medium"}),
        (lambda crop: crop, {"threshold": "much"}),
        (lambda crop: crop, {"threshold": float("nan")}),
    ],
    ids=[
        *("not an image", "truncated", "empty", "over bytes", "over pixels", "over a side"),
        *("narrow", "policy", "threshold", "nan"),
    ],
)
def test_a_bad_request_gets_one_line_and_the_server_goes_on(client, crops, make, options):
    with pytest.raises(InvalidRequestError) as caught:
        client.infer([make(crops[0])], **options)
    message = str(caught.value)
    assert message and "\n" not in message
    assert "Traceback" not in message and "request id" not in message
    assert len(client.infer(crops[:2])) == 2


def test_a_bad_image_fails_alone_among_requests_that_wait_together(server, crops):
    expected = GrpcClient(server.grpc_url).infer(crops[:20])
    bad = [NARROW, OVER_PIXELS, OVER_A_SIDE, b"this is not an image"]
    # The two instances of `preprocess` decode one of these each; what comes meanwhile is queued.
    slow = [png(7000, 7000)] * 2

    async def ask():
        async with AsyncGrpcClient(server.grpc_url) as client:
            held = [asyncio.create_task(client.infer([image])) for image in slow]
            await asyncio.sleep(0.1)
            queued = [client.infer([image]) for image in (*crops[:10], *bad, *crops[10:20])]
            answers = await asyncio.gather(*queued, return_exceptions=True)
            await asyncio.gather(*held)
            return answers

    answers = asyncio.run(ask())
    assert [isinstance(a, InvalidRequestError) for a in answers] == [False] * 10 + [True] * 4 + [
        False
    ] * 10
    assert_equal([a[0] for a in (*answers[:10], *answers[14:])], expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images.astype(np.float64),
        lambda images: images[:, :2],
        lambda images: images[:, :, :10],
        lambda images: np.full_like(images, np.nan),
    ],
    ids=["dtype", "channels", "height", "nan"],
)
def test_a_bad_tensor_is_refused(client, images, change):
    with pytest.raises(InvalidRequestError):
        client.infer_tensor(change(images[:2]))
    assert len(client.infer_tensor(images[:2])) == 2


def test_a_deadline_is_kept_and_the_next_answer_is_its_own(client, crops):
    expected = client.infer(crops[:1])
    with pytest.raises(DeadlineError, match="within"):
        client.infer(crops[1:2], timeout_s=0.0005)
    assert_equal(client.infer(crops[:1]), expected)


# --- command line ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(crops, tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    for index, crop in enumerate(crops[:6]):
        (path / f"{index}.jpg").write_bytes(crop)
    return path


def run(*arguments):
    command = [sys.executable, "-m", "client", "infer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_command_line_gives_the_clients_answers(server, crops, folder, protocol):
    url = server.grpc_url if protocol == "grpc" else server.http_url
    ran = run(folder, "--url", url, "--protocol", protocol, "--concurrency", 3, "--json")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    with GrpcClient(server.grpc_url) as client:
        expected = [client.infer([crop])[0] for crop in crops[:6]]
    assert [image["file"] for image in report["images"]] == [
        str(folder / f"{index}.jpg") for index in range(6)
    ]
    assert [image["escalated"] for image in report["images"]] == [p.escalated for p in expected]
    assert [image["top"][0]["class"] for image in report["images"]] == [
        p.top(1)[0][0] for p in expected
    ]
    assert report["summary"]["errors"] == 0
    assert report["summary"]["latency_ms_p50"] > 0


def test_the_command_line_shows_refused_files_and_goes_on(server, folder, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    ran = run(bad, folder / "0.jpg", "--url", server.grpc_url, "--policy", "high", "--top", 2)
    assert ran.returncode == 1
    assert "bad.png" in ran.stdout and "image" in ran.stdout
    assert "2 images, 1 errors, 1 escalated (100.0%)" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_labels_must_fit_the_served_model(server, folder, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"name{i}" for i in range(200)))
    ran = run(folder / "0.jpg", "--url", server.grpc_url, "--labels", labels, "--json")
    (top, *_) = json.loads(ran.stdout)["images"][0]["top"]
    assert top["label"] == f"name{top['class']}"
    labels.write_text("one\ntwo\n")
    ran = run(folder / "0.jpg", "--url", server.grpc_url, "--labels", labels)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: --labels has 2 names, the model 200 classes\n"
