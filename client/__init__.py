"""Clients of a served adaptive ViT: gRPC, HTTP and asyncio gRPC."""

from .aio import AsyncGrpcClient
from .base import DEFAULT_GRPC_URL, DEFAULT_HTTP_URL
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
from .messages import ENSEMBLE, ROUTER, Prediction, Task
from .retry import Retry
from .sync import GrpcClient, HttpClient
from .tls import Tls

__all__ = [
    "DEFAULT_GRPC_URL",
    "DEFAULT_HTTP_URL",
    "ENSEMBLE",
    "ROUTER",
    "AccessDeniedError",
    "AnswerMismatchError",
    "AsyncGrpcClient",
    "ClientError",
    "DeadlineError",
    "ForkedError",
    "GrpcClient",
    "HttpClient",
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
