"""What a look (`probe`) asks of a real server: its gRPC port and its processes.

Triton neither restarts a model's process that ends nor reports it: the model stays ready and fails
every request that meets the missing instance. So the processes are counted here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from tritonclient.utils import InferenceServerException

from routing import PROBE_ID

from .access import ENTRY, PREPROCESS, QUEUE_FULL, Access, image_input, zeros_input
from .installation import STUB_NAME

# Long for what a server knows without running a model, short for a supervisor that waits for it.
_QUESTION_TIMEOUT_S = 1.5
_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
READY = "READY"
Key = tuple[str, str]  # A model's name and version.


@dataclass(frozen=True)
class Reply:
    """What came back from a canary.

    Attributes:
        error: one line, empty if it was answered.
        is_unavailable: whether the error says that the model cannot take the request now: its
            queue is full, a rung is late, or nobody listens.
    """

    error: str = ""
    is_unavailable: bool = False


@dataclass
class Canary:
    """A request on its way; `reply` is None until it is back, after so many milliseconds."""

    model: str
    reply: Reply | None = None
    latency_ms: float | None = None


class Stub(NamedTuple):
    """The process of one model instance."""

    pid: int
    model: str
    version: str


class Serving:
    """A server, over one connection of its own. Use as a context manager.

    Open it anew for each look: a server that takes no more connections still answers on old ones.
    """

    def __init__(
        self,
        access: Access,
        process_ids: Callable[[], Iterable[int]] | None,
        ended: Callable[[], str] = lambda: "",
    ) -> None:
        """Say where the server is.

        Args:
            access: how to reach it.
            process_ids: ids of all its processes; None where they cannot be seen from here.
            ended: why its process is gone; empty while it runs, or where that cannot be seen.
        """
        self._access = access
        self._process_ids = process_ids
        self.why_it_ended = ended

    def __enter__(self) -> Serving:
        self._client = self._access.open()
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()  # Takes back the canaries that are not answered yet.

    def states(self) -> dict[Key, str] | None:
        """State by model and version, `READY` or a sentence; None if the server does not say."""
        index = self._ask(self._client.get_model_repository_index)
        if index is None:
            return None
        return {
            (model.name, model.version): f"{model.state} ({model.reason})"
            if model.reason and model.state != READY
            else model.state
            for model in index.models
        }

    def is_ready(self, model: str) -> bool:
        """Whether a model is ready, which the server says without a key."""
        with suppress(InferenceServerException):
            return bool(self._client.is_model_ready(model, client_timeout=_QUESTION_TIMEOUT_S))
        return False

    def instances(self, model: str, version: str) -> int | None:
        """Instances that a model runs by its configuration; None if the server does not say."""
        answer = self._ask(self._client.get_model_config, model, version)
        if answer is None:
            return None
        groups = answer.config.instance_group
        return sum(int(group.count) * max(1, len(group.gpus)) for group in groups)

    def is_python(self, model: str, version: str) -> bool:
        """Whether a model is one of the python backend's, and so has processes of its own."""
        answer = self._ask(self._client.get_model_config, model, version)
        return answer is not None and answer.config.backend == "python"

    def stubs(self) -> list[Stub] | None:
        """The processes of the model instances; None where they cannot be seen."""
        return None if self._process_ids is None else find_stubs(self._process_ids())

    def cpu_s(self, model: str) -> float:
        """CPU seconds that a model's processes have taken; 0 where they cannot be seen."""
        total = 0.0
        for stub in self.stubs() or ():
            if stub.model == model:
                with suppress(psutil.Error):
                    total += sum(psutil.Process(stub.pid).cpu_times()[:2])
        return total

    def allowed_cores(self) -> float:
        """Cores that the server may use; that this process may, where it cannot be seen."""
        pids = [] if self._process_ids is None else self._process_ids()
        return allowed_cores(next(iter(pids), os.getpid()))

    def answered(self) -> dict[str, int] | None:
        """Requests that each model has answered so far; None if the server does not answer.

        Empty where it tells only who has the admin key.
        """
        counts: dict[str, int] = {}
        try:
            for model in self._call(self._client.get_inference_statistics).model_stats:
                count = int(model.inference_stats.success.count)
                counts[model.name] = counts.get(model.name, 0) + count
        except InferenceServerException as error:
            return {} if "restricted" in error.message() else None
        return counts

    def ask(self, model: str) -> Canary:
        """Send a canary, without waiting. Its id tells the router that it is no traffic."""
        canary = Canary(model)
        started = time.monotonic()

        def keep(result: object, error: InferenceServerException | None) -> None:
            canary.latency_ms = (time.monotonic() - started) * 1e3
            canary.reply = Reply() if error is None else _reply(error)

        try:
            if model in (ENTRY, PREPROCESS):
                tensor = image_input()
            else:
                metadata = self._call(self._client.get_model_metadata, model)
                tensor = zeros_input([1, *metadata.inputs[0].shape[1:]])
            started = time.monotonic()
            self._client.async_infer(model, [tensor], keep, request_id=PROBE_ID)
        except InferenceServerException as error:
            canary.reply = _reply(error)
            if error.status() == "StatusCode.DEADLINE_EXCEEDED":  # That is no word of the model's.
                canary.reply = replace(canary.reply, is_unavailable=True)
        return canary

    def _ask(self, call: Callable[..., Any], *arguments: str) -> Any:
        """The answer; None if the server does not say."""
        with suppress(InferenceServerException):
            return self._call(call, *arguments)
        return None

    def _call(self, call: Callable[..., Any], *arguments: str) -> Any:
        headers = dict(self._access.headers)
        return call(*arguments, headers=headers, client_timeout=_QUESTION_TIMEOUT_S)


