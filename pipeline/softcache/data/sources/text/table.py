"""A table of samples: written in large record batches, read one sample at a time from the mapped file.

    samples.arrow       an Arrow stream (`datasets.Dataset.from_file` reads it)
    table.json          the digest, the counts, what it was made from; written last

The digest covers keys, order, tokens, segments and masks, and of rollouts their log-probabilities; fingerprints repeat
that sample by sample, but for the log-probabilities, which no teacher reads. A sample of 256 tokens is read in about 2
microseconds.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from softcache.data.sources.text.packing import KeyedSample, TokenSample
from softcache.errors import SourceError
from softcache.runtime.display import Displayed, Summary, shorten_list
from softcache.runtime.files import parse_json

__all__ = ["TableWriter", "TokenSource", "described_table"]

# `learnt` is one byte per token, so that it is read without unpacking bits; `num_rows` are label rows.
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("learnt", pa.list_(pa.uint8())),
        ("lengths", pa.list_(pa.int32())),  # of the segments
        ("num_rows", pa.int32()),
    ]
)
WITH_LOG_PROBS = SCHEMA.append(
    pa.field("log_probs", pa.list_(pa.float32()))
)  # of rollouts; NaN where none sampled
CHUNK_TOKENS = 2**22  # of a record batch: about 20 MB; the samples that wait for it take some 60


class _Chunk(NamedTuple):
    """A record batch as arrays over the mapped file; nothing is copied."""

    key: Any
    tokens: np.ndarray
    learnt: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    length_offsets: np.ndarray
    num_rows: np.ndarray
    log_probs: np.ndarray | None


def _chunks(path: Path) -> list[_Chunk]:
    def flat(column: Any) -> np.ndarray:
        return column.to_numpy(zero_copy_only=True)

    chunks = []
    for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
        key, tokens, learnt, lengths, num_rows, *more = batch.columns
        chunks.append(
            _Chunk(
                key,
                flat(tokens.values),
                flat(learnt.values).view(bool),
                flat(tokens.offsets),
                flat(lengths.values),
                flat(lengths.offsets),
                flat(num_rows),
                flat(more[0].values) if more else None,
            )
        )
    return chunks


def described_table(folder: Path) -> dict[str, Any] | None:
    """Returns table.json, or None where the table is not whole."""
    try:
        described = parse_json((folder / "table.json").read_text("utf-8"))
        whole = (folder / "samples.arrow").stat().st_size == described["num_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return described if whole else None


class TokenSource(Displayed):
    """Samples of tokens in a memory-mapped Arrow table; picklable, and opened by each process on first use.

    Attributes:
        name: of the dataset and split, for messages.
        digest: names keys, order, tokens, segments and masks.
        tokenizer_digest: of the tokenizer that made the tokens.
        tokenizer_parts: its `tokenizer_parts`; None where a table has none.
        vocab_size: ids are below it.
        seq_len, packing: how samples were cut.
        prefix: ids that the tokenizer puts before each text, such as BOS.
        num_tokens: of all samples.
        account: what became of the documents, an `Account` as a dict, and how full the samples are; empty where a table
            is not made of documents of text.
    """

    def __init__(self, folder: str | Path, *, name: str) -> None:
        self._folder, self.name = Path(folder), name
        described = described_table(self._folder)
        if described is None:
            raise SourceError(
                f"source {name}: the table {folder} is not whole; remove the folder and open the source again"
            )
        self.digest: str = described["digest"]
        self.tokenizer_digest: str = described["tokenizer_digest"]
        self.tokenizer_parts: dict[str, Any] | None = described.get("tokenizer_parts")
        self.vocab_size: int = described["vocab_size"]
        self.seq_len: int = described["made_from"]["seq_len"]
        self.packing: str = described["made_from"]["packing"]
        self.num_tokens: int = described["num_tokens"]
        self.prefix: list[int] = described["made_from"].get("prefix", [])
        self.account: dict[str, Any] = described.get("account", {})
        self._num_samples: int = described["num_samples"]
        self._opened: tuple[list[_Chunk], list[int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _open(self) -> tuple[list[_Chunk], list[int]]:
        """The chunks, and the first sample of each."""
        if self._opened is None:
            chunks = _chunks(self._folder / "samples.arrow")
            starts = np.cumsum([0, *(len(chunk.num_rows) for chunk in chunks)]).tolist()
            self._opened = chunks, starts[:-1]
        return self._opened

    def _at(self, sample: int) -> tuple[_Chunk, int]:
        if not 0 <= sample < self._num_samples:
            raise IndexError(f"source {self.name}: sample {sample} of {self._num_samples}")
        chunks, starts = self._opened or self._open()
        number = bisect.bisect_right(starts, sample) - 1
        return chunks[number], int(sample) - starts[number]

    def __len__(self) -> int:
        return self._num_samples

    def summarize(self) -> Summary:
        title = f"{type(self).__name__} {self.name}: {len(self):,} samples, {self.num_tokens:,} tokens"
        keys = [self.key(sample) for sample in range(min(len(self), 6))]
        return Summary(title, [("vocabulary", f"{self.vocab_size:,}"), ("keys", shorten_list(keys))])

    def key(self, sample: int) -> str:
        chunk, row = self._at(sample)
        return chunk.key[row].as_py()

    def keys(self) -> list[str]:
        return [key for chunk in self._open()[0] for key in chunk.key.to_pylist()]

    def num_rows(self) -> np.ndarray:
        """Returns the number of label rows [N] int64 of every sample; at least one each."""
        return np.concatenate([chunk.num_rows for chunk in self._open()[0]]).astype(np.int64)

    def find_tokens(self, ids: Iterable[int]) -> list[int]:
        """Returns those of the ids that occur in some sample, ascending; reads all tokens."""
        wanted = np.array(sorted(ids), np.int32)
        found = [wanted[np.isin(wanted, chunk.tokens)] for chunk in self._open()[0]] if len(wanted) else []
        return sorted(set(np.concatenate(found).tolist())) if found else []

    def sample(self, sample: int) -> TokenSample:
        """Returns one sample; tokens and mask are read-only views of the mapped file."""
        chunk, row = self._at(sample)
        piece = slice(chunk.offsets[row], chunk.offsets[row + 1])
        lengths = chunk.lengths[chunk.length_offsets[row] : chunk.length_offsets[row + 1]]
        segments = np.arange(len(lengths), dtype=np.int32).repeat(lengths)
        log_probs = None if chunk.log_probs is None else chunk.log_probs[piece]
        return TokenSample(chunk.tokens[piece], segments, chunk.learnt[piece], log_probs)


class TableWriter:
    """Writes samples in large record batches, and digests them on their way.

    Args:
        has_log_probs: whether samples are rollouts; the log-probabilities of one without are NaN.
    """

    def __init__(self, path: Path, *, has_log_probs: bool = False) -> None:
        self._path, self._digest = path, hashlib.sha256()
        self._schema = WITH_LOG_PROBS if has_log_probs else SCHEMA
        self._writer = pa.ipc.new_stream(str(path), self._schema)
        self._waiting: list[KeyedSample] = []
        self._waiting_tokens = self.num_samples = self.num_tokens = 0
        self.largest = -1

    def add(self, cut: KeyedSample) -> None:
        parts: list[Any] = [cut.key.encode(), np.ascontiguousarray(cut.sample.content, "<i4").data]
        if self._schema is WITH_LOG_PROBS:
            parts.append(np.ascontiguousarray(_log_probs(cut), "<f4").data)
        for part in parts:
            self._digest.update(memoryview(part).nbytes.to_bytes(8, "little"))
            self._digest.update(part)
        self.num_samples += 1
        self._waiting.append(cut)
        self._waiting_tokens += len(cut.sample.tokens)
        if self._waiting_tokens >= CHUNK_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        tokens = np.concatenate([cut.sample.tokens for cut in self._waiting])
        learnt = np.concatenate([cut.sample.learnt for cut in self._waiting]).view(np.uint8)
        offsets = np.cumsum([0, *(len(cut.sample.tokens) for cut in self._waiting)], dtype=np.int32)
        lengths = np.concatenate([cut.lengths for cut in self._waiting], dtype=np.int32)
        length_offsets = np.cumsum([0, *(len(cut.lengths) for cut in self._waiting)], dtype=np.int32)
        columns = [
            pa.array([cut.key for cut in self._waiting], pa.string()),
            pa.ListArray.from_arrays(offsets, tokens),
            pa.ListArray.from_arrays(offsets, learnt),
            pa.ListArray.from_arrays(length_offsets, lengths),
            pa.array([len(cut.sample.rows) for cut in self._waiting], pa.int32()),
        ]
        if self._schema is WITH_LOG_PROBS:
            log_probs = np.concatenate([_log_probs(cut) for cut in self._waiting])
            columns.append(pa.ListArray.from_arrays(offsets, log_probs))
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self.num_tokens += len(tokens)
        self.largest = max(self.largest, int(tokens.max()))
        self._waiting, self._waiting_tokens = [], 0

    def close(self) -> dict[str, Any]:
        """Returns the description of the samples in table.json."""
        self._flush()
        self._writer.close()
        return {
            "digest": self._digest.hexdigest(),
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "num_bytes": self._path.stat().st_size,
        }


def _log_probs(cut: KeyedSample) -> np.ndarray:
    found = cut.sample.log_probs
    return np.full(len(cut.sample.tokens), np.nan, np.float32) if found is None else found
