"""What can go wrong between a client and the server, told in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tritonclient.utils import InferenceServerException


class ClientError(Exception):
    """A request got no answer. The message is one line, fit for a user."""


class InvalidRequestError(ClientError):
    """The server refused the request: INVALID_ARGUMENT in gRPC, 400 in HTTP."""


class UnavailableError(ClientError):
    """No server answers at this address, or it does not serve this model now."""


class DeadlineError(ClientError):
    """No answer in time: the caller's for a request, ours for a question about the server."""


class ServerError(ClientError):
    """The server failed on a request that it had accepted."""


# Keys are tritonclient's `status()`: a gRPC code or an HTTP status.
_BY_STATUS: dict[str, type[ClientError]] = {
    "StatusCode.INVALID_ARGUMENT": InvalidRequestError,
    "StatusCode.OUT_OF_RANGE": InvalidRequestError,
    "400": InvalidRequestError,
    "413": InvalidRequestError,
    "StatusCode.UNAVAILABLE": UnavailableError,
    "StatusCode.NOT_FOUND": UnavailableError,
    "StatusCode.RESOURCE_EXHAUSTED": UnavailableError,
    "404": UnavailableError,
    "429": UnavailableError,
    "503": UnavailableError,
    "StatusCode.DEADLINE_EXCEEDED": DeadlineError,
    "504": DeadlineError,
}

_URL = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s/:]+):\d{1,5}")
_NO_SERVER = re.compile(r"failed to connect|connection refused|errors resolving", re.I)
_WRONG_PROTOCOL = re.compile(r"failed to connect.*Socket closed|http1\.x", re.I)
_SILENT = re.compile(r"settings frame", re.I)  # gRPC waits 20 s for the server's first word
# Triton's wrappings around the sentence that matters.
_NOISE = re.compile(
    r"^(\[[^\]]*\] )?(\[request id: [^\]]*\] )?(in ensemble '[^']*', )?"
    r"(Failed to process the request\(s\) for model (instance )?'[^']*', message: )?"
)
_ADVICE = re.compile(r"\s*NOTE: Setting a non-zero max_batch_size.*", re.S)  # to model authors
_TRACEBACK = re.compile(r"\n\s*At:\n.*", re.S)  # the Python backend appends where it was raised


def one_line(message: str) -> str:
    """The server's own sentence: no ids, no wrapping, no traceback, no line breaks."""
    sentence = _NOISE.sub("", _ADVICE.sub("", _TRACEBACK.sub("", message.strip())))
    return " ".join(sentence.split()) or "the server gave no reason"


def check_url(url: str) -> str:
    """The address, if it is one.

    Raises:
        InvalidRequestError: it is not HOST:PORT.
    """
    if not _URL.fullmatch(url):
        raise InvalidRequestError(
            f"the server's address must be HOST:PORT without a scheme, such as 127.0.0.1:8001; "
            f"got {url!r}"
        )
    return url


def no_server(url: str) -> UnavailableError:
    """The error for an address where nothing listens."""
    return UnavailableError(f"no server answers at {url}; start one with python -m server")


def wrong_protocol(url: str) -> UnavailableError:
    """The error for an address that speaks the other protocol, or none of ours."""
    return UnavailableError(
        f"what answers at {url} does not speak this protocol; "
        "gRPC and HTTP have ports of their own (8001 and 8000 by default)"
    )


def timed_out(url: str, timeout_s: float | None) -> DeadlineError:
    """The error for a request that was given up on; None where the caller set no time for it."""
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
    """Turn tritonclient's exception into ours.

    Args:
        error: what tritonclient raised.
        url: the server, for the message.
        timeout_s: what the caller allowed, in seconds, for the message.

    Returns:
        The matching error with a one-line message. tritonclient's own refusals, which carry no
        status, are about the request.
    """
    status, message = error.status(), error.message() or ""
    if status is None:
        return InvalidRequestError(one_line(message))
    kind = _BY_STATUS.get(status, ServerError)
    if kind is UnavailableError and _WRONG_PROTOCOL.search(message):
        return wrong_protocol(url)
    if kind is UnavailableError and _SILENT.search(message):
        return timed_out(url, None)
    if kind is UnavailableError and _NO_SERVER.search(message):
        return no_server(url)
    if kind is DeadlineError:
        return timed_out(url, timeout_s)
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
        raise timed_out(url, timeout_s) from None
    except ConnectionRefusedError:
        raise no_server(url) from None
    except OSError as error:  # a dropped connection, an unknown host name
        raise UnavailableError(f"the connection to {url} failed: {one_line(str(error))}") from None
