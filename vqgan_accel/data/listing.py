"""The image files below a folder. The listing of a large one is kept in the user's cache folder and read at the next
start, where no folder has changed since; and by the other processes of a machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import features

from vqgan_accel.data.names import Names
from vqgan_accel.files import one_at_a_time, write_atomically

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff") + (
    (".avif",) if "avif" in features.modules and features.check("avif") else ()
)
VERSION = 1  # of what is kept
MANY = 20_000  # files; to list fewer takes no time
SETTLED = 2 * 10**9  # ns: a folder that was just changed may change again without another time of change


class Listing(NamedTuple):
    files: Names  # relative posix paths, sorted
    folders: Names  # all that were looked into, each as 'a/b/', the first ''
    stamps: NDArray[np.int64]  # (folders, 3): what changes when one gets, loses or renames a file
    nowhere: Names  # links that led to nothing: a folder may come to be there


def image_files(folder: Path) -> Names:
    """Relative posix paths, sorted. A folder that several links lead to is read once, so that loops end."""
    kept = _kept_at(folder)
    listing = _read(kept, folder)
    if listing is None:
        with one_at_a_time(kept.parent):  # one process lists, the others then read
            listing = _read(kept, folder)
            if listing is None:
                began = time.time_ns()
                listing = listed(folder)
                if len(listing.files) >= MANY and listing.stamps[:, 1:].max() < began - SETTLED:
                    with suppress(OSError):  # a cache that cannot be written to stops nobody
                        _keep(kept, folder, listing)
    return listing.files


def listed(folder: Path) -> Listing:
    files: list[str] = []
    stamps: dict[str, list[int]] = {}
    nowhere: list[str] = []
    read: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        prefix = pending.pop()
        status = os.stat(folder / prefix)
        stamps[prefix] = _stamp(status)
        if (status.st_dev, status.st_ino) in read:
            continue
        read.add((status.st_dev, status.st_ino))
        subfolders = []
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    subfolders.append(f"{prefix}{entry.name}/")
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    files.append(prefix + entry.name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    nowhere.append(prefix + entry.name)
        pending += sorted(subfolders, reverse=True)  # which of two links is read must not depend on the file system
    files.sort()
    numbers = np.array(list(stamps.values()), np.int64)
    return Listing(Names.of(files), Names.of(stamps), numbers, Names.of(nowhere))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: not a folder; named as a broken image if it looks like one
        return False


def _stamp(status: os.stat_result) -> list[int]:
    """The time of change beside that of modification: copying tools set the latter back."""
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _kept_at(folder: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vqgan_accel" / "listings"
    return cache / f"{hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:24]}.npz"


def _about(folder: Path) -> str:
    """What else decides the files."""
    return json.dumps([VERSION, os.path.realpath(folder), EXTENSIONS])


def _keep(file: Path, folder: Path, listing: Listing) -> None:
    content = io.BytesIO()
    names = {
        f"{field}_{part}": getattr(getattr(listing, field), part)
        for field in ("files", "folders", "nowhere")
        for part in ("lines", "ends")
    }
    about = np.frombuffer(_about(folder).encode(), np.uint8)
    np.savez(content, about=about, stamps=listing.stamps, **names)
    write_atomically(file, content.getvalue())


def _read(file: Path, folder: Path) -> Listing | None:
    """None where there is none, or one that is damaged or no longer true."""
    try:
        with np.load(file) as kept:
            if kept["about"].tobytes().decode() != _about(folder):
                return None
            fields = (Names(kept[f"{name}_lines"], kept[f"{name}_ends"]) for name in ("files", "folders", "nowhere"))
            files, folders, nowhere = fields
            stamps = kept["stamps"]
        same = all(
            _stamp(os.stat(folder / name)) == stamp for name, stamp in zip(folders, stamps.tolist(), strict=True)
        )
        if not same or any(os.path.isdir(folder / name) for name in nowhere):
            return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Listing(files, folders, stamps, nowhere)
