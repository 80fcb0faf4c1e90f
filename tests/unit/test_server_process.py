"""A command ends with its launcher, however that goes. Real processes, no server."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from datetime import datetime, timezone
from pathlib import Path

import psutil
import pytest

from server import guard
from server.process import LogCopy, ProcessGroup

ROOT = Path(__file__).resolve().parents[2]
GUARD = ROOT / "server" / "guard.py"
# Prints the command's id and waits; the command has a child of its own.
LAUNCHER = """
    import os, signal, sys, threading, time
    from pathlib import Path
    from server import process

    # nohup, and who runs the tests under it, ignores it, which every process below inherits.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    scratch, script = Path(sys.argv[1]), sys.argv[2]
    process._GUARD = Path(sys.argv[3])
    def start():
        global group
        command = ["sh", "-c", script]
        group = process.ProcessGroup(command, os.environ, scratch, scratch / "log")
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()  # A thread that ends is not a launcher that ends.
    print(group.pid, flush=True)
    time.sleep(60)
"""
WITH_A_CHILD = "sleep 61 & wait"
STUBBORN = "trap '' TERM; sleep 61 & wait; sleep 61"


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def launch(scratch: Path, script: str, guard: Path = GUARD) -> tuple[subprocess.Popen[str], int]:
    """A launcher, and the id of the shell that it runs the script in."""
    arguments = [textwrap.dedent(LAUNCHER), str(scratch), script, str(guard)]
    launcher = subprocess.Popen(
        [sys.executable, "-c", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    assert wait_until(lambda: psutil.Process(pid).children())
    return launcher, pid


def group(scratch: Path, *command: str) -> ProcessGroup:
    return ProcessGroup(command, os.environ, scratch, scratch / "log")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_everything_ends_with_the_launcher(scratch: Path, number: signal.Signals):
    launcher, pid = launch(scratch, WITH_A_CHILD)
    time.sleep(1)  # Longer than the guard waits between two looks at its parent.
    everyone = [pid, psutil.Process(pid).ppid(), psutil.Process(pid).children()[0].pid]
    assert all(alive(process) for process in everyone)
    launcher.send_signal(number)
    launcher.communicate()
    assert wait_until(lambda: not any(alive(process) for process in everyone))
    assert not scratch.exists()


def test_the_guard_kills_what_does_not_listen(scratch: Path, tmp_path: Path):
    text, patience = GUARD.read_text(), "_PATIENCE_S = 40.0"
    assert patience in text
    impatient = tmp_path / "guard.py"
    impatient.write_text(text.replace(patience, "_PATIENCE_S = 0.2"))
    launcher, pid = launch(scratch, STUBBORN, impatient)
    launcher.kill()
    launcher.communicate()
    assert wait_until(lambda: not alive(pid))


def test_a_launcher_that_is_gone_before_the_guard_looks_is_noticed(scratch: Path):
    guard = [sys.executable, str(GUARD), "0", str(scratch)]
    told = json.dumps({"command": ["sleep", "61"], "log": str(scratch / "log")}) + "\n"
    started = time.monotonic()
    ran = subprocess.run(guard, input=told, start_new_session=True, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL
    assert time.monotonic() - started < 20
    assert not alive(int(ran.stdout))


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_commands_exit_code_is_handed_on(scratch: Path, script: str, code: int):
    running = group(scratch, "sh", "-c", f"echo out; echo error >&2; {script}")
    assert running.wait() == running.exit_code == code
    assert (scratch / "log").read_text() == "out\nerror\n"
    running.stop(timeout_s=1)
    assert scratch.exists()  # It is the launcher's as long as the launcher lives.


def test_a_log_that_is_copied_and_emptied_goes_on_from_its_start(scratch: Path):
    (scratch / "log").write_text("of an earlier run")
    running = group(
        scratch, "sh", "-c", "echo one; while ! [ -f go ]; do sleep 0.05; done; echo two"
    )
    assert wait_until(lambda: (scratch / "log").read_text() == "one\n")
    (scratch / "log").write_bytes(b"")
    (scratch / "go").write_text("\n")
    running.wait()
    assert (scratch / "log").read_bytes().endswith(b"two\n")
    assert b"\0" not in (scratch / "log").read_bytes()
    running.stop(timeout_s=1)


STEP_BY_STEP = "echo one; while ! [ -f go ]; do sleep 0.05; done; echo two"


def copied(scratch: Path, copy: LogCopy, script: str) -> ProcessGroup:
    command = ["sh", "-c", script]
    return ProcessGroup(command, os.environ, scratch, scratch / "log", copy=copy)


@pytest.mark.parametrize("way", ["moved and made anew", "moved", "emptied", "removed", "folder"])
def test_a_rotated_log_goes_on_under_its_name(scratch: Path, tmp_path: Path, way: str):
    folder = tmp_path / "logs"
    folder.mkdir()
    path, rotated = folder / "it's.log", folder / "it's.log.1"
    path.write_text("of an earlier run\n")
    running = copied(scratch, LogCopy(path), STEP_BY_STEP)
    assert wait_until(lambda: path.read_text().endswith("run\none\n"))  # Nothing is lost.
    if way == "emptied":  # logrotate's copytruncate; create and nocreate above
        path.write_bytes(b"")
    elif way == "removed":
        path.unlink()
    elif way == "folder":
        folder.rename(tmp_path / "elsewhere")
        folder.mkdir()
    else:
        path.rename(rotated)
    if way == "moved and made anew":
        path.touch(mode=0o640)
    (scratch / "go").touch()
    assert running.wait() == 0
    assert path.read_bytes() == b"two\n"
    assert (scratch / "log").read_text() == "one\ntwo\n"  # The launcher's own is whole.
    if rotated.exists():
        assert rotated.read_text() == "of an earlier run\none\n"
    if way == "moved and made anew":
        assert path.stat().st_mode & 0o777 == 0o640
    running.stop(timeout_s=1)


def rotate(log: Path, folder: Path) -> None:
    """Run logrotate as docs/operations.md has it, or where there is none do what it does."""
    program = shutil.which("logrotate", path=f"{os.environ.get('PATH')}:/usr/sbin")
    if program is None:
        log.rename(log.with_name(f"{log.name}.1"))
        return
    text = (ROOT / "docs/operations.md").read_text()
    config = text[text.index("/var/log/adaptive-vit/triton.log {") :].split("```")[0]
    (folder / "logrotate.conf").write_text(config.replace("/var/log/adaptive-vit", str(log.parent)))
    (folder / "logrotate.conf").chmod(0o600)
    command = [program, "--force", "--state", folder / "state", folder / "logrotate.conf"]
    subprocess.run(command, check=True)


def test_logrotate_needs_no_more_than_its_few_lines(scratch: Path, tmp_path: Path):
    log = tmp_path / "triton.log"
    running = copied(scratch, LogCopy(log), STEP_BY_STEP)
    assert wait_until(lambda: log.exists() and log.read_text() == "one\n")
    rotate(log, tmp_path)
    (scratch / "go").touch()
    assert running.wait() == 0
    assert log.read_text() == "two\n"
    (rotated,) = tmp_path.glob("triton.log.1*")
    kept = (
        gzip.decompress(rotated.read_bytes()) if rotated.suffix == ".gz" else rotated.read_bytes()
    )
    assert kept == b"one\n"
    running.stop(timeout_s=1)


def test_a_log_that_cannot_be_made_anew_goes_on_where_it_was_moved(scratch: Path, tmp_path: Path):
    (tmp_path / "logs").mkdir()
    running = copied(scratch, LogCopy(tmp_path / "logs" / "log"), STEP_BY_STEP)
    assert wait_until(lambda: (tmp_path / "logs" / "log").exists())
    (tmp_path / "logs").rename(tmp_path / "elsewhere")
    (scratch / "go").touch()
    assert running.wait() == 0
    assert (scratch / "log").read_text() == "one\ntwo\n"
    assert (tmp_path / "elsewhere" / "log").read_text() == "one\ntwo\n"
    running.stop(timeout_s=1)


def test_a_full_disk_costs_lines_and_what_comes_after_begins_on_a_line_of_its_own(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
):
    room, write = [7, 0, 99, 99], os.write

    def short(descriptor: int, data: bytes) -> int:
        if not (left := room.pop(0)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, bytes(data)[:left])

    monkeypatch.setattr(guard.os, "write", short)
    file = guard._File(str(scratch / "log"))
    with pytest.raises(OSError, match="No space"):
        file.write(b"one\ntwo and more\n")
    file.write(b"three\n")
    file.write(b"four\n")
    monkeypatch.undo()
    assert (scratch / "log").read_text() == "one\ntwo\nthree\nfour\n"


ENTRIES = r"""
E1121 11:40:12.388730 6959 model_lifecycle.cc:642] "failed to load 'p': \"no\"\n\nAt:\n  x"
W1121 11:40:12.388730 6959 main.cc:7] plain

