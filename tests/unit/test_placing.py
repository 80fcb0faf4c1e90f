"""Working folders: whole while their owner lives, gone once it is dead; real processes, locks."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bundle import placing
from bundle.placing import folder_beside, make_working_folder, remove_dead_folders, working_folder
from tests.tools import in_a_process_namespace

ROOT = Path(__file__).resolve().parents[2]
OWNER = """
    import sys
    from pathlib import Path
    from bundle.placing import folder_beside, working_folder

    out = Path(sys.argv[1])
    with working_folder("run") as folder, folder_beside(out) as beside:
        (folder / "file").touch()
        (beside / "file").touch()
        print(folder, beside, sep="\\n", flush=True)
        input()
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output that is there, and a folder for temporary files of the test's own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    made = tmp_path / "site" / "it's; out"
    made.mkdir(parents=True)
    return made


@contextmanager
def owner(out: Path, **options: object) -> Iterator[tuple[subprocess.Popen[str], Path, Path]]:
    """A process in the middle of its work, its working folder and the one beside its output."""
    code = "\n".join(line.removeprefix("    ") for line in OWNER.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout is not None
    folder, beside = (Path(process.stdout.readline().rstrip("\n")) for _ in range(2))
    try:
        yield process, folder, beside
    finally:
        process.kill()
        process.communicate()


def run_anew(out: Path, left: list[Path]) -> None:
    """What every run of ours does; what others left is gone before it takes room itself."""
    with working_folder("run"), folder_beside(out):
        assert not any(folder.exists() for folder in left)


def test_what_a_killed_run_left_goes_at_the_next_start_and_a_live_runs_stays(out: Path):
    with owner(out) as (killed, *left), owner(out) as (_, *lives):
        assert all((folder / "file").is_file() for folder in (*left, *lives))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        run_anew(out, left)
        assert all((folder / "file").is_file() for folder in lives)
    run_anew(out, lives)
    assert list(out.parent.iterdir()) == [out]
    assert list((out.parents[1] / "temporary").iterdir()) == []


def test_the_folder_of_an_owner_in_another_process_namespace_stays(out: Path):
    """Its process id means nothing there; its lock does."""
    folder, lock = make_working_folder("adaptive-vit-", Path(tempfile.gettempdir()))
    elsewhere = [*in_a_process_namespace(), sys.executable, "-c"]
    clear = (
        "import sys; from pathlib import Path; from bundle.placing import *; "
        "print(remove_dead_folders(Path(sys.argv[1]), 'adaptive-vit-'))"
    )
    command = [*elsewhere, clear, str(folder.parent)]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == "[]\n"
    os.close(lock)
    assert subprocess.check_output(command, cwd=ROOT, text=True) == f"[{folder.name!r}]\n"


def abandoned_folder(parent: Path) -> Path:
    """A folder whose owner has ended."""
    folder, lock = make_working_folder("adaptive-vit-", parent)
    os.close(lock)
    return folder


@pytest.mark.parametrize("doubt", ["another machine", "no lock file", "another user", "a link"])
def test_what_is_not_provably_dead_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doubt: str
):
    folder = abandoned_folder(tmp_path)
    if doubt == "another machine":
        (folder / ".owner").write_text("f00d-of-another-boot")
    elif doubt == "no lock file":  # Another program's, or an earlier release's.
        (folder / ".owner").unlink()
    elif doubt == "another user":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        folder = folder.rename(tmp_path / "elsewhere")
        (tmp_path / "adaptive-vit-link").symlink_to(folder)
    assert remove_dead_folders(tmp_path, "adaptive-vit-") == []
    assert folder.is_dir()


def test_other_folders_are_left_alone(tmp_path: Path):
    folder = abandoned_folder(tmp_path)
    assert remove_dead_folders(tmp_path, ".out-") == []
    assert remove_dead_folders(tmp_path / "nowhere", "adaptive-vit-") == []
    assert remove_dead_folders(tmp_path, "adaptive-vit-") == [folder.name]


def test_what_a_killed_run_left_of_an_output_with_a_longer_name_stays(tmp_path: Path):
    """It may hold the only copy of that one."""
    (tmp_path / "out").mkdir()
    left, lock = make_working_folder(".out-b-", tmp_path)
    os.close(lock)
    with folder_beside(tmp_path / "out"):
        assert left.is_dir()
    assert left.is_dir()
    (tmp_path / "out-b").mkdir()
    with folder_beside(tmp_path / "out-b"):
        assert not left.exists()


def test_while_there_is_no_output_nothing_beside_it_goes(tmp_path: Path):
    """Killed between two renames, a run may have the earlier output in its folder."""
    out = tmp_path / "out"
    left, lock = make_working_folder(".out-", tmp_path)
    os.close(lock)
    with folder_beside(out) as folder:
        assert left.is_dir()
        folder.rename(out)
    assert not left.exists() and list(tmp_path.iterdir()) == [out]


def test_on_nfs_which_keeps_the_folder_of_an_open_file_none_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    remove = shutil.rmtree

    def rmtree(folder: Path, ignore_errors: bool) -> None:
        opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        if any(path.startswith(f"{folder}/") for path in opened):
            (folder / ".owner").rename(folder / ".nfs0001")  # It goes when it is closed.
        else:
            remove(folder, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned_folder(tmp_path)
    with folder_beside(tmp_path / "out"), working_folder("run"):
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_of_outputs_whose_long_names_begin_alike_each_clears_its_own(tmp_path: Path):
    out, other = tmp_path / ("o" * 60), tmp_path / ("o" * 61)
    out.mkdir()
    with folder_beside(other) as folder:
        prefix, _, _ = folder.parent.name.rpartition("-")
    left, lock = make_working_folder(f"{prefix}-", tmp_path)
    os.close(lock)
    with folder_beside(out):
        assert left.is_dir()


def test_an_output_may_have_as_long_a_name_as_there_can_be(tmp_path: Path):
    out = tmp_path / ("ü" * 127)
    with folder_beside(out) as folder:
        folder.rename(out)
    assert out.is_dir()


def test_whoever_clears_away_never_sees_a_folder_that_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cleared = []

    def rename(source: str, target: Path) -> None:
        cleared.append(remove_dead_folders(tmp_path, "adaptive-vit-"))
        os.replace(source, target)
        cleared.append(remove_dead_folders(tmp_path, "adaptive-vit-"))

    monkeypatch.setattr(placing.os, "rename", rename)
    folder, lock = make_working_folder("adaptive-vit-", tmp_path)
    os.close(lock)
    assert cleared == [[], []] and folder.is_dir()
