"""tritonclient's exceptions become ours, in one line."""

import pytest
from tritonclient.utils import InferenceServerException

from client import (
    AccessDeniedError,
    AsyncGrpcClient,
    ClientError,
    DeadlineError,
    GrpcClient,
    HttpClient,
    InvalidRequestError,
    NotServedError,
    OverloadedError,
    RequestCancelledError,
    ServerError,
    UnavailableError,
)
from client.errors import one_line, server_errors, translate

URL = "127.0.0.1:8001"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("StatusCode.INVALID_ARGUMENT", InvalidRequestError),
        ("400", InvalidRequestError),
        (None, InvalidRequestError),  # tritonclient's own refusal, before sending
        ("StatusCode.UNAVAILABLE", UnavailableError),
        ("503", UnavailableError),
        ("429", OverloadedError),
        ("StatusCode.RESOURCE_EXHAUSTED", OverloadedError),
        ("StatusCode.NOT_FOUND", NotServedError),
        ("404", NotServedError),
        ("StatusCode.PERMISSION_DENIED", AccessDeniedError),
        ("403", AccessDeniedError),
        ("StatusCode.CANCELLED", RequestCancelledError),
        ("StatusCode.DEADLINE_EXCEEDED", DeadlineError),
        ("504", DeadlineError),
        ("StatusCode.INTERNAL", ServerError),
        ("500", ServerError),
    ],
)
def test_the_status_decides_the_class(status, kind):
    assert type(translate(InferenceServerException("it broke", status), URL)) is kind


@pytest.mark.parametrize(
    ("text", "status", "kind"),
    [
        ("in ensemble 'm', Exceeds maximum queue size", "StatusCode.UNAVAILABLE", OverloadedError),
        ("in ensemble 'm', Request timeout expired", "503", OverloadedError),
        ("vit_low failed: Exceeds maximum queue size", "StatusCode.UNAVAILABLE", OverloadedError),
        ("Stub process 'router_0_1' is not healthy.", "StatusCode.INTERNAL", UnavailableError),
        (
            "This protocol is restricted, expecting header 'triton-grpc-protocol-admin-key'",
            "StatusCode.UNAVAILABLE",
            AccessDeniedError,
        ),
        (
            "CLIENT: Sent message larger than max (8 vs. 4)",
            "StatusCode.RESOURCE_EXHAUSTED",
            InvalidRequestError,
        ),
    ],
)
def test_the_text_tells_what_the_status_does_not(text, status, kind):
    error = translate(InferenceServerException(text, status), URL)
    assert type(error) is kind
    assert "in ensemble" not in str(error)


def test_an_overloaded_server_is_named():
    text = InferenceServerException("Exceeds maximum queue size", "503")
    expected = f"the server at {URL} is overloaded: Exceeds maximum queue size"
    assert str(translate(text, URL)) == expected


@pytest.mark.parametrize(
    ("kind", "retryable"),
    [
        (UnavailableError, True),
        (OverloadedError, True),
        (NotServedError, False),
        (InvalidRequestError, False),
        (AccessDeniedError, False),
        (RequestCancelledError, False),
        (DeadlineError, False),
        (ServerError, False),
    ],
)
def test_only_what_may_pass_is_worth_another_try(kind, retryable):
    assert kind("x").retryable is retryable


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("the image is empty (0 bytes)", "the image is empty (0 bytes)"),
        (
            "[request id: <id_unknown>] inference request batch-size must be <= 32 for 'm'",
            "inference request batch-size must be <= 32 for 'm'",
        ),
        (
            "in ensemble 'm', [request id: <id_unknown>] Exceeds maximum queue size",
            "Exceeds maximum queue size",
        ),
        (
            "in ensemble 'adaptive_vit', Failed to process the request(s) for model 'router_0', "
            "message: ValueError: no\nsuch thing\n\nAt:\n  /models/router/1/model.py(9): execute\n",
            "ValueError: no such thing",
        ),
        (
            "unexpected shape. Expected [-1,3], got [2,4]. NOTE: Setting a non-zero max_batch_size "
            "in the model config requires a batch dimension ... info on max_batch_size.",
            "unexpected shape. Expected [-1,3], got [2,4].",
        ),
        ("", "the server gave no reason"),
    ],
)
def test_only_the_servers_sentence_is_kept(said, kept):
    assert one_line(said) == kept


def test_a_refused_connection_says_how_to_start_a_server():
    grpc_text = (
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:8001: Failed to "
        "connect to remote host: Connection refused"
    )
    error = translate(InferenceServerException(grpc_text, "StatusCode.UNAVAILABLE"), URL)
    expected = f"no server answers at {URL}; start one with python -m server"
    assert str(error) == expected
    with pytest.raises(UnavailableError) as caught, server_errors(URL):
        raise ConnectionRefusedError(111, "Connection refused")
    assert str(caught.value) == expected


def test_the_other_protocols_port_is_recognised():
    grpc_text = (
        "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:8000: "
        "Socket closed"
    )
    error = translate(InferenceServerException(grpc_text, "StatusCode.UNAVAILABLE"), URL)
    assert "does not speak this protocol" in str(error)
    assert not error.retryable


def test_a_silent_server_is_not_taken_for_another_protocol():
    grpc_text = (
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:8001: "
        "connection attempt timed out before receiving SETTINGS frame"
    )
    error = translate(InferenceServerException(grpc_text, "StatusCode.UNAVAILABLE"), URL)
    assert isinstance(error, DeadlineError)
    assert f"the server at {URL} accepts connections but does not answer" in str(error)


def test_a_deadline_names_the_limit():
    text = InferenceServerException("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED")
    assert "within 0.5 s" in str(translate(text, URL, 0.5))
    with pytest.raises(DeadlineError, match="within 2 s"), server_errors(URL, 2.0):
        raise TimeoutError


def test_a_dropped_connection_is_unavailable():
    with pytest.raises(UnavailableError, match="reset by peer"), server_errors(URL):
        raise ConnectionResetError(104, "Connection reset by peer")


def test_our_own_errors_pass_through():
    with pytest.raises(ServerError, match="as it was"), server_errors(URL):
        raise ServerError("as it was")


@pytest.mark.parametrize("client", [GrpcClient, HttpClient, AsyncGrpcClient])
@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "127.0.0.1", "", ":8001", "a b:1"])
def test_an_address_that_is_none_is_refused_before_connecting(client, url):
    with pytest.raises(InvalidRequestError, match="HOST:PORT") as caught:
        client(url)
    assert isinstance(caught.value, ClientError)
    assert "\n" not in str(caught.value)