Traceback \xff { "it's":
I1121 11:40:12.388730 6959 server.cc:1] "cut sh
no newline"""


def test_each_line_is_one_object_where_json_is_asked_for(scratch: Path, tmp_path: Path):
    (scratch / "said").write_bytes(ENTRIES.replace("\\xff", "\xff").encode("latin-1"))
    running = copied(scratch, LogCopy(tmp_path / "log", as_json=True), "cat said")
    assert running.wait() == 0
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(entry["level"], entry.get("at"), entry["message"]) for entry in entries] == [
        ("error", "model_lifecycle.cc:642", "failed to load 'p': \"no\"\n\nAt:\n  x"),
        ("warning", "main.cc:7", "plain"),
        ("info", None, 'Traceback \ufffd { "it\'s":'),
        ("info", "server.cc:1", '"cut sh'),
        ("info", None, "no newline"),
    ]
    assert {entry["source"] for entry in entries} == {"tritonserver"}
    times = [datetime.fromisoformat(entry["time"].replace("Z", "+00:00")) for entry in entries]
    assert all(abs((datetime.now(timezone.utc) - time).total_seconds()) < 60 for time in times)
    assert (scratch / "log").read_bytes() == (scratch / "said").read_bytes()  # As it was.
    running.stop(timeout_s=1)


WRITES_TO_STDOUT = """
    import os, sys
    from pathlib import Path
    from server.process import LogCopy, ProcessGroup

    scratch = Path(sys.argv[1])
    command = ["sh", "-c", sys.argv[2]]
    running = ProcessGroup(command, os.environ, scratch, scratch / "log", copy=LogCopy(None))
    print(running.wait(), file=sys.stderr)
