"""Parts of the folders that `softcache teacher-generate` writes, compared with their manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from softcache.errors import SourceError

__all__ = ["check_part"]


def check_part(folder: Path, name: str, digest: str) -> Path:
    """Returns the path of a part.

    Args:
        digest: sha256 of its bytes, from the manifest.

    Raises:
        SourceError: it lies outside of the folder, cannot be read, or has other bytes.
    """
    path = folder / name
    if path.resolve().parent not in (folder.resolve(), folder.resolve() / "train"):
        raise SourceError(f"source {folder}: manifest.json names {name!r}, which lies outside")
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SourceError(f"source {path}: cannot be read: {error}; generate the source again") from error
    if found != digest:
        raise SourceError(
            f"source {path}: sha256 {found[:12]}…; expected {str(digest)[:12]}…, that of manifest.json; restore the file, "
            "or generate the source again"
        )
    return path
