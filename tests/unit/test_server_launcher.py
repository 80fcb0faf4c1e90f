"""How a server is started: its repository, a failing model, the first answer.

Where a tritonserver has to run, it is a script that writes a log.
"""

import errno
import json
import os
import py_compile
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tritonclient.utils import InferenceServerException

from bundle import manifest
from routing.reference import COMPARING, OTHER, VERDICTS
from server import (
    ServerError,
    ServerStartError,
    ServerUsageError,
    TritonServer,
    access,
    launcher,
)
from server.launcher import models_in
from tests.unit.server_fakes import FakeClock, Verdicts

# --- a model that fails ------------------------------------------------------------------------


def entry(text: str, level: str = "E") -> str:
    return f'{level}1121 11:40:12.388730 6959 model_lifecycle.cc:642] "{text}"'


def loaded(model: str) -> str:
    return entry(f"successfully loaded '{model}'", "I")


def failed(model: str, why: str) -> str:
    return entry(f"failed to load '{model}' version 1: Internal: {why}")


ENSEMBLE = entry("Invalid argument: ensemble 'adaptive_vit' depends on 'router' which has no")
DIED = "Stub process 'router_0_0' is not healthy."


@pytest.mark.parametrize(
    ("script", "message", "not_ready"),
    [
        (
            [loaded("vit_low"), failed("router", "ValueError: no\\n\\nAt:"), ENSEMBLE],
            "model 'router' failed to load: no; not ready either: adaptive_vit",
            {"router", "adaptive_vit"},
        ),
        (
            [failed("router", "one"), "sleep 0.5", loaded("vit_low"), failed("adaptive_vit", "x")],
            "model 'router' failed to load: one; model 'adaptive_vit' failed to load: x",
            {"router", "adaptive_vit"},
        ),
        (
            [loaded("vit_low"), loaded("adaptive_vit"), failed("router", DIED)],
            f"model 'router' failed to load: {DIED}",
            {"router"},
        ),
        (  # One that takes long, or of which nothing is ever heard.
            [failed("router", "one"), loaded("vit_low")],
            "model 'router' failed to load: one; not ready either: adaptive_vit",
            {"router", "adaptive_vit"},
        ),
        (
            [loaded("vit_low"), "echo 'error: creating server: Internal - no disk'", "exit 3"],
            "tritonserver ended while starting (exit code 3): no disk; not ready: adaptive_vit, "
            "router",
            {"router", "adaptive_vit"},
        ),
    ],
)
def test_a_start_that_fails_ends_at_once_and_names_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: list[str], message: str, not_ready: set
):
    monkeypatch.setattr(launcher, "_LAST_NEWS_S", 1.0)
    for model in ("vit_low", "router", "adaptive_vit"):
        (tmp_path / "repository" / model).mkdir(parents=True)
    binary = tmp_path / "tritonserver"
    lines = [f"cat <<'LINE'\n{line}\nLINE" if line[0] in "EI" else line for line in script]
    # As Triton, it does not hear that it is to end.
    binary.write_text("\n".join(["#!/bin/sh", "trap '' TERM INT", *lines, "sleep 61"]))
    binary.chmod(0o755)
    server = TritonServer(tmp_path / "repository", free_ports=True, tritonserver=binary)
    started = time.monotonic()
    with pytest.raises(ServerStartError) as caught:
        server.start()
    assert time.monotonic() - started < 10 and not server.is_running()
    assert str(caught.value) == message and set(caught.value.not_ready) == not_ready


# --- the first answer --------------------------------------------------------------------------

UNAVAILABLE = "StatusCode.UNAVAILABLE"
STILL = InferenceServerException(f"in ensemble 'adaptive_vit', {COMPARING}", UNAVAILABLE)
FOREIGN = InferenceServerException(f"{VERDICTS[OTHER]}: of 32 reference images 20", UNAVAILABLE)
FULL = InferenceServerException("Exceeds maximum queue size", UNAVAILABLE)


@pytest.mark.parametrize(
    ("refuses", "timeout_s", "verdicts", "asked", "error"),
    [
        # Two instances take turns; the second knows later.
        (True, 60, [STILL, STILL, None, STILL, None, STILL, None], 6 + access.ANSWERS, ""),
        (False, 60, [None], 1, ""),
        (False, 60, [FULL], 1, ""),
        (True, 0.05, [STILL], None, r"\(after 0.05 s; --timeout-s gives it longer\)"),
        (True, 0.3, [STILL], None, r"\(after 0.3 s; --timeout-s gives it longer\)"),
        (True, 60, [STILL, FOREIGN], 2, "32 reference .* --reference-check warn and serve"),
    ],
)
def test_ready_means_that_every_instance_has_compared(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuses: bool,
    timeout_s: float,
    verdicts: list,
    asked: int | None,
    error: str,
):
    monkeypatch.setattr(access, "_POLL_S", 0.001)
    monkeypatch.setattr(launcher, "refuses_other_answers", lambda repository: refuses)
    triton = Verdicts(*verdicts)

    class Started(TritonServer):
        access = triton

    server = Started(tmp_path, log=tmp_path / "log", timeout_s=timeout_s)
    if error:
        with pytest.raises(ServerStartError, match=error):
            server._wait_for_first_answer()
    else:
        server._wait_for_first_answer()
    assert asked in (None, triton.asked)


