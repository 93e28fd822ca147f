"""DistillKit's compressed log-probabilities (github.com/arcee-ai/DistillKit): Parquet files of its vLLM sampler.

    OUT/data_0.parquet …            a row for each document: input_ids, compressed_logprobs, bytepacked_indices
    OUT/compression_config.yaml     how they are compressed

`input_ids` has L ids, and the two others L - 1 lists of bytes: list t is the distribution over token t + 1, at T = 1 over
all of the vocabulary. Of each list, with the names of compression_config.yaml:

    bytepacked_indices     k ids of ceil(log2 d) bits, the highest bit of the first id first
    compressed_logprobs    exact_k numbers of exact_dtype; a coefficient of term_dtype for each of polynomial_terms, of a
                           curve over t = 0 … (with normalize_t 0 … 1) through the other k - exact_k; then for each of
                           residual_bins a scale and num_elements numbers of element_bits, what is added to the curve;
                           with delta_encoding all are differences, from the second on

The curve is an approximation: log-probabilities may be off by tenths, above 0 or out of order. Rows are ordered anew, and a
row that sums to more than 1 is scaled to 1, up to `max_mass`. Samples are found by their ids, so a document is one sample; a
row group is held at a time, so they are best read in the order of the files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import BaseModel, Field, ValidationError

from softcache.data.batch import Dataset
from softcache.errors import AlignmentError, LabelError, SourceError
from softcache.labels import LabelKind
from softcache.runtime.optional import text_library
from softcache.tools.import_caches.base import IMPORTERS, UNKNOWN, Original, digest_files
from softcache.tools.import_caches.top_rows import TopRows

__all__ = ["Compression", "DistillKit", "unpack_numbers"]

IDS, VALUES, PACKED = "input_ids", "compressed_logprobs", "bytepacked_indices"
CONFIG = "compression_config.yaml"
MAX_PADDING_MASS = 1e-3
"""Of ids above the vocabulary, of heads that are padded."""
ABOVE_ZERO = 0.05
"""How far an approximated log-probability may be above 0, nats."""

Float = Literal["float16", "bfloat16", "float32", "float64"]
SIZES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class _Bin(BaseModel):
    scale_dtype: Float
    element_bits: int = Field(ge=1, le=63)
    num_elements: int = Field(ge=1)

    @property
    def num_bytes(self) -> int:
        return SIZES[self.scale_dtype] + (self.element_bits * self.num_elements + 7) // 8


class Compression(BaseModel):
    """compression_config.yaml, by the names that are there."""

    d: int = Field(ge=1)
    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    exact_dtype: Float = "float32"
    polynomial_terms: list[Literal["sqrt", "exp"] | int] | None = None
    term_dtype: Float = "float32"
    residual_bins: list[_Bin]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def id_bits(self) -> int:
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def id_bytes(self) -> int:
        return (self.k * self.id_bits + 7) // 8

    @property
    def value_bytes(self) -> int:
        numbers = (
            self.exact_k * SIZES[self.exact_dtype] + len(self.polynomial_terms or ()) * SIZES[self.term_dtype]
        )
        return numbers + sum(part.num_bytes for part in self.residual_bins)

    def unpack(self, bytes_RB: np.ndarray) -> np.ndarray:
        """Returns the log-probabilities [R, k] float64 of rows [R, value_bytes] uint8."""
        num_rows, rest = len(bytes_RB), self.k - self.exact_k
        exact_RE, at = _floats(bytes_RB, 0, self.exact_k, self.exact_dtype)
        curve_RA = np.zeros((num_rows, rest))
        if self.polynomial_terms:
            terms_RT, at = _floats(bytes_RB, at, len(self.polynomial_terms), self.term_dtype)
            curve_RA = terms_RT @ self.terms(rest)
        start = 0
        for part in self.residual_bins:
            scale_R1, at = _floats(bytes_RB, at, 1, part.scale_dtype)
            stop = at + (part.element_bits * part.num_elements + 7) // 8
            steps = unpack_numbers(bytes_RB[:, at:stop], part.element_bits, part.num_elements)
            middle = 2 ** (part.element_bits - 1)
            steps = 2 * steps - 1 if part.element_bits == 1 else steps - middle
            curve_RA[:, start : start + part.num_elements] += steps * scale_R1
            at, start = stop, start + part.num_elements
        values_RK = np.concatenate([exact_RE, curve_RA], axis=1)
        with np.errstate(invalid="ignore"):  # -inf less -inf; what comes of it is refused
            return np.cumsum(values_RK, axis=1) if self.delta_encoding else values_RK

    def terms(self, count: int) -> np.ndarray:
        """Returns the curve's terms [T, count] float64 at each point."""
        points = np.linspace(0, 1, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        named = {"sqrt": np.sqrt, "exp": np.exp}
        return np.stack(
            [
                points**term if isinstance(term, int) else named[term](points)
                for term in self.polynomial_terms or ()
            ]
        )


@IMPORTERS.register("distillkit")
class DistillKit(Original):
    """The folder, or Parquet files next to a compression_config.yaml."""

    kind: ClassVar[LabelKind] = "tokens"
    sees_source: ClassVar[bool] = True
    max_mass: ClassVar[float] = ABOVE_ZERO
    bounds_tail: ClassVar[bool] = False
    missing: ClassVar[tuple[str, ...]] = (
        *UNKNOWN,
        "log-probabilities behind the first exact_k, which are a curve's",
    )

    def __init__(self, paths: Sequence[Path], data: Dataset) -> None:
        self._source = data.source
        files = [file for path in paths for file in _files(path)]
        self._compression = _read_compression(files[0].parent)
        vocab_size, bits = int(data.source.vocab_size), self._compression.id_bits
        if vocab_size > 2**bits:
            raise LabelError(
                f"distillkit, {files[0].parent / CONFIG}: d = {self._compression.d}, so ids have {bits} bits; source "
                f"{data.source.name} has {vocab_size:,} tokens, and ids above {2**bits - 1:,} were cut to others as they "
                "were written; capture again with a larger d"
            )
        self.k = self._compression.k
        self.digest = digest_files((file.name, file) for file in [*files, files[0].parent / CONFIG])
        self.facts = {"compression": self._compression.model_dump(mode="json"), "joined_by": "token ids"}
        self._files = [(path, _open(path)) for path in files]
        self._rows = self._index()
        self._group = lru_cache(maxsize=2)(self._read_group)

    def read(self, samples: np.ndarray, view: int, batch: Any) -> TopRows:
        values, packed, starts = [], [], np.concatenate([[0], np.cumsum(batch.row_counts)])
        for number, sample in enumerate(samples.tolist()):
            positions = batch.positions[starts[number] : starts[number + 1]]
            found = self._lists(sample, int(starts[number]), positions)
            values.append(found[0])
            packed.append(found[1])
        ids_RK = unpack_numbers(np.concatenate(packed), self._compression.id_bits, self.k)
        log_probs_RK = self._compression.unpack(np.concatenate(values))
        for row, slot in np.argwhere(~(log_probs_RK <= ABOVE_ZERO))[:1].tolist():
            raise LabelError(
                f"slot {slot} has log-probability {log_probs_RK[row, slot]:g}; expected at most 0: an infinite number "
                f"spoiled the curve, or the files are not compressed as {CONFIG} has it",
                position=row,
            )
        log_probs_RK = np.minimum(log_probs_RK, 0.0)
        num_classes = int(self._source.vocab_size)
        padding_R = np.where(ids_RK >= num_classes, np.exp(log_probs_RK), 0.0).sum(1)
        for row in np.flatnonzero(padding_R > MAX_PADDING_MASS)[:1].tolist():
            raise LabelError(
                f"ids at and above the vocabulary of {num_classes:,} have a probability of {padding_R[row]:.2g}; expected "
                "next to none, of a head's padding; is source.tokenizer the teacher's?",
                position=row,
            )
        is_used_RK = (log_probs_RK > -np.inf) & (ids_RK < num_classes)
        return TopRows(np.where(is_used_RK, ids_RK, num_classes), np.where(is_used_RK, log_probs_RK, -np.inf))

    def where(self, sample: int, view: int) -> str:
        file, group, row = self._rows[_content(self._source.sample(sample).tokens)]
        return f"{self._files[file][0]}, row group {group}, row {row}"

    def _lists(self, sample: int, first: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the bytes [R, ...] of values and ids of a sample's rows at some positions.

        Args:
            first: the number of its first row in the batch, for messages.
        """
        tokens = self._source.sample(sample).tokens
        place = self._rows.get(_content(tokens))
        if place is None:
            raise AlignmentError(
                f"distillkit, {self._files[0][0].parent}: sample {self._source.key(sample)!r} of {len(tokens)} tokens has "
                f"the ids of no row, from {tokens[:6].tolist()} on: read the same files as source.path with "
                'input_ids_column = "input_ids", a source.seq_len that holds every row and packing = "documents"'
            )
        file, group, row = place
        table, out = self._group(file, group), []
        for name, size in ((VALUES, self._compression.value_bytes), (PACKED, self._compression.id_bytes)):
            lists = table.column(name)[row].values
            if len(lists) <= positions.max(initial=-1):
                raise LabelError(
                    f"{name} has {len(lists)} lists for {len(tokens)} tokens; expected {len(tokens) - 1}: of every token "
                    "but the first",
                    position=first + len(lists),
                )
            sizes = np.diff(lists.offsets.to_numpy())
            for wrong in np.flatnonzero(sizes[positions] != size)[:1].tolist():
                raise LabelError(
                    f"{name} has {sizes[positions[wrong]]} bytes; expected {size} by {CONFIG}",
                    position=first + wrong,
                )
            begin = lists.offsets.to_numpy()[positions]
            content = lists.values.to_numpy()
            out.append(content[begin[:, None] + np.arange(size)])
        return out[0], out[1]

    def _index(self) -> dict[bytes, tuple[int, int, int]]:
        """Returns file, row group and row of each document, by its ids; of equal ones, whose labels are equal, the first."""
        rows: dict[bytes, tuple[int, int, int]] = {}
        for number, (_, file) in enumerate(self._files):
            for group in range(file.num_row_groups):
                for row, ids in enumerate(file.read_row_group(group, [IDS]).column(IDS)):
                    rows.setdefault(_content(ids.values.to_numpy()), (number, group, row))
        return rows

    def _read_group(self, file: int, group: int) -> pa.Table:
        path, opened = self._files[file]
        try:
            return opened.read_row_group(group, [VALUES, PACKED]).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise SourceError(
                f"distillkit, {path}, row group {group}: cannot be read: {error}; restore it"
            ) from error


def _content(ids: np.ndarray) -> bytes:
    return xxhash.xxh3_128_digest(np.ascontiguousarray(ids, "<i4").tobytes())


def _files(path: Path) -> list[Path]:
    found = sorted(path.glob("*.parquet"), key=_number) if path.is_dir() else [path] * path.is_file()
    if not found:
        raise SourceError(
            f"distillkit, {path}: no Parquet file; expected data_0.parquet and on, or the folder that has them"
        )
    return found


def _number(path: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", path.stem)
    return (int(digits[-1]) if digits else -1), path.name


def _read_compression(folder: Path) -> Compression:
    path = folder / CONFIG
    try:
        return Compression.model_validate(text_library("yaml").safe_load(path.read_text("utf-8")))
    except OSError as error:
        raise SourceError(
            f"distillkit, {path}: {error.strerror}; put the settings there with which the files were compressed; a data "
            "set's card has them, under logprob_compressor"
        ) from error
    except (ValidationError, ValueError, text_library("yaml").YAMLError) as error:
        raise SourceError(
            f"distillkit, {path}: {error}; expected d, k, exact_k, residual_bins and so on"
        ) from error


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"distillkit, {path}: cannot be read: {error}; restore it") from error
    names = set(file.schema_arrow.names)
    if {"packed_indices", "exact_values", "coeffs"} <= names:
        raise LabelError(
            f"distillkit, {path}: compressed as versions before 1.0 did; its values may be logits less their mean, whose "
            "sum of probabilities is not kept; capture again"
        )
    if not {IDS, VALUES, PACKED} <= names:
        raise SourceError(
            f"distillkit, {path}: columns {', '.join(sorted(names))}; expected {IDS}, {VALUES} and {PACKED}"
        )
    if "attention_mask" in names:
        raise SourceError(
            f"distillkit, {path}: packed by distillkit-pack-logits, several documents to a row; import the data set that "
            "was packed"
        )
    return file


def _floats(bytes_RB: np.ndarray, start: int, count: int, dtype: str) -> tuple[np.ndarray, int]:
    """Returns numbers [R, count] float64 from a column of bytes on, and where the next ones begin."""
    stop = start + count * SIZES[dtype]
    part = np.ascontiguousarray(bytes_RB[:, start:stop])
    if dtype == "bfloat16":
        numbers = (part.view("<u2").astype("<u4") << 16).view("<f4")
    else:
        numbers = part.view(np.dtype(dtype).newbyteorder("<"))
    return numbers.astype(np.float64), stop


def unpack_numbers(bytes_RB: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Returns whole numbers [R, count] int64 of so many bits each, packed with the highest bit first."""
    bits_RX = np.unpackbits(bytes_RB, axis=1)[:, : bits * count].reshape(len(bytes_RB), count, bits)
    return bits_RX.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
