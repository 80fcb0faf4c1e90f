"""Run a tritonserver as a context manager: prepare, launch, wait for every model, first answer."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from tritonclient.utils import InferenceServerException

from bundle.placing import PREFIX, make_working_folder, remove_dead_folders
from bundle.versions import refuses_other_answers
from routing import PROBE_ID

from . import triton_log
from .access import (
    ANSWERS,
    ENTRY,
    OTHER_ANSWERS,
    QUEUE_FULL,
    STILL_COMPARING,
    WAY_OUT,
    Access,
    image_input,
    rest,
    wait_out,
)
from .controls import Control, controls
from .errors import ServerStartError
from .installation import SHM_BYTES, Installation, find_installation, find_wheel
from .paths import plain
from .ports import Ports, check_ports, pick_free_ports, url
from .preconditions import check_machine, check_shared_memory, temporary_folder
from .process import LogCopy, ProcessGroup
from .repository import bytecode, check_repository, remove_bytecode
from .security import Security, known_options
from .shared_memory import SERVER_PREFIX, hold, remove_dead_segments, remove_segments

_STOP_TIMEOUT_S = 40.0  # Triton itself gives running requests 30 s.
_ABORT_TIMEOUT_S = 0.2  # What has not served has nothing to finish.
# Once a model has failed, the others are waited for as long as the last news of one is not older.
_LAST_NEWS_S = 10.0
_PORT_ATTEMPTS = 3
_POLL_S = 0.1
STANDARD_OUTPUT = ("-", "/dev/stdout")  # The guard has another, and opens no such name.
_CALL_TIMEOUT_S = 5.0
_FIRST_ANSWER_TIMEOUT_S = 60.0


class TritonServer:
    """A tritonserver that serves one model repository between `with` and its end.

    It also ends when this process ends, however that happens (see `guard.py`).

    Attributes:
        ports: ports it listens on; with `free_ports` known once it has started.
        version: the version that the server reports, such as `2.51.0`; empty before it is ready.
        installation: which tritonserver runs; None before it has started.
    """

    def __init__(
        self,
        repository: Path | str,
        *,
        ports: Ports | None = None,
        free_ports: bool = False,
        host: str = "127.0.0.1",
        timeout_s: float = 120.0,
        tritonserver: Path | str | None = None,
        backend_directory: Path | str | None = None,
        log: Path | str | None = None,
        log_as_json: bool = False,
        models: Sequence[str] | None = None,
        extra_args: Sequence[str] = (),
        security: Security | None = None,
        stop_patience_s: float = _STOP_TIMEOUT_S,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        """Say what to run; nothing starts yet.

        Args:
            repository: the model repository.
            ports: ports to listen on; Triton's own if not given.
            free_ports: pick three free ports instead of those.
            host: address to bind; `security` may bind HTTP and metrics elsewhere.
            timeout_s: seconds until every model must be ready; as many more to compare answers.
            tritonserver: binary to run instead of the one on PATH or in the wheel.
            backend_directory: its backends, where they are not in their usual place.
            log: file to append Triton's log to, `-` for the standard output; only a temporary one
                that goes with the server if not given. The file may be moved, removed, or copied
                and emptied meanwhile, as logrotate does.
            log_as_json: write each line of it as a JSON object: time, level, source, message.
            models: models that must be ready, every one in the repository if not given.
            extra_args: more arguments for tritonserver; HTTP, gRPC and metrics must stay on.
            security: what of it is open to whom; all but loading models if not given.
            stop_patience_s: seconds to let it finish its requests at the end before it is killed.
                Triton takes some to stop even without requests: 0 suits a server nobody else asks.
            on_progress: called with a line for people whenever something has changed.

        Raises:
            ServerUsageError: other machines could load models without a key.
        """
        self.repository = Path(repository).absolute()
        self.security = security or Security()
        self.addresses = self.security.addresses(host)
        self.ports = ports or Ports()
        self.version = ""
        self.installation: Installation | None = None
        self._access = Access("")
        self._free_ports = free_ports
        self._timeout_s = timeout_s
        self._explicit = Path(tritonserver) if tritonserver is not None else None
        self._backend_directory = Path(backend_directory) if backend_directory is not None else None
        file = Path(log).absolute() if log is not None and str(log) not in STANDARD_OUTPUT else None
        self._log = LogCopy(file, log_as_json) if log is not None else None
        self._models = models
        self._extra_args = list(extra_args)
        self._stop_patience_s = stop_patience_s
        self._on_progress = on_progress or (lambda line: None)
        self._process: ProcessGroup | None = None
        self._work, self._served = Path(), self.repository  # Or a link to it.
        self._undo = ExitStack()
        self._is_ready = False
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
        return replace(self._access, url=self.grpc_url)

    @property
    def pid(self) -> int:
        """Id of the server's process."""
        return self._running.pid

    @property
    def log_path(self) -> Path:
        """File with Triton's log; exists while the server runs, longer if it was asked for."""
        return (self._log and self._log.path) or self._recent_log

    @property
    def _recent_log(self) -> Path:
        """Our own, which nobody else moves; of a long one the end."""
        return self._work / "tritonserver.log"

    def controls(self) -> list[Control]:
        """What `production` turned on and what it could not, once the server is ready."""
        if not self.security.production:
            return []
        return controls(
            self.security, self.repository, self.addresses, self.version, self._known_options
        )

    def memory_mib(self) -> float:
        """Proportional set size of the server and all its model processes, in MiB."""
        return self._running.memory_mib()

    def cpu_s(self) -> float:
        """CPU seconds that the server and all its model processes have taken so far."""
        return self._running.cpu_s()

    def process_ids(self) -> list[int]:
        """Ids of the server's process and of all its model processes."""
        return self._running.process_ids()

    def is_running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.exit_code is None

    def wait(self) -> None:
        """Wait until the server ends by itself, and raise `ServerStartError` with the reason."""
        raise self._end()

    def why_it_ended(self) -> str:
        """Why the server has ended, in one line; empty while it runs."""
        return "" if self.is_running() else str(self._end())

    def _end(self) -> ServerStartError:
        return self._failure(f"tritonserver ended by itself (exit code {self._running.wait()})")

    def _failure(self, what: str, missing: Sequence[str] = ()) -> ServerStartError:
        error = triton_log.start_error(what, self._recent_log, missing)
        # Triton may know it by a link that is gone when somebody reads this.
        names = (str(self._served), str(self.repository))
        return ServerStartError(
            str(error).replace(*names),
            {model: why.replace(*names) for model, why in error.not_ready.items()},
            error.log_tail.replace(*names),
        )

    def start(self) -> None:
        """Start the server and wait until it serves.

        It serves when every model is ready and `adaptive_vit`, where there is one, has answered.

        Raises:
            ServerUsageError: something to put right first: repository, ports, tritonserver, log,
                or what the machine lacks (`preconditions.py`).
            ServerStartError: the server ended, a model is not ready, or there was no answer.
        """
        if self._process is not None:
            raise RuntimeError("the server is already running")
        check_machine()
        temporary = temporary_folder()
        models = check_repository(self.repository, self._models)
        if not self._free_ports:
            check_ports(self.addresses, self.ports)
        self._access = self.security.access(self.grpc_url)
        if self._log is not None and self._log.path is not None:
            triton_log.make_writable(self._log.path)
        remove_dead_segments()
        remove_dead_folders(temporary, PREFIX)
        try:
            lock = hold(self._server_id)
            self._undo.callback(os.close, lock)
            self._undo.callback(remove_segments, self._server_id)
            self._work, held = make_working_folder(f"{PREFIX}server-", temporary)
            # Twice, as NFS keeps the folder of a file that is open.
            self._undo.callback(shutil.rmtree, self._work, ignore_errors=True)
            self._undo.callback(os.close, held)
            self._undo.callback(shutil.rmtree, self._work, ignore_errors=True)
            self._served = plain(self.repository, self._work, "repository")
            before = bytecode(self.repository)
            self._undo.callback(remove_bytecode, self.repository, but=before)
            backends = self._work / "backends"
            self.installation = find_installation(
                backends, self._explicit, self._backend_directory, wheel=find_wheel()
            )
            check_shared_memory(self.repository, models, self.installation.backends, SHM_BYTES)
            self._start_on_free_ports(models, self.installation, (lock, held))
        except BaseException:
            self.stop()
            raise

    def stop(self, patience_s: float | None = None) -> None:
        """Stop the server and remove what it left behind; does nothing if it is not running.

        Args:
            patience_s: seconds before it is killed, in place of `stop_patience_s`.

        Raises:
            ServerError: some of its processes cannot even be killed.
        """
        if patience_s is None:
            patience_s = self._stop_patience_s if self._is_ready else _ABORT_TIMEOUT_S
        with self._undo:
            if self._process is not None:
                self._process.stop(patience_s)
            self._process, self._is_ready = None, False  # Not before: it can be told again.

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def _running(self) -> ProcessGroup:
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process

    def _start_on_free_ports(
        self, models: Sequence[str], installation: Installation, locks: tuple[int, ...]
    ) -> None:
        environment = installation.environment(self._work)
        if self.security.production:
            self._known_options = known_options(installation.binary, environment)
        for attempt in range(_PORT_ATTEMPTS):
            if self._free_ports:
                self.ports = pick_free_ports(self.addresses.grpc)
            arguments = [*self.security.arguments(self._known_options), *self._extra_args]
            # Its own working directory: Python models have it first on sys.path, and would import
            # this project's packages when started from a checkout.
            self._process = ProcessGroup(
                installation.command(
                    self._server_id, self._served, self.addresses, self.ports, arguments
                ),
                environment,
                cwd=self._work,
                log=self._recent_log,
                keep_open=locks,
                copy=self._log,
            )
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
                self._process.stop(_ABORT_TIMEOUT_S)

    def _wait_for_models(self, models: Sequence[str]) -> None:
        """Wait until every model is ready and every port is open.

        A server can report itself ready while a model is missing, so each is asked for by name. And
        another server may have taken the port while ours was loading, so the server is, too. Where
        a model fails Triton takes seconds to end, so the log is read: once every other model has
        loaded or failed, too, there is nothing to wait for.
        """
        self._on_progress(f"starting tritonserver, {len(models)} models to load")
        deadline = time.monotonic() + self._timeout_s
        waiting, told = list(models), (-1, -1)
        with self.access.open() as client:
            while True:
                metadata = _answer(client.get_server_metadata)
                if metadata is not None and metadata.name == self._server_id:
                    self.version = str(metadata.version)
                    waiting = [m for m in waiting if not _answer(client.is_model_ready, m)]
                    # Metrics come up last: gRPC answers for a moment even if their port is taken.
                    if not waiting and self._running.listens_on(self.ports.all):
                        self._on_progress(f"{len(models)} of {len(models)} models loaded")
                        return
                code = self._running.exit_code  # Before the log, which is complete if it ended.
                log, now = triton_log.read(self._recent_log), time.monotonic()
                missing = sorted(set(models) - triton_log.loaded_models(log))
                failed = [m for m in missing if m in triton_log.failure_reasons(log)]
                if told != (len(missing), len(failed)):
                    told, news_at = (len(missing), len(failed)), now
                    self._on_progress(f"{len(models) - told[0]} of {len(models)} models loaded")
                what = ""
                if code is not None:
                    what = f"tritonserver ended while starting (exit code {code})"
                elif failed and (failed == missing or now - news_at > _LAST_NEWS_S):
                    what = "a model failed"
                elif now > deadline:
                    what = "not ready" if waiting else "not listening on all ports"
                    what, missing = f"{what} after {self._timeout_s:g} s", waiting
                if what:
                    raise self._failure(what, missing)
                deadline = rest(_POLL_S, deadline)

    def _wait_for_first_answer(self) -> None:
        """Send an image through the whole ensemble.

        A queue that clients have filled already, as they do where a server is restarted under load,
        is no error: their requests are being answered. A router that is still comparing its answers
        with the calibration's, and refuses requests until it knows, is waited for.
        """
        self._on_progress("waiting for the answer to a first request")
        answers = ANSWERS if refuses_other_answers(self.repository) else 1

        def ask() -> None:
            options = {"request_id": PROBE_ID, "client_timeout": _FIRST_ANSWER_TIMEOUT_S}
            try:
                client.infer(ENTRY, [image_input()], **options)
            except InferenceServerException as error:
                if not QUEUE_FULL.search(error.message()):
                    raise

        try:
            with self.access.open() as client:
                wait_out(ask, answers, self._timeout_s)
        except InferenceServerException as error:
            reason = triton_log.first_line(error.message())
            if STILL_COMPARING in reason:
                reason = f"{reason} (after {self._timeout_s:g} s; --timeout-s gives it longer)"
            elif OTHER_ANSWERS in reason:
                reason = f"{reason}; {WAY_OUT}"
            what = f"every model is ready, but the first request failed: {reason}"
            raise self._failure(what) from error


def _answer(call: Callable[..., Any], *arguments: str) -> Any:
    """What the server answers; None while nobody listens yet."""
    try:
        return call(*arguments, client_timeout=_CALL_TIMEOUT_S)
    except (InferenceServerException, grpc.RpcError):
        return None