def find_stubs(process_ids: Iterable[int]) -> list[Stub]:
    """Pick the model instances out of a server's processes, told by their arguments."""
    stubs = []
    for pid in process_ids:
        with suppress(psutil.Error):  # It has just ended.
            # STUB MODEL/VERSION/FILE SHARED_MEMORY_NAME ...
            arguments = psutil.Process(pid).cmdline()
            if len(arguments) > 1 and Path(arguments[0]).name == STUB_NAME:
                parts = Path(arguments[1]).parts
                if len(parts) > 2:
                    stubs.append(Stub(pid, parts[-3], parts[-2]))
    return stubs


def local_processes(access: Access) -> Callable[[], list[int]] | None:
    """How to list the processes of a server that listens on this machine, and its children.

    None where nobody of this user listens here.
    """
    port = int(access.url.rpartition(":")[2]) if access.is_here else None
    with suppress(psutil.Error):
        for connection in psutil.net_connections(kind="tcp") if port else ():
            is_listening = connection.status == psutil.CONN_LISTEN
            if is_listening and connection.laddr.port == port and connection.pid:
                return partial(_family, connection.pid)
    return None


def allowed_cores(pid: int, cgroups: Path = _CGROUPS, proc: Path = _PROC) -> float:
    """Cores that a process may use, by its affinity and the quotas of its cgroup and those above.

    Args:
        pid: the process.
        cgroups: where the kernel shows cgroups.
        proc: the proc file system.
    """
    found = [float(os.cpu_count() or 1)]
    with suppress(OSError):
        found = [float(len(os.sched_getaffinity(pid)))]
    with suppress(OSError):
        for line in (proc / str(pid) / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = cgroups / controllers
            folder = root / path.strip("/")
            if not controllers or "cpu" in controllers.split(","):
                for each in (folder, *folder.parents):
                    found += _quota(each) if each.is_relative_to(root) else []
    return min(found)


def _quota(cgroup: Path) -> list[float]:
    """The quota of one cgroup in cores; empty where it has none."""
    with suppress(OSError, ValueError):
        if (cgroup / "cpu.max").is_file():  # Version 2.
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu.cfs_period_us").read_text()
        if float(quota) > 0:  # `max` is no number, and -1 no quota either.
            return [float(quota) / float(period)]
    return []


def _family(pid: int) -> list[int]:
    with suppress(psutil.Error):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return []


def _reply(error: InferenceServerException) -> Reply:
    message = " ".join(error.message().split())
    is_unavailable = error.status() == "StatusCode.UNAVAILABLE"
    return Reply(message, is_unavailable or bool(QUEUE_FULL.search(message)))
