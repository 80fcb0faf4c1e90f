"""What can go wrong between a client and the server, told in one line."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from .messages import Prediction


class ClientError(Exception):
    """A request got no answer. The message is one line, fit for a user.

    Attributes:
        retryable: the same request may well succeed if it is sent again.
        is_connecting: no word of the server's came; with TLS a handshake may tell why.
        answers: where images were asked about in several requests, what those before this one were
            answered: a prediction for each of the first `len(answers)` images, in their order. The
            images from place `len(answers)` on (counted from 0) have no answer.
    """

    retryable = False
    is_connecting = False
    answers: Sequence[Prediction] = ()


class InvalidRequestError(ClientError):
    """The request is wrong: the client found out, or the server (INVALID_ARGUMENT, HTTP's 400)."""


class UnavailableError(ClientError):
    """No server answers at this address, or not now."""

    retryable = True


class OverloadedError(UnavailableError):
    """The server has more requests than it can take: its queue is full, or the wait too long."""


class NotServedError(UnavailableError):
    """What answers at this address has no such model or version, or another protocol."""

    retryable = False


class AccessDeniedError(ClientError):
    """One side does not trust the other: a key or certificate is missing or not accepted."""


class RequestCancelledError(ClientError):
    """The request was cancelled, by closing the client or on the server."""


class DeadlineError(ClientError):
    """No answer in time: the caller's for a request, ours for a question about the server."""


class ServerError(ClientError):
    """The server failed on a request that it had accepted."""


class AnswerMismatchError(ServerError):
    """What came was the answer to another request. No new request goes over its connection."""


class ForkedError(ClientError):
    """gRPC cannot be used here: this process was forked when its parent could not let go of it."""


# gRPC's codes and HTTP's statuses; of any other the server has failed.
_BY_STATUS = {
    status: kind
    for kind, statuses in {
        InvalidRequestError: "INVALID_ARGUMENT OUT_OF_RANGE 400 413",
        UnavailableError: "UNAVAILABLE 503",
        OverloadedError: "RESOURCE_EXHAUSTED 429",
        NotServedError: "NOT_FOUND 404",
        AccessDeniedError: "UNAUTHENTICATED PERMISSION_DENIED 401 403",
        RequestCancelledError: "CANCELLED",
        DeadlineError: "DEADLINE_EXCEEDED 504",
    }.items()
    for status in statuses.split()
}

# What the status does not tell: Triton answers UNAVAILABLE to a call that wants a key, INTERNAL
# where a model's process has died (another instance may live), gRPC RESOURCE_EXHAUSTED to its own
# limit on a message.
_BY_TEXT: tuple[tuple[re.Pattern[str], type[ClientError]], ...] = (
    (re.compile(r"is restricted, expecting header"), AccessDeniedError),
    (re.compile(r"Exceeds maximum queue size|Request timeout expired"), OverloadedError),
    (re.compile(r"Stub process .* is not healthy"), UnavailableError),
    (re.compile(r"message larger than max"), InvalidRequestError),
)

_URL = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s/:]+):\d{1,5}")
_NO_SERVER = re.compile(r"failed to connect|connection refused|errors resolving", re.I)
_WRONG_PROTOCOL = re.compile(r"failed to connect.*Socket closed|http1\.x", re.I)
_DISTRUST = re.compile(r"handshake failed|SSL_ERROR|verification check failed", re.I)
_OPENSSL = re.compile(r"OPENSSL_internal:(.+?)(?:: OK)?$", re.S)  # in gRPC's texts
_SILENT = re.compile(r"settings frame", re.I)  # gRPC waits 20 s for the server's first word
# Triton's wrappings around the sentence that matters.
_REQUEST_ID = re.compile(r"\[request id: ([^\]]*)\] ")
_NOISE = re.compile(
    r"^(\[[^\]]*\] )?(in ensemble '[^']*', )?"
    r"(Failed to process the request\(s\) for model (instance )?'[^']*', message: )?"
)
_ADVICE = re.compile(r"\s*NOTE: Setting a non-zero max_batch_size.*", re.S)  # to model authors
_TRACEBACK = re.compile(r"\n\s*At:\n.*", re.S)  # the Python backend appends where it was raised