# --- its repository ----------------------------------------------------------------------------


def test_models_are_the_folders(tmp_path: Path):
    with pytest.raises(ServerUsageError, match="no model repository at .*nowhere"):
        models_in(tmp_path / "nowhere")
    with pytest.raises(ServerUsageError, match="holds no model"):
        models_in(tmp_path)
    (tmp_path / "vit_low").mkdir()
    (tmp_path / "adaptive_vit").mkdir()
    (tmp_path / "MANIFEST.json").write_text("{}")
    assert models_in(tmp_path) == ["adaptive_vit", "vit_low"]


def refusal(repository: Path) -> str:
    """Why a server of it is not started; "nowhere" where only the tritonserver is missing."""
    server = TritonServer(repository, free_ports=True, tritonserver=repository / "nowhere")
    with pytest.raises(ServerUsageError) as caught:
        server.start()
    return str(caught.value)


def test_a_server_with_more_than_was_assembled_is_not_started(tmp_path: Path):
    (tmp_path / "vit_low/1").mkdir(parents=True)
    (tmp_path / "vit_low/1/model.onnx").write_text("assembled")
    assert "nowhere" in refusal(tmp_path)  # Without a manifest nothing is checked.
    manifest.write(tmp_path)
    assert "nowhere" in refusal(tmp_path)
    (tmp_path / "vit_low/2").mkdir()
    (tmp_path / "vit_low/2/model.onnx").write_text("something else")
    assert ": vit_low/2/model.onnx is not listed in MANIFEST" in refusal(tmp_path)


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
    manifest.verify(forged)  # Every hash is right.
    assert answer(forged) == "2"
    assert "nowhere" in refusal(forged)
    assert answer(forged) == "1"
    manifest.verify(forged)  # What is listed stays.


def test_without_a_manifest_bytecode_stays(forged: Path):
    (forged / manifest.NAME).unlink()
    assert "nowhere" in refusal(forged)
    assert answer(forged) == "2"


def test_bytecode_that_cannot_be_removed_is_refused(forged: Path, monkeypatch: pytest.MonkeyPatch):
    def read_only(path: Path, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    message = refusal(forged)
    assert "answer." in message and "pyc cannot be removed (Read-only file" in message


def test_only_new_bytecode_is_removed(tmp_path: Path):
    old = tmp_path / "a" / "1" / "__pycache__"
    new = tmp_path / "a" / "1" / "routing" / "__pycache__"
    old.mkdir(parents=True)
    new.parent.mkdir()
    server = TritonServer(tmp_path, free_ports=True, models=[], tritonserver=sys.executable)

    def run(*arguments: object) -> None:
        new.mkdir()

    server._start_on_free_ports = run
    server.start()
    assert new.is_dir()
    server.stop()
    assert old.is_dir() and not new.exists() and new.parent.is_dir()


def test_what_would_not_stop_can_be_told_again(tmp_path: Path):
    told: list[float] = []

    def stop(patience_s: float) -> None:
        told.append(patience_s)
        if len(told) == 1:
            raise ServerError("processes of the server cannot be killed: 7")

    server = TritonServer(tmp_path)
    server._process = SimpleNamespace(stop=stop)
    with pytest.raises(ServerError, match="cannot be killed: 7"):
        server.stop(1.0)
    server.stop(2.0)
    server.stop(3.0)
    assert told == [1.0, 2.0]


def test_a_pause_is_no_part_of_the_time_that_is_waited(monkeypatch: pytest.MonkeyPatch):
    clock = FakeClock()
    monkeypatch.setattr(access, "time", SimpleNamespace(monotonic=clock, sleep=clock.sleep))

    def once(seconds: float) -> None:
        clock.now += 3600.0 if len(clock.slept) == 1 else 0.0

    clock.each = once
    comparing = InferenceServerException(COMPARING)
    server = Verdicts(comparing, comparing, comparing, None)
    access.wait_out(server.infer, 1, 5.0)
    assert server.asked == 4
    with pytest.raises(InferenceServerException):
        access.wait_out(Verdicts(comparing).infer, 1, 5.0)
