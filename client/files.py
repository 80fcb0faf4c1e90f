"""Which files a command line names: images, class labels and an admin key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class UsageError(ValueError):
    """The command line asks for what cannot be. The message is one line."""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The images that files and folders stand for.

    Args:
        paths: files are taken as they are, whatever their suffix; folders are searched at every
            depth for `SUFFIXES`.

    Returns:
        Files in the order of `paths`, sorted within a folder, each once.

    Raises:
        UsageError: a path does not exist, or a folder holds no image.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = [f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file()]
            if not inside:
                raise UsageError(f"{path} holds no image ({', '.join(SUFFIXES)})")
            found.update(dict.fromkeys(sorted(inside)))
        elif path.exists():
            found[path] = None
        else:
            raise UsageError(f"{path} does not exist")
    return list(found)


def read_labels(path: Path) -> list[str]:
    """Class names from a text file, the name of class i on line i (from 0).

    Raises:
        UsageError: the file cannot be read as UTF-8 text, or is empty.
    """
    labels = _read(path, "labels").splitlines()
    if not labels:
        raise UsageError(f"{path} holds no labels; it needs one class name per line")
    return labels


def read_admin_key(path: Path) -> str:
    """The key in a text file, without the line break that editors end it with.

    Raises:
        UsageError: the file cannot be read as UTF-8 text.
    """
    return _read(path, "the admin key").strip()


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read {what} from {path}: {reason}") from None
