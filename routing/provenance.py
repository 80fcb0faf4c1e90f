"""What made an artifact: this project's release, and the processor that its answers come from.

Int8 answers depend on the processor: those without a dot product of 8-bit numbers (VNNI and its
like) add in 16 bits, which saturate, and the others add exactly.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RELEASE = "0.1.0"  # of the distribution too: pyproject.toml reads it here
# As Linux names them: the instructions among which ONNX Runtime chooses its int8 kernels.
INT8_INSTRUCTIONS = (
    "amx_int8",
    "avx512_vnni",
    "avx_vnni",
    "avx_vnni_int8",
    "avx512f",
    "avx2",
    "i8mm",
    "asimddp",
)
_CPUINFO = Path("/proc/cpuinfo")


def processor(cpuinfo: Path = _CPUINFO) -> dict[str, Any]:
    """This machine's processor: `vendor`, `model` and those of `INT8_INSTRUCTIONS` that it has.

    Where the kernel does not describe it, `model` is what Python knows and `int8` is None.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    facts: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags", facts.get("Features"))
    return {
        "vendor": facts.get("vendor_id", facts.get("CPU implementer", "")),
        "model": facts.get("model name") or platform.processor() or platform.machine(),
        "int8": None
        if flags is None
        else [name for name in INT8_INSTRUCTIONS if name in flags.split()],
    }


def processor_words(found: Mapping[str, Any] | None) -> str:
    """What `processor` found, for people."""
    if not found:
        return "a processor that is not known"
    if found["int8"] is None:
        return f"{found['model']}"
    return f"{found['model']} ({', '.join(found['int8']) or 'no int8 instructions'})"


def runtime_words(runtime: Mapping[str, Any] | None) -> str:
    """What answered, for people: `{"name": ..., "processor": ...}` as calibration records it."""
    if not runtime:
        return "a runtime that was not recorded"
    return f"{runtime['name']}, {processor_words(runtime.get('processor'))}"
