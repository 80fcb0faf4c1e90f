"""What the environment block says of a machine, with and without GPUs."""

import json
import os

import pynvml
import pytest

from perf import environment as nvml
from perf.environment import cpu_name, device_title, environment


class FakeNvml:
    """NVML of a machine with two GPUs, the second a slice without clocks of its own."""

    NVMLError = pynvml.NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = "sm", "memory"
    CLOCKS = {"sm": (1500, 1980), "memory": (2000, 2619)}

    def __init__(self):
        self.used = {"first": 2**20, "second": 3 * 2**20}
        self.is_open = False

    def nvmlInit(self):  # noqa: N802
        self.is_open = True

    def nvmlShutdown(self):  # noqa: N802
        assert self.is_open
        self.is_open = False

    def nvmlDeviceGetCount(self):  # noqa: N802
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return list(self.used)[index]

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return f"GPU {handle}"

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        return "570.1"

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return type("Info", (), {"used": self.used[handle], "total": 80 * 2**30})

    def nvmlDeviceGetClockInfo(self, handle, domain):  # noqa: N802
        return self._clock(handle, domain, 0)

    def nvmlDeviceGetMaxClockInfo(self, handle, domain):  # noqa: N802
        return self._clock(handle, domain, 1)

    def _clock(self, handle, domain, index):
        if handle == "second":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return self.CLOCKS[domain][index]


class NoNvml(FakeNvml):
    """A machine without a driver."""

    def nvmlInit(self):  # noqa: N802
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def test_gpus_are_described_and_a_missing_clock_is_none(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setattr(nvml, "pynvml", fake)
    block = environment("2.51.0", "2.50.0")
    assert block["gpus"][0] == {
        "name": "GPU first",
        "driver": "570.1",
        "memory_mib": 81920,
        "sm_clock_mhz": 1500,
        "max_sm_clock_mhz": 1980,
        "memory_clock_mhz": 2000,
        "max_memory_clock_mhz": 2619,
    }
    assert block["gpus"][1]["max_sm_clock_mhz"] is None
    assert block["device"] == "2 x GPU first"
    assert not fake.is_open


def test_device_memory_is_that_of_all_gpus(monkeypatch):
    monkeypatch.setattr(nvml, "pynvml", FakeNvml())
    with nvml.gpus() as handles:
        assert nvml.used_mib(handles) == 4.0


def test_without_a_driver_there_is_no_gpu_and_no_device_memory(monkeypatch):
    monkeypatch.setattr(nvml, "pynvml", NoNvml())
    with nvml.gpus() as handles:
        assert nvml.used_mib(handles) is None
    block = environment("2.51.0", None)
    cores = len(os.sched_getaffinity(0))
    assert block["gpus"] == [] and block["cores"] == cores
    assert block["device"].startswith(f"{cores} core")
    assert block["triton_version"] == "2.51.0" and block["perf_analyzer"] is None
    assert block["memory_gib"] > 0 and block["onnxruntime"][0].isdigit()
    assert json.loads(json.dumps(block)) == block


@pytest.mark.parametrize(
    ("cpu", "cores", "gpus", "title"),
    [
        ("Intel(R) Xeon(R) CPU @ 2.80GHz", 2, [], "2 cores of Intel Xeon"),
        ("AMD EPYC 7763 64-Core Processor", 1, [], "1 core of AMD EPYC 7763 64-Core"),
        ("aarch64", 4, [], "4 cores of aarch64"),
        ("Processor", 4, [], "4 cores of Processor"),
        ("aarch64", 4, ["NVIDIA H100"], "NVIDIA H100"),
    ],
)
def test_a_machine_has_a_short_title(cpu, cores, gpus, title):
    assert device_title(cpu, cores, gpus) == title


def test_the_processor_is_named_by_the_kernel_or_by_its_architecture(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU: new\n\nmodel name\t: Other\n")
    assert cpu_name(file) == "Some CPU: new"
    file.write_text("processor\t: 0\n")  # as on ARM
    unnamed = cpu_name(file)
    assert unnamed and unnamed == cpu_name(tmp_path / "missing")
