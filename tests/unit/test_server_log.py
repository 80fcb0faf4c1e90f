"""Reading reasons out of Triton's log, and what is left in a repository."""

import errno
import json
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from bundle import manifest
from server import ServerUsageError, TritonServer
from server.repository import (
    bytecode_folders,
    models_in,
    remove_new_bytecode,
    require_as_assembled,
)
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


def test_of_a_long_log_the_end_is_read(tmp_path: Path):
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(3 * 2**20)
        file.seek(0, 2)
        file.write(f"\n{ROUTER}".encode())
    assert len(read(log)) == 2**20
    assert "model 'router' failed to load" in str(start_error("ended", log))
    assert read(tmp_path / "nowhere") == ""


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


def test_models_are_the_folders(tmp_path: Path):
    (tmp_path / "vit_low").mkdir()
    (tmp_path / "adaptive_vit").mkdir()
    (tmp_path / "MANIFEST.json").write_text("{}")
    assert models_in(tmp_path) == ["adaptive_vit", "vit_low"]


def test_a_server_with_more_than_was_assembled_is_not_started(tmp_path: Path):
    model = tmp_path / "vit_low/1/model.onnx"
    model.parent.mkdir(parents=True)
    model.write_text("assembled")
    server = TritonServer(tmp_path, free_ports=True, tritonserver=tmp_path / "nowhere")
    with pytest.raises(ServerUsageError, match="nowhere"):  # without a manifest nothing is checked
        server.start()
    manifest.write(tmp_path)
    with pytest.raises(ServerUsageError, match="nowhere"):
        server.start()
    (tmp_path / "vit_low/2").mkdir()
    (tmp_path / "vit_low/2/model.onnx").write_text("something else")
    with pytest.raises(
        ServerUsageError, match=r": vit_low/2/model\.onnx is not listed in MANIFEST"
    ):
        server.start()


@pytest.fixture
def forged(tmp_path: Path) -> Path:
    """A listed source, and bytecode of another in its name, with its time and size."""
    source = tmp_path / "router/1/answer.py"
    source.parent.mkdir(parents=True)
    source.write_text("ANSWER = 2\n")
    os.utime(source, (1_700_000_000, 1_700_000_000))
    py_compile.compile(str(source), doraise=True)
    source.write_text("ANSWER = 1\n")
    os.utime(source, (1_700_000_000, 1_700_000_000))
    (source.parent / "__pycache__" / "listed.pyc").write_text("by who assembled it")
    names = ("router/1/answer.py", "router/1/__pycache__/listed.pyc")
    listed = {name: manifest.sha256_file(tmp_path / name) for name in names}
    (tmp_path / manifest.NAME).write_text(json.dumps({"files": listed}))
    return tmp_path


def answer(repository: Path) -> str:
    """What a new Python finds in the source."""
    code = "import answer; print(answer.ANSWER)"
    folder = repository / "router/1"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_no_bytecode_is_run_in_place_of_a_listed_source(forged: Path):
    manifest.verify(forged)  # every hash is right
    assert answer(forged) == "2"
    with pytest.raises(ServerUsageError, match="nowhere"):
        TritonServer(forged, free_ports=True, tritonserver=forged / "nowhere").start()
    assert answer(forged) == "1"
    manifest.verify(forged)  # what is listed stays


def test_without_a_manifest_bytecode_stays(forged: Path):
    (forged / manifest.NAME).unlink()
    require_as_assembled(forged)
    assert answer(forged) == "2"


def test_bytecode_that_cannot_be_removed_is_refused(forged: Path, monkeypatch: pytest.MonkeyPatch):
    def read_only(path: Path, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(ServerUsageError, match=r"answer\..*pyc cannot be removed \(Read-only file"):
        require_as_assembled(forged)


def test_a_missing_or_empty_repository_is_refused(tmp_path: Path):
    with pytest.raises(ServerUsageError, match="no model repository at .*nowhere"):
        models_in(tmp_path / "nowhere")
    with pytest.raises(ServerUsageError, match="holds no model"):
        models_in(tmp_path)


def test_only_new_bytecode_is_removed(tmp_path: Path):
    old = tmp_path / "a" / "1" / "__pycache__"
    new = tmp_path / "a" / "1" / "routing" / "__pycache__"
    old.mkdir(parents=True)
    before = bytecode_folders(tmp_path)
    new.mkdir(parents=True)
    remove_new_bytecode(tmp_path, before)
    assert old.is_dir()
    assert not new.exists()
    assert new.parent.is_dir()