"""


@pytest.mark.parametrize("reader", ["reads", "stands still", "is gone", "was never there"])
def test_who_reads_the_standard_output_stops_nobody(scratch: Path, reader: str):
    # What a pipe holds, or more than it and the queue before it do: the command has to end.
    lines = 2000 if reader == "reads" else 20_000
    script = f"yes a line of a log as any other | head -n {lines}"
    command = [sys.executable, "-c", textwrap.dedent(WRITES_TO_STDOUT), str(scratch), script]
    reading, writing = os.pipe()
    if reader == "was never there":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    launcher = subprocess.Popen(
        command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    said = b""
    if reader == "is gone":
        os.close(reading)
    elif reader == "reads":
        with open(reading, "rb") as out:
            said = out.read()
    _, error = launcher.communicate(timeout=60)
    assert (launcher.returncode, error) == (0, "0\n")
    whole = (scratch / "log").read_bytes()
    assert whole.count(b"\n") == lines
    if reader == "reads":
        assert said == whole
    elif reader != "is gone":
        os.close(reading)


def test_of_a_log_for_the_launcher_alone_the_end_is_kept(scratch: Path):
    line = "x" * 99
    script = f"yes {line} | head -c 40000000; echo last"
    running = group(scratch, "sh", "-c", script)
    assert running.wait() == 0
    kept = (scratch / "log").read_bytes()
    assert 2**20 <= len(kept) <= 17 * 2**20 and kept.endswith(b"x\nlast\n")
    running.stop(timeout_s=1)


def test_who_holds_the_commands_output_keeps_nobody_from_seeing_its_end(scratch: Path):
    running = group(scratch, "sh", "-c", "echo said; (sleep 61 &); exit 3")
    began = time.monotonic()
    assert running.wait() == 3 and time.monotonic() - began < 30
    assert (scratch / "log").read_text() == "said\n"
    running.stop(timeout_s=1)


def test_what_shall_stay_open_is_inherited_and_nothing_else(scratch: Path):
    reading, writing = os.pipe()
    command = ["sh", "-c", f"echo kept > /proc/self/fd/{writing}"]
    running = ProcessGroup(command, os.environ, scratch, scratch / "log", keep_open=[writing])
    assert running.wait() == 0 and os.read(reading, 9) == b"kept\n"
    running.stop(timeout_s=1)
    running = group(scratch, *command)
    assert running.wait() != 0
    running.stop(timeout_s=1)
    os.close(reading)
    os.close(writing)


def test_a_program_that_cannot_run_is_told_in_the_log(scratch: Path):
    (scratch / "tritonserver").write_text("no program")
    (scratch / "tritonserver").chmod(0o755)
    running = group(scratch, str(scratch / "tritonserver"))
    assert running.wait() == 126
    assert "tritonserver does not start: Exec format error\n" in (scratch / "log").read_text()
    running.stop(timeout_s=1)


def test_stopping_ends_all_of_the_group_and_the_guard_is_not_in_its_memory(scratch: Path):
    running = group(scratch, "sh", "-c", WITH_A_CHILD)
    assert wait_until(lambda: len(running.members()) == 3)
    assert psutil.Process(running.pid).name() == "sh"
    assert 0 < running.memory_mib() < 5  # A shell and a sleep; a Python alone takes more.
    members = running.members()
    running.stop(timeout_s=5)
    assert not any(alive(member.pid) for member in members)
    assert running.exit_code == 128 + signal.SIGTERM


def test_the_groups_processes_are_counted_without_the_guard(scratch: Path):
    count = "i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done"
    running = group(scratch, "sh", "-c", f"{count}; {WITH_A_CHILD}")
    assert wait_until(lambda: len(running.members()) == 3)
    everyone = {member.pid for member in running.members()}
    guard = psutil.Process(running.pid).ppid()
    assert set(running.process_ids()) == everyone - {guard}
    shell = psutil.Process(running.pid).cpu_times()
    assert 0 < shell.user + shell.system <= running.cpu_s() < 20
    running.stop(timeout_s=5)
    assert running.process_ids() == [] and running.cpu_s() == 0
