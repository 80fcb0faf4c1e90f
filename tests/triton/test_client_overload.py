"""The clients against a real server that has too much to do, and keys."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from PIL import Image

from client import (
    AccessDeniedError,
    ClientError,
    DeadlineError,
    GrpcClient,
    HttpClient,
    OverloadedError,
    Prediction,
    Retry,
)
from export.repository import RepositorySettings, assemble
from tests.servers import running

KEY = "not much of a secret"
PATIENT = Retry(attempts=500, first_backoff_s=0.05, max_backoff_s=0.2)


@pytest.fixture(scope="module")
def narrow(build, graph_set, tmp_path_factory):
    """The session's models behind queues of one request; sizes of batches only with a key."""
    # The reference answers' images would fill a queue of one.
    settings = RepositorySettings(max_queue=1, reference_check="off")
    folder = tmp_path_factory.mktemp("narrow") / "repository"
    repository = assemble(graph_set, build / "calibration.json", folder, settings)
    restricted = [
        f"--grpc-restricted-protocol=model-config:admin-key={KEY}",
        f"--http-restricted-api=model-config:admin-key={KEY}",
    ]
    with running(repository, extra_args=restricted) as server:
        yield server


@pytest.fixture(scope="module")
def slow_image():
    """A few kilobytes that take a good part of a second to decode."""
    buffer = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(buffer, "PNG")
    return buffer.getvalue()


both = pytest.mark.parametrize("kind", [GrpcClient, HttpClient])


def connect(kind, server, **options):
    return kind(server.grpc_url if kind is GrpcClient else server.http_url, **options)


def ask_at_once(client, images):
    """Every image in a request of its own, all at the same time: answers and errors."""

    def ask(image):
        try:
            return client.infer([image])[0]
        except ClientError as error:
            return error

    with ThreadPoolExecutor(len(images)) as pool:
        return list(pool.map(ask, images))


# --- too much to do ----------------------------------------------------------------------------


@both
def test_a_full_queue_is_an_overloaded_server(narrow, kind, slow_image):
    with connect(kind, narrow, retry=None) as client:
        found = ask_at_once(client, [slow_image] * 12)
    errors = [answer for answer in found if isinstance(answer, ClientError)]
    assert errors and len(errors) < len(found)
    assert {type(error) for error in errors} == {OverloadedError}
    # Mostly the queue of `preprocess`; that of a rung where two routers ask it at one moment.
    said = [str(error) for error in errors]
    assert all("is overloaded: " in one and "maximum queue size" in one for one in said), said


@both
def test_who_tries_again_is_answered(narrow, kind, slow_image):
    with connect(kind, narrow, retry=PATIENT) as client:
        found = ask_at_once(client, [slow_image] * 12)
    assert all(isinstance(answer, Prediction) for answer in found), found


@contextmanager
def busy(server, slow_image):
    """Both instances of `preprocess` decode, and as many requests wait."""
    with GrpcClient(server.grpc_url) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_at_once, client, [slow_image] * 4)
        time.sleep(0.1)
        yield
        assert all(isinstance(answer, Prediction) for answer in asked.result())


@both
def test_who_waits_too_long_gets_a_clear_error_and_is_answered_later(
    server, kind, crops, slow_image
):
    with connect(kind, server) as client:
        with busy(server, slow_image), pytest.raises((DeadlineError, OverloadedError)):
            client.infer(crops[:1], timeout_s=0.05)
        assert len(client.infer(crops[:1])) == 1


# --- keys --------------------------------------------------------------------------------------


@both
def test_restricted_apis_want_the_key(narrow, kind, images):
    with connect(kind, narrow, admin_key=KEY) as client:
        assert len(client.infer_tensor(images[:2])) == 2  # asks for the largest batch first
    for options in ({}, {"admin_key": "another"}):
        with connect(kind, narrow, **options) as client:
            assert len(client.infer_tensor(images[:1])) == 1
            with pytest.raises(AccessDeniedError, match="restricted") as caught:
                client.infer_tensor(images[:2])
            assert KEY not in str(caught.value)
