"""The peers' files on disk with the labels of a cache, each read the way that its own loader reads.

    TinyViT      keys.txt and values.bin, a record of int32 seed, K int16 ids and K float16 probabilities (404 bytes at
                 K = 100); a reader parses all keys into a dict, once an epoch, and seeks one record per sample;
                 map-style, torch's default collate
    FKD          a file per sample, torch.save of crop box, flip, K ids and K float16 probabilities
    Megatron-LM  a tar of batches, each zstd of a torch.save: float16 log-probabilities and ids of ceil(log2 V) bits;
                 in the order of writing only
    DistillKit   Parquet rows list<list<uint8>>, a list of bytes per position; a sample through `to_pylist`

Written from what is known of the formats, not from the peers' code. Where a choice was open, the faster one was taken: no
augmentation is replayed from TinyViT's seeds, FKD's files are unpickled without the checks that are torch's default, and
Megatron's ids are unpacked with a few gathers. Only files that this benchmark wrote are unpickled.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numcodecs import Zstd
from torch.utils.data import Dataset, IterableDataset

from benchmarks.peer_layouts import DistillKit, pack_bits
from softcache.reader.cache import Cache

__all__ = [
    "DistillKitFiles",
    "FkdFiles",
    "MegatronFiles",
    "TinyVitFiles",
    "parse_keys",
    "write_distillkit",
    "write_fkd",
    "write_megatron",
    "write_tinyvit",
]

PART_SAMPLES = 2048
_IMAGE = torch.full((1, 2, 2), 128, dtype=torch.uint8)


def _parts(cache: Cache, num_samples: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields sample numbers, ids and log-probabilities of some samples after the others."""
    for start in range(0, num_samples, size):
        samples = np.arange(start, min(start + size, num_samples))
        labels = cache.read(samples)
        yield samples, labels.ids.astype(np.int64), labels.log_probs.astype(np.float32)


# -- TinyViT -----------------------------------------------------------------------------------------------


def write_tinyvit(cache: Cache, keys: Sequence[str], folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "keys.txt").write_text("".join(f"{key}\n" for key in keys))
    with (folder / "values.bin").open("wb") as file:
        for samples, ids_PK, log_probs_PK in _parts(cache, len(keys), PART_SAMPLES):
            records = np.empty(len(samples), _tinyvit_record(ids_PK.shape[1]))
            records["seed"], records["ids"], records["probs"] = samples, ids_PK, np.exp(log_probs_PK)
            records.tofile(file)


def _tinyvit_record(k: int) -> np.dtype:
    return np.dtype([("seed", "<i4"), ("ids", "<i2", (k,)), ("probs", "<f2", (k,))])


def parse_keys(path: Path) -> dict[str, int]:
    """Returns the place of every key."""
    places = {}
    with path.open() as file:
        for number, line in enumerate(file):
            places[line.strip()] = number
    return places


class TinyVitFiles(Dataset):
    """Map-style; a worker parses the keys on its first sample, and workers live for one epoch."""

    def __init__(self, folder: Path, source: Any, k: int) -> None:
        self._folder, self._source, self._k = folder, source, k
        self._item_bytes = _tinyvit_record(k).itemsize
        self._places: dict[str, int] = {}
        self._values: Any = None

    def __len__(self) -> int:
        return len(self._source)

    def set_epoch(self) -> None:
        self._places, self._values = {}, None

    def __getitem__(self, sample: int) -> tuple[Any, tuple[np.ndarray, np.ndarray, np.int32]]:
        if self._values is None:
            self._places = parse_keys(self._folder / "keys.txt")
            self._values = (self._folder / "values.bin").open("rb")
        self._values.seek(self._places[self._source.key(sample)] * self._item_bytes)
        record, cut = self._values.read(self._item_bytes), 4 + 2 * self._k
        seed = np.frombuffer(record[:4], np.int32)[0]
        # Copied, so that torch may write to them.
        ids = np.frombuffer(record[4:cut], np.int16).copy()
        probs = np.frombuffer(record[cut:], np.float16).copy()
        return (_IMAGE, self._source.target(sample)), (ids, probs, seed)


# -- FKD ---------------------------------------------------------------------------------------------------


def write_fkd(cache: Cache, num_samples: int, folder: Path) -> None:
    folder.mkdir(parents=True)
    for samples, ids_PK, log_probs_PK in _parts(cache, num_samples, PART_SAMPLES):
        probs_PK = np.exp(log_probs_PK).astype(np.float16)
        for sample, ids, probs in zip(samples, ids_PK.astype(np.int16), probs_PK, strict=True):
            labels = (torch.from_numpy(probs.copy()), torch.from_numpy(ids.copy()))
            torch.save(
                [torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor(False), labels], _fkd(folder, sample)
            )


