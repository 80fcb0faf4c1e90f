"""What an artifact says of the runtime and the processor that its answers come from."""

import re
from pathlib import Path

import pytest

from routing.provenance import RELEASE, processor, processor_words, runtime_words
from tests.unit.reference_files import collected, fitted

ROOT = Path(__file__).resolve().parents[2]
WITH_VNNI = """processor : 0
vendor_id : GenuineIntel
model name : Intel(R) Xeon(R) Processor
flags : fpu sse2 avx2 avx512f avx512_vnni amx_int8

processor : 1
flags : none
"""
ARM = "processor : 0\nCPU implementer : 0x41\nFeatures : fp asimd asimddp i8mm\n"


@pytest.mark.parametrize(
    ("text", "vendor", "int8"),
    [
        (WITH_VNNI, "GenuineIntel", ["amx_int8", "avx512_vnni", "avx512f", "avx2"]),
        (WITH_VNNI.replace(" avx512_vnni amx_int8", ""), "GenuineIntel", ["avx512f", "avx2"]),
        (ARM, "0x41", ["i8mm", "asimddp"]),
    ],
)
def test_processors_are_told_apart_by_what_decides_the_int8_kernel(tmp_path, text, vendor, int8):
    (tmp_path / "cpuinfo").write_text(text)
    found = processor(tmp_path / "cpuinfo")
    assert (found["vendor"], found["int8"]) == (vendor, int8) and found["model"]
    assert processor_words(found) == f"{found['model']} ({', '.join(int8)})"


def test_where_the_kernel_says_nothing_python_names_it(tmp_path):
    found = processor(tmp_path / "absent")
    assert found["int8"] is None and processor_words(found) == found["model"] != ""


def test_what_is_not_known_is_said():
    assert runtime_words({}) == runtime_words(None) == "a runtime that was not recorded"
    served = {"name": "tritonserver 2.51.0", "processor": None}
    assert runtime_words(served) == "tritonserver 2.51.0, a processor that is not known"


def test_the_release_is_that_of_the_distribution():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text and 'path = "routing/provenance.py"' in text
    pattern = re.search(r"^pattern = '(.*)'$", text, re.M)[1]
    assert re.search(pattern, (ROOT / "routing/provenance.py").read_text())["version"] == RELEASE


def test_an_artifact_names_runtime_processor_and_releases(tmp_path):
    graph_set, outputs = collected(tmp_path)
    data = fitted(graph_set, outputs, images=0).calibration.data
    assert re.match(r"onnxruntime \d+\.\d+\.\d+ on (CPU|CUDA)$", data["runtime"]["name"])
    assert data["runtime"]["processor"] == processor()
    assert (data["release"], data["exported_by"]) == (RELEASE, graph_set.release)
