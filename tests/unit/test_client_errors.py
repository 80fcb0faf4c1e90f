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
from client.errors import one_line, server_errors

URL = "127.0.0.1:8001"
AWAY = "StatusCode.UNAVAILABLE"
NO_CONNECTION = "failed to connect to all addresses; last error: "
FULL = "Exceeds maximum queue size"


def raised(error, timeout_s=None):
    with pytest.raises(ClientError) as caught, server_errors(URL, timeout_s):
        raise error
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("StatusCode.INVALID_ARGUMENT", InvalidRequestError),
        ("400", InvalidRequestError),
        (None, InvalidRequestError),  # tritonclient's own refusal, before sending
        (AWAY, UnavailableError),
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
def test_the_status_decides_the_class_and_that_whether_to_try_again(status, kind):
    error = raised(InferenceServerException("it broke", status))
    assert type(error) is kind
    assert error.retryable is (kind in (UnavailableError, OverloadedError))


@pytest.mark.parametrize(
    ("text", "status", "kind", "said"),
    [
        (
            f"in ensemble 'm', {FULL}",
            AWAY,
            OverloadedError,
            f"server at {URL} is overloaded: {FULL}",
        ),
        ("in ensemble 'm', Request timeout expired", "503", OverloadedError, ": Request timeout"),
        (f"vit_low failed: {FULL}", AWAY, OverloadedError, f"overloaded: vit_low failed: {FULL}"),
        (
            *("Stub process 'router_0_1' is not healthy.", "StatusCode.INTERNAL"),
            *(UnavailableError, "is not healthy"),
        ),
        (
            "This protocol is restricted, expecting header 'triton-grpc-protocol-admin-key'",
            *(AWAY, AccessDeniedError, "is restricted"),
        ),
        (
            *("CLIENT: Sent message larger than max (8 vs. 4)", "StatusCode.RESOURCE_EXHAUSTED"),
            *(InvalidRequestError, "larger than max"),
        ),
        (
            f"{NO_CONNECTION}UNKNOWN: ipv4:{URL}: Connection refused",
            *(
                AWAY,
                UnavailableError,
                f"no server answers at {URL}; start one with python -m server",
            ),
        ),
        (
            f"{NO_CONNECTION}UNAVAILABLE: ipv4:{URL}: Socket closed",
            *(AWAY, NotServedError, f"answers at {URL} does not speak this protocol"),
        ),
        (
            f"{NO_CONNECTION}UNKNOWN: {URL}: connection attempt timed out before SETTINGS frame",
            *(AWAY, DeadlineError, f"the server at {URL} accepts connections but does not answer"),
        ),
        (
            *("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED"),
            *(DeadlineError, f"no answer from {URL} within 0.5 s"),
        ),
    ],
)
def test_the_text_tells_what_the_status_does_not(text, status, kind, said):
    error = raised(InferenceServerException(text, status), 0.5)
    assert type(error) is kind
    assert said in str(error) and "in ensemble" not in str(error)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ConnectionRefusedError(111, "refused"), UnavailableError, f"no server answers at {URL}"),
        (TimeoutError(), DeadlineError, "within 2 s"),
        (ConnectionResetError(104, "Connection reset by peer"), UnavailableError, "reset by peer"),
        (ServerError("as it was"), ServerError, "as it was"),
    ],
)
def test_the_sockets_errors_become_ours_and_ours_stay(error, kind, said):
    found = raised(error, 2.0)
    assert type(found) is kind and said in str(found)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("the image is empty (0 bytes)", "the image is empty (0 bytes)"),
        (
            "[request id: <id_unknown>] inference request batch-size must be <= 32 for 'm'",
            "inference request batch-size must be <= 32 for 'm'",
        ),
        (f"in ensemble 'm', [request id: <id_unknown>] {FULL}", FULL),
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


@pytest.mark.parametrize("client", [GrpcClient, HttpClient, AsyncGrpcClient])
@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "127.0.0.1", "", ":8001", "a b:1"])
def test_an_address_that_is_none_is_refused_before_connecting(client, url):
    with pytest.raises(InvalidRequestError, match="HOST:PORT") as caught:
        client(url)
    assert "\n" not in str(caught.value)
