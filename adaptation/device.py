"""Where training runs: the GPU with mixed precision where there is one, else the CPU's cores."""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from routing.provenance import processor

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Device:
    """A device, and the precision of the student's matrix products on it.

    Attributes:
        name: `cuda` or `cpu`.
        half: whether matrix products are taken in BF16; weights, sums and optimiser stay FP32.
    """

    name: str
    half: bool

    @classmethod
    def find(cls) -> Device:
        """CUDA where it works; in BF16 where the hardware multiplies it."""
        if torch.cuda.is_available():
            return cls("cuda", torch.cuda.is_bf16_supported(including_emulation=False))
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return cls("cpu", _has_bf16())

    @property
    def words(self) -> str:
        """For people to read."""
        precision = "BF16 products" if self.half else "FP32"
        if self.name == "cuda":
            return f"{torch.cuda.get_device_name()} with {precision}"
        return f"{torch.get_num_threads()} CPU threads with {precision}"

    def environment(self) -> dict[str, Any]:
        """Where something was trained, ready for JSON."""
        return {"device": self.words, "torch": torch.__version__, "processor": processor()}

    def autocast(self) -> AbstractContextManager[Any]:
        """What the student's forward pass runs in."""
        return torch.autocast(self.name, torch.bfloat16) if self.half else nullcontext()

    def put(self, array: NDArray[Any]) -> torch.Tensor:
        """An array of numbers there."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.name)

    def take(self, module: Module) -> Module:
        """A copy of a module there, for answers; what it shares with others stays where it is."""
        return copy.deepcopy(module).eval().to(self.name)


def _has_bf16() -> bool:
    """Whether the processor has instructions for BF16 products, which are twice as fast there."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())
