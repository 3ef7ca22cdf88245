"""How files are written: whole or not at all, and by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LOCK = ".lock"  # a file in a folder that only one process may work in
# what a disk says that lacks links, or `fsync` of folders: SMB, FUSE, object stores
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
ASK_AGAIN = 1.0  # seconds between two tries to get it


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file holds the old content or the new, never a part, also after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)


def require_absent(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder} is there already; give another output folder")


@contextmanager
def written_as_a_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, beside `folder`, which takes its name at the end; nothing is left where writing fails.

    ValueError where there is something at `folder` already.
    """
    require_absent(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(folder):
            partial.mkdir(parents=True)
            yield partial
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            os.replace(partial, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk's error does not say which file was written; this one does."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Make a file's content, or a folder's renames, durable. (Disks that cannot do that for folders do not stop us.)"""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def point(link: Path, name: str) -> None:
    """Make `link` a link to `name` beside it, at one stroke; a file that holds the name where the disk has no links."""
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(name)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        partial.write_text(name + "\n", encoding="utf-8")
    os.replace(partial, link)


def followed(link: Path) -> Path:
    """Where a link of `point` leads that is a file; one that is a link is itself."""
    return link.with_name(link.read_text(encoding="utf-8").strip()) if link.is_file() else link


class FolderHeldError(ValueError):
    """Another process is at work in the folder."""


def lock(run: Path, patience: float = 0.0) -> IO[str]:
    """Keep other processes from working in the same folder until the file is closed or this process ends.

    FolderHeldError where another one does, still after `patience` seconds. (POSIX locks, which work over NFS and are
    not inherited by data workers.)
    """
    file = (run / LOCK).open("a")
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() < end:
                time.sleep(ASK_AGAIN)
                continue
            file.close()
            raise FolderHeldError(
                f"another process is at work in {run}; wait for its end, or give another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        return file


def is_locked(run: Path) -> bool:
    """Whether another process holds the folder's lock just now. Nothing is written. (Not for the process that holds it
    itself: POSIX takes a lock away from whoever closes the file once.)"""
    try:
        with (run / LOCK).open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # never locked, or a file system without locks
        pass
    return False


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """The processes that share the folder, one after the other: what the first one downloads into it the others find.

    Where it cannot be written to all go on at once: what they want must be there already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock(folder, patience=math.inf)
    except OSError:
        yield
        return
    with file:
        yield


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    write_atomically(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def append_line(path: Path, values: dict[str, Any]) -> None:
    """One JSON object as a line of its own at the end of the file."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; what is none, such as a last line that was cut off, is passed over. Empty
    where there is no file."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
