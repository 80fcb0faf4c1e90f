"""Clients of a served adaptive ViT: gRPC, HTTP and asyncio gRPC."""

from .aio import AsyncGrpcClient
from .errors import (
    ClientError,
    DeadlineError,
    InvalidRequestError,
    ServerError,
    UnavailableError,
)
from .messages import ENSEMBLE, ROUTER, Prediction
from .sync import DEFAULT_GRPC_URL, DEFAULT_HTTP_URL, GrpcClient, HttpClient

__all__ = [
    "DEFAULT_GRPC_URL",
    "DEFAULT_HTTP_URL",
    "ENSEMBLE",
    "ROUTER",
    "AsyncGrpcClient",
    "ClientError",
    "DeadlineError",
    "GrpcClient",
    "HttpClient",
    "InvalidRequestError",
    "Prediction",
    "ServerError",
    "UnavailableError",
]
