"""Run a tritonserver as a context manager."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from . import triton_log
from .backend_directory import prepare_backend_directory
from .command import triton_command
from .environment import server_environment
from .errors import ServerStartError
from .failures import start_error
from .finding import Tritonserver, find_tritonserver, find_wheel
from .ports import Ports, check_ports, pick_free_ports
from .process import ProcessGroup
from .readiness import ENTRY_MODEL, Canary, adaptive_vit_canary, server_version, wait_until_ready
from .repository import bytecode_folders, models_in, remove_new_bytecode
from .shared_memory import SEGMENT_PREFIX, remove_dead_segments

_STOP_TIMEOUT_S = 40.0  # Triton itself gives running requests 30 s.
_ABORT_TIMEOUT_S = 5.0  # Without requests to wait for, while models may still be loading.
_PORT_ATTEMPTS = 3
_POLL_S = 0.05


class TritonServer:
    """A tritonserver that serves one model repository between `with` and its end.

    It also ends when this process ends, however that happens (see `guard.py`).

    Attributes:
        repository: the model repository, absolute.
        host: address it binds.
        ports: ports it listens on; with `free_ports` known once it has started.
        version: the version that the server reports, such as `2.51.0`; empty before it is ready.
        server: which tritonserver runs; None before it has started.
    """

    def __init__(
        self,
        repository: Path | str,
        *,
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        free_ports: bool = False,
        host: str = "127.0.0.1",
        timeout_s: float = 120.0,
        tritonserver: Path | str | None = None,
        backend_directory: Path | str | None = None,
        log: Path | str | None = None,
        canary: Canary | None = None,
        models: Sequence[str] | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        """Say what to run; nothing starts yet.

        Args:
            repository: the model repository.
            http_port: HTTP port.
            grpc_port: gRPC port.
            metrics_port: Prometheus port.
            free_ports: pick three free ports instead of those.
            host: address to bind.
            timeout_s: seconds until every model must be ready.
            tritonserver: binary to run instead of the one on PATH or in the wheel.
            backend_directory: its backends, where they are not in their usual place.
            log: file for Triton's log; a temporary one that goes with the server if not given.
            canary: called with the gRPC URL once the models are ready, raises if the server does
                not answer as it should; by default an image is sent to `adaptive_vit` if the
                repository has it.
            models: models that must be ready, every one in the repository if not given.
            extra_args: more arguments for tritonserver; HTTP, gRPC and metrics must stay on.
            env: more environment variables.
            on_progress: called with a line for people whenever something has changed.
        """
        self.repository = Path(repository).absolute()
        self.host = host
        self.ports = Ports(http_port, grpc_port, metrics_port)
        self.version = ""
        self.server: Tritonserver | None = None
        self._free_ports = free_ports
        self._timeout_s = timeout_s
        self._explicit = Path(tritonserver) if tritonserver is not None else None
        self._backend_directory = Path(backend_directory) if backend_directory is not None else None
        self._log = Path(log).absolute() if log is not None else None
        self._canary = canary
        self._models = models
        self._extra_args = list(extra_args)
        self._env = dict(env or {})
        self._on_progress = on_progress or (lambda line: None)
        self._process: ProcessGroup | None = None
        self._work: Path | None = None
        self._is_ready = False
        self._bytecode_before: set[Path] = set()
        # A name of its own tells it from another server on the same port, and its shared-memory
        # segments from those of others.
        self._server_id = f"{SEGMENT_PREFIX}{os.getpid()}_{secrets.token_hex(4)}"

    @property
    def http_url(self) -> str:
        """`host:port`, as `tritonclient.http` takes it."""
        return f"{self._client_host}:{self.ports.http}"

    @property
    def grpc_url(self) -> str:
        """`host:port`, as `tritonclient.grpc` takes it."""
        return f"{self._client_host}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        """Full URL of the Prometheus metrics."""
        return f"http://{self._client_host}:{self.ports.metrics}/metrics"

    @property
    def pid(self) -> int:
        """Id of the server's process."""
        return self._running().pid

    @property
    def log_path(self) -> Path:
        """File with Triton's log; exists while the server runs, longer if it was asked for."""
        if self._log is None and self._work is None:
            raise RuntimeError("the server is not running")
        return self._log or self._work_directory() / "tritonserver.log"

    def memory_mib(self) -> float:
        """Proportional set size of the server and all its model processes, in MiB."""
        return self._running().memory_mib()

    def cpu_s(self) -> float:
        """CPU seconds that the server and all its model processes have taken so far."""
        return self._running().cpu_s()

    def process_ids(self) -> list[int]:
        """Ids of the server's process and of all its model processes."""
        return self._running().process_ids()

    def is_running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.exit_code is None

    def wait(self) -> None:
        """Wait until the server ends by itself, which it should not.

        Raises:
            ServerStartError: it did, with the reason out of its log.
        """
        code = self._running().wait()
        raise self._failure(f"tritonserver ended by itself (exit code {code})")

    def start(self) -> None:
        """Start the server and wait until every model is ready and the canary has answered.

        Raises:
            ServerUsageError: something to put right first: repository, ports, tritonserver, log.
            ServerStartError: the server ended, a model is not ready, or the canary got no answer.
        """
        if self._process is not None:
            raise RuntimeError("the server is already running")
        models = list(models_in(self.repository) if self._models is None else self._models)
        if not self._free_ports:
            check_ports(self.host, self.ports)
        wheel = find_wheel()
        self.server = find_tritonserver(self._explicit, self._backend_directory, wheel=wheel)
        if self._log is not None:
            triton_log.make_writable(self._log)
        remove_dead_segments()
        self._bytecode_before = bytecode_folders(self.repository)
        try:
            self._work = Path(tempfile.mkdtemp(prefix="adaptive-vit-server-"))
            backends = prepare_backend_directory(self.server, self._work / "backends", wheel)
            environment = {**server_environment(self.server, backends), **self._env}
            self._start_on_free_ports(models, backends.path, environment)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and remove what it left behind; does nothing if it is not running."""
        try:
            if self._process is not None:
                self._process.stop(_STOP_TIMEOUT_S if self._is_ready else _ABORT_TIMEOUT_S)
        finally:
            self._process = None
            self._is_ready = False
            remove_dead_segments(own_prefix=self._server_id)
            if self._work is not None:
                remove_new_bytecode(self.repository, self._bytecode_before)
                shutil.rmtree(self._work, ignore_errors=True)
                self._work = None

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def _client_host(self) -> str:
        # A wildcard address is one to bind, not one to call.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]" if ":" in host else host

    def _running(self) -> ProcessGroup:
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process

    def _work_directory(self) -> Path:
        if self._work is None:
            raise RuntimeError("the server is not running")
        return self._work

    def _start_on_free_ports(
        self, models: Sequence[str], backends: Path, environment: Mapping[str, str]
    ) -> None:
        for attempt in range(_PORT_ATTEMPTS):
            if self._free_ports:
                self.ports = pick_free_ports(self.host)
            self._launch(backends, environment)
            try:
                self._await(models)
                self._is_ready = True
                return
            except ServerStartError as error:
                # Somebody took a port while the models were loading.
                is_race = self._free_ports and triton_log.is_port_taken(error.log_tail)
                if not is_race or attempt == _PORT_ATTEMPTS - 1:
                    raise
                self._running().stop(_ABORT_TIMEOUT_S)

    def _launch(self, backends: Path, environment: Mapping[str, str]) -> None:
        assert self.server is not None
        command = triton_command(
            self.server.binary,
            self._server_id,
            self.repository,
            backends,
            self.host,
            self.ports,
            self._extra_args,
        )
        # Its own working directory: Python models have the working directory first on sys.path, and
        # would import this project's packages when started from a checkout.
        self._process = ProcessGroup(
            command, environment, cwd=self._work_directory(), log=self.log_path
        )

    def _await(self, models: Sequence[str]) -> None:
        shown: set[str] = set()
        self._on_progress(f"starting tritonserver, {len(models)} models to load")

        def watch() -> None:
            loaded = triton_log.loaded_models(self._log_while_running(models)) & set(models)
            if len(loaded) > len(shown):
                shown.update(loaded)
                self._on_progress(f"{len(shown)} of {len(models)} models loaded")

        deadline = time.monotonic() + self._timeout_s
        missing = wait_until_ready(self.grpc_url, self._server_id, models, self._timeout_s, watch)
        if missing:
            raise self._failure(f"not ready after {self._timeout_s:g} s", missing)
        self.version = server_version(self.grpc_url)
        # Metrics come up last: gRPC answers for a moment even if their port is taken.
        while not self._running().listens_on(self.ports.all):
            self._log_while_running(models)
            if time.monotonic() > deadline:
                raise self._failure(f"not listening on all ports after {self._timeout_s:g} s")
            time.sleep(_POLL_S)
        self._run_canary(models)

    def _log_while_running(self, models: Sequence[str]) -> str:
        code = self._running().exit_code  # Before the log, which is complete if it has ended.
        log = self.log_path.read_text(errors="replace")
        if code is not None:
            loaded = triton_log.loaded_models(log)
            missing = [model for model in models if model not in loaded]
            raise self._failure(f"tritonserver ended while starting (exit code {code})", missing)
        return log

    def _run_canary(self, models: Sequence[str]) -> None:
        canary = self._canary
        if canary is None and ENTRY_MODEL in models:
            canary = adaptive_vit_canary
        if canary is None:
            return
        self._on_progress("waiting for the answer to a first request")
        try:
            canary(self.grpc_url)
        except Exception as error:
            reason = triton_log.first_line(str(error))
            raise self._failure(
                f"every model is ready, but the first request failed: {reason}"
            ) from error

    def _failure(self, what: str, missing: Sequence[str] = ()) -> ServerStartError:
        return start_error(what, self.log_path, missing)
