"""Where output lies until it is complete, how files get there, and what killed runs left behind.

A working folder holds a file that its owner, and whoever the owner hands the descriptor to, keeps
locked (`flock`): unlocked means dead, in whatever container or process namespace the owner ran.
The lock of another machine, on a network drive, is not to be relied on, so the file also says which
boot of which kernel it is of, and only folders of this one are ever taken for dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "adaptive-vit-"  # of our folders among other programs' temporary files
_OWNER = ".owner"
_LONGEST_NAME = 50  # of the 255 bytes of a name; a sign has four at most
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def working_folder(purpose: str) -> Iterator[Path]:
    """A folder for temporary files that goes at the end; those of killed runs go at the start.

    Args:
        purpose: a word of its name.
    """
    parent = Path(tempfile.gettempdir())
    remove_dead_folders(parent, PREFIX)
    folder, lock = make_working_folder(f"{PREFIX}{purpose}-", parent)
    try:
        yield folder
    finally:
        _remove(folder, lock)


@contextlib.contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out`, so that moving it or what is in it to `out` is one rename.

    Those of killed runs go, too, but not while there is no `out`: one of them may hold it.

    Raises:
        OSError: there can be none; the path that is in the way is its `filename`.
    """
    # Of a file in the place of the parent, mkdir(exist_ok=True) would say that it exists.
    if not out.parent.exists():
        out.parent.mkdir(parents=True)
    name = out.name
    if len(name) > _LONGEST_NAME:  # Others may begin alike.
        name = f"{name[:_LONGEST_NAME]}{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    prefix = f".{name}-"
    if out.exists():
        remove_dead_folders(out.parent, prefix)
    whole, lock = make_working_folder(prefix, out.parent)
    try:
        folder = whole / out.name
        folder.mkdir()
        yield folder
    finally:
        _remove(whole, lock)
        if out.exists():
            remove_dead_folders(out.parent, prefix)


def make_working_folder(prefix: str, parent: Path) -> tuple[Path, int]:
    """Make a folder that only this user may enter.

    Args:
        prefix: what its name begins with.
        parent: where it lies.

    Returns:
        The folder, and the descriptor of its locked file, to hand on and to close in the end.

    Raises:
        OSError: it cannot be made there.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        return folder, claim(folder / _OWNER)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def remove_dead_folders(parent: Path, prefix: str) -> list[str]:
    """Remove this user's working folders whose owner has ended.

    Args:
        parent: where they lie.
        prefix: what their names begin with; `PREFIX`, or all but the random part, without a "-".

    Returns:
        Their names, sorted.
    """
    removed = []
    with contextlib.suppress(OSError):
        for folder in sorted(parent.iterdir()):
            # Of another output, whose name begins with this one's, after it comes one more "-".
            rest = folder.name.removeprefix(prefix)
            is_ours = rest != folder.name and (prefix == PREFIX or "-" not in rest)
            if is_ours and not folder.is_symlink():
                with abandoned(folder / _OWNER) as is_dead:
                    if is_dead:
                        shutil.rmtree(folder, ignore_errors=True)
                        removed.append(folder.name)
                if is_dead:
                    shutil.rmtree(folder, ignore_errors=True)  # as in _remove
    return removed


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)  # NFS keeps the folder of a file that is open.


def claim(path: Path) -> int:
    """Make and lock a file whose lock says that its owner lives.

    Returns:
        Its descriptor, for the owner's processes to inherit and the caller to close.

    Raises:
        OSError: it cannot be made.
    """
    # Under another name until it is locked: who clears away must never see it without its lock.
    descriptor, fresh = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with contextlib.suppress(OSError):  # Without locks nothing there is ever taken for dead.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, _boot())
        os.rename(fresh, path)
    except BaseException:
        os.close(descriptor)
        os.unlink(fresh)
        raise
    return descriptor


@contextlib.contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Whether the owner of a file that `claim` made has provably ended; locked meanwhile if so.

    False where anything is in doubt: another user's, no file at all, another machine's.
    """
    descriptor = -1
    is_dead = False
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_own = os.fstat(descriptor).st_uid == os.geteuid()
        is_dead = is_own and os.pread(descriptor, 64, 0) in (b"", _boot())
    except OSError:  # It lives, or somebody else was quicker.
        pass
    try:
        yield is_dead
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _boot() -> bytes:
    """What tells this kernel from another, and from itself before it was started anew."""
    try:
        return _BOOT.read_bytes().strip()
    except OSError:
        return b""


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
