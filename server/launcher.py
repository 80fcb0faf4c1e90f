"""Run a tritonserver as a context manager: prepare, launch, wait for every model, first answer."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import grpc
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from routing import PROBE_ID

from . import triton_log
from .access import (
    ANSWERS,
    ENTRY,
    QUEUE_FULL,
    WAY_OUT,
    Access,
    image_input,
    is_comparing,
    is_other,
    wait_out,
)
from .controls import Control, controls
from .errors import ServerStartError
from .installation import Installation, find_installation, find_wheel, triton_command
from .ports import Ports, check_ports, pick_free_ports, url
from .process import ProcessGroup
from .repository import (
    bytecode_folders,
    models_in,
    refuses_other_answers,
    remove_new_bytecode,
    require_as_assembled,
)
from .security import Security, known_options
from .shared_memory import SERVER_PREFIX, hold, remove_dead_segments, remove_segments

_STOP_TIMEOUT_S = 40.0  # Triton itself gives running requests 30 s.
_ABORT_TIMEOUT_S = 5.0  # Without requests to wait for, while models may still be loading.
_PORT_ATTEMPTS = 3
_POLL_S = 0.1
_CALL_TIMEOUT_S = 5.0
_FIRST_ANSWER_TIMEOUT_S = 60.0


class TritonServer:
    """A tritonserver that serves one model repository between `with` and its end.

    It also ends when this process ends, however that happens (see `guard.py`).

    Attributes:
        repository: the model repository, absolute.
        addresses: addresses it binds.
        security: what of it is open to whom.
        ports: ports it listens on; with `free_ports` known once it has started.
        version: the version that the server reports, such as `2.51.0`; empty before it is ready.
        installation: which tritonserver runs; None before it has started.
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
        models: Sequence[str] | None = None,
        extra_args: Sequence[str] = (),
        security: Security | None = None,
        stop_patience_s: float = _STOP_TIMEOUT_S,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        """Say what to run; nothing starts yet.

        Args:
            repository: the model repository.
            http_port: HTTP port.
            grpc_port: gRPC port.
            metrics_port: Prometheus port.
            free_ports: pick three free ports instead of those.
            host: address to bind; `security` may bind HTTP and metrics elsewhere.
            timeout_s: seconds until every model must be ready; and as many for a router that
                refuses other answers to compare them.
            tritonserver: binary to run instead of the one on PATH or in the wheel.
            backend_directory: its backends, where they are not in their usual place.
            log: file for Triton's log; a temporary one that goes with the server if not given.
            models: models that must be ready, every one in the repository if not given.
            extra_args: more arguments for tritonserver; HTTP, gRPC and metrics must stay on.
            security: what of the server is open to whom; everything but loading models if not
                given.
            stop_patience_s: seconds to let it finish its requests at the end before it is killed.
                Triton takes some to stop even without requests: 0 suits a server nobody else asks.
            on_progress: called with a line for people whenever something has changed.

        Raises:
            ServerUsageError: other machines could load models without a key.
        """
        self.repository = Path(repository).absolute()
        self.security = security or Security()
        self.addresses = self.security.addresses(host)
        self._access: Access | None = None
        self.ports = Ports(http_port, grpc_port, metrics_port)
        self.version = ""
        self.installation: Installation | None = None
        self._free_ports = free_ports
        self._timeout_s = timeout_s
        self._explicit = Path(tritonserver) if tritonserver is not None else None
        self._backend_directory = Path(backend_directory) if backend_directory is not None else None
        self._log = Path(log).absolute() if log is not None else None
        self._models = models
        self._extra_args = list(extra_args)
        self._stop_patience_s = stop_patience_s
        self._on_progress = on_progress or (lambda line: None)
        self._process: ProcessGroup | None = None
        self._work: Path | None = None
        self._lock: int | None = None
        self._is_ready = False
        self._bytecode_before: set[Path] = set()
        self._known_options: frozenset[str] = frozenset()
        # A name of its own tells it from another server on the same port, and its shared-memory
        # segments from those of others.
        self._server_id = f"{SERVER_PREFIX}{os.getpid()}_{secrets.token_hex(4)}"

    @property
    def http_url(self) -> str:
        """`host:port`, as `tritonclient.http` takes it."""
        return url(self.addresses.http, self.ports.http)

    @property
    def grpc_url(self) -> str:
        """`host:port`, as `tritonclient.grpc` takes it."""
        return url(self.addresses.grpc, self.ports.grpc)

    @property
    def metrics_url(self) -> str:
        """Full URL of the Prometheus metrics."""
        return f"http://{url(self.addresses.metrics, self.ports.metrics)}/metrics"

    @property
    def access(self) -> Access:
        """How our own calls reach its gRPC port, once it has started."""
        if self._access is None:
            raise RuntimeError("the server has not started")
        return replace(self._access, url=self.grpc_url)

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

    def controls(self) -> list[Control]:
        """What `production` turned on and what it could not, once the server is ready.

        Empty without `production`.
        """
        if not self.security.production:
            return []
        return controls(
            self.security, self.repository, self.addresses, self.version, self._known_options
        )

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
        raise self._ended()

    def why_it_ended(self) -> str:
        """Why the server has ended, in one line; empty while it runs."""
        return "" if self.is_running() else str(self._ended())

    def start(self) -> None:
        """Start the server and wait until it serves.

        It serves when every model is ready and, where the repository has `adaptive_vit`, that has
        answered an image.

        Raises:
            ServerUsageError: something to put right first: repository, ports, tritonserver, log.
            ServerStartError: the server ended, a model is not ready, or there was no answer.
        """
        if self._process is not None:
            raise RuntimeError("the server is already running")
        models = list(models_in(self.repository) if self._models is None else self._models)
        require_as_assembled(self.repository)
        if not self._free_ports:
            check_ports(self.addresses, self.ports)
        self._access = self.security.access(self.grpc_url)
        if self._log is not None:
            triton_log.make_writable(self._log)
        remove_dead_segments()
        self._bytecode_before = bytecode_folders(self.repository)
        try:
            self._lock = hold(self._server_id)
            self._work = Path(tempfile.mkdtemp(prefix="adaptive-vit-server-"))
            self.installation = find_installation(
                self._work / "backends",
                self._explicit,
                self._backend_directory,
                wheel=find_wheel(),
            )
            environment = self.installation.environment()
            if self.security.production:
                self._known_options = known_options(self.installation.binary, environment)
            self._start_on_free_ports(models, environment)
        except BaseException:
            self.stop()
            raise

    def stop(self, patience_s: float | None = None) -> None:
        """Stop the server and remove what it left behind; does nothing if it is not running.

        Args:
            patience_s: seconds to let it finish its requests before it is killed; what it was
                given when it was made if not given here.

        Raises:
            ServerError: some of its processes cannot even be killed.
        """
        if patience_s is None:
            patience_s = self._stop_patience_s if self._is_ready else _ABORT_TIMEOUT_S
        try:
            if self._process is not None:
                self._process.stop(patience_s)
        finally:
            self._process = None
            self._is_ready = False
            remove_segments(self._server_id)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
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

    def _ended(self) -> ServerStartError:
        code = self._running().wait()
        return triton_log.start_error(
            f"tritonserver ended by itself (exit code {code})", self.log_path
        )

    def _running(self) -> ProcessGroup:
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process

    def _work_directory(self) -> Path:
        if self._work is None:
            raise RuntimeError("the server is not running")
        return self._work

    def _start_on_free_ports(self, models: Sequence[str], environment: dict[str, str]) -> None:
        for attempt in range(_PORT_ATTEMPTS):
            if self._free_ports:
                self.ports = pick_free_ports(self.addresses.grpc)
            self._launch(environment)
            try:
                self._wait_for_models(models)
                if ENTRY in models:
                    self._wait_for_first_answer()
                self._is_ready = True
                return
            except ServerStartError as error:
                # Somebody took a port while the models were loading.
                is_race = self._free_ports and triton_log.is_port_taken(error.log_tail)
                if not is_race or attempt == _PORT_ATTEMPTS - 1:
                    raise
                self._running().stop(_ABORT_TIMEOUT_S)

    def _launch(self, environment: dict[str, str]) -> None:
        assert self.installation is not None
        command = triton_command(
            self.installation.binary,
            self._server_id,
            self.repository,
            self.installation.backends,
            self.addresses,
            self.ports,
            [*self.security.arguments(self._known_options), *self._extra_args],
        )
        # Its own working directory: Python models have the working directory first on sys.path, and
        # would import this project's packages when started from a checkout.
        self._process = ProcessGroup(
            command,
            environment,
            cwd=self._work_directory(),
            log=self.log_path,
            keep_open=() if self._lock is None else (self._lock,),
        )

    def _wait_for_models(self, models: Sequence[str]) -> None:
        """Wait until every model is ready and every port is open.

        A server can report itself ready while a model is missing, so each is asked for by name. And
        another server may have taken the port while ours was loading, so the server is, too.

        Raises:
            ServerStartError: the server ended, or the time ran out.
        """
        self._on_progress(f"starting tritonserver, {len(models)} models to load")
        deadline = time.monotonic() + self._timeout_s
        waiting, loaded = list(models), 0
        with self.access.open() as client:
            while True:
                version = self._version(client)
                if version:
                    waiting = [model for model in waiting if not _is_ready(client, model)]
                    # Metrics come up last: gRPC answers for a moment even if their port is taken.
                    if not waiting and self._running().listens_on(self.ports.all):
                        self.version = version
                        return
                log = self._log_while_running(models)
                found = len(triton_log.loaded_models(log) & set(models))
                if found > loaded:
                    loaded = found
                    self._on_progress(f"{loaded} of {len(models)} models loaded")
                if time.monotonic() > deadline:
                    what = "not ready" if waiting else "not listening on all ports"
                    raise triton_log.start_error(
                        f"{what} after {self._timeout_s:g} s", self.log_path, waiting
                    )
                time.sleep(_POLL_S)

    def _wait_for_first_answer(self) -> None:
        """Send an image through the whole ensemble.

        A queue that clients have filled already, as they do where a server is restarted under load,
        is no error: their requests are being answered. A router that is still comparing its answers
        with the calibration's, and refuses requests until it knows, is waited for.

        Raises:
            ServerStartError: no answer, or an error.
        """
        self._on_progress("waiting for the answer to a first request")
        answers = ANSWERS if refuses_other_answers(self.repository) else 1
        with self.access.open() as client:

            def ask() -> None:
                try:
                    client.infer(
                        ENTRY,
                        [image_input()],
                        request_id=PROBE_ID,
                        client_timeout=_FIRST_ANSWER_TIMEOUT_S,
                    )
                except InferenceServerException as error:
                    if not QUEUE_FULL.search(error.message()):
                        raise

            try:
                wait_out(ask, answers, self._timeout_s)
            except InferenceServerException as error:
                reason = triton_log.first_line(error.message())
                if is_comparing(reason):
                    reason = f"{reason} (after {self._timeout_s:g} s; --timeout-s gives it longer)"
                elif is_other(reason):
                    reason = f"{reason}; {WAY_OUT}"
                raise triton_log.start_error(
                    f"every model is ready, but the first request failed: {reason}", self.log_path
                ) from error

    def _version(self, client: triton.InferenceServerClient) -> str:
        """The version that our server reports; empty while nobody, or another, answers."""
        try:
            metadata = client.get_server_metadata(client_timeout=_CALL_TIMEOUT_S)
        except (InferenceServerException, grpc.RpcError):  # Nobody listens yet.
            return ""
        return str(metadata.version) if metadata.name == self._server_id else ""

    def _log_while_running(self, models: Sequence[str]) -> str:
        code = self._running().exit_code  # Before the log, which is complete if it has ended.
        log = triton_log.read(self.log_path)
        if code is not None:
            loaded = triton_log.loaded_models(log)
            missing = [model for model in models if model not in loaded]
            raise triton_log.start_error(
                f"tritonserver ended while starting (exit code {code})", self.log_path, missing
            )
        return log


def _is_ready(client: triton.InferenceServerClient, model: str) -> bool:
    try:
        return bool(client.is_model_ready(model, client_timeout=_CALL_TIMEOUT_S))
    except (InferenceServerException, grpc.RpcError):
        return False