def _fkd(folder: Path, sample: int) -> Path:
    return folder / f"{sample:08d}.pt"


class FkdFiles(Dataset):
    """Map-style, a file per sample."""

    def __init__(self, folder: Path, source: Any, num_samples: int) -> None:
        self._folder, self._source, self._num_samples = folder, source, num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> tuple[Any, Any]:
        box, flip, (probs, ids) = torch.load(_fkd(self._folder, sample), weights_only=False)
        return (_IMAGE, self._source.target(sample)), (ids, probs, box, flip, sample)


# -- Megatron-LM -------------------------------------------------------------------------------------------


def write_megatron(cache: Cache, path: Path, batch_samples: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    zstd, bits = Zstd(level=3), (cache.num_classes - 1).bit_length()
    with tarfile.open(path, "w") as tar:
        for samples, ids_PK, log_probs_PK in _parts(cache, len(cache), batch_samples):
            batch = {
                "samples": torch.from_numpy(samples),
                "log_probs": torch.from_numpy(log_probs_PK.astype(np.float16)),
                "ids": torch.from_numpy(pack_bits(ids_PK, bits)),
            }
            buffer = io.BytesIO()
            torch.save(batch, buffer)
            data = zstd.encode(buffer.getvalue())
            entry = tarfile.TarInfo(f"{samples[0]:08d}.pt.zst")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def unpack_ids(packed_PR: np.ndarray, bits: int, k: int) -> np.ndarray:
    """Returns the numbers [P, K] int32 of `bits` <= 25 bits each; little-endian."""
    starts_K = np.arange(k) * bits
    padded_PR = np.pad(packed_PR, ((0, 0), (0, 4)))
    out_PK = np.zeros((len(packed_PR), k), np.uint32)
    for byte in range((bits + 7 + 7) // 8):
        out_PK |= padded_PR[:, starts_K // 8 + byte].astype(np.uint32) << np.uint32(8 * byte)
    return ((out_PK >> (starts_K % 8).astype(np.uint32)) & np.uint32((1 << bits) - 1)).astype(np.int32)


class MegatronFiles(IterableDataset):
    """Batches in the order of the tar; each worker takes every so-manieth."""

    def __init__(self, path: Path, num_classes: int, k: int) -> None:
        self._path, self._bits, self._k = path, (num_classes - 1).bit_length(), k

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        worker, zstd = torch.utils.data.get_worker_info(), Zstd()
        step, mine = (worker.num_workers, worker.id) if worker else (1, 0)
        with tarfile.open(self._path) as tar:
            for number, entry in enumerate(tar):
                if number % step != mine:
                    continue
                file = tar.extractfile(entry)
                assert file is not None
                batch = torch.load(io.BytesIO(zstd.decode(file.read())), weights_only=False)
                ids = torch.from_numpy(unpack_ids(batch["ids"].numpy(), self._bits, self._k))
                yield batch["samples"], ids, batch["log_probs"]


# -- DistillKit --------------------------------------------------------------------------------------------


def write_distillkit(cache: Cache, path: Path, num_samples: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = DistillKit(cache.num_classes, cache.manifest.build_codec().k)
    schema = pa.schema([("labels", pa.list_(pa.list_(pa.uint8())))])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for samples, ids_PK, log_probs_PK in _parts(cache, num_samples, 64):
            records_PR = layout.records(ids_PK, log_probs_PK)
            size = records_PR.shape[1]
            rows = pa.ListArray.from_arrays(
                np.arange(0, records_PR.size + 1, size, dtype=np.int32), pa.array(records_PR.reshape(-1))
            )
            ends = np.cumsum(np.concatenate([[0], cache.rows.counts(samples)])).astype(np.int32)
            writer.write_table(pa.table([pa.ListArray.from_arrays(ends, rows)], schema=schema))


class DistillKitFiles(Dataset):
    """Map-style, a sample of many positions at a time; the table is read whole by each process, which favours it."""

    def __init__(self, path: Path, num_classes: int, k: int, num_samples: int) -> None:
        self._path, self._layout, self._num_samples = path, DistillKit(num_classes, k), num_samples
        self._table: Any = None

    def __len__(self) -> int:
        return self._num_samples

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}

    def __getitem__(self, sample: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        if self._table is None:
            self._table = pq.read_table(self._path).combine_chunks()
        (row,) = self._table["labels"].slice(sample, 1).to_pylist()
        ids_PK, log_probs_PK = self._layout.unpack_records(np.array(row, np.uint8))
        return sample, torch.from_numpy(ids_PK), torch.from_numpy(log_probs_PK)
