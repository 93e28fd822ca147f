"""Files of a source: one, a glob or a folder, also in a bucket; copied and unpacked where they have to be.

    corpus/part-000.jsonl.gz            a file
    corpus/part-*.parquet               a glob
    images/train-{000..127}.tar         numbers, or {a,b}: every one of these files
    corpus                              a folder
    s3://bucket/corpus/part-*.csv.zst   each of them in a bucket (s3, gs, az)

What is copied or unpacked lies under `data_dir`, in files/DIGEST, and is read as any local file is. A bucket is asked for
its listing on every open; an object with another tag is copied again. Eight files are copied or unpacked at once, each with
a buffer of 16 MB.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import lzma
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from softcache.data.sources.build_cache import BuildSettings, build_dir_path, build_folder
from softcache.errors import CacheNotFoundError, SourceError
from softcache.hashing.digests import digest_json
from softcache.runtime.logging import progress_bar

__all__ = [
    "COMPRESSED",
    "CorpusFiles",
    "expand_braces",
    "file_digest",
    "files_below",
    "find_files",
    "suffix_of",
]

COPIED_BYTES, NUM_THREADS = 1 << 24, 8
FILES_VERSION = 1


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": partial(pa.input_stream, compression="zstd", buffer_size=COPIED_BYTES),
}
"""What opens a compressed file, by its last suffix."""


def suffix_of(name: str) -> str:
    """Returns the suffix that names what a file holds, before that of its compression.

    >>> suffix_of("part.00.jsonl.gz"), suffix_of("part.csv")
    ('.jsonl', '.csv')
    """
    path = Path(name)
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


@dataclass(frozen=True)
class CorpusFiles:
    """Local files in order, with the folder that they were found in.

    Attributes:
        given: as the settings name them.
        root: names of files are relative to it.
        paths: of the files, as they were found; not unpacked.
        is_folder: whether `given` is a folder, whose names of files may have a meaning.
    """

    given: str
    root: Path
    paths: Sequence[Path]
    is_folder: bool

    def name(self, path: Path) -> str:
        """Returns the name of a file in keys and digests, which does not depend on where the files are."""
        return path.relative_to(self.root).as_posix()

    @cached_property
    def digest(self) -> str:
        """Names the contents: of one file, its suffix; of several, their names.

        Raises:
            SourceError: a file cannot be read.
        """
        try:
            if len(self.paths) == 1 and not self.is_folder:
                (path,) = self.paths
                return digest_json(["".join(_suffixes(path)), file_digest(path)])
            return digest_json([[self.name(path), file_digest(path)] for path in self.paths])
        except OSError as error:
            raise SourceError(
                f"source.path {self.given!r}: cannot be read: {error}; check its permissions"
            ) from error

    def unpacked(self, settings: BuildSettings) -> CorpusFiles:
        """Returns the files with each compressed one unpacked, now if it was not before; the digest stays its own.

        Raises:
            SourceError: a compressed file is truncated or damaged.
            StorageError: `data_dir` cannot be written.
        """
        if not any(path.suffix in COMPRESSED for path in self.paths):
            return self
        made_from = {"version": FILES_VERSION, "contents": self.digest}
        if not all(
            path.suffix in COMPRESSED for path in self.paths
        ):  # those are links to where the files are now
            made_from["root"] = str(self.root)
        folder = build_dir_path(settings, "files", made_from)
        if not folder.is_dir():
            with (
                build_folder(folder, Path.is_dir) as staged,
                progress_bar(f"unpack {self.given}", len(self.paths), "files") as advance,
            ):

                def make(path: Path) -> None:
                    target = _plain(staged / self.name(path))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if path.suffix in COMPRESSED:
                        _unpack(path, target)
                    else:
                        target.symlink_to(path)

                _for_each(make, self.paths, advance)
        paths = [_plain(folder / self.name(path)) for path in self.paths]
        return CorpusFiles(self.given, folder, paths, self.is_folder)


def find_files(given: str, settings: BuildSettings, *, kinds: Collection[str]) -> CorpusFiles | None:
    """Returns the files of a `path`; None where there is nothing of that name here, as of a name on the hub.

    Args:
        given: a file, a glob, a folder, or each of them as the URL of a bucket.
        kinds: the suffixes that files may have, before that of a compression; of a folder, others are left out where
            it has any of them.

    Raises:
        SourceError: a file that cannot be of these kinds, or a name of one that is not there.
        StorageError, CacheNotFoundError: the bucket refuses, or `data_dir` cannot be written.
    """
    from softcache.cache.storage.base import is_bucket

    if is_bucket(given):
        return _copied(given, settings, kinds)
    path = Path(given).expanduser()
    is_glob = any(sign in given for sign in "*?[")
    if "{" in given and not is_glob and not path.exists():
        found = [Path(os.path.abspath(Path(name).expanduser())) for name in expand_braces(given)]
        _check_all_there(given, [str(one) for one in found if not one.is_file()], len(found))
        return _of_kinds(given, found, kinds)
    if is_glob and not path.exists():
        names = {name for one in expand_braces(str(path)) for name in glob.glob(one, recursive=True)}
        found = sorted(Path(os.path.abspath(name)) for name in names)
        return _of_kinds(given, [path for path in found if path.is_file()], kinds)
    if path.is_dir():
        root = path.resolve()
        return CorpusFiles(given, root, files_below(root), is_folder=True)
    if path.is_file():
        return _of_kinds(given, [Path(os.path.abspath(path))], kinds)
    if suffix_of(path.name) in kinds:
        raise SourceError(f"source.path {given!r}: no such file; check source.path")
    return None


def expand_braces(pattern: str) -> list[str]:
    """Returns what the braces of a pattern stand for, in order.

    >>> expand_braces("a-{08..11}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'a-11.tar']
    >>> expand_braces("{train,val}/0.tar")
    ['train/0.tar', 'val/0.tar']
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers is None:
        parts = found[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        parts = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [whole for part in parts for whole in expand_braces(f"{before}{part}{after}")]


def _check_all_there(given: str, missing: Sequence[str], total: int) -> None:
    if missing:
        raise SourceError(
            f"source.path {given!r}: {len(missing):,} of its {total:,} files are not there, such as {missing[0]}; check the "
            "numbers in braces, or fetch the files"
        )


def _of_kinds(given: str, paths: Sequence[Path], kinds: Collection[str]) -> CorpusFiles:
    expected = f"{', '.join(kinds)}, alone or with {', '.join(COMPRESSED)} behind"
    if not paths:
        raise SourceError(
            f"source.path {given!r}: no file has such a name; expected one ending in {expected}"
        )
    for path in paths:
        if suffix_of(path.name) not in kinds:
            raise SourceError(
                f"source.path {given!r}: a file must end in {expected}; found {suffix_of(path.name)!r}"
                + ("" if len(paths) == 1 else f" of {path.name}")
            )
    if len({suffix_of(path.name) for path in paths}) > 1:
        found = sorted({suffix_of(path.name) for path in paths})
        raise SourceError(
            f"source.path {given!r}: files of different kinds, {', '.join(found)}; expected one kind; give a narrower glob"
        )
    root = paths[0].parent
    while not all(path.is_relative_to(root) for path in paths):
        root = root.parent
    return CorpusFiles(given, root, paths, is_folder=False)


def files_below(folder: Path) -> list[Path]:
    """Returns the files below a folder that are not hidden, nor in a hidden folder, in order of their paths.

    Links to folders are followed, as torchvision and timm follow them.

    Raises:
        SourceError: a link leads nowhere, or to a folder that it is in; a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise SourceError(f"source {folder}: {error}; let it be read, or leave it out") from error

    found: list[Path] = []
    for here, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        place = Path(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        above = [place.resolve(), *place.resolve().parents]
        for name in folders:
            if (path := place / name).is_symlink() and path.resolve() in above:
                raise SourceError(f"source {folder}: {path} is a link to a folder that it is in; remove it")
        for name in names:
            if name.startswith("."):
                continue
            if not (path := place / name).exists():
                raise SourceError(
                    f"source {folder}: {path} is a link to {os.readlink(path)}, which is not there; fetch what it leads to "
                    "(git annex get, dvc pull), or remove it"
                )
            if path.is_file():
                found.append(path)
    return sorted(found)


def _suffixes(path: Path) -> list[str]:
    return [suffix_of(path.name), path.suffix] if path.suffix in COMPRESSED else [path.suffix]


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file in hex; reads it in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def _for_each(make: Callable[[Any], None], items: Sequence[Any], advance: Callable[[int], None]) -> None:
    """Calls a function with each item, a few at once; the first error ends it."""
    with ThreadPoolExecutor(NUM_THREADS, "softcache-files") as threads:
        try:
            for _ in threads.map(make, items):
                advance(1)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _unpack(path: Path, target: Path) -> None:
    try:
        with target.open("xb") as writer, COMPRESSED[path.suffix](path) as stream:
            shutil.copyfileobj(stream, writer, COPIED_BYTES)
    except FileExistsError as error:
        raise SourceError(
            f"source.path: {path} unpacks to {target.name}, which is also another file's name; remove one of them"
        ) from error
    except (EOFError, lzma.LZMAError, OSError) as error:  # a damaged file is each of them, by its kind
        if getattr(error, "errno", None):
            raise  # the file system's, about the target
        raise SourceError(
            f"source.path: {path} cannot be unpacked: {error}; expected a whole {path.suffix} file; fetch it again, or "
            f"test it with its own tool"
        ) from error


# -- buckets -----------------------------------------------------------------------------------------------


def _copied(url: str, settings: BuildSettings, kinds: Collection[str]) -> CorpusFiles:
    """Returns local copies of the objects of a URL: of one, of a glob, or of all below a prefix."""
    from softcache.cache.storage.cloud.store import CloudObjects

    scheme, _, rest = url.partition("://")
    bucket, _, pattern = rest.partition("/")
    is_glob = any(sign in pattern for sign in "*?[{")
    is_file = not is_glob and suffix_of(pattern) in kinds
    fixed = pattern.split("/")
    if is_glob or is_file:
        places = [number for number, part in enumerate(fixed) if any(sign in part for sign in "*?[{")]
        fixed = fixed[: (places or [len(fixed) - 1])[0]]
    objects = CloudObjects("/".join([f"{scheme}://{bucket}", *filter(None, fixed)]))
    pattern = "/".join(pattern.split("/")[len(fixed) :])
    try:
        tags = objects.tags(pattern if is_file else None)
    except CacheNotFoundError as error:
        raise SourceError(
            f"source.path {url!r}: no such object; check the bucket and source.path ({error})"
        ) from error
    if is_glob and pattern in tags:  # a name, as of a file that is there
        tags = {pattern: tags[pattern]}
    elif is_glob:
        patterns = expand_braces(pattern)
        if "{" in pattern and not any(sign in pattern for sign in "*?["):
            _check_all_there(url, [name for name in patterns if name not in tags], len(patterns))
            tags = {name: tags[name] for name in patterns}
        else:
            wanted = [one.split("/") for one in patterns]
            found = [path for path in tags if any(_matches(path.split("/"), one) for one in wanted)]
            tags = {path: tags[path] for path in sorted(found, key=PurePosixPath)}
    elif not is_file:
        tags = {
            path: tag for path, tag in tags.items() if not any(p.startswith(".") for p in path.split("/"))
        }
    if not tags:
        raise SourceError(f"source.path {url!r}: no object has such a name; check the bucket and source.path")
    folder = build_dir_path(settings, "files", {"version": FILES_VERSION, "url": objects.url, "tags": tags})
    if not folder.is_dir():
        with (
            build_folder(folder, Path.is_dir) as staged,
            progress_bar(f"copy {url}", len(tags), "files") as advance,
        ):

            def copy(path: str) -> None:
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                with (staged / path).open("wb") as writer:
                    for block in objects.blocks(path, tags[path], COPIED_BYTES):
                        writer.write(block)

            _for_each(copy, sorted(tags), advance)
    if is_glob or is_file:
        return _of_kinds(url, [folder / path for path in tags], kinds)
    return CorpusFiles(url, folder, files_below(folder), is_folder=True)


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a path matches a pattern, each cut at its slashes, as `glob` has it: ** is any folders, * no hidden name."""
    if not (parts and patterns):
        return not parts and all(one == "**" for one in patterns)
    is_hidden = parts[0].startswith(".")
    if patterns[0] == "**":
        return _matches(parts, patterns[1:]) or (not is_hidden and _matches(parts[1:], patterns))
    if is_hidden and not patterns[0].startswith("."):
        return False
    return fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])
