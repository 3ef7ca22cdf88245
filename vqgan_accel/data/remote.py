"""Files of many images behind a URL: object storage (s3://, gs://, hf://) and whatever else fsspec can list."""

from __future__ import annotations

import glob
from pathlib import PurePath, PurePosixPath

from fsspec.core import url_to_fs

from vqgan_accel.data.source import STORES, listed


def remote_files(url: str) -> tuple[PurePath, dict[PurePath, str]]:
    """What lies at `url`, and the files of many images there, all of one kind, sorted: path -> URL. Two levels, as
    `stores` looks into a folder.

    ValueError where it cannot be listed, FileNotFoundError where nothing is found.
    """
    try:
        system, root = url_to_fs(url)
        if system.isfile(root):
            found = [root] if PurePosixPath(root).suffix in STORES else []
        else:
            here = glob.escape(root.rstrip("/"))
            kinds = ([*system.glob(f"{here}/*{end}"), *system.glob(f"{here}/*/*{end}")] for end in STORES)
            found = sorted(next(filter(None, kinds), []))
        urls: dict[PurePath, str] = {PurePosixPath(name): system.unstrip_protocol(name) for name in found}
    except Exception as error:  # each storage's client has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data.path {url} cannot be listed: {reason}; correct it, install the package of its kind of storage, or "
            "give this machine the right to read it"
        ) from error
    if not urls:
        raise FileNotFoundError(f"no files that end in {listed([*STORES])} at data.path {url}, nor in its folders")
    return PurePosixPath(root), urls