def one_line(message: str) -> str:
    """The server's own sentence: no ids, no wrapping, no traceback, no line breaks."""
    sentence = _ADVICE.sub("", _TRACEBACK.sub("", _REQUEST_ID.sub("", message.strip())))
    sentence = _NOISE.sub("", sentence)
    return " ".join(sentence.split()) or "the server gave no reason"


def named_request(message: str) -> str | None:
    """The id of the request that Triton's text is about; None where it names none."""
    found = _REQUEST_ID.match(message)
    return None if found is None or found[1] == "<id_unknown>" else found[1]


def check_url(url: str) -> str:
    """The address, or InvalidRequestError where it is not HOST:PORT."""
    if not _URL.fullmatch(url):
        raise InvalidRequestError(
            f"the server's address must be HOST:PORT without a scheme, such as 127.0.0.1:8001; "
            f"got {url!r}"
        )
    return url


def no_server(url: str) -> ClientError:
    """Nothing listens there."""
    return _connecting(
        UnavailableError(f"no server answers at {url}; start one with python -m server")
    )


def closed_client() -> ClientError:
    """A request through a client that was closed before."""
    return InvalidRequestError("this client is closed; make another one")


def wrong_protocol(url: str) -> ClientError:
    """What listens there speaks the other protocol, or none of ours."""
    return _connecting(
        NotServedError(
            f"what answers at {url} does not speak this protocol: gRPC and HTTP have ports of "
            "their own (8001 and 8000 by default), and a server may want TLS, or a client "
            "certificate with it"
        )
    )


def _distrusted(url: str, reason: str) -> ClientError:
    known = _OPENSSL.search(reason)
    return _connecting(
        AccessDeniedError(
            f"no TLS connection to {url}, check the certificates on both sides: "
            f"{one_line(known[1].replace('_', ' ').lower() if known else reason)}"
        )
    )


def _connecting(error: ClientError) -> ClientError:
    error.is_connecting = True
    return error


def _timed_out(url: str, timeout_s: float | None) -> DeadlineError:
    if timeout_s is None:
        return DeadlineError(
            f"the server at {url} accepts connections but does not answer; it hangs or is "
            "overloaded"
        )
    return DeadlineError(
        f"no answer from {url} within {timeout_s:g} s; allow more time or send less at once"
    )


def translate(
    error: InferenceServerException, url: str, timeout_s: float | None = None
) -> ClientError:
    """Ours for tritonclient's exception, with a one-line message; arguments as `server_errors`."""
    status, message = error.status(), error.message() or ""
    if status is None:  # tritonclient's own refusal of a request
        return InvalidRequestError(one_line(message))
    if status == "StatusCode.UNAVAILABLE":  # gRPC got no connection, or Triton says so
        if _DISTRUST.search(message):
            return _distrusted(url, message)
        if _WRONG_PROTOCOL.search(message):
            return wrong_protocol(url)
        if _SILENT.search(message):
            return _timed_out(url, None)
        if _NO_SERVER.search(message):
            return no_server(url)
    kind: type[ClientError] = _BY_STATUS.get(status.removeprefix("StatusCode."), ServerError)
    kind = next((kind for pattern, kind in _BY_TEXT if pattern.search(message)), kind)
    if kind is DeadlineError:
        return _timed_out(url, timeout_s)
    if kind is OverloadedError:
        return OverloadedError(f"the server at {url} is overloaded: {one_line(message)}")
    return kind(one_line(message))


@contextmanager
def server_errors(url: str, timeout_s: float | None = None) -> Iterator[None]:
    """Raise ours instead of tritonclient's and the socket's exceptions.

    Args:
        url: the server, for messages.
        timeout_s: what the caller allowed, in seconds, for messages.

    Raises:
        ClientError: one of the classes above.
    """
    try:
        yield
    except InferenceServerException as error:
        raise translate(error, url, timeout_s) from None
    except TimeoutError:
        raise _timed_out(url, timeout_s) from None
    except ConnectionRefusedError:
        raise no_server(url) from None
    except ssl.SSLError as error:
        raise _distrusted(url, str(error)) from None
    except OSError as error:  # a dropped connection, an unknown host name
        reason = one_line(str(error))
        raise _connecting(UnavailableError(f"the connection to {url} failed: {reason}")) from None
