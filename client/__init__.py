"""Clients of a served adaptive ViT: gRPC, HTTP and asyncio gRPC."""

from .errors import (
    AccessDeniedError,
    AnswerMismatchError,
    ClientError,
    DeadlineError,
    ForkedError,
    InvalidRequestError,
    NotServedError,
    OverloadedError,
    RequestCancelledError,
    ServerError,
    UnavailableError,
)
from .grpc_clients import DEFAULT_GRPC_URL, AsyncGrpcClient, GrpcClient
from .http_client import DEFAULT_HTTP_URL, HttpClient
from .images import ImageLike
from .messages import ENSEMBLE, Prediction, Task
from .retry import Retry
from .tls import Tls

__all__ = [
    "DEFAULT_GRPC_URL",
    "DEFAULT_HTTP_URL",
    "ENSEMBLE",
    "AccessDeniedError",
    "AnswerMismatchError",
    "AsyncGrpcClient",
    "ClientError",
    "DeadlineError",
    "ForkedError",
    "GrpcClient",
    "HttpClient",
    "ImageLike",
    "InvalidRequestError",
    "NotServedError",
    "OverloadedError",
    "Prediction",
    "RequestCancelledError",
    "Retry",
    "ServerError",
    "Task",
    "Tls",
    "UnavailableError",
]
