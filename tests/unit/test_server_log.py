"""Reading reasons out of Triton's log."""

import os
import tracemalloc
from pathlib import Path

import pytest

from server import ServerUsageError, TritonServer
from server.triton_log import (
    failure_reasons,
    is_port_taken,
    last_error,
    loaded_models,
    make_writable,
    read,
    start_error,
)

GPU_NOISE = (
    'E1121 11:51:38.330576 9150 server.cc:241] "CudaDriverHelper has not been initialized."\n'
)
NVML_NOISE = "Error: Failed to initialize NVML\n"
LOADED = "I1121 11:40:12.497505 6959 model_lifecycle.cc:839] \"successfully loaded 'vit_low'\"\n"
ROUTER = (
    "E1121 11:40:12.388730 6959 model_lifecycle.cc:642] \"failed to load 'router' version 1: "
    "Internal: routing.calibration.CalibrationError: calibration.json does not match "
    'vit_low/1/model.onnx\\n\\nAt:\\n  /repo/router/1/model.py(3): initialize\\n"\n'
)
ENSEMBLE = (
    'E1121 11:51:49.218126 9296 model_repository_manager.cc:703] "Invalid argument: ensemble '
    "'adaptive_vit' depends on 'router' which has no loaded version. Model 'router' loading "
    'failed with error: version 1 is at UNAVAILABLE state: Internal: x"\n'
)
ALL_FAILED = "error: creating server: Internal - failed to load all models\n"
BAD_FIELD = (
    "[libprotobuf ERROR /tmp/text_format.cc:337] Error parsing text-format "
    'inference.ModelConfig: 6:10: Message type "inference.ModelConfig" has no field named "new".\n'
    'E1121 11:51:38.331506 9150 model_repository_manager.cc:1460] "Poll failed for model '
    "directory 'm': failed to read text proto from /repo/m/config.pbtxt\"\n"
)
PORT_TAKEN = (
    'E1121 11:52:22.365915 9542 main.cc:257] "failed to start HTTP service: Unavailable - '
    "Socket '127.0.0.1:37989' already in use \"\n"
)


@pytest.mark.parametrize(
    ("log", "reasons"),
    [
        (ROUTER, {"router": "calibration.json does not match vit_low/1/model.onnx"}),
        (
            BAD_FIELD,
            {
                "m": "failed to read text proto from /repo/m/config.pbtxt: 6:10: Message type "
                '"inference.ModelConfig" has no field named "new".'
            },
        ),
        (GPU_NOISE + NVML_NOISE + LOADED, {}),
    ],
)
def test_reasons_are_one_line_without_noise(log: str, reasons: dict[str, str]):
    assert failure_reasons(log) == reasons


def test_quotes_inside_a_reason_are_kept():
    log = ROUTER.replace("does not match", 'does not \\"match\\"')
    assert failure_reasons(log)["router"].startswith('calibration.json does not "match"')


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (GPU_NOISE + NVML_NOISE, ""),
        (GPU_NOISE + ALL_FAILED, ""),
        (GPU_NOISE + "error: creating server: Internal - no disk\n", "no disk"),
        ("/x/bin/tritonserver: unrecognized option '--y'\nUsage:\n", "unrecognized option '--y'"),
        ("Usage: tritonserver [options]\n  --help\n\nBad option: \"--id\".\nGot x\n\n\n", "Got x"),
        (PORT_TAKEN, "failed to start HTTP service: Unavailable - Socket '127.0.0.1:37989' "
         "already in use"),
    ],
)  # fmt: skip
def test_last_error(log: str, error: str):
    assert last_error(log) == error


def test_loaded_models_and_a_taken_port():
    assert loaded_models(LOADED + ROUTER) == {"vit_low"}
    assert is_port_taken(PORT_TAKEN)
    assert not is_port_taken(ROUTER)


def test_the_cause_comes_before_what_depends_on_it(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text(GPU_NOISE + LOADED + ENSEMBLE + ROUTER + "| a table |\n" + ALL_FAILED)
    error = start_error("ended", log, missing=["adaptive_vit", "router"])
    assert str(error) == (
        "model 'router' failed to load: calibration.json does not match vit_low/1/model.onnx; "
        "not ready either: adaptive_vit"
    )
    assert set(error.not_ready) == {"router", "adaptive_vit"}
    assert "a table" not in error.log_tail
    assert ALL_FAILED.strip() in error.log_tail


def test_without_a_reason_the_models_are_named(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text(GPU_NOISE)
    error = start_error("not ready after 5 s", log, missing=["router"])
    assert str(error) == "not ready after 5 s; not ready: router"


def test_a_log_of_many_months_takes_no_more_memory_than_a_short_one(tmp_path: Path):
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(600 * 2**20)
        file.seek(0, 2)
        file.write(f"\n{ROUTER}".encode())
    tracemalloc.start()
    try:
        assert "model 'router' failed to load" in str(start_error("ended", log))
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
        assert len(read(log)) == 2**20 and read(tmp_path / "nowhere") == ""
    finally:
        tracemalloc.stop()


def test_a_log_and_its_folder_are_made_and_an_earlier_log_is_kept(tmp_path: Path):
    make_writable(tmp_path / "new" / "log")
    assert (tmp_path / "new" / "log").read_text() == ""
    (tmp_path / "log").write_text("earlier")
    make_writable(tmp_path / "log")
    assert (tmp_path / "log").read_text() == "earlier"


@pytest.mark.parametrize(("place", "reason"), [("", "Is a directory"), ("file/log", "File exists")])
def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path, place: str, reason: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerUsageError, match=rf"{reason}\); give another --log") as caught:
        make_writable(tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)


@pytest.mark.parametrize("name", ["/dev/stderr", "/dev/tty", "/dev/fd/FD", "/proc/self/fd/FD", ""])
def test_a_log_that_the_guard_could_not_open_by_its_name_is_refused(tmp_path: Path, name: str):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "file").open("ab") as file:  # What it leads to is a file all the same.
        log = Path(name.replace("FD", str(file.fileno())) or tmp_path / "pipe")
        with pytest.raises(ServerUsageError, match=f"^the log {log} is no file; .* - for the stan"):
            make_writable(log)


def test_the_name_of_the_standard_output_means_it_and_what_is_written_to_null_is_let_go(
    tmp_path: Path,
):
    for name in ("-", "/dev/stdout"):
        assert TritonServer(tmp_path, log=name)._log.path is None
    make_writable(Path(os.devnull))
