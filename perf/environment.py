"""What figures depend on: the machine, its NVIDIA GPUs as NVML sees them, and versions."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
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
    with gpus() as handles:
        described = [_describe(handle) for handle in handles]
    cpu, cores = cpu_name(), len(os.sched_getaffinity(0))
    return {
        "device": device_title(cpu, cores, [gpu["name"] for gpu in described]),
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": described,
        "os": _os_name(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "triton_version": triton_version,
        "perf_analyzer": perf_analyzer,
        "locust": version("locust"),
    }


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's own name, else that of its architecture."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_title(cpu: str, cores: int, gpu_names: Sequence[str]) -> str:
    """A row's name in a table: the GPUs where there are any, else the cores and their processor."""
    if gpu_names:
        return gpu_names[0] if len(gpu_names) == 1 else f"{len(gpu_names)} x {gpu_names[0]}"
    # "Intel(R) Xeon(R) CPU @ 2.80GHz" is an Intel Xeon: marks and the nominal clock say nothing.
    plain = re.sub(r"\((R|TM|C)\)|\b(CPU|Processor)\b|@.*", " ", cpu, flags=re.IGNORECASE)
    return f"{cores} core{'s' * (cores != 1)} of {' '.join(plain.split()) or cpu}"


def _os_name() -> str:
    kernel = f"{platform.system()} {platform.release()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):  # A system without that file, macOS among them.
        return kernel


@contextlib.contextmanager
def gpus() -> Iterator[list[Any]]:
    """NVML's handles of the machine's GPUs while the block runs; none where NVML cannot be had."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or one that does not answer
        yield []
        return
    try:
        yield [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def used_mib(handles: Sequence[Any]) -> float | None:
    """Memory in use on all these GPUs together, by whomever; None without a GPU."""
    if not handles:
        return None
    return float(sum(pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles)) / 2**20


def _describe(handle: Any) -> dict[str, Any]:
    """A GPU's name, driver, memory and clocks; None for what it does not tell."""

    def clock(get: Callable[[Any, int], int], domain: int) -> int | None:
        try:
            return get(handle, domain)
        except pynvml.NVMLError:  # a slice of a GPU (MIG) or a virtual one has none of its own
            return None

    now, most = pynvml.nvmlDeviceGetClockInfo, pynvml.nvmlDeviceGetMaxClockInfo
    return {
        "name": pynvml.nvmlDeviceGetName(handle),
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "memory_mib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**20),
        "sm_clock_mhz": clock(now, pynvml.NVML_CLOCK_SM),
        "max_sm_clock_mhz": clock(most, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": clock(now, pynvml.NVML_CLOCK_MEM),
        "max_memory_clock_mhz": clock(most, pynvml.NVML_CLOCK_MEM),
    }
