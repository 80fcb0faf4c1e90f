"""What figures depend on: the machine, its NVIDIA GPUs as NVML sees them, and versions."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import onnxruntime
import psutil
import pynvml

_CPUINFO = Path("/proc/cpuinfo")


def environment(triton_version: str, perf_analyzer: str | None) -> dict[str, Any]:
    """Describe this machine, as it stands in summary.json.

    Clocks of a GPU are those of this moment: ask right after measuring, before it goes idle.

    Args:
        triton_version: as the server reports it.
        perf_analyzer: its version; None where it was not used.
    """
    with Nvml() as nvml:
        gpus = nvml.describe()
    cpu, cores = cpu_name(), len(os.sched_getaffinity(0))
    return {
        "device": device_title(cpu, cores, [gpu["name"] for gpu in gpus]),
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "os": _os_name(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "triton_version": triton_version,
        "perf_analyzer": perf_analyzer,
        "locust": version("locust"),
    }


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's own name, else that of its architecture.

    Args:
        cpuinfo: the kernel's description of the processors.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_title(cpu: str, cores: int, gpus: list[str]) -> str:
    """A row's name in a table: the GPUs where there are any, else the cores and their processor.

    Args:
        cpu: the processor's name.
        cores: how many of its cores this process may use.
        gpus: names of the GPUs.
    """
    if gpus:
        return gpus[0] if len(gpus) == 1 else f"{len(gpus)} x {gpus[0]}"
    # "Intel(R) Xeon(R) CPU @ 2.80GHz" is an Intel Xeon: marks and the nominal clock say nothing.
    plain = re.sub(r"\((R|TM|C)\)|\b(CPU|Processor)\b|@.*", " ", cpu, flags=re.IGNORECASE)
    return f"{cores} core{'s' * (cores != 1)} of {' '.join(plain.split()) or cpu}"


def _os_name() -> str:
    kernel = f"{platform.system()} {platform.release()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):  # A system without that file, macOS among them.
        return kernel


class Nvml:
    """NVML between `with` and its end.

    Attributes:
        handles: one per GPU of the machine; empty where NVML cannot be had.
    """

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self._is_open = False

    def __enter__(self) -> Nvml:
        try:
            pynvml.nvmlInit()
            self._is_open = True
            count = pynvml.nvmlDeviceGetCount()
            self.handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        except pynvml.NVMLError:  # No driver, or one that does not answer.
            self.handles = []
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_open:
            pynvml.nvmlShutdown()

    def used_mib(self) -> float | None:
        """Memory in use on all GPUs together, by whomever; None without a GPU."""
        if not self.handles:
            return None
        used = sum(pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in self.handles)
        return float(used) / 2**20

    def describe(self) -> list[dict[str, Any]]:
        """Each GPU's name, driver, memory and clocks; None for what it does not tell."""
        found = []
        for handle in self.handles:

            def clock(get: Callable[[Any, int], int], domain: int, handle: Any = handle) -> Any:
                return _or_none(lambda: get(handle, domain))

            now, most = pynvml.nvmlDeviceGetClockInfo, pynvml.nvmlDeviceGetMaxClockInfo
            found.append(
                {
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "driver": pynvml.nvmlSystemGetDriverVersion(),
                    "memory_mib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**20),
                    "sm_clock_mhz": clock(now, pynvml.NVML_CLOCK_SM),
                    "max_sm_clock_mhz": clock(most, pynvml.NVML_CLOCK_SM),
                    "memory_clock_mhz": clock(now, pynvml.NVML_CLOCK_MEM),
                    "max_memory_clock_mhz": clock(most, pynvml.NVML_CLOCK_MEM),
                }
            )
        return found


def _or_none(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except pynvml.NVMLError:  # A slice of a GPU (MIG) or a virtual one has no clocks of its own.
        return None
