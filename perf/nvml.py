"""NVIDIA GPUs as their management library (NVML) sees them; none where there is no driver."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import pynvml


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
        return sum(pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in self.handles) / 2**20

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
