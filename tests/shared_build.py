"""What several test processes need is made once, and made again when the code behind it changes."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/tests"
_SOURCES = ("bundle", "calibration", "export", "imaging", "model_repository", "routing")


def shared(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that whoever asks first fills while the others wait; nobody is to change it.

    Args:
        name: of the folder.
        make: fills the empty folder that it is given. It is called again when its file, a source
            that makes artifacts, or a library has changed since.
    """
    home = FOLDER / f"{name}-{_key(make)}"
    with locked(FOLDER / f"{name}.lock"):
        if not home.exists():
            for old in FOLDER.glob(f"{name}-*"):
                shutil.rmtree(old)
            unfinished = FOLDER / f"{name}-unfinished"
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(home)
    return home


def linked_copy(source: Path, target: Path) -> Path:
    """Copy a folder, but only link graphs and weights: the copy's other files may be changed."""
    bytecode = shutil.ignore_patterns("__pycache__")  # a server may be writing some
    shutil.copytree(source, target, ignore=bytecode, copy_function=_link_or_copy)
    return target


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith((".onnx", ".bin")):
        try:
            os.link(source, target)
            return
        except OSError:  # another file system
            pass
    shutil.copy2(source, target)


def _key(make: Callable[[Path], None]) -> str:
    found = hashlib.sha256(state(*_SOURCES).encode())
    for path in (Path(__file__), Path(inspect.getfile(make))):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


@cache
def state(*folders: str) -> str:
    """SHA-256 of all files of these folders of the project, of Python and of the libraries."""
    installed = sorted(f"{library.name} {library.version}" for library in distributions())
    found = hashlib.sha256("\n".join([sys.version, *installed]).encode())
    for path in sorted(path for name in folders for path in (ROOT / name).rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process at a time; the file is made and stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
