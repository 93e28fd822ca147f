"""Documents encoded in shards, by this process or several; finished shards are kept until the table is whole.

    NUMBER-CHECKSUM.arrow     the encoded documents of a shard, in order; the checksum (xxh3_128) is of the file

They lie under `data_dir`, in shards/DIGEST. A shard is written under a hidden name and renamed, and its checksum is compared
when it is read: after a kill, the same command goes on with the first shard that is missing or damaged. Where a shard ends
depends on the documents alone, and samples are cut by one process from documents in their order, so that the number of
processes changes no byte of a table.

Memory: a shard is about 16 MB of text; this process holds one, and with N processes at most N + 2 of them.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from softcache.data.sources.build_cache import build_dir_path
from softcache.data.sources.text.documents import Document, Documents
from softcache.data.sources.text.encode import DocumentEncoder, batches
from softcache.data.sources.text.packing import Encoded
from softcache.data.sources.text.special_tokens import SpecialTokens
from softcache.errors import LostProcessError, SoftcacheError, StorageError
from softcache.runtime.logging import log_info
from softcache.runtime.signals import follow_parent

if TYPE_CHECKING:
    from softcache.data.sources.text.settings import TextSettings

__all__ = ["ShardedEncoder", "Shards"]

SHARD_SIZE, SHARD_DOCUMENTS = 2**24, 2**15
SHARDS_VERSION = 4
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("learnt", pa.list_(pa.uint8())),
        ("num_prefix", pa.int32()),
        ("has_prompt", pa.bool_()),
    ]
)
WITH_LOG_PROBS = SCHEMA.append(pa.field("log_probs", pa.list_(pa.float32())))  # of rollouts


def shards_of(documents: Iterable[Document]) -> Iterator[tuple[list[Document], bool]]:
    """Yields documents in lists of `SHARD_SIZE` characters or `SHARD_DOCUMENTS`, and whether a list is that full."""
    shard: list[Document] = []
    size = 0
    for document in documents:
        shard.append(document)
        size += document.size + sum(len(str(message)) for message in document.messages)
        if len(shard) == SHARD_DOCUMENTS or size >= SHARD_SIZE:
            yield shard, True
            shard, size = [], 0
    if shard:
        yield shard, False


class Shards:
    """A folder of encoded shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths = {int(path.name[:6]): path for path in folder.glob("??????-*.arrow")}

    def __contains__(self, number: int) -> bool:
        return number in self._paths

    def __len__(self) -> int:
        return len(self._paths)

    def add(self, number: int, path: Path) -> None:
        """Makes a shard known that another process wrote."""
        self._paths[number] = path

    def read(self, number: int) -> list[Encoded] | None:
        """Returns a shard, over a memory-mapped file; None where there is no whole one, and what is there is removed."""
        if (path := self._paths.get(number)) is None:
            return None
        with suppress(FileNotFoundError):  # another process was faster with the table, and removed it
            if _checksum(path) == path.stem.partition("-")[2]:
                return _read(path)
            log_info(f"{path}: damaged; it is made again")
            path.unlink(missing_ok=True)
        del self._paths[number]
        return None

    def write(self, number: int, encoded: Sequence[Encoded]) -> Path:
        """Writes a shard and returns its path; it appears whole.

        Raises:
            StorageError: the folder cannot be written.
        """
        try:
            try:
                path = self._write(number, encoded)
            except FileNotFoundError:  # another process was faster with the table, and removed the folder
                path = self._write(number, encoded)
        except OSError as error:
            raise StorageError(
                f"source.data_dir: cannot write {self.folder}: {error}; set it to a folder that can be written, with room"
            ) from error
        self._paths[number] = path
        return path

    def _write(self, number: int, encoded: Sequence[Encoded]) -> Path:
        staged = self.folder / f".{number:06d}.{uuid.uuid4().hex[:8]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            batch = _batch(encoded)
            with pa.OSFile(str(staged), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            return staged.rename(self.folder / f"{number:06d}-{_checksum(staged)}.arrow")
        finally:
            staged.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # another table's shards are there
            self.folder.parent.rmdir()


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _batch(encoded: Sequence[Encoded]) -> pa.RecordBatch:
    def lists(arrays: list[np.ndarray], dtype: Any) -> pa.ListArray:
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, np.concatenate(arrays).astype(dtype, copy=False))

    columns = [
        pa.array([document.key for document in encoded], pa.string()),
        lists([document.tokens for document in encoded], np.int32),
        lists([document.learnt for document in encoded], np.uint8),
        pa.array([document.num_prefix for document in encoded], pa.int32()),
        pa.array([document.has_prompt for document in encoded], pa.bool_()),
    ]
    if all(document.log_probs is None for document in encoded):
        return pa.record_batch(columns, schema=SCHEMA)
    log_probs = [
        np.full(len(document.tokens), np.nan) if document.log_probs is None else document.log_probs
        for document in encoded
    ]
    return pa.record_batch([*columns, lists(log_probs, np.float32)], schema=WITH_LOG_PROBS)


