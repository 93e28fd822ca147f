"""Folders made once, named by a digest of what they were made from; they appear whole or not at all.

What is made lies under `data_dir`:

    tokens/DIGEST       samples.arrow and table.json (text/table.py)
    tokenizers/DIGEST   a Hugging Face tokenizer, and bpe.json (text/tokenizer.py)
    datasets/DIGEST     what the datasets library makes of local files (hub.py)
    files/DIGEST        copies of objects in a bucket, and unpacked files (files.py)
    streams/DIGEST      the start of a dataset (hub.py)
    shards/DIGEST       tokens of documents, while a table is made (text/shards.py)
    images/DIGEST       rows of Parquet files, to be read one by one (images/parquet.py)
    tar/DIGEST          where each picture lies in tar files (images/webdataset.py)
    unreadable/DIGEST   which pictures cannot be decoded (images/unreadable.py)

All but the library's own and the shards are built under a hidden name next to their place and renamed in one step:
processes may build the same folder at once, and one that is killed leaves nothing that another takes for whole.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from softcache.errors import SoftcacheError, StorageError
from softcache.hashing.digests import digest_json

__all__ = ["BuildSettings", "build_dir_path", "build_folder"]


class BuildSettings(Protocol):
    """Settings of a source that makes folders."""

    @property
    def data_dir(self) -> str: ...


def build_dir_path(settings: BuildSettings, kind: str, made_from: Mapping[str, Any]) -> Path:
    """Returns where what is made from `made_from` lies; it need not be there yet."""
    # Absolute, so that loader processes find it wherever they run.
    return (Path(settings.data_dir).expanduser() / kind / digest_json(made_from)[:16]).resolve()


@contextmanager
def build_folder(folder: Path, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields a folder next to `folder` that takes its place in one step when the block ends without an error.

    A process that was faster is left its folder: both made the same. One that is not whole is replaced.
    """
    staged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    aside = staged.with_name(f"{staged.name}.old")
    try:
        staged.mkdir(parents=True)
        yield staged
        try:
            staged.rename(folder)
        except OSError:  # something is there
            if not is_whole(folder):
                folder.rename(aside)
                staged.rename(folder)
    except OSError as error:
        if isinstance(error, SoftcacheError):
            raise
        raise StorageError(
            f"source.data_dir: cannot write {folder}: {error}; set it to a folder that can be written, with room"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