def _read(path: Path) -> list[Encoded]:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    keys, tokens, learnt, prefixes, prompts, *more = batch.columns
    ids, mask = tokens.values.to_numpy(), learnt.values.to_numpy().view(bool)
    ends = tokens.offsets.to_numpy()
    places = zip(
        keys.to_pylist(), ends[:-1], ends[1:], prefixes.to_pylist(), prompts.to_pylist(), strict=True
    )
    log_probs = more[0].values.to_numpy() if more else None
    return [
        Encoded(
            key,
            ids[start:stop],
            mask[start:stop],
            num_prefix,
            has_prompt,
            None if log_probs is None else log_probs[start:stop],
        )
        for key, start, stop, num_prefix, has_prompt in places
    ]


class _Waiting(NamedTuple):
    """A shard that is encoded by another process, or was before."""

    number: int
    documents: list[Document]
    made: Future[Path] | None


class ShardedEncoder:
    """Encodes documents, in order.

    Args:
        made_from: what the tokens depend on, apart from the documents.
    """

    def __init__(
        self, tokenizer: Any, settings: TextSettings, around: SpecialTokens, made_from: dict[str, Any]
    ) -> None:
        self._how = tokenizer, settings, around
        self._settings = settings
        self._made_from = {"version": SHARDS_VERSION, "size": [SHARD_SIZE, SHARD_DOCUMENTS], **made_from}
        self._pool: ProcessPoolExecutor | None = None
        self._used: list[Shards] = []

    @contextmanager
    def processes(self) -> Iterator[None]:
        """Starts the processes of `source.tokenize_workers`, and ends them with the block."""
        if self._settings.tokenize_workers == 0 or current_process().daemon:  # which may not start any
            yield
            return
        self._pool = ProcessPoolExecutor(
            self._settings.tokenize_workers,
            mp_context=get_context("spawn"),
            initializer=_start,
            initargs=(os.getpid(), *self._how),
        )
        try:
            yield
        except BrokenProcessPool as error:
            kept = sum(map(len, self._used))
            raise LostProcessError(
                f"source.tokenize_workers: a process ended without an answer (killed, perhaps for memory, or started from a "
                f'script without `if __name__ == "__main__":`); {kept} shards of tokens are kept; run the same command '
                "again, with fewer processes if memory ran out"
            ) from error
        finally:
            running = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in running:  # what they are at is of no use any more
                process.kill()
            for process in running:
                process.join()
            self._pool = None

    def remove_shards(self) -> None:
        """Removes what `encode` kept; for when the table is whole."""
        for shards in self._used:
            shards.remove()

    def encode(
        self, documents: Documents, *, advance: Callable[[int], None], num_streams: int = 1
    ) -> Iterator[Encoded]:
        """Yields documents as tokens; finished shards of a run that was stopped are used.

        Args:
            advance: is called with how many documents were encoded.
            num_streams: how many are encoded by turns; they share the shards that wait in memory.

        Raises:
            SourceError: a document cannot be encoded.
            StorageError: `data_dir` cannot be written.
        """
        described = {**self._made_from, "documents": documents.digest}
        shards = Shards(build_dir_path(self._settings, "shards", described))
        self._used.append(shards)
        if found := len(shards):
            log_info(f"source {documents.name}: {found} shards of tokens are there already")
        if self._pool is None:
            yield from self._here(documents, shards, advance)
        else:
            window = max(2, (self._settings.tokenize_workers + 2) // num_streams)
            yield from self._by_others(documents, shards, advance, window)

    def _here(
        self, documents: Documents, shards: Shards, advance: Callable[[int], None]
    ) -> Iterator[Encoded]:
        encode = DocumentEncoder(*self._how, of=documents.name)
        for number, (shard, is_full) in enumerate(shards_of(documents)):
            if (encoded := shards.read(number)) is not None:
                advance(len(shard))
                yield from encoded
                continue
            made: list[Encoded] = []
            for batch in batches(shard):
                made += (new := list(encode(batch)))
                yield from new
                advance(len(batch))
            # The last one is not worth a file: the table follows at once.
            if is_full:
                shards.write(number, made)

    def _by_others(
        self, documents: Documents, shards: Shards, advance: Callable[[int], None], window: int
    ) -> Iterator[Encoded]:
        assert self._pool is not None
        waiting: deque[_Waiting] = deque()
        numbered = enumerate(shards_of(documents))
        is_at_end = False
        while waiting or not is_at_end:
            while not is_at_end and len(waiting) < window:
                number, (shard, _) = next(numbered, (0, ([], False)))
                is_at_end = not shard
                if shard:
                    made = None
                    if number not in shards:
                        made = self._pool.submit(_make, shards.folder, number, shard, documents.name)
                    waiting.append(_Waiting(number, shard, made))
            if not waiting:
                return
            first = waiting.popleft()
            if first.made is not None:
                shards.add(first.number, first.made.result())
            encoded = shards.read(first.number)
            if encoded is None:
                encoded = DocumentEncoder(*self._how, of=documents.name).all(first.documents)
                shards.write(first.number, encoded)
            yield from encoded
            advance(len(first.documents))


# -- in another process ------------------------------------------------------------------------------------

_how: tuple[Any, ...] = ()


def _start(parent: int, *how: Any) -> None:
    global _how
    _how = how
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each; the processes are the parallelism
    follow_parent(parent)


def _make(folder: Path, number: int, documents: list[Document], of: str) -> Path:
    try:
        return Shards(folder).write(number, DocumentEncoder(*_how, of=of).all(documents))
    except SoftcacheError as error:
        raise type(error)(str(error)) from None  # the cause may not be picklable
